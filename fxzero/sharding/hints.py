"""From a plan's hints to how the parameters of a model lie over tp; see [Note: hints] in plan_tp.py."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.graph.axis_placement import REPLICATED, Placement, divides, shard
from fxzero.plan import Plan

_WHERE = "Plan.tp"


@dataclass(frozen=True)
class _Parameter:
    """One parameter of a module: its path (of tied ones, each has its own), its module and the module's path."""

    path: str
    value: nn.Parameter
    module: nn.Module
    module_path: str


def pin(step: StepGraph, placements: Mapping[str, Placement], *, axis: str = "tp") -> None:
    """Say in a graph how parameters have to lie over an axis; what was said of it before is forgotten.

    Args:
        step: as captured.
        placements: name of a parameter -> how it has to lie.
        axis: of the mesh.
    """
    for node in step.inputs("parameter"):
        others = {name: lies for name, lies in node.meta.get("pinned", {}).items() if name != axis}
        own = placements.get(node.meta["entry"].name)
        if own is not None and own.is_shard:
            own = shard(own.dim)  # state rests in plain parts, also of what is used in parts of blocks
        node.meta["pinned"] = others if own is None else {**others, axis: own}


def pinned_by(plan: Plan, model: nn.Module) -> dict[str, Placement]:
    """How the parameters of a model lie that the hints of a resolved plan name; see `pinned`."""
    return {} if isinstance(plan.tp, str) else pinned(plan.tp, model, ranks=plan.axes.get("tp", 1))


def pinned(hints: Mapping[str, str], model: nn.Module, *, ranks: int = 1) -> dict[str, Placement]:
    """How the parameters that hints name lie over tp; how others do is not said.

    Args:
        hints: pattern -> word, as `Plan.tp` has them.
        model: the patterns are of its modules' paths and its parameters' names, from their begin or behind any dot.
        ranks: of the axis tp, which divides every size that is split; 1 divides all.

    Returns:
        Name of a parameter, as `model.named_parameters()` has it (of tied ones the first) -> its placement.

    Raises:
        PlanError: a pattern that finds nothing or what its word cannot split, a size that ranks do not divide, or two
            hints that say different things of one parameter.

    Source: `ColwiseParallel` and `RowwiseParallel` of torch.distributed.tensor.parallel for linear layers and
        embeddings; for other parameters, those of transformers.distributed.tensor_parallel.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[str, Placement]] = {}
    for pattern, word in hints.items():
        for parameter in _named_by(pattern, word, model):
            name = names[id(parameter.value)]
            placement = _placement(parameter, pattern, word)
            _check_size(name, parameter, pattern, placement, ranks=ranks)
            other, standing = found.setdefault(name, (pattern, placement))
            if standing != placement:
                expected = "hints that say the same of it"
                got = f"{other!r}: {hints[other]!r} ({standing}) and {pattern!r}: {word!r} ({placement})"
                fix = "leave one of them out, or write a narrower pattern"
                raise PlanError.of(f"{_WHERE}, parameter {name}", expected=expected, got=got, fix=fix)
    return {name: found[name][1] for name in names.values() if name in found}


def _named_by(pattern: str, word: str, model: nn.Module) -> list[_Parameter]:
    """The parameters of a pattern: those of the modules that it finds, and those that it finds themselves."""
    modules = [path for path, _ in model.named_modules(remove_duplicate=False) if _matches(path, pattern)]
    paths = set(modules)
    parameters = list(_parameters(model))
    found = [item for item in parameters if item.module_path in paths or _matches(item.path, pattern)]
    where = f"{_WHERE}[{pattern!r}]"
    if not found and not modules:
        known = [*(item.path for item in parameters), *(path for path, _ in model.named_modules())]
        raise PlanError.of(
            where, expected="a module or a parameter", got="none of that name", fix=_near(pattern, known)
        )
    if not found and word != "replicate":
        inner = next((item.module_path for item in parameters if item.path.startswith(f"{modules[0]}.")), "")
        fix = f"name what is in it, such as {inner!r}" if inner else "leave it out"
        got = f"{type(model.get_submodule(modules[0])).__name__} at {modules[0]!r}, which has none"
        raise PlanError.of(where, expected=f"a module with parameters of its own, for {word!r}", got=got, fix=fix)
    return found


def _parameters(model: nn.Module) -> Iterator[_Parameter]:
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in module.named_parameters(recurse=False, remove_duplicate=False):
            yield _Parameter(f"{path}.{name}" if path else name, value, module, path)


def _matches(path: str, pattern: str) -> bool:
    """Whether a pattern finds a path, from its begin or behind a dot."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def _near(pattern: str, paths: list[str]) -> str:
    """What a pattern may have meant: paths, and what follows their dots, with numbers as patterns have them."""
    general = {re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path) for path in paths}
    endings = {path.split(".", skipped)[-1] for path in general for skipped in range(path.count(".") + 1)}
    close = difflib.get_close_matches(pattern, sorted(endings), n=3)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "write a path as model.named_modules() has it"


def _placement(parameter: _Parameter, pattern: str, word: str) -> Placement:
    """How a parameter lies by a word."""
    value, module = parameter.value, parameter.module
    if word == "replicate":
        return REPLICATED
    is_packed, by_columns = word.startswith("packed_"), word.endswith("colwise")
    is_named = _matches(parameter.path, pattern)
    is_embedding = isinstance(module, nn.Embedding)
    is_linear = hasattr(module, "in_features") and hasattr(module, "out_features")
    is_turned = any(base.__name__ == "Conv1D" for base in type(module).__mro__)  # of transformers: weight [in, out]
    fits = value.dim() and (is_embedding or is_linear or is_turned or is_named)
    if not fits or (is_packed and is_embedding):
        what = "an embedding" if is_embedding else f"{type(module).__name__}.{parameter.path.rpartition('.')[2]}"
        expected = f"a linear layer{'' if is_packed else ', an embedding'} or the name of a parameter, for {word!r}"
        fix = f"write 'replicate', or a hint for {parameter.path!r} itself, with the dim that is meant"
        where = f"{_WHERE}[{pattern!r}], {parameter.path}"
        raise PlanError.of(where, expected=expected, got=f"{what} of shape {tuple(value.shape)}", fix=fix)
    blocks = 2 if is_packed else 1
    if value.dim() == 1:
        is_bias = parameter.path.endswith("bias")
        return REPLICATED if is_bias and not by_columns else shard(0, blocks)
    # the last dim is that of what comes in, and the one before it that of what goes out
    takes_last = by_columns == (is_embedding or is_turned)
    return shard(value.dim() - (1 if takes_last else 2), blocks)


def _check_size(name: str, parameter: _Parameter, pattern: str, placement: Placement, *, ranks: int) -> None:
    shape = tuple(parameter.value.shape)
    if divides(shape, placement, ranks):
        return
    size, step = shape[placement.dim], placement.blocks * ranks
    below = size // step * step
    near = f"{below} or {below + step}" if below else str(below + step)
    in_blocks = f" in {placement.blocks} blocks" if placement.blocks > 1 else ""
    fewer = [n for n in range(2, ranks) if size % (placement.blocks * n) == 0]
    fix = f"pad it, write 'replicate'{f', or set tp={fewer[-1]} in the mesh' if fewer else ''}"
    raise PlanError.of(
        f"{_WHERE}[{pattern!r}], parameter {name}",
        expected=f"a size of dim {placement.dim} that tp={ranks} divides{in_blocks}, such as {near}",
        got=f"{size} of shape {shape}",
        fix=fix,
    )
