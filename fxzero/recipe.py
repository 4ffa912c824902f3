"""From a plan to the ordered list of passes: the one page that says what is done to a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxzero.capture.accumulation import Accumulation
from fxzero.capture.clipping import Clipping
from fxzero.capture.loss_scaling import LossScaling
from fxzero.capture.options import CaptureOptions
from fxzero.capture.precision import Precision
from fxzero.cost.recorded import RecordedCosts
from fxzero.errors import PlanError
from fxzero.graph import AuxiliaryState, StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import SPLIT_AXES
from fxzero.graph.contract import Pass
from fxzero.graph.placement import NOTHING_PLACED, Placement
from fxzero.pass_manager import Pipeline
from fxzero.passes.agree_on_overflow import agree_on_overflow
from fxzero.passes.bucket_all_gathers import bucket_all_gathers
from fxzero.passes.bucket_gradient_sums import bucket_gradient_sums
from fxzero.passes.bucket_reduce_scatters import bucket_reduce_scatters
from fxzero.passes.choose_buckets import choose_buckets
from fxzero.passes.choose_collective_algorithms import choose_collective_algorithms
from fxzero.passes.chunk_losses import chunk_losses
from fxzero.passes.chunk_products import chunk_products
from fxzero.passes.compress_with_powersgd import compress_with_powersgd, powersgd_states
from fxzero.passes.compress_with_top_k import compress_with_top_k, top_k_states
from fxzero.passes.cut_regions import cut_regions
from fxzero.passes.delay_weight_gradients import delay_weight_gradients
from fxzero.passes.fuse_gates import fuse_gates
from fxzero.passes.fuse_norms import fuse_norms
from fxzero.passes.fuse_rotary import fuse_rotary
from fxzero.passes.fuse_updates import fuse_updates
from fxzero.passes.gather_for_next_step import gather_for_next_step
from fxzero.passes.gather_in_place import gather_in_place
from fxzero.passes.gather_within_nodes import gather_within_nodes
from fxzero.passes.hand_over_numbers import hand_over_numbers
from fxzero.passes.keep_gathered import keep_gathered
from fxzero.passes.offload_activations import offload_activations
from fxzero.passes.offload_state import offload_state
from fxzero.passes.place_swaps import place_swaps
from fxzero.passes.place_updates import place_updates
from fxzero.passes.prefetch_all_gathers import prefetch_all_gathers
from fxzero.passes.quantize_all_gathers import quantize_all_gathers
from fxzero.passes.quantize_reductions import quantize_reductions
from fxzero.passes.recompute_blocks import recompute_blocks
from fxzero.passes.recompute_chosen import recompute_chosen
from fxzero.passes.recompute_pointwise import recompute_pointwise
from fxzero.passes.reduce_gradients import reduce_gradients
from fxzero.passes.reduce_in_low_precision import reduce_in_low_precision
from fxzero.passes.remove_dead_nodes import remove_dead_nodes
from fxzero.passes.schedule_step import schedule_step
from fxzero.passes.shard_gradient_norms import shard_gradient_norms
from fxzero.passes.shard_gradients import shard_gradients
from fxzero.passes.shard_optimizer_state import shard_optimizer_state
from fxzero.passes.shard_parameters import shard_parameters
from fxzero.passes.split_tensors import split_tensors
from fxzero.plan import Plan
from fxzero.plan_buckets import bucket_bytes, cuts_by_cost, regathers
from fxzero.plan_compression import QUANTIZED
from fxzero.plan_offload import WHERE, leaves_state_open, state_tiers, uses
from fxzero.plan_values import NORM_KERNELS, UPDATE_KERNELS
from fxzero.split_recipe import splitting

ALL_PASSES: tuple[Pass, ...] = (
    split_tensors,
    chunk_products,
    fuse_norms,
    fuse_gates,
    fuse_rotary,
    chunk_losses,
    recompute_blocks,
    recompute_chosen,
    recompute_pointwise,
    reduce_gradients,
    shard_optimizer_state,
    shard_gradient_norms,
    agree_on_overflow,
    shard_gradients,
    shard_parameters,
    quantize_all_gathers,
    gather_within_nodes,
    delay_weight_gradients,
    reduce_in_low_precision,
    remove_dead_nodes,
    quantize_reductions,
    compress_with_powersgd,
    compress_with_top_k,
    choose_collective_algorithms,
    choose_buckets,
    keep_gathered,
    bucket_gradient_sums,
    bucket_all_gathers,
    bucket_reduce_scatters,
    prefetch_all_gathers,
    place_updates,
    gather_for_next_step,
    offload_activations,
    offload_state,
    place_swaps,
    gather_in_place,
    schedule_step,
    fuse_updates,
    hand_over_numbers,
    cut_regions,
)
DATA_AXES = ("dp", "dp_replicate")  # whose ranks have batches of their own: gradients are reduced over them
# pass -> the kernels that it puts in
_KERNELS = {
    "fuse_norms": NORM_KERNELS,
    "fuse_gates": ("gated_activation",),
    "fuse_rotary": ("rotary",),
    "fuse_updates": UPDATE_KERNELS,
}


def captured_as(plan: Plan) -> CaptureOptions:
    """What a plan says of the captured step itself: dtypes, loss scale, microbatches and clipping."""
    scale = plan.loss_scale_init if isinstance(plan.loss_scale, str) else plan.loss_scale or 0.0
    return CaptureOptions(
        Precision.parse(plan.precision, plan.keep_fp32),
        Clipping(plan.clip_grad_norm, plan.clip_grad_norm_p, plan.clip_grad_value),
        LossScaling(scale, plan.loss_scale == "dynamic", plan.loss_scale_growth_interval),
        Accumulation(plan.accumulate, unsharded=plan.accumulate_in == "unsharded"),
    )


def auxiliary_state(plan: Plan, parameters: Mapping[str, torch.Tensor]) -> list[AuxiliaryState]:
    """What a plan makes a step keep beside parameters, buffers and optimizer state.

    Args:
        plan: resolved.
        parameters: the model's, by name.
    """
    return [*captured_as(plan).scaling.states, *_kept_back(plan, parameters)]


def _kept_back(plan: Plan, parameters: Mapping[str, torch.Tensor]) -> list[AuxiliaryState]:
    """What compressed reductions keep from step to step."""
    ranks, below = plan.axes["dp"], plan.compress_below
    if ranks > 1 and plan.compress_reductions == "powersgd":
        return powersgd_states(parameters, ranks=ranks, rank=plan.powersgd_rank, below=below)
    if ranks > 1 and plan.compress_reductions == "topk":
        return top_k_states(parameters, ranks=ranks, fraction=plan.topk_fraction, below=below)
    return []


@dataclass(frozen=True)
class Decided:
    """What a plan leaves open, as `fxzero.decide` has decided it for one step.

    Args:
        recomputed: names of the captured step's forward nodes that backward has again.
        offloaded: names of those that wait off the device, with their tier.
        placed: where single tensors of the state rest.
        bytes_beside: on the device, at rest for the step's other microbatches.
    """

    recomputed: tuple[str, ...] = ()
    offloaded: tuple[tuple[str, str], ...] = ()
    placed: Placement = NOTHING_PLACED
    bytes_beside: int = 0


NOTHING_DECIDED = Decided()


def recipe(
    plan: Plan, *, backend: str, decided: Decided = NOTHING_DECIDED, costs: RecordedCosts | None = None
) -> Pipeline:
    """The pipeline of a plan.

    Args:
        plan: resolved (its mesh is known).
        backend: what carries collectives ("nccl", "gloo", "shm", "fake"); decides what a plan leaves at "auto".
        decided: what the plan leaves open, for this step.
        costs: the recorded ones on which ranks have agreed; None: what the plan's file holds here.

    Raises:
        PlanError: if `disable` names no pass.
    """
    _check_disabled(plan)
    axes = {axis: size for axis, size in plan.axes.items() if size > 1 and axis in DATA_AXES}
    on_gloo = backend in ("gloo", c10d.SHM)
    form = plan.bucket_form if plan.bucket_form != "auto" else ("separate" if on_gloo else "coalesced")
    algorithms = _algorithms(plan, backend, form)
    shards = "dp" in axes
    rows = {"axis": "dp", "persist_below": plan.persist_below}

    gathers = shards and plan.zero >= plan.parameter_stage
    passes = _before_recomputation(plan, backend)
    if plan.recompute == "auto":
        passes.append(recompute_chosen.using(names=decided.recomputed))
    elif plan.recompute != "none":
        passes.append(recompute_blocks.using(**_recomputed(plan.recompute)))
    passes.append(recompute_pointwise)
    if axes:
        order = tuple(axis for axis in DATA_AXES if axis in axes)
        passes.append(reduce_gradients.using(axes=order))
    if shards and plan.zero >= 1:
        passes.append(shard_optimizer_state.using(**rows))
    if shards and plan.zero >= 1 and plan.clip_grad_norm is not None:
        passes.append(shard_gradient_norms.using(axis="dp", only_gathered=plan.zero == 1))
    if shards and plan.zero >= 1 and plan.loss_scale is not None:
        passes.append(agree_on_overflow.using(axis="dp"))
    if shards and plan.zero >= 2:
        passes.append(shard_gradients)
    packed = {"block": plan.compress_block, "below": plan.compress_below}
    if gathers:
        passes.append(shard_parameters.using(**rows, again=plan.zero == 3 and regathers(plan) is not False))
        if plan.compress_gathers != "none":
            passes.append(quantize_all_gathers.using(form=plan.compress_gathers, **packed))
        if plan.node_size:
            passes.append(gather_within_nodes.using(axis="dp", node=plan.node_size))
        passes.append(delay_weight_gradients)
    if axes and plan.reduce_dtype != "fp32":
        passes.append(reduce_in_low_precision)
    passes.append(remove_dead_nodes)
    if shards and plan.compress_reductions in QUANTIZED:
        passes.append(quantize_reductions.using(form=plan.compress_reductions, **packed))
    feedback = {"axis": "dp", "below": plan.compress_below}
    if shards and plan.compress_reductions == "powersgd":
        passes.append(compress_with_powersgd.using(**feedback, rank=plan.powersgd_rank))
    if shards and plan.compress_reductions == "topk":
        passes.append(compress_with_top_k.using(**feedback, fraction=plan.topk_fraction))
    if axes:
        passes.append(choose_collective_algorithms.using(**algorithms))
    if form == "coalesced" and any(plan.axes.get(axis, 1) > 1 for axis in SPLIT_AXES):
        passes.append(bucket_gradient_sums.using(bucket_bytes=bucket_bytes(plan)))
    bound = None if plan.memory_budget is None else plan.memory_budget - decided.bytes_beside
    machine = {"hardware": plan.hardware, "backend": backend, "memory_bytes": bound}
    passes += _bucketing(plan, machine, form=form, gathers=gathers) if axes else []
    if gathers:
        passes.append(prefetch_all_gathers.using(distance=plan.prefetch))
    alone = _decides_buckets(plan) and form == "coalesced"  # a bucket is a launch: no further grouping of updates
    passes.append(place_updates.using(bucket_bytes=0 if alone else bucket_bytes(plan)))
    if gathers and plan.cross_step:
        passes.append(gather_for_next_step.using(**(machine if plan.schedule == "cost" else {"memory_bytes": bound})))
    passes += _offloading(plan, decided)
    if shares_rows(plan, backend):
        passes.append(gather_in_place)
    if plan.schedule == "cost":
        passes.append(schedule_step.using(**machine, **_recorded(plan, costs)))
    return Pipeline([*passes, *_lowering(plan)], disable=plan.disable)


def _before_recomputation(plan: Plan, backend: str) -> list[Pass]:
    """What changes which calls there are to be had again."""
    chunked = [] if plan.chunk_loss is None else [chunk_losses.using(rows=plan.chunk_loss)]
    return [*splitting(plan, backend), *_kernels(plan, fuse_norms, fuse_gates, fuse_rotary), *chunked]


def _kernels(plan: Plan, *passes: Pass) -> list[Pass]:
    """These passes with the kernels that a plan names, on any device; with all of them where that is a GPU, if True."""
    if plan.kernels is True:
        return [fuse.using(device="cuda") for fuse in passes]
    named = plan.kernels or ()
    kept = [(fuse, tuple(name for name in _KERNELS[fuse.name] if name in named)) for fuse in passes]
    return [fuse.using(names=names) for fuse, names in kept if names]


def recomputed_from(step: StepGraph, plan: Plan, *, backend: str) -> StepGraph:
    """The graph whose forward results may be named to be had again.

    Args:
        step: as captured; it is not changed.
        plan: resolved.
        backend: what carries collectives.
    """
    passes = _before_recomputation(plan, backend)
    return Pipeline(passes, disable=plan.disable).run(step, check=False) if passes else step


def _lowering(plan: Plan) -> list[Pass]:
    """What runs the calls of the finished order."""
    passes: list[Pass] = []
    passes += [fuse_updates] if plan.kernels is True else _kernels(plan, fuse_updates)
    if plan.cuda_graph:
        passes.append(hand_over_numbers)
    if plan.lowering not in ("auto", "eager"):
        passes.append(cut_regions.using(only_rows=True) if plan.lowering == "triton" else cut_regions)
    return passes


def _recorded(plan: Plan, costs: RecordedCosts | None) -> dict[str, Any]:
    """The recorded costs that decide a schedule, as options of the pass."""
    if plan.costs is None and costs is None:
        return {}
    return {"costs": costs or plan.costs, "any_machine": plan.costs_of_any_machine}


def _decides_buckets(plan: Plan) -> bool:
    """Whether buckets are decided by cost: not with offload, since it is not known yet what leaves the device."""
    return (cuts_by_cost(plan) or regathers(plan) == "auto") and not uses(plan, *WHERE[1:])


def _bucketing(plan: Plan, machine: dict[str, Any], *, form: str, gathers: bool) -> list[Pass]:
    """Which collectives share a launch, and what is not gathered again."""
    passes: list[Pass] = []
    decides = _decides_buckets(plan)
    if decides:
        keep = gathers and regathers(plan) == "auto"
        given = None if cuts_by_cost(plan) else bucket_bytes(plan)
        order = {"by_cost": plan.schedule == "cost", "prefetch": plan.prefetch}
        passes.append(choose_buckets.using(**order, bucket_bytes=given, form=form, keep=keep, **machine))
        passes += [keep_gathered] if keep else []
    cut = None if decides else bucket_bytes(plan)
    if gathers:
        passes.append(bucket_all_gathers.using(bucket_bytes=cut, form=form))
    return [*passes, bucket_reduce_scatters.using(bucket_bytes=cut, form=form)]


def _offloading(plan: Plan, decided: Decided) -> list[Pass]:
    """What leaves the device: last, because it follows the order of the program."""
    passes: list[Pass] = []
    if plan.offload_activations != "none" and plan.recompute == "auto":
        passes.append(offload_activations.using(names=decided.offloaded))
    elif plan.offload_activations != "none":
        passes.append(offload_activations.using(tier=plan.offload_activations, below=plan.offload_below))
    if tiers := state_tiers(plan):
        where = {"placed": decided.placed} if leaves_state_open(plan) else {}
        passes.append(offload_state.using(tiers=tiers, below=plan.offload_below, on_host=plan.update_on_host, **where))
    return [*passes, place_swaps.using(distance=plan.prefetch, bucket_bytes=bucket_bytes(plan))] if passes else []


def _recomputed(recompute: str | float | tuple[str, ...]) -> dict[str, Any]:
    """The plan's key as options of the pass."""
    if isinstance(recompute, float):
        return {"fraction": recompute}
    return {} if recompute == "blocks" else {"patterns": recompute}


def _algorithms(plan: Plan, backend: str, form: str) -> dict[str, str]:
    """What carries gathers and reduce-scatters; the options of the pass that says so."""
    carriers = {"gloo": c10d.SEND_RECV, c10d.SHM: c10d.SHARED_MEMORY} if form == "separate" else {}
    best = carriers.get(backend, "native")
    algorithms = {
        "all_gather": best if plan.all_gather == "auto" else plan.all_gather,
        "reduce_scatter": best if plan.reduce_scatter == "auto" else plan.reduce_scatter,
    }
    _check_coalescing(plan, form, algorithms)
    return algorithms


def shares_rows(plan: Plan, backend: str) -> bool:
    """Whether sharded parameters rest in memory that the ranks of a host share, and gathers read them there.

    Not where the next step's gathers are launched in a step: the user may write the rows after that.

    Args:
        plan: resolved.
        backend: what carries collectives.
    """
    carried = backend == c10d.SHM and plan.all_gather == "auto"
    if not carried or plan.axes.get("dp", 1) == 1 or plan.zero < plan.parameter_stage or plan.cross_step:
        return False
    return plan.bucket_form != "coalesced" and "parameter" not in state_tiers(plan)


def _check_coalescing(plan: Plan, form: str, algorithms: dict[str, str]) -> None:
    carried = {c10d.SEND_RECV, c10d.SHARED_MEMORY}.intersection(algorithms.values())
    if form == "coalesced" and bucket_bytes(plan) and carried:
        raise PlanError.of(
            where="bucket_form",
            expected=f"'separate' where a collective is carried by {' and '.join(sorted(carried))}",
            got="'coalesced'",
            fix="set bucket_form='separate' or bucket_bytes=0, or leave the algorithms at 'native'",
        )


def _check_disabled(plan: Plan) -> None:
    names = [p.name for p in ALL_PASSES]
    for name in plan.disable:
        if name not in names:
            raise PlanError.of(
                where="disable",
                expected="names of passes",
                got=repr(name),
                fix=f"choose from: {', '.join(names)}",
            )
