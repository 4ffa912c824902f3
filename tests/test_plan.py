"""The plan: defaults, every error path by its message, immutability, round trips through dict, TOML, JSON."""

import copy
import dataclasses
import importlib
import inspect
import json
import math
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxzero.errors import FxzeroError, PlanError
from fxzero.plan import Plan
from fxzero.plan_mesh import AXES, RESERVED_AXES, Mesh

DOC = Path(__file__).resolve().parent.parent / "docs" / "plan.md"
ACTIVE = dataclasses.fields(Plan)

SIZES = st.integers(1, 2**20)
MESHES = st.none() | st.permutations(AXES + RESERVED_AXES).flatmap(
    lambda order: st.lists(st.sampled_from(order), min_size=1, unique=True).flatmap(
        lambda axes: st.fixed_dictionaries({a: SIZES if a in AXES else st.just(1) for a in axes})
    )
)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,15}", fullmatch=True)
PATTERNS = st.sampled_from(["layers.*.q_proj", 'a"b\\c', "", "[!x].gl\u00fc\U0001f600", "up"])
KEYS = {
    "mesh": MESHES,
    "zero": st.integers(0, 3),
    "bucket_bytes": st.none() | st.just("auto") | st.integers(0, 2**63 - 1),
    "regather": st.sampled_from([None, True, False, "auto"]),
    "persist_below": st.integers(0, 2**63 - 1),
    "prefetch": st.integers(0, 2**63 - 1),
    "cross_step": st.just(False),
    "tp": st.just("auto") | st.dictionaries(PATTERNS, st.sampled_from(["colwise", "rowwise_rep", "local"]), max_size=3),
    "tp_strict": st.booleans(),
    "tp_chunks": st.integers(1, 64) | st.just("auto"),
    "sp_attention": st.sampled_from(["auto", "heads", "gather", "ring"]),
    "expert_room": st.just("all") | st.floats(1, 1e6),
    "all_gather": st.sampled_from(["auto", "native", "send_recv", "shared_memory"]),
    "reduce_scatter": st.sampled_from(["auto", "native", "send_recv", "shared_memory", "all_to_all"]),
    "bucket_form": st.sampled_from(["auto", "coalesced", "separate"]),
    "lowering": st.sampled_from(["auto", "eager", "inductor", "triton"]),
    "eager_fallback": st.booleans(),
    "cuda_graph": st.just(False),
    "dynamic": st.sampled_from(["auto", True, False]),
    "precision": st.sampled_from(["fp32", "bf16", "fp16", "autocast:bf16", "autocast:fp16"]),
    "reduce_dtype": st.sampled_from(["fp32", "bf16", "fp16"]),
    "keep_fp32": st.lists(st.sampled_from(["*.norm", "head", "layers.[01].*"]), max_size=3),
    "clip_grad_norm": st.none() | st.floats(1e-9, 1e9),
    "clip_grad_norm_p": st.floats(1e-3, 1e3) | st.just("inf") | st.just(math.inf),
    "clip_grad_value": st.none() | st.floats(1e-9, 1e9),
    "compress_gathers": st.sampled_from(["none", "int8", "fp8", "fp8_rows"]),
    "compress_reductions": st.sampled_from(["none", "int8", "fp8", "powersgd", "topk"]),
    "powersgd_rank": st.integers(1, 2**20),
    "topk_fraction": st.floats(1e-6, 1.0),
    "node_size": st.sampled_from([0, 2, 8]),
    "compress_block": st.integers(16, 2**20),
    "compress_below": st.integers(0, 2**63 - 1),
    "loss_scale": st.none() | st.just("dynamic") | st.floats(1e-9, 1e9),
    "loss_scale_init": st.floats(1e-9, 1e9),
    "loss_scale_growth_interval": st.integers(1, 10**6),
    "max_skipped_steps": st.integers(1, 10**6),
    "accumulate": st.integers(1, 10**6),
    "accumulate_in": st.sampled_from(["shards", "unsharded"]),
    "recompute": st.sampled_from(["none", "blocks", "auto", 0.5, 1, ["layers.*"], ["b", "a"]]),
    "chunk_loss": st.none() | st.just("auto") | st.integers(1, 2**20),
    "kernels": st.booleans() | st.lists(st.sampled_from(["adamw", "sgd"]), max_size=3),
    "memory_budget": st.none() | st.integers(1, 2**63 - 1),
    "offload_optimizer": st.sampled_from(["none", "host", "nvme", "auto"]),
    "offload_parameters": st.sampled_from(["none", "host", "nvme", "auto"]),
    "offload_activations": st.sampled_from(["none", "host", "nvme", "auto"]),
    "offload_below": st.integers(0, 2**63 - 1),
    "update_on_host": st.floats(0, 1) | st.just("auto"),
    "host_budget": st.none() | st.integers(1, 2**63 - 1),
    "offload_dir": st.none() | st.just("/scratch"),
    "offload_io": st.sampled_from(["direct", "buffered"]),
    "offload_buffer_bytes": st.integers(0, 2**63 - 1),
    "schedule": st.sampled_from(["fixed", "cost"]),
    "hardware": st.sampled_from(["auto", "h100", "machines/own.toml"]),
    "costs": st.none(),
    "costs_of_any_machine": st.just(False),
    "disable": st.lists(NAMES, max_size=5),
    "timeout_s": st.floats(0, 86_400, exclude_min=True) | st.integers(1, 86_400),
}


def _consistent(keys: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that another precision or compression does not take, and with what a precision needs."""
    precision = keys.get("precision", "fp32")
    if precision.endswith("fp16") and keys.get("loss_scale") is None:
        keys = {**keys, "loss_scale": "dynamic"}
    if precision not in ("bf16", "fp16"):
        keys = {key: value for key, value in keys.items() if key not in ("reduce_dtype", "keep_fp32")}
    elif keys.get("reduce_dtype") not in (None, "fp32", precision):
        keys = {**keys, "reduce_dtype": precision}
    if {"tp", "sp"}.isdisjoint(keys.get("mesh") or {}):
        keys = {key: value for key, value in keys.items() if key != "tp_chunks"}
    return _offloading_what_can_be(_compressing_what_can_be(keys))


def _offloading_what_can_be(keys: dict[str, Any]) -> dict[str, Any]:
    where = {keys.get(f"offload_{part}", "none") for part in ("optimizer", "parameters", "activations")}
    if "auto" in where:
        keys = {**keys, "memory_budget": keys.get("memory_budget") or 2**30}
    if keys.get("offload_activations") == "auto":
        keys = {**keys, "recompute": "auto"}
    unread = [] if where != {"none"} else ["offload_below"]
    unread += [] if where & {"nvme", "auto"} else ["offload_dir"]
    files = "nvme" in where or ("auto" in where and keys.get("offload_dir") is not None)
    unread += [] if files else ["offload_io", "offload_buffer_bytes"]
    unread += [] if where & {"host", "auto"} else ["host_budget"]
    taken = {"host": (0.0, 0.5, 1.0, "auto"), "auto": (0.0, "auto")}.get(keys.get("offload_optimizer", "none"), (0.0,))
    unread += [] if keys.get("update_on_host", 0.0) in taken else ["update_on_host"]
    return {key: value for key, value in keys.items() if key not in unread}


def _compressing_what_can_be(keys: dict[str, Any]) -> dict[str, Any]:
    keys, stage, mesh = dict(keys), keys.get("zero", 3), keys.get("mesh") or {}
    if stage < (1 if keys.get("precision") in ("bf16", "fp16") else 3):
        keys.pop("compress_gathers", None)
    size = mesh.get("dp", 1)
    if stage != 3 or (size > 1 and (size % (keys.get("node_size") or 1) or keys.get("node_size", 0) >= size)):
        keys.pop("node_size", None)
    if stage != 3:
        keys.pop("regather", None)
    gathers, reductions = keys.get("compress_gathers", "none"), keys.get("compress_reductions", "none")
    scaled = keys.get("loss_scale") is not None and reductions in ("powersgd", "topk")
    kept_split = max(mesh.get(axis, 1) for axis in ("tp", "sp", "ep")) > 1 and reductions in ("powersgd", "topk")
    refused = scaled or kept_split or mesh.get("dp_replicate", 1) > 1
    if (stage < 2 and reductions in ("int8", "fp8")) or refused:
        keys.pop("compress_reductions", None)
        reductions = "none"
    for name, key in (("powersgd", "powersgd_rank"), ("topk", "topk_fraction")):
        if reductions != name:
            keys.pop(key, None)
    if not {"int8", "fp8"} & {gathers, reductions}:
        keys.pop("compress_block", None)
    if gathers == reductions == "none":
        keys.pop("compress_below", None)
    if keys.get("memory_budget") is None and keys.get("recompute") == "auto":
        keys.pop("recompute")
    return keys


PLANS = st.fixed_dictionaries({}, optional=KEYS).map(_consistent).map(Plan.from_dict)
quick = settings(deadline=None)


def message(make: Callable[[], object]) -> str:
    """The one line of the PlanError that `make` raises."""
    with pytest.raises(PlanError) as info:
        make()
    text = str(info.value)
    assert "\n" not in text and isinstance(info.value, FxzeroError)
    assert re.fullmatch(r".+: expected .+, got .+; .+", text)
    return text


# Defaults, and what a plan is


def test_defaults() -> None:
    assert Plan().to_dict() == {
        "mesh": None,
        "zero": 3,
        "bucket_bytes": None,
        "regather": None,
        "persist_below": 0,
        "prefetch": 1,
        "cross_step": False,
        "tp": "auto",
        "tp_strict": False,
        "tp_chunks": 1,
        "sp_attention": "auto",
        "expert_room": "all",
        "all_gather": "auto",
        "reduce_scatter": "auto",
        "bucket_form": "auto",
        "lowering": "auto",
        "eager_fallback": False,
        "cuda_graph": False,
        "dynamic": "auto",
        "precision": "fp32",
        "reduce_dtype": "fp32",
        "keep_fp32": [],
        "clip_grad_norm": None,
        "clip_grad_norm_p": 2.0,
        "clip_grad_value": None,
        "compress_gathers": "none",
        "compress_reductions": "none",
        "compress_block": 256,
        "compress_below": 4096,
        "powersgd_rank": 4,
        "topk_fraction": 0.01,
        "node_size": 0,
        "loss_scale": None,
        "loss_scale_init": 65536.0,
        "loss_scale_growth_interval": 2000,
        "max_skipped_steps": 20,
        "accumulate": 1,
        "accumulate_in": "shards",
        "recompute": "none",
        "chunk_loss": None,
        "kernels": False,
        "memory_budget": None,
        "offload_optimizer": "none",
        "offload_parameters": "none",
        "offload_activations": "none",
        "offload_below": 4096,
        "update_on_host": 0.0,
        "host_budget": None,
        "offload_dir": None,
        "offload_io": "direct",
        "offload_buffer_bytes": 33554432,
        "schedule": "fixed",
        "hardware": "auto",
        "costs": None,
        "costs_of_any_machine": False,
        "disable": [],
        "timeout_s": 60.0,
    }


def test_hypothesis_builds_every_active_key() -> None:
    assert set(KEYS) == {f.name for f in ACTIVE}


def test_docs_list_every_key_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .+? \| `(.+?)` \| .+ \|$", DOC.read_text("utf-8"), re.MULTILINE)
    defaults = {name: default.replace('"', "'") for name, default in rows}
    assert defaults == {f.name: repr(f.default) for f in dataclasses.fields(Plan)}


def test_docs_example_is_the_same_plan_in_python_and_toml() -> None:
    text = DOC.read_text("utf-8")
    toml = re.search(r"```toml\n(.+?)```", text, re.DOTALL)
    assert toml is not None
    assert Plan.from_toml(toml[1]) == Plan(mesh={"dp_replicate": 2, "dp": 4}, bucket_bytes=8 * 2**20)


def test_the_signature_shows_keys_and_defaults() -> None:
    parameters = inspect.signature(Plan).parameters
    assert list(parameters) == [f.name for f in dataclasses.fields(Plan)]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    assert parameters["zero"].default == 3


def test_a_plan_is_frozen() -> None:
    plan = Plan(mesh={"dp": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.zero = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.mesh["dp"] = 3  # type: ignore[index]


def test_the_plan_does_not_share_the_callers_objects() -> None:
    mesh, disable = {"dp": 2}, ["b", "a"]
    plan = Plan(mesh=mesh, disable=disable)  # type: ignore[arg-type]
    mesh["dp"] = 3
    disable.append("c")
    assert plan.axes == {"dp": 2} and plan.disable == ("a", "b")
    plan.axes["dp"] = 5
    assert plan.axes == {"dp": 2}


@given(PLANS, PLANS)
@quick
def test_equal_plans_and_only_they_have_equal_hash_and_fingerprint(a: Plan, b: Plan) -> None:
    twin = Plan.from_dict(a.to_dict())
    assert twin == a and hash(twin) == hash(a) and twin.fingerprint() == a.fingerprint()
    assert (a == b) == (a.fingerprint() == b.fingerprint())


def test_mesh_order_is_part_of_plan_and_fingerprint() -> None:
    a, b = Plan(mesh={"dp_replicate": 2, "dp": 4}), Plan(mesh={"dp": 4, "dp_replicate": 2})
    assert a != b and a.fingerprint() != b.fingerprint()
    assert list(a.axes) == ["dp_replicate", "dp"]


def test_the_order_and_doubles_of_disabled_passes_do_not_count() -> None:
    twins = [Plan(disable=("a", "b")), Plan(disable=("b", "a", "b")), Plan(disable={"a", "b"})]  # type: ignore[arg-type]
    assert twins[0] == twins[1] == twins[2] and len({p.fingerprint() for p in twins}) == 1


@given(PLANS)
@quick
def test_a_fingerprint_is_one_line_of_json(plan: Plan) -> None:
    assert "\n" not in plan.fingerprint()
    assert set(json.loads(plan.fingerprint())) == {f.name for f in ACTIVE}


@given(PLANS)
@quick
def test_a_plan_survives_pickle_copy_and_asdict(plan: Plan) -> None:
    assert pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan) == copy.copy(plan) == plan
    assert dataclasses.asdict(plan)["mesh"] == plan.mesh


def test_repr_shows_what_is_built_and_reads_back() -> None:
    plan = Plan(mesh={"dp_replicate": 2, "dp": 4}, disable=("a",))
    assert "mesh=Mesh(dp_replicate=2, dp=4)" in repr(plan)
    assert eval(repr(plan), {"Plan": Plan, "Mesh": Mesh}) == plan


# Mesh


def test_a_mesh_is_a_mapping() -> None:
    mesh = Mesh(dp_replicate=2, dp=4)
    assert isinstance(mesh, Mapping) and dict(mesh) == {"dp_replicate": 2, "dp": 4} and len(mesh) == 2
    assert mesh == {"dp_replicate": 2, "dp": 4} and {"dp_replicate": 2, "dp": 4} == mesh
    assert mesh != Mesh(dp=4, dp_replicate=2) and mesh != {"dp": 4, "dp_replicate": 2} and mesh != 8
    assert hash(mesh) == hash(Mesh(dp_replicate=2, dp=4))
    assert Plan(mesh=mesh) == Plan(mesh={"dp_replicate": 2, "dp": 4})


def test_a_reserved_axis_may_have_size_one() -> None:
    assert Plan(mesh={"dp": 4, "pp": 1}).resolve(4).axes == {"dp": 4, "pp": 1}


def test_tp_is_an_axis_with_its_ranks_numbered_as_the_mesh_says() -> None:
    assert Plan(mesh={"dp": 2, "tp": 2}).resolve(4).axes == {"dp": 2, "tp": 2}
    assert list(Plan(mesh={"tp": 4}).resolve(4).axes.items()) == [("tp", 4), ("dp", 1)]
    with pytest.raises(PlanError, match="dp=2 x tp=2 = 4; run with world size 4 or set dp=4"):
        Plan(mesh={"dp": 2, "tp": 2}).resolve(8)


def test_resolve_puts_all_ranks_on_dp() -> None:
    assert Plan(zero=1).resolve(8) == Plan(zero=1, mesh={"dp": 8})
    assert Plan().resolve(1).axes == {"dp": 1}


def test_resolve_keeps_the_order_and_is_idempotent() -> None:
    for mesh in ({"dp_replicate": 2, "dp": 4}, {"dp": 4, "dp_replicate": 2}):
        plan = Plan(mesh=mesh).resolve(8)
        assert list(plan.axes.items()) == list(mesh.items())
        assert plan.resolve(8) == plan == Plan(mesh=mesh)


def test_resolve_appends_a_missing_dp_axis() -> None:
    assert list(Plan(mesh={"dp_replicate": 4}).resolve(4).axes.items()) == [("dp_replicate", 4), ("dp", 1)]


@given(PLANS, st.integers(1, 64))
@quick
def test_a_resolved_mesh_has_exactly_the_ranks_or_is_refused(plan: Plan, world_size: int) -> None:
    plan = plan.replace(node_size=0)  # it need not divide any number of ranks
    product = 1
    for size in (plan.mesh or {"dp": world_size}).values():
        product *= size
    if product != world_size:
        assert f"world size {world_size}" in message(lambda: plan.resolve(world_size))
        return
    resolved = plan.resolve(world_size)
    assert "dp" in resolved.axes and resolved.replace(mesh=plan.mesh) == plan


@pytest.mark.parametrize(
    ("mesh", "world_size", "got", "fix"),
    [
        ({"dp": 4}, 8, "got dp=4 = 4;", "run with world size 4 or set dp=8"),
        (
            {"dp_replicate": 2, "dp": 2},
            8,
            "got dp_replicate=2 x dp=2 = 4;",
            "run with world size 4 or set dp=4",
        ),
        (
            {"dp_replicate": 3},
            8,
            "got dp_replicate=3 x dp=1 = 3;",
            "run with world size 3 or change the sizes",
        ),
        ({"dp": 4}, 1, "got dp=4 = 4;", "run with world size 4 or set dp=1"),
    ],
)
def test_a_mesh_of_another_size_is_refused(mesh: dict[str, int], world_size: int, got: str, fix: str) -> None:
    text = message(lambda: Plan(mesh=mesh).resolve(world_size))
    assert text.startswith(f"Plan.mesh: expected axis sizes that multiply to the world size {world_size}, ")
    assert got in text and text.endswith(fix)


@pytest.mark.parametrize("world_size", [0, -1, True, 2.0, "2", None])
def test_a_world_size_is_a_positive_integer(world_size: Any) -> None:
    text = message(lambda: Plan().resolve(world_size))
    assert text.startswith("Plan.resolve(world_size): expected an integer of at least 1, got ")


def test_axes_need_a_mesh() -> None:
    assert message(lambda: Plan().axes) == "Plan.axes: expected a mesh, got None; call plan.resolve first"


# Bad values


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"zero": True}, ["Plan.zero: expected an integer from 0 to 3, got True;", "state (1)"]),
        ({"zero": "3"}, ["Plan.zero: expected an integer from 0 to 3, got '3';"]),
        ({"zero": 4}, ["Plan.zero:", "got 4;"]),
        ({"zero": -1}, ["Plan.zero:", "got -1;"]),
        ({"zero": 3.0}, ["Plan.zero:", "got 3.0;"]),
        ({"zero": None}, ["Plan.zero:", "got None;"]),
        ({"bucket_bytes": -1}, ["Plan.bucket_bytes: expected an integer of at least 0, got -1;", "'4 MiB'"]),
        ({"bucket_bytes": 4e6}, ["Plan.bucket_bytes: expected an integer", "got 4000000.0;"]),
        ({"bucket_bytes": True}, ["Plan.bucket_bytes: expected an integer", "got True;"]),
        ({"bucket_bytes": 2**63}, ["Plan.bucket_bytes: expected an integer", f"got {2**63};"]),
        (
            {"bucket_bytes": "4 Mib"},
            ["Plan.bucket_bytes: expected a number of bytes, got '4 Mib';", "KiB, MiB"],
        ),
        ({"bucket_bytes": "-4 MiB"}, ["got '-4 MiB';"]),
        ({"bucket_bytes": "MiB"}, ["got 'MiB';"]),
        ({"bucket_bytes": ""}, ["got '';"]),
        ({"bucket_bytes": "Auto"}, ["Plan.bucket_bytes: expected a number of bytes, got 'Auto';"]),
        ({"regather": "yes"}, ["Plan.regather: expected True, False, 'auto' or None, got 'yes';"]),
        ({"regather": 1}, ["Plan.regather: expected True, False, 'auto' or None, got 1;"]),
        ({"regather": False, "zero": 2}, ["Plan.regather: expected zero=3 with it, got zero=2;", "leave regather out"]),
        (
            {"bucket_bytes": "1.5 B"},
            ["expected a whole number of bytes below 2**63, got '1.5 B' = 1.5 bytes;"],
        ),
        ({"bucket_bytes": "99999999999 TiB"}, ["expected a whole number of bytes below 2**63"]),
        ({"bucket_bytes": "9" * 5000}, ["got '999", "...;"]),
        (
            {"persist_below": -1},
            ["Plan.persist_below: expected an integer of at least 0, got -1;", "elements"],
        ),
        ({"persist_below": "1 MiB"}, ["Plan.persist_below:", "got '1 MiB';"]),
        ({"prefetch": -1}, ["Plan.prefetch: expected an integer of at least 0, got -1;", "buckets"]),
        ({"prefetch": True}, ["Plan.prefetch:", "got True;"]),
        (
            {"reduce_scatter": "all-to-all"},
            [
                "'native' or 'send_recv' or 'shared_memory' or 'all_to_all', got",
                "did you mean 'all_to_all'?",
            ],
        ),
        ({"reduce_scatter": "ring"}, ["got 'ring'; choose from: auto, native, send_recv, shared_memory, all_to_all"]),
        ({"reduce_scatter": ["auto"]}, ["got ['auto'];"]),
        (
            {"sp_attention": "rings"},
            [
                "Plan.sp_attention: expected 'auto' or 'heads' or 'gather' or 'ring', got 'rings'",
                "did you mean 'ring'?",
            ],
        ),
        (
            {"bucket_form": "packed"},
            ["Plan.bucket_form: expected 'auto' or 'coalesced' or 'separate', got 'packed';"],
        ),
        (
            {"lowering": "jit"},
            ["expected 'auto' or 'eager' or 'inductor' or 'triton', got 'jit'; choose from: auto, eager"],
        ),
        ({"lowering": "Eager"}, ["got 'Eager'; did you mean 'eager'?"]),
        ({"lowering": None}, ["got None; choose from: auto, eager"]),
        ({"dynamic": "yes"}, ["Plan.dynamic: expected True, False or 'auto', got 'yes'; write true, false or 'auto'"]),
        ({"dynamic": 1}, ["got 1;"]),
        (
            {"precision": "fp16"},
            ["Plan.loss_scale: expected one, with precision in fp16, got None; set loss_scale='dynamic'"],
        ),
        ({"precision": "bfloat16"}, ["got 'bfloat16'; did you mean 'bf16'?"]),
        (
            {"reduce_dtype": "bf16"},
            ["Plan.reduce_dtype: expected precision 'bf16' with it, got 'fp32';"],
        ),
        ({"keep_fp32": ["norm"]}, ["Plan.keep_fp32: expected precision 'bf16' with it, got 'fp32';"]),
        ({"keep_fp32": "norm", "precision": "bf16"}, ["Plan.keep_fp32: expected a list of patterns", "got 'norm'"]),
        ({"clip_grad_norm": 0}, ["Plan.clip_grad_norm: expected a finite number above 0, or None, got 0;"]),
        ({"clip_grad_norm": float("inf")}, ["Plan.clip_grad_norm:", "got inf;"]),
        ({"clip_grad_norm": True}, ["Plan.clip_grad_norm:", "got True;"]),
        ({"clip_grad_value": -1.0}, ["Plan.clip_grad_value:", "got -1.0;"]),
        ({"loss_scale": "auto"}, ["Plan.loss_scale: expected 'dynamic', a finite number above 0, or None, got 'auto'"]),
        ({"loss_scale": 0}, ["Plan.loss_scale:", "got 0;"]),
        ({"loss_scale_init": math.inf}, ["Plan.loss_scale_init: expected a finite number above 0, got inf;"]),
        (
            {"recompute": "some"},
            ["Plan.recompute: expected 'none', 'blocks', 'auto', a number above 0 and at most 1, or a list of"],
        ),
        (
            {"recompute": "auto"},
            ["Plan.memory_budget: expected one, with recompute='auto', got None; say how much memory there is"],
        ),
        ({"memory_budget": 0}, ["Plan.memory_budget: expected more than 0 bytes, or None, got 0;"]),
        ({"memory_budget": "20 Gib"}, ["Plan.memory_budget: expected a number of bytes, got '20 Gib';"]),
        ({"recompute": 0}, ["got 0;"]),
        ({"recompute": []}, ["got [];"]),
        ({"recompute": True}, ["got True;"]),
        ({"accumulate": 0}, ["Plan.accumulate: expected an integer of at least 1, got 0;"]),
        ({"accumulate_in": "rows"}, ["Plan.accumulate_in: expected 'shards' or 'unsharded', got 'rows';"]),
        (
            {"reduce_dtype": "fp16", "precision": "bf16"},
            ["Plan.reduce_dtype: expected precision 'fp16' with it, got 'bf16';"],
        ),
        ({"clip_grad_norm_p": 0}, ["Plan.clip_grad_norm_p: expected a number above 0, or 'inf', got 0;"]),
        ({"clip_grad_norm_p": -2}, ["Plan.clip_grad_norm_p:", "got -2;"]),
        ({"clip_grad_norm_p": "max"}, ["Plan.clip_grad_norm_p:", "got 'max';"]),
        ({"compress_gathers": "int4"}, ["Plan.compress_gathers: expected 'none' or 'int8'", "got 'int4'"]),
        (
            {"compress_gathers": "int8", "zero": 2},
            ["Plan.compress_gathers: expected a plan that gathers parameters", "got zero=2, precision='fp32'"],
        ),
        (
            {"compress_gathers": "fp8", "zero": 0, "precision": "bf16"},
            ["Plan.compress_gathers:", "got zero=0, precision='bf16'"],
        ),
        ({"compress_reductions": "int8", "zero": 1}, ["Plan.compress_reductions: expected zero=2 or 3", "got zero=1"]),
        (
            {"compress_reductions": "int8", "mesh": {"dp_replicate": 2, "dp": 2}},
            ["Plan.compress_reductions: expected a mesh without dp_replicate", "got dp_replicate=2;"],
        ),
        (
            {"compress_reductions": "powersgd", "mesh": {"dp": 2, "tp": 2}},
            ["Plan.compress_reductions: expected a mesh without tp with 'powersgd'", "got tp=2;"],
        ),
        (
            {"compress_reductions": "topk", "mesh": {"dp": 2, "tp": 2}},
            ["Plan.compress_reductions: expected a mesh without tp with 'topk'", "got tp=2;"],
        ),
        ({"compress_block": 128}, ["Plan.compress_block: expected compress_gathers or compress_reductions 'int8'"]),
        ({"compress_block": 128, "compress_gathers": "fp8_rows"}, ["Plan.compress_block:", "got none of that;"]),
        ({"compress_block": 8, "compress_gathers": "int8"}, ["Plan.compress_block: expected an integer from 16"]),
        (
            {"compress_reductions": "topk", "loss_scale": "dynamic"},
            ["Plan.compress_reductions: expected no loss_scale with 'topk'", "got loss_scale='dynamic';"],
        ),
        ({"node_size": 2, "zero": 2}, ["Plan.node_size: expected zero=3", "got zero=2;"]),
        ({"node_size": 3, "mesh": {"dp": 4}}, ["Plan.node_size: expected 0, or a divisor of dp=4", "got 3;"]),
        ({"node_size": 4, "mesh": {"dp": 4}}, ["Plan.node_size:", "above 1 and below it, got 4;"]),
        ({"node_size": 1, "mesh": {"dp": 4}}, ["Plan.node_size:", "got 1;"]),
        ({"powersgd_rank": 8}, ["Plan.powersgd_rank: expected compress_reductions 'powersgd' with it"]),
        ({"powersgd_rank": 0, "compress_reductions": "powersgd"}, ["Plan.powersgd_rank: expected an integer from 1"]),
        ({"topk_fraction": 0.5, "compress_reductions": "int8"}, ["Plan.topk_fraction: expected compress_reductions"]),
        ({"topk_fraction": 0.0, "compress_reductions": "topk"}, ["Plan.topk_fraction: expected a number above 0"]),
        ({"topk_fraction": 1.5, "compress_reductions": "topk"}, ["at most 1, got 1.5;"]),
        ({"compress_below": 0}, ["Plan.compress_below: expected compress_gathers or compress_reductions with it"]),
        (
            {"disable": "shard_parameters"},
            ["Plan.disable: expected a list of pass names, got 'shard_parameters';"],
        ),
        (
            {"disable": ["a b"]},
            ["Plan.disable: expected a list of pass names, got ['a b'];", "fxzero passes"],
        ),
        ({"disable": [1]}, ["Plan.disable:", "got [1];"]),
        ({"disable": None}, ["Plan.disable:", "got None;"]),
        ({"disable": ["caf\u00e9"]}, ["Plan.disable:"]),
        ({"schedule": "best"}, ["Plan.schedule:", "got 'best';"]),
        ({"cross_step": 1}, ["Plan.cross_step: expected True or False, got 1;"]),
        (
            {"cross_step": True, "zero": 2},
            ["Plan.cross_step: expected parameters that forward gathers", "got True with"],
        ),
        (
            {"cross_step": True, "compress_gathers": "int8"},
            ["Plan.cross_step: expected compress_gathers='none' with it", "got 'int8'; leave out"],
        ),
        (
            {"cross_step": True, "offload_parameters": "host"},
            ["Plan.cross_step: expected offload_parameters='none' with it", "got 'host'; leave out"],
        ),
        ({"cuda_graph": 1}, ["Plan.cuda_graph: expected True or False, got 1;"]),
        (
            {"cuda_graph": True, "offload_optimizer": "host"},
            ["Plan.cuda_graph: expected offload_optimizer='none' with it: what moves", "got 'host'; leave out"],
        ),
        (
            {"cuda_graph": True, "offload_parameters": "nvme"},
            ["Plan.cuda_graph: expected offload_parameters='none' with it", "got 'nvme'; leave out"],
        ),
        (
            {"cuda_graph": True, "offload_activations": "host"},
            ["Plan.cuda_graph: expected offload_activations='none' with it", "got 'host'; leave out"],
        ),
        ({"cuda_graph": True, "cross_step": True}, ["Plan.cuda_graph: expected cross_step=False with it", "got True"]),
        ({"cuda_graph": True, "expert_room": 2}, ["Plan.cuda_graph: expected expert_room='all' with it", "got 2.0"]),
        ({"expert_room": 0.5}, ["Plan.expert_room: expected a finite number of at least 1, or 'all', got 0.5"]),
        ({"expert_room": True}, ["Plan.expert_room: expected a finite number of at least 1, or 'all', got True"]),
        ({"cuda_graph": True, "accumulate": 2}, ["Plan.cuda_graph: expected accumulate=1 with it", "got 2; leave out"]),
        ({"costs": "costs.json"}, ["Plan.costs: expected schedule='cost' with it, got 'fixed'; set schedule"]),
        ({"costs": 1, "schedule": "cost"}, ["Plan.costs: expected a path, got 1"]),
        ({"costs_of_any_machine": True}, ["Plan.costs_of_any_machine: expected costs with it, got None"]),
        ({"hardware": ""}, ["Plan.hardware: expected the name or path of a machine's description, got '';"]),
        ({"hardware": 1}, ["Plan.hardware:", "got 1;"]),
        ({"timeout_s": 0}, ["Plan.timeout_s: expected seconds, more than 0 and at most 86400, got 0;"]),
        ({"timeout_s": -1.0}, ["Plan.timeout_s:", "got -1.0;"]),
        ({"timeout_s": float("nan")}, ["Plan.timeout_s:", "got nan;"]),
        ({"timeout_s": float("inf")}, ["Plan.timeout_s:", "got inf;"]),
        ({"timeout_s": 10**400}, ["Plan.timeout_s:", "got 1000", "...;"]),
        ({"timeout_s": True}, ["Plan.timeout_s:", "got True;"]),
        ({"timeout_s": "60"}, ["Plan.timeout_s:", "got '60';", "60.0"]),
        ({"mesh": {"dp": 0}}, ["Plan.mesh['dp']: expected an integer of at least 1, got 0;"]),
        ({"mesh": {"dp": -2}}, ["Plan.mesh['dp']:", "got -2;"]),
        ({"mesh": {"dp": "4"}}, ["Plan.mesh['dp']:", "got '4';"]),
        ({"mesh": {"dp": True}}, ["Plan.mesh['dp']:", "got True;"]),
        ({"mesh": {"dp": 2.0}}, ["Plan.mesh['dp']:", "got 2.0;"]),
        ({"mesh": {}}, ["Plan.mesh: expected at least one axis, got none;"]),
        ({"mesh": {"ddp": 2}}, ["Plan.mesh: expected a mesh axis, got 'ddp'; did you mean 'dp'?"]),
        ({"mesh": {"dp": 2, "replicate": 2}}, ["got 'replicate'; did you mean 'dp_replicate'?"]),
        ({"mesh": {"data": 2}}, ["got 'data'; choose from: dp, dp_replicate"]),
        ({"mesh": {"self": 2}}, ["got 'self';"]),
        ({"mesh": {1: 2}}, ["Plan.mesh: expected axis names with their sizes, got {1: 2};"]),
        ({"mesh": 4}, ["Plan.mesh: expected axis names with their sizes, got 4;", "{'dp': 4}"]),
        ({"mesh": [("dp", 4)]}, ["Plan.mesh:", "got [('dp', 4)];"]),
        ({"mesh": "dp=4"}, ["Plan.mesh:", "got 'dp=4';"]),
    ]
    + [({"mesh": {"dp": 2, axis: 2}}, [f"Plan.mesh['{axis}']:", "reserved, not built yet"]) for axis in RESERVED_AXES],
    ids=repr,
)
def test_a_bad_value_is_refused(keys: dict[str, Any], parts: list[str]) -> None:
    text = message(lambda: Plan(**keys))
    assert all(part in text for part in parts), text
    assert message(lambda: Plan.from_dict(keys)) == message(lambda: Plan().replace(**keys)) == text
    assert len(text) < 400


def test_a_foreign_value_shows_its_type() -> None:
    class Four:
        def __repr__(self) -> str:
            return "4\n"

    assert "got 4 (Four);" in re.sub(r"\s+", " ", message(lambda: Plan(zero=Four())))  # type: ignore[arg-type]


# Unknown keys


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("zeros", "did you mean 'zero'?"),
        ("bucket-bytes", "did you mean 'bucket_bytes'?"),
        ("Prefetch", "did you mean 'prefetch'?"),
        ("precison", "did you mean 'precision'?"),
        ("dp", "axes go into the mesh: mesh={'dp': ..}"),
        ("pp", "axes go into the mesh: mesh={'pp': ..}"),
        ("qqq", "choose from: mesh, zero, bucket_bytes"),
        ("self", "choose from: mesh, zero, bucket_bytes"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, fix: str) -> None:
    text = message(lambda: Plan(**{key: 3}))
    assert text.startswith(f"Plan: expected a plan key, got {key!r}; {fix}")
    assert message(lambda: Plan.from_dict({key: 3})) == message(lambda: Plan().replace(**{key: 3})) == text
    assert message(lambda: Plan.from_json(json.dumps({key: 3}))) == f"JSON text: {text}"
    assert message(lambda: Plan.from_toml(f"{key} = 3")) == f"TOML text: {text}"


def test_keys_must_be_named() -> None:
    assert message(lambda: Plan(3)) == "Plan: expected named keys, got 3; write Plan(zero=3)"  # type: ignore[misc]


@pytest.mark.parametrize("values", [None, [1], "zero", {1: 2}, [("zero", 3)]])
def test_from_dict_takes_a_table_of_names(values: Any) -> None:
    assert message(lambda: Plan.from_dict(values)).startswith("Plan: expected a table of keys, got ")


# Bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("25 MiB", 25 * 2**20),
        ("4MB", 4_000_000),
        ("0", 0),
        ("12", 12),
        ("12 B", 12),
        (" 1.5 GiB ", 3 * 2**29),
        ("0.3 MB", 300_000),
        ("64 KiB", 65536),
        ("1 kB", 1000),
        ("1 KB", 1000),
        ("2 TiB", 2**41),
        ("1 GB", 10**9),
        ("1 TB", 10**12),
        (4096, 4096),
        (0, 0),
    ],
)
def test_bytes_are_read_exactly(text: Any, num_bytes: int) -> None:
    plan = Plan(bucket_bytes=text)
    assert plan.bucket_bytes == num_bytes and type(plan.bucket_bytes) is int
    assert plan == Plan(bucket_bytes=num_bytes)


@given(st.integers(0, 2**30), st.sampled_from(["KiB", "MiB", "GiB"]), st.sampled_from(["", " ", "  "]))
@quick
def test_any_whole_number_of_units_is_that_many_bytes(count: int, unit: str, space: str) -> None:
    power = {"KiB": 10, "MiB": 20, "GiB": 30}[unit]
    assert Plan(bucket_bytes=f"{count}{space}{unit}").bucket_bytes == count << power  # type: ignore[arg-type]


@given(st.text(max_size=12))
@quick
def test_any_text_as_bytes_is_a_number_or_a_plan_error(text: str) -> None:
    try:
        found = Plan(bucket_bytes=text).bucket_bytes
        assert found == text == "auto" or (isinstance(found, int) and found >= 0)
    except PlanError as error:
        assert "\n" not in str(error)


# Dict, TOML, JSON


@given(PLANS)
@quick
def test_round_trips(plan: Plan) -> None:
    for again in (
        Plan.from_dict(plan.to_dict()),
        Plan.from_toml(plan.to_toml()),
        Plan.from_json(plan.to_json()),
        Plan(**plan.to_dict()),
    ):
        assert again == plan and again.fingerprint() == plan.fingerprint() and hash(again) == hash(plan)
        assert list((again.mesh or {}).items()) == list((plan.mesh or {}).items())
        assert type(again.timeout_s) is float


def test_to_toml_as_people_read_it() -> None:
    plan = Plan(zero=1, mesh={"dp_replicate": 2, "dp": 4}, disable=("bucket_all_gathers",), timeout_s=30)
    assert plan.to_toml() == (
        "zero = 1\n"
        "persist_below = 0\n"
        "prefetch = 1\n"
        "cross_step = false\n"
        'tp = "auto"\n'
        "tp_strict = false\n"
        "tp_chunks = 1\n"
        'sp_attention = "auto"\n'
        'expert_room = "all"\n'
        'all_gather = "auto"\n'
        'reduce_scatter = "auto"\n'
        'bucket_form = "auto"\n'
        'lowering = "auto"\n'
        "eager_fallback = false\n"
        "cuda_graph = false\n"
        'dynamic = "auto"\n'
        'precision = "fp32"\n'
        'reduce_dtype = "fp32"\n'
        "keep_fp32 = []\n"
        "clip_grad_norm_p = 2.0\n"
        'compress_gathers = "none"\n'
        'compress_reductions = "none"\n'
        "compress_block = 256\n"
        "compress_below = 4096\n"
        "powersgd_rank = 4\n"
        "topk_fraction = 0.01\n"
        "node_size = 0\n"
        "loss_scale_init = 65536.0\n"
        "loss_scale_growth_interval = 2000\n"
        "max_skipped_steps = 20\n"
        "accumulate = 1\n"
        'accumulate_in = "shards"\n'
        'recompute = "none"\n'
        "kernels = false\n"
        'offload_optimizer = "none"\n'
        'offload_parameters = "none"\n'
        'offload_activations = "none"\n'
        "offload_below = 4096\n"
        "update_on_host = 0.0\n"
        'offload_io = "direct"\n'
        "offload_buffer_bytes = 33554432\n"
        'schedule = "fixed"\n'
        'hardware = "auto"\n'
        "costs_of_any_machine = false\n"
        'disable = ["bucket_all_gathers"]\n'
        "timeout_s = 30.0\n"
        "\n"
        "[mesh]\n"
        "dp_replicate = 2\n"
        "dp = 4\n"
    )


def test_the_empty_text_is_the_default_plan() -> None:
    assert Plan.from_toml("") == Plan.from_json("{}") == Plan.from_dict({}) == Plan()


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_files_by_path_string_and_suffix(tmp_path: Path, suffix: str) -> None:
    plan = Plan(zero=2, mesh={"dp": 2}, bucket_bytes=0)
    text = {"toml": plan.to_toml, "json": plan.to_json}[suffix]()
    read = {"toml": Plan.from_toml, "json": Plan.from_json}[suffix]
    path = tmp_path / f"lr=0.1 plan.{suffix}"
    path.write_text(text, encoding="utf-8")
    assert read(path) == read(str(path)) == Plan.load(path) == Plan.load(str(path)) == read(text) == plan
    path.write_text("\ufeff" + text, encoding="utf-8")  # as some editors on Windows save it
    assert Plan.load(path) == plan
    other = tmp_path / "plan.txt"
    other.write_text(text, encoding="utf-8")
    assert read(other) == plan


def test_load_goes_by_suffix(tmp_path: Path) -> None:
    for name in ("plan.yaml", "plan", "plan.TOML"):
        text = message(lambda name=name: Plan.load(tmp_path / name))
        assert text.startswith("Plan.load: expected .toml or .json, got ")


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plan.{suffix}"
    assert message(lambda: Plan.load(path)).startswith(f"{path}: expected a plan in {suffix.upper()}, got [Errno")
    path.write_text("zero 3", encoding="utf-8")
    assert message(lambda: Plan.load(path)).endswith("; correct the file or its path")
    path.write_bytes(b'"\xff"')
    assert "codec can't decode" in message(lambda: Plan.load(path))
    path.unlink()
    path.mkdir()
    with pytest.raises(PlanError) as info:
        Plan.load(path)
    assert isinstance(info.value.__cause__, OSError)


def test_a_bad_value_in_a_file_names_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text("zero = 7\n", encoding="utf-8")
    with pytest.raises(PlanError) as info:
        Plan.load(path)
    assert str(info.value).startswith(f"{path}: Plan.zero: expected an integer from 0 to 3, got 7; ")
    assert isinstance(info.value.__cause__, PlanError) and info.value.where == f"{path}: Plan.zero"


@pytest.mark.parametrize(
    ("read", "text", "part"),
    [
        (Plan.from_toml, "zero = 3 3", "TOML text: expected a plan in TOML, got"),
        (Plan.from_toml, "zero = 3\nzero = 2\n", "TOML text: expected a plan in TOML, got"),
        (Plan.from_toml, "plan.cfg", "pass a path to a .toml"),
        (Plan.from_toml, "zero = 2024-01-01", "TOML text: Plan.zero: expected an integer"),
        (Plan.from_toml, "mesh = 4", "TOML text: Plan.mesh: expected axis names"),
        (Plan.from_toml, "timeout_s = inf", "TOML text: Plan.timeout_s:"),
        (Plan.from_json, "", "JSON text: expected a plan in JSON, got"),
        (Plan.from_json, "[1]", "JSON text: Plan: expected a table of keys, got [1];"),
        (Plan.from_json, '{"zero": 1, "zero": 2}', "got key 'zero' twice;"),
        (Plan.from_json, '{"mesh": {"dp": 1, "dp": 2}}', "got key 'dp' twice;"),
        (Plan.from_json, '{"timeout_s": NaN}', "JSON text: Plan.timeout_s:"),
        (Plan.from_json, "[" * 100_000, "JSON text: expected a plan in JSON, got"),
    ],
    ids=lambda v: v[:20] if isinstance(v, str) else v.__name__,
)
def test_bad_texts(read: Callable[[str], Plan], text: str, part: str) -> None:
    assert part in message(lambda: read(text))


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="reads TOML with tomllib itself")
def test_python_310_reads_toml_with_tomli() -> None:
    pytest.importorskip("tomli")
    assert Plan.from_toml("zero = 1").zero == 1


def test_toml_without_a_reader_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    monkeypatch.setattr(importlib, "import_module", missing)
    text = message(lambda: Plan.from_toml("zero = 1"))
    assert text == "TOML: expected the package tomli, got none; pip install tomli, or write the plan as JSON"
