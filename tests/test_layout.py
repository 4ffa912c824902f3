"""The house rules that can be read off the source: import direction, private torch names, sizes, file names.

Nothing is imported. Every check takes source text or paths, and has a planted fault at the end of this file.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 80

EVERYTHING = frozenset({"*"})
BASE = frozenset({"errors", "plan", "compat"})

# layer -> the layers of fxzero it may import, beside itself (kernels: not even itself). A layer is the first
# name below `fxzero`; "fxzero" is the package's own __init__.
ALLOWED_IMPORTS: dict[str, frozenset[str]] = {
    "fxzero": EVERYTHING,
    "errors": frozenset(),
    "compat": frozenset({"errors"}),
    "compat_inductor": frozenset({"errors"}),
    "compat_dynamo": frozenset({"errors"}),
    "compat_distributed": frozenset({"errors"}),
    "compat_sharding": frozenset({"errors"}),
    "integer_program": frozenset(),
    "plan_values": frozenset({"errors"}),
    "plan_buckets": frozenset({"errors"}),
    "plan_compression": frozenset({"errors"}),
    "plan_cuda_graph": frozenset({"errors", "plan_values"}),
    "plan_mesh": frozenset({"errors", "plan_values"}),
    "plan_offload": frozenset({"errors"}),
    "plan_precision": frozenset({"errors"}),
    "plan_schedule": frozenset({"errors", "plan_values"}),
    "plan_tp": frozenset({"errors", "plan_values"}),
    "plan": frozenset({"errors", "compat", "plan_values", "plan_buckets", "plan_compression", "plan_mesh"})
    | {"plan_cuda_graph", "plan_offload", "plan_precision", "plan_schedule", "plan_tp"},
    "arguments": frozenset({"errors"}),
    "graph": BASE | {"kernels"},
    "capture": BASE | {"graph"},
    "cost": BASE | {"graph"},
    "simulate": BASE | {"graph", "cost", "schedule"},
    "schedule": BASE | {"graph", "cost"},
    "sharding": BASE | {"plan_tp", "plan_values", "compat_sharding", "graph", "cost", "integer_program"},
    "passes": BASE | {"graph", "cost", "schedule", "sharding", "kernels"},
    "pass_manager": BASE | {"graph"},
    "recipe": BASE
    | {"plan_buckets", "plan_compression", "plan_offload", "plan_values", "graph", "capture", "cost", "passes"}
    | {"pass_manager", "split_recipe"},
    "split_recipe": BASE | {"graph", "passes"},
    "decide": BASE
    | {"plan_buckets", "plan_offload", "graph", "cost", "passes", "pass_manager", "recipe", "integer_program"},
    "kernels": frozenset(),
    "lower": BASE | {"compat_inductor", "graph", "kernels"},
    "runtime": BASE | {"compat_distributed", "plan_offload", "graph", "kernels", "capture", "lower"},
    "calibrate": BASE | {"graph", "cost", "simulate", "runtime"},
    "report": BASE | {"graph", "cost", "simulate", "pass_manager", "decide", "lower"},
    "programs": BASE | {"graph", "capture", "cost", "decide", "lower", "pass_manager", "runtime", "sharding"},
    "step_source": BASE | {"graph", "lower", "runtime"},
    "readable": BASE | {"graph", "programs", "report", "runtime", "step_source"},
    "profile": BASE | {"graph", "cost", "simulate", "runtime"},
    "compile": EVERYTHING,
    "backend": EVERYTHING,
    "cli": EVERYTHING,
}
# what runs anywhere, what knows other ranks, and torch's compiler: its back end and its front end
PRIVATE_NAMES_LIVE_IN = tuple(
    f"fxzero.compat{part}" for part in ("", "_distributed", "_inductor", "_dynamo", "_sharding")
)
KERNELS_MAY_IMPORT = frozenset({"torch", "triton"}) | sys.stdlib_module_names
SHARED_BY_KERNELS = frozenset(  # no op is defined there
    f"fxzero.kernels.{name}" for name in ("launch", "multi_tensor", "region_functions", "region_ops", "region_tiles")
)

# Underscored, yet public: the namespace of torch's functional collectives.
PUBLIC_TORCH_NAMES = ("torch.ops._c10d_functional", "torch.ops.aten")
BANNED_STEMS = ("utils", "helpers")


def module_name(path: Path, *, root: Path = ROOT) -> str:
    """The dotted name a file is imported by; passes/ and kernels/ lie below fxzero."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] in ("passes", "kernels"):
        parts.insert(0, "fxzero")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def python_files(*folders: str) -> list[Path]:
    """Every Python file below these folders of the checkout, once: symlinked folders are left out."""
    below = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in below if path.resolve() == path)


def layer_of(module: str) -> str:
    """The row of ALLOWED_IMPORTS for a dotted name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imported_names(tree: ast.AST, *, module: str, is_package: bool) -> Iterator[tuple[int, str, str]]:
    """(line, absolute dotted name, local name) for every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                yield node.lineno, alias.name, local
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                source = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{source}.{alias.name}", alias.asname or alias.name


def import_faults(source: str, *, module: str, is_package: bool = False) -> list[str]:
    """Imports that point the wrong way, and modules the table does not know."""
    layer = layer_of(module)
    if layer not in ALLOWED_IMPORTS:
        return [f"{module}: layer {layer!r} is not in ALLOWED_IMPORTS: add it, with what it may import"]
    faults = []
    for line, name, _ in imported_names(ast.parse(source), module=module, is_package=is_package):
        top = name.split(".")[0]
        shared = ".".join(name.split(".")[:3]) in SHARED_BY_KERNELS
        if layer == "kernels" and top not in KERNELS_MAY_IMPORT and not shared:
            expected = "only torch, triton, the stdlib and what kernels share"
            faults.append(f"{module}:{line}: kernels imports {name}, expected {expected}")
        if layer == "kernels":
            continue
        if top in ("passes", "kernels"):
            faults.append(f"{module}:{line}: imports {name}, expected fxzero.{name}")
            continue
        if top != "fxzero":
            continue
        target = layer_of(name)
        if target not in ALLOWED_IMPORTS:
            target = "fxzero"  # `from fxzero import Plan`: a name that the package's __init__ gathers
        allowed = ALLOWED_IMPORTS[layer]
        if target != layer and target not in allowed and allowed != EVERYTHING:
            expected = ", ".join(sorted(allowed | {layer}))
            faults.append(f"{module}:{line}: {layer} imports {name}, expected one of: {expected}")
    return faults


def private_part(dotted: str) -> str | None:
    """The first underscored part of a name below torch, or None. Dunder names are public."""
    if any(f"{dotted}.".startswith(f"{public}.") for public in PUBLIC_TORCH_NAMES):
        return None
    top, *parts = dotted.split(".")
    if top != "torch":
        return None
    return next((part for part in parts if part.startswith("_") and not part.endswith("__")), None)


def dotted_name(node: ast.expr, names: dict[str, str]) -> str | None:
    """`a.b.c` for an attribute chain whose root is an imported name (resolved through `names`), else None."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([names[node.id], *reversed(parts)])


def private_torch_faults(source: str, *, module: str) -> list[str]:
    """Imports of, and dotted expressions that reach, an underscored name of torch outside fxzero.compat."""
    if module in PRIVATE_NAMES_LIVE_IN:
        return []
    tree = ast.parse(source)
    found: set[tuple[int, str]] = set()
    names = {"torch": "torch"}
    for line, name, local in imported_names(tree, module=module, is_package=False):
        if private_part(name):
            found.add((line, name))
            continue  # one fault for the import, none for each use
        if name.split(".")[0] == "torch":
            names[local] = "torch" if local == "torch" else name
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        name = dotted_name(node, names)
        if name and private_part(name) == node.attr:
            found.add((node.lineno, name))
    return [f"{module}:{line}: {name} is private, expected a function of fxzero.compat" for line, name in sorted(found)]


def size_faults(source: str, *, module: str) -> list[str]:
    """Modules and functions that are too long to be read at once."""
    faults = []
    num_lines = len(source.splitlines())
    if num_lines > MAX_MODULE_LINES:
        faults.append(f"{module}: {num_lines} lines, expected at most {MAX_MODULE_LINES}: split it by concept")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            where = f"{module}:{node.lineno}: {node.name}"
            faults.append(f"{where}: {num_lines} lines, expected at most {MAX_FUNCTION_LINES}")
    return faults


def name_faults(paths: list[Path]) -> list[str]:
    """Files and folders that are named for nothing in particular."""
    faults = []
    for path in paths:
        stems = [*path.parts[:-1], path.stem]
        if any(stem in BANNED_STEMS or stem.endswith("_v2") for stem in stems):
            faults.append(f"{path}: expected a name that says the concept, not {', '.join(BANNED_STEMS)} or *_v2")
    return faults


CHECKED = python_files("fxzero", "passes", "kernels")
SIZED = python_files("fxzero", "passes")
NAMED = python_files("fxzero", "passes", "kernels", "tests", "examples")


def report(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


def test_the_checks_see_the_sources_once() -> None:
    names = [module_name(path) for path in CHECKED]
    assert {"fxzero", "fxzero.errors", "fxzero.passes"} <= set(names)
    assert len(names) == len(set(names))


def test_imports_point_one_way() -> None:
    report(
        [
            fault
            for path in CHECKED
            for fault in import_faults(path.read_text(), module=module_name(path), is_package=path.stem == "__init__")
        ]
    )


def test_private_torch_names_live_in_compat() -> None:
    report([fault for path in CHECKED for fault in private_torch_faults(path.read_text(), module=module_name(path))])


def test_modules_and_functions_are_short() -> None:
    report([fault for path in SIZED for fault in size_faults(path.read_text(), module=module_name(path))])


def test_files_are_named_for_a_concept() -> None:
    report(name_faults([path.relative_to(ROOT) for path in NAMED]))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fxzero.graph.edit", "from fxzero.passes import shard_parameters"),
        ("fxzero.graph.edit", "from fxzero import passes"),
        ("fxzero.graph.edit", "from ..passes import shard_parameters"),
        ("fxzero.graph.edit", "def f():\n    import fxzero.runtime.executor"),
        ("fxzero.graph.edit", "import fxzero"),
        ("fxzero.graph.edit", "from fxzero import compile"),
        ("fxzero.cost.memory", "from fxzero.simulate import timeline"),
        ("fxzero.capture.trace", "from fxzero.cost import memory"),
        ("fxzero.passes.release", "from fxzero.runtime import executor"),
        ("fxzero.passes.release", "from fxzero.pass_manager import run"),
        ("fxzero.passes.release", "import passes.bucket_all_gathers"),
        ("fxzero.pass_manager", "import fxzero.passes.bucket_all_gathers as bucket"),
        ("fxzero.recipe", "from fxzero.runtime import executor"),
        ("fxzero.recipe", "from fxzero.decide import decide"),
        ("fxzero.decide.decision", "from fxzero.compile import TrainStep"),
        ("fxzero.runtime.executor", "from fxzero.cost import memory"),
        ("fxzero.runtime.executor", "from ..recipe import recipe"),
        ("fxzero.compat", "from fxzero.plan import Plan"),
        ("fxzero.errors", "from fxzero.plan import Plan"),
        ("fxzero.kernels.adamw", "from fxzero.errors import PlanError"),
        ("fxzero.kernels.adamw", "from . import rmsnorm"),
        ("fxzero.kernels.adamw", "from fxzero.kernels import sgd"),
        ("fxzero.kernels.adamw", "from fxzero.graph import launch"),
        ("fxzero.kernels.adamw", "import numpy"),
        ("fxzero.unheard_of", ""),
    ],
)
def test_an_import_that_points_the_wrong_way_is_found(module: str, source: str) -> None:
    assert len(import_faults(source, module=module)) == 1


def test_a_relative_import_in_a_package_is_resolved_from_the_package() -> None:
    assert import_faults("from . import edit", module="fxzero.graph", is_package=True) == []
    assert len(import_faults("from .. import passes", module="fxzero.graph", is_package=True)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "fxzero.graph.edit",
            "import torch\nfrom fxzero.graph import text\nfrom fxzero import compat\nfrom . import text",
        ),
        (
            "fxzero.passes.release",
            "from fxzero.cost import memory\nfrom ..graph.edit import erase\nimport networkx",
        ),
        ("fxzero.runtime.executor", "from fxzero.kernels import adamw"),
        ("fxzero.kernels.adamw", "import math\nimport torch.library\nimport triton.language as tl"),
        ("fxzero.kernels.adamw", "from fxzero.kernels import launch\nfrom .multi_tensor import place"),
        ("fxzero.cli.main", "from fxzero import compile\nfrom fxzero.simulate import timeline"),
    ],
)
def test_an_import_that_points_the_right_way_is_not(module: str, source: str) -> None:
    assert import_faults(source, module=module) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch._inductor",
        "import torch.distributed._local_tensor as local",
        "from torch._guards import TracingContext",
        "from torch.distributed.tensor._ops import rules",
        "from torch.fx.graph import _format_target",
        "from torch.utils import _pytree as pytree\npytree.tree_map",
        "import torch\ntorch._C._cuda_init()",
        "import torch\ntorch.utils._pytree.tree_map(f, x)",
        "import torch\ndef f():\n    return torch.Tensor._make_subclass(1)[0]",
        "import torch.distributed as dist\ndist._functional",
        "from torch import fx\nfx.Graph._codegen",
        "from torch import ops\nops._caffe2",
        "import torch\ntorch.ops._c10d_functional_autograd",
    ],
)
def test_a_private_torch_name_is_found(source: str) -> None:
    assert len(private_torch_faults(source, module="fxzero.graph.edit")) == 1
    assert private_torch_faults(source, module="fxzero.compat") == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.ops._c10d_functional.wait_tensor.default",
        "from torch import ops\nops._c10d_functional.all_reduce",
        "import torch\ntorch.__version__",
        "from torch import __version__",
        "from mylib import _private\nself._field",
        "from fxzero.graph import _c10d",
    ],
)
def test_a_public_name_is_not_taken_for_a_private_one(source: str) -> None:
    assert private_torch_faults(source, module="fxzero.graph.edit") == []


def test_a_long_module_is_found() -> None:
    assert size_faults("x = 1\n" * MAX_MODULE_LINES, module="m") == []
    assert len(size_faults("x = 1\n" * (MAX_MODULE_LINES + 1), module="m")) == 1


@pytest.mark.parametrize("head", ["def f():\n", "async def f():\n", "class A:\n  def f(self):\n"])
def test_a_long_function_is_found(head: str) -> None:
    assert size_faults(head + "    x = 1\n" * (MAX_FUNCTION_LINES - 1), module="m") == []
    assert len(size_faults(head + "    x = 1\n" * MAX_FUNCTION_LINES, module="m")) == 1


@pytest.mark.parametrize(
    "path", ["fxzero/utils.py", "passes/helpers.py", "fxzero/graph/edit_v2.py", "fxzero/utils/text.py"]
)
def test_a_file_named_for_nothing_is_found(path: str) -> None:
    assert len(name_faults([Path(path), Path("fxzero/compile.py")])) == 1
