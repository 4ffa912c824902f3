"""The options that several commands share, and the plan that they make."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from fxzero.cli.usage import UsageError
from fxzero.cost.allocator import CPU, CUDA, Allocator
from fxzero.lower.choose import with_lowering
from fxzero.plan import Plan

# option of the command line -> key of the plan
_KEYS: tuple[str, ...] = ("zero", "mesh", "bucket_bytes", "persist_below", "prefetch", "bucket_form", "lowering")
_KEYS += ("dynamic",)
_KEYS += ("all_gather", "reduce_scatter")
_KEYS += ("compress_gathers", "compress_reductions", "compress_block", "compress_below")
_KEYS += ("powersgd_rank", "topk_fraction", "node_size")
_KEYS += ("precision", "reduce_dtype", "keep_fp32", "clip_grad_norm", "clip_grad_norm_p", "clip_grad_value")
_KEYS += ("loss_scale", "accumulate", "accumulate_in", "recompute", "chunk_loss", "kernels", "memory_budget")
_KEYS += ("offload_optimizer", "offload_parameters", "offload_activations", "offload_below", "update_on_host")
_KEYS += ("host_budget", "offload_dir", "offload_io", "offload_buffer_bytes", "disable")
_LISTS = ("keep_fp32", "disable")
_BACKEND = "what carries collectives, and decides what the plan leaves open; shm: gloo, on one host"


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Let a command take a plan: a file, single keys, the number of ranks and what carries their collectives."""
    group = parser.add_argument_group("plan (docs/plan.md); single keys replace those of the file")
    group.add_argument("--plan", metavar="FILE", help="a plan in TOML or JSON")
    group.add_argument("--world", type=int, metavar="N", help="number of ranks; default: those of the plan's mesh")
    group.add_argument("--backend", choices=("nccl", "gloo", "shm"), default="nccl", help=_BACKEND)
    group.add_argument("--zero", type=_number, metavar="STAGE", help="0 to 3; default 3")
    group.add_argument("--mesh", metavar="AXIS=N,..", help="ranks per axis, outermost first: dp_replicate=8,dp=8")
    group.add_argument("--bucket-bytes", type=_number, metavar="BYTES", help="'25 MiB'; 0: no buckets; or auto")
    group.add_argument("--persist-below", type=_number, metavar="N", help="elements below which nothing is sharded")
    group.add_argument("--prefetch", type=_number, metavar="N", help="buckets that a gather goes ahead of its use")
    group.add_argument("--all-gather", metavar="NAME", help="native, send_recv, shared_memory or auto")
    group.add_argument("--reduce-scatter", metavar="NAME", help="native, send_recv, shared_memory, all_to_all or auto")
    group.add_argument("--bucket-form", metavar="NAME", help="coalesced, separate or auto")
    group.add_argument("--lowering", metavar="NAME", help="auto, eager, inductor or triton; marks what is compiled")
    group.add_argument("--dynamic", type=_yes_no, metavar="WHEN", help="when sizes become symbols: auto, true or false")
    group.add_argument("--precision", metavar="NAME", help="fp32, bf16, fp16, autocast:bf16 or autocast:fp16")
    group.add_argument("--reduce-dtype", metavar="NAME", help="of gradients under precision bf16 or fp16")
    group.add_argument("--keep-fp32", action="append", metavar="PATTERN,..", help="modules that stay fp32")
    group.add_argument("--clip-grad-norm", type=_number, metavar="NORM", help="the greatest norm of all gradients")
    group.add_argument("--clip-grad-norm-p", type=_number, metavar="P", help="the order of that norm; default 2")
    group.add_argument("--clip-grad-value", type=_number, metavar="VALUE", help="the greatest element of a gradient")
    group.add_argument("--compress-gathers", metavar="NAME", help="none, int8, fp8 or fp8_rows")
    group.add_argument("--compress-reductions", metavar="NAME", help="none, int8, fp8, powersgd or topk")
    group.add_argument("--compress-block", type=_number, metavar="N", help="elements that share a scale; default 256")
    group.add_argument("--compress-below", type=_number, metavar="N", help="elements below which nothing is compressed")
    group.add_argument("--powersgd-rank", type=_number, metavar="N", help="columns of powersgd's factors; default 4")
    group.add_argument("--topk-fraction", type=_number, metavar="X", help="of a gradient that topk sends; default 0.01")
    group.add_argument("--node-size", type=_number, metavar="N", help="ranks that share a node; backward gathers in it")
    group.add_argument("--loss-scale", type=_number, metavar="SCALE", help="dynamic, or a number that stays")
    group.add_argument("--accumulate", type=_number, metavar="K", help="microbatches in a step; default 1")
    group.add_argument("--accumulate-in", metavar="NAME", help="shards or unsharded")
    group.add_argument("--recompute", type=_recompute, metavar="WHAT", help="auto, blocks, a fraction, or PATTERN,..")
    group.add_argument("--chunk-loss", type=_number, metavar="ROWS", help="whose logits are made at a time, or auto")
    about = "all, or adamw, sgd, lion, rms_norm, layer_norm, gated_activation, rotary"
    group.add_argument("--kernels", type=_kernels, metavar="NAME,..", help=about)
    group.add_argument("--memory-budget", type=_number, metavar="BYTES", help="'20 GiB': the greatest predicted peak")
    for part, what in (("optimizer", "its state rests"), ("parameters", "they rest"), ("activations", "they wait")):
        group.add_argument(f"--offload-{part}", metavar="WHERE", help=f"where {what}: none, host, nvme or auto")
    group.add_argument("--offload-below", type=_number, metavar="N", help="elements below which nothing is offloaded")
    about = "of state on the host, 0 to 1, or auto; default 0"
    group.add_argument("--update-on-host", type=_number, metavar="PART", help=about)
    group.add_argument("--host-budget", type=_number, metavar="BYTES", help="of host memory, for what is offloaded")
    group.add_argument("--offload-dir", metavar="DIR", help="where files of nvme are made; default: for temporary ones")
    group.add_argument("--offload-io", metavar="NAME", help="of files: direct (default) or buffered")
    group.add_argument(
        "--offload-buffer-bytes", type=_number, metavar="BYTES", help="of host memory for file transfers"
    )
    group.add_argument("--disable", action="append", metavar="PASS,..", help="passes to leave out")


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Let a command take a step to capture."""
    about = "a Python file and a function in it that returns (model, optimizer, example batch[, loss])"
    parser.add_argument("target", metavar="FILE.py:FUNCTION", help=about)
    add_plan_options(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not check the graph after each pass")
    parser.add_argument("--out", metavar="FILE", help="write there instead of to stdout")
    parser.add_argument("--quiet", action="store_true", help="say nothing on stderr but errors")


def allocator_of(args: argparse.Namespace) -> Allocator:
    """The allocator of the devices that the plan is for: nccl serves CUDA, gloo the CPU."""
    return CUDA if args.backend == "nccl" else CPU


def names_a_plan(args: argparse.Namespace) -> bool:
    """Whether any option of the plan was given."""
    return any(getattr(args, key) is not None for key in ("plan", "world", *_KEYS))


def plan_of(args: argparse.Namespace, *, default_world: int | None = None) -> Plan:
    """The plan that was asked for, with its mesh resolved.

    Args:
        args: parsed by a parser with `add_plan_options`.
        default_world: number of ranks where neither --world nor the mesh says it; None: that is an error.

    Raises:
        PlanError: if the plan cannot be honoured.
        UsageError: if the number of ranks or the mesh cannot be told.
    """
    plan = Plan.load(args.plan) if args.plan is not None else Plan()
    given = {key: value for key in _KEYS if (value := getattr(args, key)) is not None}
    if "mesh" in given:
        given["mesh"] = _mesh(given["mesh"])
    for key in (key for key in _LISTS if key in given):
        given[key] = [name.strip() for names in given[key] for name in names.split(",") if name.strip()]
    is_gpu = args.backend == "nccl"
    device = torch.device("cuda" if is_gpu else "cpu")
    plan = with_lowering(plan.replace(**given), device, is_here=not is_gpu)
    if args.world is not None:
        return plan.resolve(args.world)
    if plan.mesh is not None:
        return plan.resolve(math.prod(plan.mesh.values()))
    if default_world is None:
        fix = "add --world 64, or --mesh dp=64"
        raise UsageError.of("--world", expected="the number of ranks", got="none, and a plan without mesh", fix=fix)
    return plan.resolve(default_world)


def _number(text: str) -> Any:
    """A number, or the text as it is: the plan checks it and says what is wrong."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _yes_no(text: str) -> Any:
    """Yes or no, or the text as it is."""
    return {"true": True, "false": False}.get(text.lower(), text)


def _recompute(text: str) -> Any:
    """A word, a fraction, or patterns of module paths."""
    value = _number(text)
    patterns = [part.strip() for part in text.split(",") if part.strip()]
    return value if value != text or text in ("none", "blocks", "auto") else patterns


def _kernels(text: str) -> bool | list[str]:
    """All, or names."""
    return True if text == "all" else [part.strip() for part in text.split(",") if part.strip()]


def _mesh(text: str) -> dict[str, Any]:
    axes: dict[str, Any] = {}
    for part in text.split(","):
        axis, equals, size = part.partition("=")
        axis = axis.strip()
        if not axis or not equals or axis in axes:
            fix = "write each axis once, as dp_replicate=8,dp=8"
            raise UsageError.of("--mesh", expected="axes with their sizes", got=repr(text), fix=fix)
        axes[axis] = _number(size.strip())
    return axes
