"""The lines of a program that move tensors off the device and back.

    act_out = swap_write(act, 'act of layers.0', 'nvme')     launched; `act` may not change until the next line
    act_stored = swap_written(act_out)
    act_in = swap_read(act_stored)
    swap_drop(act_stored)                                    its room is free again, once that has been read
    act_here = swap_loaded(act_in)

State has a home of its own, known by the name of its entry: it is read from there, and what is written goes there. What
one program saves for another is the slot itself: whoever holds it gives its room back. A value that ops of the host
read is a tensor over its room, from `swap_on_host` until `swap_drop`; what they compute comes in by `swap_upload`.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph.step_graph import SAVED, STATE_KINDS, first_argument
from fxzero.graph.storage import InPlace
from fxzero.graph.swap_ops import is_launch, is_off_device, is_wait, swap_in, swap_out, wait_of

SWAPPER_METHODS = ("write", "written", "read", "loaded", "on_host", "upload", "drop")


class SwapLines:
    """What to write for each move of one graph.

    Args:
        step: the graph.
        in_place: its memory.

    Attributes:
        stores: launch that moves out the next value of an input that rests there -> that input.
        drops: node -> lines after it that give room back.
    """

    def __init__(self, step: StepGraph, in_place: InPlace) -> None:
        self.stores = _stores(step)
        self.drops: dict[fx.Node, list[str]] = {}
        nodes = list(step.graph.nodes)
        returned = {in_place.storage[node] for node in step.results.values()}
        handed_on = {node for (kind, _), node in step.results.items() if kind == SAVED}
        self._computed_with: set[fx.Node] = set()
        for launch in step.calls(swap_out):
            wait = wait_of(launch)
            if launch in self.stores or wait in handed_on:
                continue
            if any(user.op == "call_function" and user.target is not swap_in for user in wait.users):
                self._computed_with.add(wait)
            at = max(in_place.last_use[launch], in_place.position[wait])
            last = nodes[-2 if launch in returned else at]  # what is returned may be copied at the end
            self.drops.setdefault(last, []).append(f"swap_drop({self._slot(wait)})")

    def __contains__(self, node: fx.Node) -> bool:
        return is_launch(node) or is_wait(node)

    def line(self, node: fx.Node, args: list[str]) -> str:
        """The line of a launch or a wait.

        Args:
            node: the call.
            args: its arguments as text.
        """
        source = first_argument(node)
        if is_wait(node):
            if source.target is swap_out:
                return f"{self._slot(node)} = swap_written({args[0]})"
            return f"{node.name} = {args[0]}" if _is_uploaded(source) else f"{node.name} = swap_loaded({args[0]})"
        if node.target is swap_in:
            if source.op == "placeholder" and source.meta["entry"].kind != SAVED:
                return f"{node.name} = swap_read({source.meta['entry'].label!r})"
            if _is_uploaded(node):
                return f"{node.name} = swap_upload({args[0]})"
            return f"{node.name} = swap_read({self._slot(source)})"
        state = self.stores.get(node)
        label = f"{source.name} of {source.meta.get('module') or 'the model'}"
        name, home = (label, "") if state is None else (state.meta["entry"].label, f", into={state.name}")
        return f"{node.name} = swap_write({args[0]}, {name!r}, {args[1]}{home})"

    def after(self, node: fx.Node) -> list[str]:
        """What follows a call: the tensor over what it has stored, room that is given back."""
        lines = []
        if node in self._computed_with:
            lines.append(f"{node.name} = swap_on_host({self._slot(node)})")
        return lines + self.drops.get(node, [])

    def _slot(self, wait: fx.Node) -> str:
        return f"{wait.name}_slot" if wait in self._computed_with else wait.name


def _is_uploaded(launch: fx.Node) -> bool:
    """Whether a launch brings in what ops of the host have computed."""
    source = first_argument(launch)
    return launch.target is swap_in and source.op != "placeholder" and not is_wait(source)


def _stores(step: StepGraph) -> dict[fx.Node, fx.Node]:
    inputs: dict[Any, fx.Node] = {n.meta["entry"].key: n for n in step.inputs(*STATE_KINDS) if is_off_device(n)}
    found = ((node, inputs.get(key)) for key, node in step.results.items())
    return {first_argument(node): state for node, state in found if state is not None and is_wait(node)}
