"""The plan: what a user asks of the compiler; frozen, checked when made, from and to TOML and JSON.

Each key is declared once, in `Plan`, with its default and the check that its value must pass.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fxzero.errors import PlanError
from fxzero.plan_buckets import check_regather
from fxzero.plan_compression import check_compression
from fxzero.plan_cuda_graph import check_cuda_graph
from fxzero.plan_mesh import AXES, RESERVED_AXES, mesh_of
from fxzero.plan_offload import WHERE, check_offload
from fxzero.plan_precision import check_precision
from fxzero.plan_schedule import check_schedule
from fxzero.plan_tp import MOST_CHUNKS, check_chunks, tp_hints
from fxzero.plan_values import (
    Check,
    always_or_auto,
    boolean,
    bound,
    budget,
    bytes_or_auto,
    finite,
    fraction,
    integer,
    kernel_names,
    name_or_path,
    nearest,
    norm_order,
    number_of_bytes,
    number_or_auto,
    one_of,
    part_or_auto,
    pass_names,
    path,
    patterns,
    recomputed,
    room_or_all,
    rows_or_auto,
    scale,
    seconds,
    show,
    yes_no_or_auto,
)


def _key(default: Any, check: Check) -> Any:
    return dataclasses.field(default=default, metadata={"check": check})


def _refuse_unknown_keys(cls: type[Plan]) -> type[Plan]:
    """Make an unknown keyword a PlanError with the nearest key; a dataclass alone raises TypeError."""
    dataclass_init = cls.__init__
    names = [f.name for f in dataclasses.fields(cls)]

    @functools.wraps(dataclass_init)
    def init(self: Plan, /, *args: Any, **keys: Any) -> None:
        if args:
            raise PlanError.of("Plan", expected="named keys", got=show(args[0]), fix="write Plan(zero=3)")
        for key in [key for key in keys if key not in names]:
            is_axis = key in AXES + RESERVED_AXES
            fix = f"axes go into the mesh: mesh={{{key!r}: ..}}" if is_axis else nearest(key, names)
            raise PlanError.of("Plan", expected="a plan key", got=show(key), fix=fix)
        dataclass_init(self, **keys)

    cls.__init__ = init  # type: ignore[assignment, method-assign]
    return cls


@_refuse_unknown_keys
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the compiler is asked to do with a training step; docs/plan.md has the table of all keys.

    Args:
        mesh: axes of ranks with their sizes, outermost first; None: all ranks on dp. Parameters are sharded
            over dp and replicated over dp_replicate (hybrid sharding); over tp single tensors are split, over sp what
            is made of a batch: its rows, tokens and heads; over ep that, and experts: each rank has some. Ranks that
            differ on tp, sp or ep alone take the same batch.
        zero: 0 replicates everything, 1 shards optimizer state, 2 gradients too, 3 parameters too.
        bucket_bytes: bytes of unsharded parameters or gradients in one coalesced collective; 0: each tensor alone;
            "auto": decided by cost. None: 4 MiB, or "auto" with schedule "cost". Files may write "4 MiB".
        regather: with zero 3, whether backward gathers what forward has: True, False (it stays), "auto" (of each, what
            is faster within the bound on memory); None: True, or "auto" where buckets are, with schedule "cost".
        persist_below: number of elements, of what tp leaves a rank of a parameter, below which dp does not shard it.
        prefetch: how many buckets ahead of its use a gather is launched.
        cross_step: launch the first gathers of the next step at the end of this one.
        tp: which parameters lie how over the axis tp: "auto" (solved for), or hints, which the solver keeps to:
            patterns of module paths with "colwise", "rowwise" or "replicate" each, or styles of torch and transformers.
        tp_strict: an op for which no rule says how it can be split over tp is an error; else it runs on whole values.
        tp_chunks: pieces into which products beside gathers and reduce-scatters of values in parts over tp and sp are
            cut, so that these overlap; "auto": for each, as many as are predicted to be fastest; 1: they stay whole.
        sp_attention: how rows that sp splits on tokens are attended: "heads" (they come to ranks and go back), "gather"
            (all keys to all ranks), "ring" (keys travel), or "auto": what costs least, whole rows where that is less.
        expert_room: for how many rows a rank of ep has room in each mixture of experts: "all" (never too few), or so
            many times as it would have if all experts had equally many; a step in which more come is an error.
        all_gather: "native", "send_recv" (a message to each peer), "shared_memory" (CPU ranks of one host), or "auto":
            over gloo shared_memory where ranks share a host, else send_recv; native elsewhere.
        reduce_scatter: as all_gather; also "all_to_all" (with a local mean that stands in the graph).
        bucket_form: "coalesced" (one collective over several tensors), "separate" (one launch a tensor), or "auto".
        lowering: what runs the compute: "eager" (each op), "inductor" (compiled regions of them), "triton" (a kernel
            for each region of pointwise ops and reductions of rows, all else op by op), or "auto": inductor where its
            compiler is found, eager elsewhere, and with schedule="cost".
        eager_fallback: a region that cannot be compiled runs op by op, and the report counts it; else it is an error.
        cuda_graph: the whole step is captured as one CUDA graph, and replayed at each call.
        dynamic: when sizes of the batch become symbols, for which no new size is traced or compiled: "auto" (those that
            have changed, at their first change), True (from the first batch on), False (never: each is by itself).
        precision: "fp32" (what parameters and batch have), "bf16" or "fp16" (parameters, before any gather, and inputs
            are cast; the update stays in fp32, on the shards), "autocast:bf16" or "autocast:fp16".
        loss_scale: "dynamic" (as by `torch.amp.GradScaler`: halved when a gradient overflows, and that step skipped),
            or a number that stays. Precision in fp16 must say one; 1.0 scales nothing.
        loss_scale_init, loss_scale_growth_interval: the first dynamic scale; so many good steps until it doubles.
        max_skipped_steps: so many skipped steps in a row, with a scale that is or stays small, are an error.
        accumulate: number of microbatches in a step: a list of them, or one batch that is split on dim 0.
        accumulate_in: "shards" (each microbatch's gradients are reduced, and added where they are kept), or "unsharded"
            (they are added up whole on each rank, and reduced once).
        clip_grad_norm: the greatest norm of all gradients together, over all ranks; larger ones are scaled down, as by
            `torch.nn.utils.clip_grad_norm_`. The norm is in `step.metrics["grad_norm"]`.
        clip_grad_norm_p: order of that norm; "inf" or math.inf is the greatest element.
        clip_grad_value: the greatest absolute value of a gradient's element; applied before clip_grad_norm.
        reduce_dtype: with precision "bf16" or "fp16", the dtype in which gradients are reduced: that one, or "fp32".
        keep_fp32: with precision "bf16" or "fp16", patterns of module paths whose parameters are not cast.
        compress_gathers: how gathered parameters travel: "none", "int8" or "fp8" (one byte an element, a scale for each
            `compress_block` of them), "fp8_rows" (a scale a row, on the weights of linear layers only).
        compress_reductions: how gradients travel: "none", "int8" or "fp8" (to the rank that keeps their rows),
            "powersgd" (two factors of `powersgd_rank` columns) or "topk" (the `topk_fraction` of largest elements); the
            last two add what they miss to the next gradient.
        compress_block: elements that share a scale.
        compress_below: parameters with fewer elements travel as they are.
        powersgd_rank: columns of powersgd's factors.
        topk_fraction: of a gradient's elements, how many topk sends.
        node_size: of dp, how many share a node: backward gathers inside it what forward gathered over all; 0: over dp.
        recompute: what backward computes again instead of keeping it: "none" (but cheap pointwise results), "blocks"
            (the inside of each repeated module), a fraction of the blocks (the first), patterns of module paths, or
            "auto": what loses the least time, for a predicted peak within memory_budget.
        chunk_loss: rows whose logits are made at a time; "auto": where that pays, as their size asks; None: all.
        kernels: what runs by one op each: True (updates; on a GPU all), False, or names: "adamw", "rms_norm".
        memory_budget: bytes of device memory that a rank's tensors, state included, may take at the predicted peak.
        offload_optimizer: where optimizer state rests: "none" (on the device), "host" (in host memory), "nvme" (in
            files), or "auto": each where the least time is lost for memory_budget (in files only with offload_dir); it
            comes in for the update of its parameter.
        offload_parameters: where parameters (their rows, where sharded) rest; they come in for each phase.
        offload_activations: where activations wait from forward for backward; with recompute "auto", those that are
            chosen for it.
        offload_below: elements below which a tensor stays on the device.
        update_on_host: the part of the optimizer state on the host (0 to 1, of its bytes) that is updated there, or
            "auto": where that is predicted to be faster.
        host_budget: bytes of host memory that what a rank offloads may take.
        offload_dir: for files: the directory in which each run makes one of its own; None: that for temporary files.
        offload_io: "direct" (past the page cache) or "buffered", for files.
        offload_buffer_bytes: of host memory through which tensors stream to and from files.
        schedule: the order of the program: "fixed" (by rules: prefetch, updates behind their reductions), or "cost" (
            the fastest found by the costs of `hardware`, within memory_budget or, without it, the peak of "fixed").
        hardware: whose costs decide: a name ("h100"), a path to a description, or "auto": the device of the model.
        costs: a file of recorded costs that decide before those of `hardware`; rank 0's counts, on all ranks.
        costs_of_any_machine: take them though they were recorded on another machine.
        disable: names of passes to leave out; kept sorted, since their order means nothing.
        timeout_s: seconds that ranks wait for each other to agree before the first collective.

    Raises:
        PlanError: a key is unknown or its value cannot be honoured. So do all methods that make a plan; those
            that read one also when the source cannot be read or parsed.
    """

    mesh: Mapping[str, int] | None = _key(None, mesh_of)
    zero: int = _key(3, integer(0, 3, fix="shard nothing (0), state (1), gradients too (2), or all (3)"))
    bucket_bytes: int | str | None = _key(None, bytes_or_auto)
    regather: bool | str | None = _key(None, yes_no_or_auto)
    persist_below: int = _key(0, integer(0, fix="write a number of elements; 0 shards every parameter"))
    prefetch: int = _key(1, integer(0, fix="write how many buckets ahead; 0 gathers at the use"))
    cross_step: bool = _key(False, boolean)
    tp: str | Mapping[str, Any] = _key("auto", tp_hints)
    tp_strict: bool = _key(False, boolean)
    tp_chunks: int | str = _key(1, number_or_auto(MOST_CHUNKS, fix="write a number of pieces, 1 for none, or 'auto'"))
    sp_attention: str = _key("auto", one_of("auto", "heads", "gather", "ring"))
    expert_room: str | float = _key("all", room_or_all)
    all_gather: str = _key("auto", one_of("auto", "native", "send_recv", "shared_memory"))
    reduce_scatter: str = _key("auto", one_of("auto", "native", "send_recv", "shared_memory", "all_to_all"))
    bucket_form: str = _key("auto", one_of("auto", "coalesced", "separate"))
    lowering: str = _key("auto", one_of("auto", "eager", "inductor", "triton"))
    eager_fallback: bool = _key(False, boolean)
    cuda_graph: bool = _key(False, boolean)
    dynamic: bool | str = _key("auto", always_or_auto)
    precision: str = _key("fp32", one_of("fp32", "bf16", "fp16", "autocast:bf16", "autocast:fp16"))
    reduce_dtype: str = _key("fp32", one_of("fp32", "bf16", "fp16"))
    keep_fp32: tuple[str, ...] = _key((), patterns)
    clip_grad_norm: float | None = _key(None, bound)
    clip_grad_norm_p: float = _key(2.0, norm_order)
    clip_grad_value: float | None = _key(None, bound)
    compress_gathers: str = _key("none", one_of("none", "int8", "fp8", "fp8_rows"))
    compress_reductions: str = _key("none", one_of("none", "int8", "fp8", "powersgd", "topk"))
    compress_block: int = _key(256, integer(16, 2**20, fix="write how many elements share a scale"))
    compress_below: int = _key(4096, integer(0, fix="write a number of elements; 0 compresses every parameter"))
    powersgd_rank: int = _key(4, integer(1, 2**20, fix="write how many columns the two factors have"))
    topk_fraction: float = _key(0.01, fraction)
    node_size: int = _key(0, integer(0, fix="write how many ranks share a node; 0 gathers over all of them"))
    loss_scale: str | float | None = _key(None, scale)
    loss_scale_init: float = _key(65536.0, finite(fix="write the first scale, such as 65536.0"))
    loss_scale_growth_interval: int = _key(2000, integer(1, fix="write a number of steps"))
    max_skipped_steps: int = _key(20, integer(1, fix="write a number of steps in a row"))
    accumulate: int = _key(1, integer(1, fix="write how many microbatches a step has"))
    accumulate_in: str = _key("shards", one_of("shards", "unsharded"))
    recompute: str | float | tuple[str, ...] = _key("none", recomputed)
    chunk_loss: str | int | None = _key(None, rows_or_auto)
    kernels: bool | tuple[str, ...] = _key(False, kernel_names)
    memory_budget: int | None = _key(None, budget)
    offload_optimizer: str = _key("none", one_of(*WHERE))
    offload_parameters: str = _key("none", one_of(*WHERE))
    offload_activations: str = _key("none", one_of(*WHERE))
    offload_below: int = _key(4096, integer(0, fix="write a number of elements; 0 offloads every tensor"))
    update_on_host: str | float = _key(0.0, part_or_auto)
    host_budget: int | None = _key(None, budget)
    offload_dir: str | None = _key(None, path)
    offload_io: str = _key("direct", one_of("direct", "buffered"))
    offload_buffer_bytes: int = _key(32 * 2**20, number_of_bytes)
    schedule: str = _key("fixed", one_of("fixed", "cost"))
    hardware: str = _key("auto", name_or_path)
    costs: str | None = _key(None, path)
    costs_of_any_machine: bool = _key(False, boolean)
    disable: tuple[str, ...] = _key((), pass_names)
    timeout_s: float = _key(60.0, seconds)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            # The dataclass is frozen; this is the one place where a value becomes canonical.
            object.__setattr__(self, f.name, f.metadata["check"](f"Plan.{f.name}", getattr(self, f.name)))
        check_precision(self)
        check_compression(self)
        check_offload(self)
        check_schedule(self)
        check_regather(self)
        check_cuda_graph(self)
        check_chunks(self)
        if self.recompute == "auto" and self.memory_budget is None:
            fix = "say how much memory there is, such as '20 GiB', or set recompute='blocks'"
            raise PlanError.of("Plan.memory_budget", expected="one, with recompute='auto'", got="None", fix=fix)

    @property
    def axes(self) -> dict[str, int]:
        """Axis sizes, outermost first; PlanError while the mesh is still None."""
        if self.mesh is None:
            raise PlanError.of("Plan.axes", expected="a mesh", got="None", fix="call plan.resolve first")
        return dict(self.mesh)

    @property
    def parameter_stage(self) -> int:
        """The ZeRO stage from which parameters rest as shards.

        With precision "bf16" or "fp16" it is 1: what ranks gather is a copy in low precision, so the fp32 parameter is
        state of the optimizer.
        """
        return 1 if self.precision in ("bf16", "fp16") else 3

    def resolve(self, world_size: int) -> Plan:
        """The same plan with a mesh that has a dp axis and exactly `world_size` ranks.

        The order of given axes is kept; a missing dp axis is appended, innermost, with size 1. PlanError
        where the sizes multiply to another number.
        """
        world_size = integer(1, fix="pass the number of ranks")("Plan.resolve(world_size)", world_size)
        if self.mesh is None:
            return self.replace(mesh={"dp": world_size})
        axes = {**self.mesh, "dp": self.mesh.get("dp", 1)}
        product = math.prod(axes.values())
        if product == world_size:
            return self.replace(mesh=axes)
        num_others = product // axes["dp"]
        other = f"set dp={world_size // num_others}" if world_size % num_others == 0 else "change the sizes"
        expected = f"axis sizes that multiply to the world size {world_size}"
        got = f"{' x '.join(f'{axis}={size}' for axis, size in axes.items())} = {product}"
        fix = f"run with world size {product} or {other}"
        raise PlanError.of("Plan.mesh", expected=expected, got=got, fix=fix)

    def replace(self, /, **changes: Any) -> Plan:
        """A copy of the plan with some keys changed, checked as a new plan is."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All keys, as plain values that TOML and JSON have."""
        named = [f.name for f in dataclasses.fields(self)]
        mesh = None if self.mesh is None else dict(self.mesh)
        return {name: getattr(self, name) for name in named} | {
            "mesh": mesh,
            "tp": self.tp if isinstance(self.tp, str) else dict(self.tp),
            "keep_fp32": list(self.keep_fp32),
            "recompute": list(self.recompute) if isinstance(self.recompute, tuple) else self.recompute,
            "clip_grad_norm_p": "inf" if math.isinf(self.clip_grad_norm_p) else self.clip_grad_norm_p,
            "disable": list(self.disable),
            "kernels": list(self.kernels) if isinstance(self.kernels, tuple) else self.kernels,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan with these keys, the others at their default."""
        if isinstance(values, Mapping) and all(isinstance(key, str) for key in values):
            return cls(**values)
        raise PlanError.of("Plan", expected="a table of keys", got=show(values), fix="write {'zero': 3}")

    def to_toml(self) -> str:
        """The plan as TOML text that `from_toml` reads back to an equal plan."""
        keys = self.to_dict()
        tables = {key: keys.pop(key) for key in ("mesh", "tp") if isinstance(keys[key], dict)}
        # A JSON number, string or list of plain names is TOML as it stands; so is a string of what can be printed.
        lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None]
        for name, table in tables.items():
            lines += ["", f"[{name}]", *(f"{_toml_key(key)} = {json.dumps(value)}" for key, value in table.items())]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """The plan as JSON text that `from_json` reads back to an equal plan."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_toml(cls, source: str | os.PathLike[str]) -> Plan:
        """The plan in a TOML text or file: a path, or one line that ends in ".toml", names a file."""
        return _read(source, "toml", _parse_toml)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Plan:
        """The plan in a JSON text or file: a path, or one line that ends in ".json", names a file."""
        return _read(source, "json", functools.partial(json.loads, object_pairs_hook=_object_of_json))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan in a file, read as its suffix says: .toml or .json."""
        readers = {".toml": cls.from_toml, ".json": cls.from_json}
        suffix = Path(path).suffix
        if suffix not in readers:
            raise PlanError.of("Plan.load", expected=".toml or .json", got=str(path), fix="rename the file")
        return readers[suffix](Path(path))

    def fingerprint(self) -> str:
        """One line of JSON, equal on two ranks exactly when their plans are equal; mesh order counts."""
        axes = None if self.mesh is None else list(self.mesh.items())
        return json.dumps(self.to_dict() | {"mesh": axes}, sort_keys=True, separators=(",", ":"))


def _read(source: str | os.PathLike[str], form: str, parse: Callable[[str], Any]) -> Plan:
    """The plan in a text or file; every error says which file it is about."""
    is_file = not isinstance(source, str) or (source.endswith(f".{form}") and "\n" not in source)
    where = str(source) if is_file else f"{form.upper()} text"
    try:
        values = parse(Path(source).read_text(encoding="utf-8-sig") if is_file else str(source))
    except (OSError, ValueError, RecursionError) as error:
        fix = "correct the file or its path" if is_file else f"correct it, or pass a path to a .{form}"
        raise PlanError.of(where, expected=f"a plan in {form.upper()}", got=str(error), fix=fix) from error
    try:
        return Plan.from_dict(values)
    except PlanError as error:
        raise error.at(where) from error


def _toml_key(key: str) -> str:
    return key if key.isascii() and key.isidentifier() else json.dumps(key, ensure_ascii=False)


def _parse_toml(text: str) -> Any:
    reader = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        return importlib.import_module(reader).loads(text)
    except ModuleNotFoundError as error:
        fix = f"pip install {reader}, or write the plan as JSON"
        raise PlanError.of("TOML", expected=f"the package {reader}", got="none", fix=fix) from error


def _object_of_json(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without double keys; json would let the last one win in silence, where TOML refuses."""
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} twice")
    return dict(pairs)
