"""Editing with moves off the device: a launch with its wait, as one."""

from __future__ import annotations

from torch import fx

from fxzero.graph.edit import Editor
from fxzero.graph.swap_ops import swap_in, swap_out, swap_wait


def store(editor: Editor, x: fx.Node, tier: str, *, stem: str) -> fx.Node:
    """Copy a value of the device to a tier, where the editor stands; returns the wait, which is on that tier."""
    sharding = x.meta.get("sharding")
    launch = editor.call(swap_out, x, tier, name=f"{stem}_out", sharding=sharding)
    wait = editor.call(swap_wait, launch, name=f"{stem}_stored", sharding=sharding)
    launch.meta["tier"] = wait.meta["tier"] = tier
    return wait


def take_in(editor: Editor, stored: fx.Node, *, stem: str) -> fx.Node:
    """Bring a value of a tier to the device of the graph; returns the wait, which may be read."""
    sharding = stored.meta.get("sharding")
    launch = editor.call(swap_in, stored, name=f"{stem}_in", sharding=sharding)
    return editor.call(swap_wait, launch, name=f"{stem}_here", sharding=sharding)
