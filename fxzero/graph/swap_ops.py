"""The ops that move a tensor off the device and back, and where a value rests.

swap_out(x, tier) -> stored       starts to copy `x` to host memory ("host") or to a file ("nvme")
swap_in(stored) -> x              starts to bring it back, into new memory of the device
swap_wait(moved) -> moved         the copy is done: what `swap_out` read may die, what `swap_in` made may be read

A launch is read by its wait alone, as a collective is. What a `swap_out` yields, and an input that rests on a tier,
carries `meta["tier"]`; a value without it is on the device. On the host ops can compute (an update that runs there);
what is on nvme can only be swapped in. `meta["val"]` has the device of the step wherever the value is: only the tier
says where. Called as ops, outside of a program, they copy on the device. Source of the idea: ZeRO-Infinity
(Rajbhandari et al., 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

TIERS = ("host", "nvme")
DEVICE = "device"
FILE_BLOCK_BYTES = 4096  # what direct I/O reads and writes at least

_LIBRARY = torch.library.Library("fxzero", "FRAGMENT")
_LIBRARY.define("swap_out(Tensor x, str tier) -> Tensor")
_LIBRARY.define("swap_in(Tensor stored) -> Tensor")
_LIBRARY.define("swap_wait(Tensor(a) moved) -> Tensor(a)")


@torch.library.impl(_LIBRARY, "swap_out", "CompositeExplicitAutograd")
def _swap_out(x: torch.Tensor, tier: str) -> torch.Tensor:
    return x.clone()


@torch.library.impl(_LIBRARY, "swap_in", "CompositeExplicitAutograd")
def _swap_in(stored: torch.Tensor) -> torch.Tensor:
    return stored.clone()


@torch.library.impl(_LIBRARY, "swap_wait", "CompositeExplicitAutograd")
def _swap_wait(moved: torch.Tensor) -> torch.Tensor:
    return moved


@torch.library.register_fake("fxzero::swap_out", lib=_LIBRARY)
def _swap_out_fake(x: torch.Tensor, tier: str) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("fxzero::swap_in", lib=_LIBRARY)
def _swap_in_fake(stored: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(stored)


swap_out = torch.ops.fxzero.swap_out.default
swap_in = torch.ops.fxzero.swap_in.default
swap_wait = torch.ops.fxzero.swap_wait.default

OPS = (swap_out, swap_in, swap_wait)


def is_launch(node: fx.Node) -> bool:
    """Whether a node starts to move a tensor."""
    return node.op == "call_function" and node.target in (swap_out, swap_in)


def is_wait(node: fx.Node) -> bool:
    """Whether a node waits until a tensor has been moved."""
    return node.op == "call_function" and node.target is swap_wait


def wait_of(launch: fx.Node) -> fx.Node:
    """The node that waits for a launch."""
    return next(user for user in launch.users if is_wait(user))


def tier_of(node: fx.Node) -> str:
    """Where the value of a node is: "device", "host" or "nvme"."""
    return str(node.meta.get("tier", DEVICE))


def is_off_device(node: fx.Node) -> bool:
    """Whether a value takes no memory of the device."""
    return "tier" in node.meta


def swapped_bytes(nodes: Sequence[fx.Node]) -> dict[tuple[str, str], int]:
    """(tier, "out" or "in") -> bytes that these calls move in one run; to and from files, in whole blocks."""
    total: dict[tuple[str, str], int] = {}
    for node in nodes:
        if is_launch(node):
            source: Any = node.args[0]
            out = node.target is swap_out
            key = (tier_of(node if out else source), "out" if out else "in")
            val = node.meta["val"]
            size = val.numel() * val.element_size()
            if key[0] == "nvme":
                size = -(-size // FILE_BLOCK_BYTES) * FILE_BLOCK_BYTES
            total[key] = total.get(key, 0) + size
    return total
