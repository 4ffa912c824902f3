"""When the tensors of a block are alive, for each answer to its problem: on the program that keeps everything.

The places are those of the program that the recipe makes when nothing is decided; the nodes of the captured step keep
their names there. What an answer changes is an estimate only in that the other passes might order things otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fxzero.cost.memory import memory_timeline
from fxzero.decide.activations import Activations, Block, Option
from fxzero.decide.frontier import Choice
from fxzero.graph import StepGraph
from fxzero.graph.step_graph import is_getitem, is_view, num_bytes
from fxzero.passes.recompute_pointwise import backward_readers


@dataclass(frozen=True)
class Interval:
    """Bytes that are alive from one place of the program to another, both included."""

    start: int
    end: int
    size_bytes: int


class Lifetimes:
    """Intervals of tensors, by their place in a program.

    Args:
        activations: of the captured step.
        program: what the recipe made of it, with nothing decided.

    Attributes:
        alive: bytes at each place of that program, state included.
    """

    def __init__(self, activations: Activations, program: StepGraph) -> None:
        self.activations = activations
        self._place = {node.name: place for place, node in enumerate(program.graph.nodes)}
        self.alive = memory_timeline(program).total.astype(float)
        self._members: dict[fx.Node, list[fx.Node]] = {}
        for node, root in activations.root.items():
            self._members.setdefault(root, []).append(node)

    def change(self, block: Block, choice: Choice, instead_of: Choice) -> dict[int, float]:
        """Place -> by how much more is alive from there on, with one answer instead of another."""
        change: dict[int, float] = {}
        for sign, answer in ((1, choice), (-1, instead_of)):
            for interval in self.intervals(block, answer):
                change[interval.start] = change.get(interval.start, 0) + sign * interval.size_bytes
                change[interval.end + 1] = change.get(interval.end + 1, 0) - sign * interval.size_bytes
        return {place: size for place, size in sorted(change.items()) if size}

    def intervals(self, block: Block, choice: Choice) -> Iterator[Interval]:
        """The lives of a block's tensors and of their copies in backward."""
        made = self._made(block, choice)
        copies, kept = self._uses_in_backward(block, made)
        for node, places in copies.items():
            yield Interval(made[node], max(places), num_bytes(node.meta["val"]))
        options = {block.roots[s]: block.problem.storages[s][o] for s, o in choice.kept}
        for root in block.roots:
            if root.name in self._place:
                yield from self._life(root, options.get(root), kept.get(root, []))
        for root, places in kept.items():  # of other blocks, and free already when a copy reads it
            if root in self.activations.fixed and root.name in self._place:
                last = max(self._last_in_forward(root), self._last_in_backward(root))
                if max(places) > last:
                    yield Interval(last + 1, max(places), num_bytes(root.meta["val"]))

    def _life(self, root: fx.Node, option: Option | None, places: list[int]) -> Iterator[Interval]:
        """Of memory that backward needs at these places, carried there as the option says."""
        size = num_bytes(root.meta["val"])
        start, forward_end = self._place[root.name], self._last_in_forward(root)
        if option is None or option.name == "keep" or not places:
            yield Interval(start, max(forward_end, *places, start), size)
            return
        yield Interval(start, forward_end, size)
        yield Interval(forward_end + 1, max(min(places), forward_end), option.kept_bytes)
        yield Interval(min(places), max(places), size)

    def _uses_in_backward(
        self, block: Block, made: dict[fx.Node, int]
    ) -> tuple[dict[fx.Node, list[int]], dict[fx.Node, list[int]]]:
        """Where backward needs the memory of each copy (its first place included), and the memory of forward."""
        copies: dict[fx.Node, list[int]] = {}
        kept: dict[fx.Node, list[int]] = {}
        copy_of: dict[fx.Node, fx.Node | None] = {}  # value had again -> the copy whose memory it lives in

        def use(value: fx.Node, place: int) -> None:
            copy = copy_of.get(value)
            if copy is not None:
                copies[copy].append(place)
            elif value in self.activations.root:
                kept.setdefault(self.activations.root[value], []).append(place)

        for node, place in made.items():
            is_own = self.activations.root[node] is node
            copy_of[node] = node if is_own else copy_of.get(node.all_input_nodes[0])
            if is_own:
                copies[node] = [place]
            for source in node.all_input_nodes:
                use(source, place)
        for index, node in enumerate(block.nodes):
            if block.problem.values[index].read:
                for place in self._places_in_backward(node):
                    use(node, place)
        return copies, kept

    def _made(self, block: Block, choice: Choice) -> dict[fx.Node, int]:
        """What is had again, in forward order -> the place of its copy: before the first that reads it."""
        again = [block.nodes[index] for index in choice.again]
        made: dict[fx.Node, int] = {}
        for node in reversed(again):
            places = [made[user] for user in node.users if user in made]
            places += [p for user in backward_readers(node) if (p := self._place.get(user.name)) is not None]
            if places:
                made[node] = min(places)
        return {node: made[node] for node in again if node in made}

    def _places_in_backward(self, node: fx.Node) -> list[int]:
        """Where backward reads a value, or a view that it makes of it."""
        places = []
        readers = backward_readers(node)
        while readers:
            reader = readers.pop()
            if reader.name in self._place:
                places.append(self._place[reader.name])
            if is_view(reader) or is_getitem(reader):
                readers += reader.users
        return places

    def _last_in_forward(self, root: fx.Node) -> int:
        users = [user for member in self._members[root] for user in member.users]
        names = [n.name for n in (root, *users) if n.meta.get("phase") != "backward"]
        return max(self._place[name] for name in names if name in self._place)

    def _last_in_backward(self, root: fx.Node) -> int:
        read = [member for member in self._members[root] if member not in self.activations.free]
        return max((place for member in read for place in self._places_in_backward(member)), default=0)
