"""Time and bandwidth of each kernel beside plain torch, Inductor, Liger (where installed) and a copy, on a GPU.

    python -m tests.benchmarks.kernels --json out/kernels.json           # all kernels, 20 rounds
    python -m tests.benchmarks.kernels --only rms_norm adamw --rounds 50
    python -m tests.benchmarks.kernels --device cpu --check              # everything but the timing, in seconds

A round calls each variant of a case once (A B A B ...) after a warm-up that compiles it, each between two events of the
device. Sizes are far beyond a GPU's last-level cache. Columns:

    ms          of a call: median of the rounds (least..greatest)
    GB/s        bytes that the formula needs to read and write, once each, over the median
    of a copy   the same as a share of what a copy of as many bytes reaches, measured in the same rounds
    / fxzero    the variant's time over that of our kernel, medians

"eager" is the kernel's plain-torch reference, for AdamW torch's foreach form, "fused" torch's fused one; "compiled" is
the reference under torch.compile. What fails has its error in place of figures, and the exit code is 1. With --check
each variant is called once on small tensors and compared with the reference in fp64, messages byte by byte with those
that the compression ops pack on the CPU (on a GPU their own may differ in the last bit of a scale, and then fail here).
There is no timing without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fxzero.graph import compression_ops
from fxzero.kernels import (
    adamw,
    bucket_copy,
    gated_activation,
    launch,
    layer_norm,
    lion,
    quantize_blocks,
    rms_norm,
    rotary,
    sgd,
)

WARM_UP = 3
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One kernel on one set of tensors.

    Attributes:
        name: of the kernel.
        moved_bytes: what the formula needs to read and to write, each once.
        variants: name -> call; what it returns, or the tensors that it updates, are compared.
        exact: call of the reference in fp64, or of one that is met bit by bit, from the same tensors each time.
    """

    name: str
    moved_bytes: int
    variants: dict[str, Callable[[], Any]]
    exact: Callable[[], Any]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of a result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for part in value for x in tensors_in(part)] if isinstance(value, list | tuple) else []


def num_bytes(*values: Any) -> int:
    """Bytes of all tensors in these values."""
    return sum(x.numel() * x.element_size() for x in tensors_in(list(values)))


def wide(value: Any) -> Any:
    """The same with tensors in fp64."""
    if isinstance(value, torch.Tensor):
        return value.double()
    return type(value)(map(wide, value)) if isinstance(value, list | tuple) else value


def function_case(
    name: str,
    op: Callable,
    reference: Callable,
    arguments: tuple,
    liger: Callable | None = None,
    exact: Callable[[], Any] | None = None,
) -> Case:
    """A kernel that returns its results."""
    moved = num_bytes(arguments, op(*arguments))
    variants = {"fxzero": partial(op, *arguments), "eager": partial(reference, *arguments)}
    variants["compiled"] = partial(torch.compile(reference, dynamic=False), *arguments)
    if liger is not None:
        variants["liger"] = liger
    return Case(name, moved, variants, exact or (lambda: reference(*map(wide, arguments))))


def liger_function(module: str, name: str) -> Callable | None:
    """An autograd function of Liger, or None where Liger is not installed."""
    try:
        return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply
    except ImportError:
        return None


def norm_cases(rows: int, columns: int, device: torch.device) -> list[Case]:
    """RMS norm and layer norm, bf16 with fp32 statistics."""
    make = partial(torch.randn, rows, columns, device=device, dtype=torch.bfloat16)
    x, dy, weight, bias = make(), make(), *torch.randn(2, columns, device=device, dtype=torch.bfloat16)
    cases = []
    ours = liger_function("rms_norm", "LigerRMSNormFunction")
    liger = partial(ours, x, weight, EPS) if ours else None
    cases.append(function_case("rms_norm", rms_norm.rms_norm, rms_norm.rms_norm_reference, (x, weight, EPS), liger))
    rstd = rms_norm.rms_norm(x, weight, EPS)[1]
    given = (dy, x, weight, rstd)
    cases.append(
        function_case("rms_norm_backward", rms_norm.rms_norm_backward, rms_norm.rms_norm_backward_reference, given)
    )
    given = (x, weight, bias, EPS)
    ours = liger_function("layer_norm", "LigerLayerNormFunction")
    liger = partial(ours, *given) if ours else None
    cases.append(function_case("layer_norm", layer_norm.layer_norm, layer_norm.layer_norm_reference, given, liger))
    _, mean, rstd = layer_norm.layer_norm(*given)
    pair = layer_norm.layer_norm_backward, layer_norm.layer_norm_backward_reference
    cases.append(function_case("layer_norm_backward", *pair, (dy, x, weight, mean, rstd, True)))
    return cases


def gated_cases(rows: int, columns: int, device: torch.device) -> list[Case]:
    """SwiGLU and both GeGLU forms, bf16."""
    a, b, dy = torch.randn(3, rows, columns, device=device, dtype=torch.bfloat16)
    names = {"silu": ("swiglu", "LigerSiLUMulFunction"), "gelu_tanh": ("geglu", "LigerGELUMulFunction")}
    cases = []
    for form in gated_activation.FORMS:
        ours = liger_function(*names[form]) if form in names else None
        forward = gated_activation.gated_activation, gated_activation.gated_activation_reference
        backward = gated_activation.gated_activation_backward, gated_activation.gated_activation_backward_reference
        liger = partial(ours, a, b) if ours else None
        cases.append(function_case(f"gated_activation {form}", *forward, (a, b, form), liger))
        cases.append(function_case(f"gated_activation_backward {form}", *backward, (dy, a, b, form)))
    return cases


def rotary_cases(positions: int, heads: int, device: torch.device) -> list[Case]:
    """Queries as a projection leaves them, the transpose of [B, S, H, D], bf16."""
    x = torch.randn(4, positions, heads, 128, device=device, dtype=torch.bfloat16).transpose(1, 2)
    cos, sin = torch.randn(2, positions, 128, device=device)
    pairs = [("rotary", rotary.rotary, rotary.rotary_reference)]
    pairs.append(("rotary_backward", rotary.rotary_backward, rotary.rotary_backward_reference))
    return [
        function_case(f"{name}{' interleaved' * interleaved}", op, reference, (x, cos, sin, interleaved))
        for name, op, reference in pairs
        for interleaved in (False, True)
    ]


def message_cases(rows: int, columns: int, device: torch.device) -> list[Case]:
    """Buckets of matrices, and messages of eight ranks in blocks of 256, beside the ops that fxzero has today."""
    tensors = list(torch.randn(8, rows, columns, device=device))
    pair = bucket_copy.bucket_pack, bucket_copy.pack_reference
    cases = [function_case("bucket_pack", *pair, (tensors, torch.bfloat16))]
    x = torch.randn(8 * rows, columns, device=device, dtype=torch.bfloat16)
    for form in quantize_blocks.FORMS:
        given = (x, form, 256, 8)
        packed = quantize_blocks.quantize_blockwise(*given)
        rest = ([rows, columns], form, 256, 8, "avg", torch.float32)
        pair = quantize_blocks.quantize_blockwise, compression_ops.quantize_blockwise
        exact = partial(compression_ops.quantize_blockwise, x.cpu(), *given[1:])
        cases.append(function_case(f"quantize_blockwise {form}", *pair, given, exact=exact))
        pair = quantize_blocks.dequantize_reduce, compression_ops.dequantize_reduce
        exact = partial(compression_ops.dequantize_reduce, packed.cpu(), *rest)
        cases.append(function_case(f"dequantize_reduce {form}", *pair, (packed, *rest), exact=exact))
    return cases


def shard_lists(sizes: Sequence[int], roles: int, device: torch.device) -> list[list[torch.Tensor]]:
    """Lists of fp32 shards: parameters, gradients, and zeros as state."""
    draws = [[torch.randn(n, device=device) for n in sizes] for _ in range(2)]
    return draws + [[torch.zeros(n, device=device) for n in sizes] for _ in range(roles - 2)]


def updating(update: Callable, lists: list[list[torch.Tensor]], *rest: Any, **arguments: Any) -> Callable[[], Any]:
    """A call that updates a copy of these lists in place, and returns it."""
    own = [[x.clone() for x in tensors] for tensors in lists]

    def call() -> list[list[torch.Tensor]]:
        update(*own, *rest, **arguments)
        return own

    return call


def torch_adamw(lists: list[list[torch.Tensor]], hyper: dict[str, Any], **form: bool) -> Callable[[], Any]:
    """torch's AdamW on a copy of these lists."""
    params = [torch.nn.Parameter(p.clone()) for p in lists[0]]
    for param, grad in zip(params, lists[1], strict=True):
        param.grad = grad.clone()
    optimizer = torch.optim.AdamW(params, **hyper, **form)

    def call() -> list[torch.Tensor]:
        optimizer.step()
        return [p.detach() for p in params]

    return call


def update_case(name: str, op: Callable, reference: Callable, lists: list, arguments: dict[str, Any]) -> Case:
    """A kernel that updates lists of shards in place; every list is read, all but the gradients are written."""
    moved = 2 * num_bytes(*lists) - num_bytes(lists[1])
    given = {"inverse_scale": 1.0, "clip": 1.0, "overflow": None, "maximize": False} | arguments
    given |= {f"{x}_tensor": None for x in ("lr", "correction1", "correction2", "inverse_scale", "clip")}
    none: list[torch.Tensor] = []
    rest = (none, none) if name == "adamw" else (none,)
    variants = {"fxzero": updating(op, lists, **arguments), "eager": updating(reference, lists, *rest, **given)}
    variants["compiled"] = updating(torch.compile(reference, dynamic=False), lists, *rest, **given)
    return Case(name, moved, variants, lambda: updating(reference, wide(lists), *rest, **given)())


def update_cases(sizes: Sequence[int], device: torch.device) -> list[Case]:
    """The optimizers, all in fp32, with numbers as arguments."""
    hyper = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1}
    numbers = hyper | {"beta1": 0.9, "beta2": 0.999, "correction1": 0.1, "correction2": 0.001}
    lists = shard_lists(sizes, 4, device)
    first = update_case("adamw", adamw.adamw_, adamw.adamw_reference, lists, numbers)
    first.variants["eager"] = torch_adamw(lists, hyper, foreach=True)
    first.variants["fused"] = torch_adamw(lists, hyper, fused=True)
    options = {"lr": 1e-3, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False, "first": False}
    lists = shard_lists(sizes, 3, device)
    second = update_case("sgd", sgd.sgd_, sgd.sgd_reference, lists, options)
    numbers = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}
    return [first, second, update_case("lion", lion.lion_, lion.lion_reference, lists, numbers)]


def cases_of(args: argparse.Namespace) -> list[Case]:
    """All cases, on tensors of the size that is asked for."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    if args.check:
        parts = (norm_cases(6, 96, device), gated_cases(6, 96, device), rotary_cases(5, 2, device))
        parts += (message_cases(6, 96, device), update_cases((5, 3000, 70), device))
    else:
        parts = (norm_cases(16384, 8192, device), gated_cases(16384, 14336, device), rotary_cases(8192, 32, device))
        parts += (message_cases(4096, 4096, device), update_cases([4096 * 4096] * 12 + [4096] * 24, device))
    cases = [case for part in parts for case in part]
    return [case for case in cases if case.name.startswith(tuple(args.only))]


def check(case: Case, names: Sequence[str]) -> list[list[str]]:
    """A line for each variant: how far its results are from the reference in fp64, relative to the greatest value."""
    rows = []
    for name in [name for name in case.variants if name in names]:
        results, exact = tensors_in(case.variants[name]()), tensors_in(case.exact())
        pairs = list(zip(results, exact, strict=False))  # Liger and torch's optimizers return fewer
        off = max(
            ((x.cpu().double() - y.cpu()).abs().max() / y.abs().max().clamp(min=1).cpu()).item() for x, y in pairs
        )
        eps = max(torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0 for x in results)
        rows.append([case.name, name, f"{off:.2e}", "ok" if off <= 4 * eps else f"FAILED: more than {4 * eps:.1e}"])
    return rows


def time_ms(call: Callable[[], Any]) -> float:
    """Milliseconds of one call, by events of the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(case: Case, names: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """What each variant took, in turns, and the copy of as many bytes beside them."""
    source = torch.empty(case.moved_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source)}
    calls |= {name: call for name, call in case.variants.items() if name in names}
    times: dict[str, list[float]] = {}
    errors = {}
    for name, call in calls.items():
        try:
            for _ in range(WARM_UP):
                call()
            torch.cuda.synchronize()
            times[name] = []
        except Exception as error:  # a variant that does not run is a line of the table
            errors[name] = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"
    for _ in range(rounds):
        for name in times:
            times[name].append(time_ms(calls[name]))
    found = [
        {"case": case.name, "variant": name, "bytes": case.moved_bytes, "ms": taken} for name, taken in times.items()
    ]
    return found + [{"case": case.name, "variant": name, "error": text} for name, text in errors.items()]


def lines(found: list[dict[str, Any]]) -> list[list[str]]:
    """The lines of the table for one case."""
    medians = {each["variant"]: statistics.median(each["ms"]) for each in found if "ms" in each}
    rows = []
    for each in found:
        name = each["variant"]
        if "error" in each:
            rows.append([each["case"], name, each["error"], "", "", ""])
            continue
        spread = f"{medians[name]:.3f} ({min(each['ms']):.3f}..{max(each['ms']):.3f})"
        ratio = f"{medians[name] / medians['fxzero']:.2f}" if "fxzero" in medians else ""
        share = f"{medians['copy'] / medians[name]:.2f}"
        rows.append([each["case"], name, spread, f"{each['bytes'] / medians[name] / 1e6:.0f}", share, ratio])
    return rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--check", action="store_true", help="compare small results with the reference; no timing")
    parser.add_argument("--only", nargs="+", default=[""], metavar="KERNEL", help="names, or how they begin")
    parser.add_argument("--variants", nargs="+", default=["fxzero", "eager", "compiled", "fused", "liger"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a GPU, and there is none; --device cpu --check runs everything but the timing")
    if args.device == "cpu" and not args.check:
        parser.error("--device cpu: nothing is timed on a CPU; add --check")
    return args


def main() -> None:
    """Runs all cases, prints one table and writes it as JSON."""
    args = arguments()
    rows: list[list[str]] = []
    found: list[dict[str, Any]] = []
    for case in cases_of(args):
        if args.check:
            rows += check(case, args.variants)
            continue
        found += measure(case, args.variants, args.rounds)
        rows += lines([each for each in found if each["case"] == case.name])
    headers = (
        ["kernel", "variant", "off by", ""]
        if args.check
        else ["kernel", "variant", "ms", "GB/s", "of a copy", "/ fxzero"]
    )
    print(tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github"))
    if args.check and args.device == "cpu":
        print(f"Kernels in Triton's interpreter: {launch.interpreted()}. Times need a GPU.")
    if args.json:
        name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "cases": found, "rows": rows}))
    sys.exit(any("FAILED" in cell for row in rows for cell in row))


if __name__ == "__main__":
    main()
