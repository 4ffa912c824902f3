"""How far a kernel may be from its formula computed in fp64.

[Note: tolerance]
A value is a sum of terms, formed in fp32 and rounded once to its dtype. Each of n roundings in fp32 moves it by at most
eps32 times the sum of the terms' absolute values, its magnitude; the last one by eps / 2 of the value itself, or by eps
where the interpreter cuts bf16 off instead of rounding it. Below the least normal number that step is absolute. So

    |got - want| <= eps(dtype) |want| + n eps(fp32) magnitude + eps(dtype) least_normal(dtype)

The caller gives n, as the length of the longest chain of roundings, and the magnitude.
"""

from __future__ import annotations

import torch

EPS32 = torch.finfo(torch.float32).eps


def assert_close(
    got: torch.Tensor, want: torch.Tensor, *, roundings: float, magnitude: torch.Tensor | float = 0.0, name: str = ""
) -> None:
    """`got` is as near to `want` as its dtype lets it be ([Note: tolerance]).

    Args:
        got: what the kernel wrote.
        want: the same in fp64.
        roundings: n of the note.
        magnitude: sum of the absolute values of the terms; |want| where that is greater.
        name: of the value, for the message.
    """
    want = want.cpu()
    assert got.shape == want.shape, f"{name}: {list(got.shape)} instead of {list(want.shape)}"
    info = torch.finfo(got.dtype)
    size = torch.maximum(want.abs(), torch.as_tensor(magnitude, dtype=torch.float64).cpu().expand(want.shape))
    bound = info.eps * want.abs() + roundings * EPS32 * size + info.eps * info.smallest_normal
    off = (got.cpu().double() - want).abs()
    wrong = ~(off <= bound)
    if wrong.any():
        worst = (off / bound).nan_to_num(nan=torch.inf).argmax()
        at, limit = off.flatten()[worst].item(), bound.flatten()[worst].item()
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} differ, the worst by {at:.3g} > {limit:.3g}"
        )
