"""What matrix products and attention reach, over sizes and dtypes, and the curves that go through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fxzero.calibrate.timing import Clock, Measured
from fxzero.cost.hardware import MatrixRate

aten = torch.ops.aten

LARGE = {"cpu": 512, "cuda": 4096}
SKINNY = {"cpu": (32, 64, 128, 256), "cuda": (64, 256, 1024)}
SEQUENCES = {"cpu": (64, 128, 256, 512), "cuda": (256, 1024, 4096)}
HEADS, WIDTHS = 8, (32, 64)
TURNS = 8  # sets of inputs that calls take turns with: a program does not repeat itself in a cache
SLOW_FLOPS_S = 5e9  # below this a dtype has no matrix unit of its own, and one size of product tells its rate
PROBE = 128


@dataclass(frozen=True)
class Case:
    """One product.

    Args:
        name: of its class.
        case: words for it.
        flops: operations, as torch counts them.
        smallest: its smallest size, see `MatrixRate`.
        call: runs it.
    """

    name: str
    case: str
    flops: float
    smallest: int
    call: Callable[[int], object]


def matrix_cases(device: torch.device, *, fast: bool = False) -> list[Case]:
    """What is timed, in the dtype that the device is used with."""
    return list(_cases(device, fast=fast))


def matrix_rates(
    timed: Mapping[Case, float], clock: Clock, *, fast: bool = False
) -> tuple[dict[torch.dtype, float], dict[str, MatrixRate], list[Measured]]:
    """Peak by dtype, the part of it that each class reaches, and what these are made of.

    The peak of the dtype that classes were timed in is what the fastest of them tends to. Other dtypes count by one
    large product.
    """
    classes: dict[str, list[tuple[Case, float]]] = {}
    for case, seconds in timed.items():
        classes.setdefault(case.name, []).append((case, seconds))
    fits = {name: _fit(of_class) for name, of_class in classes.items()}
    peak = max(rate for rate, _ in fits.values())
    rates = {name: MatrixRate(rate / peak, half_dim) for name, (rate, half_dim) in fits.items()}
    rows = [
        Measured(f"matrix.classes.{name}", case.case, seconds, case.flops / (peak * rates[name].part(case.smallest)))
        for name, of_class in classes.items()
        for case, seconds in of_class
    ]
    main = _main_dtype(clock.device)
    flops = {main: peak}
    for dtype in (dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if dtype is not main):
        size, seconds = _probe(clock, dtype, fast=fast)
        flops[dtype] = 2 * size**3 / seconds / rates["matmul"].part(size)
        predicted = 2 * size**3 / (flops[dtype] * rates["matmul"].part(size))
        name = str(dtype).removeprefix("torch.")
        rows.append(Measured(f"matrix.flops_s.{name}", f"mm {size} x {size} x {size}", seconds, predicted))
    return flops, rates, rows


def _cases(device: torch.device, *, fast: bool) -> Iterator[Case]:
    large = 128 if fast else LARGE[device.type]
    for smallest in (32, 64) if fast else (*SKINNY[device.type], large):
        for m, k, n in {(large, smallest, large), (large, large, smallest), (smallest, large, large)}:
            call = _turns(lambda a, b: aten.mm(a, b.t()), [(m, k), (n, k)], device)
            yield Case("matmul", f"mm {m} x {k} x {n}", 2.0 * m * k * n, smallest, call)
    for size in (32, 64) if fast else SKINNY[device.type][1:]:
        call = _turns(aten.bmm, [(HEADS, size, size)] * 2, device)
        yield Case("batched_matmul", f"bmm {HEADS} x {size}^3", 2.0 * HEADS * size**3, size, call)
    for sequence in (32, 64) if fast else SEQUENCES[device.type]:
        for width in WIDTHS:
            yield from _attention(device, sequence, width)


def _main_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _turns(call: Callable[..., Any], shapes: list[tuple[int, ...]], device: torch.device) -> Callable[[int], object]:
    """The call on random inputs of these shapes, other ones each time; what it makes lives on until its next turn."""
    dtype = _main_dtype(device)
    inputs = [[torch.randn(shape, device=device).to(dtype) for shape in shapes] for _ in range(TURNS)]
    kept: list[Any] = [None] * TURNS

    def turn(number: int) -> None:
        kept[number % TURNS] = call(*inputs[number % TURNS])

    return turn


def _attention(device: torch.device, sequence: int, width: int) -> Iterator[Case]:
    """Causal attention, counted whole as torch counts it."""
    shape = (1, HEADS, sequence, width)
    q, k, v, g = (torch.randn(shape, device=device).to(_main_dtype(device)) for _ in range(4))
    product = 2.0 * HEADS * sequence * sequence * width
    if device.type == "cuda":
        out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        forward, backward = aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_backward
        saved = (*out[:6], 0.0, True, *out[6:8])
    else:
        forward = aten._scaled_dot_product_flash_attention_for_cpu
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        saved = (*forward(q, k, v, 0.0, True), 0.0, True)
    case = f"{HEADS} heads of {width}, sequence {sequence}"
    yield Case(
        "attention", case, 2 * product, sequence, _turns(lambda *qkv: forward(*qkv, 0.0, True), [shape] * 3, device)
    )
    yield Case("attention_backward", case, 5 * product, sequence, lambda _: backward(g, q, k, v, *saved))


def _fit(timed: list[tuple[Case, float]]) -> tuple[float, float]:
    """(rate of large products, half_dim): 1 / rate is a line in 1 / smallest. Least squares of relative errors."""
    inverse = np.array([seconds / case.flops for case, seconds in timed])
    matrix = np.array([[1.0, 1.0 / case.smallest] for case, _ in timed]) / inverse[:, None]
    (constant, slope), *_ = np.linalg.lstsq(matrix, np.ones(len(timed)), rcond=None)
    if constant <= 0 or slope <= 0:  # no dependence that could be told from noise
        return float(1 / np.median(inverse)), 0.0
    return float(1 / constant), float(slope / constant)


def _probe(clock: Clock, dtype: torch.dtype, *, fast: bool) -> tuple[int, float]:
    """(size, seconds) of a large square product, or of a small one where that is slow already."""
    small = torch.randn(PROBE, PROBE, device=clock.device).to(dtype)
    seconds = clock.seconds(lambda _: aten.mm(small, small))
    if fast or 2 * PROBE**3 / seconds < SLOW_FLOPS_S:
        return PROBE, seconds
    size = LARGE[clock.device.type]
    large = torch.randn(size, size, device=clock.device).to(dtype)
    return size, clock.seconds(lambda _: aten.mm(large, large))
