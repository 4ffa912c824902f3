"""The calls of backward that differentiate some calls of forward, found by what they compute.

[Note: gradients by value]
Some calls of forward yield y from inputs. Their backward are calls that follow from dy, the gradient of y, the inputs
and the values in between, and from nothing else. All that follows from these is run on small tensors ([Note: proof by
values]); a gradient is a call that yields what the kernel's reference does, or a few that yield its parts, where
torch has added them one by one to what else reaches the same input. What is between them must die with them: a value
that anything else reads leaves all of it as it is. dy is looked for among what reads the values in between.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxzero.graph.small_values import NotSmall, SmallRun, agree, can_run, form_of
from fxzero.graph.step_graph import is_getitem, tensor_val, yields_tensor

aten = torch.ops.aten

_MOST_CALLS = 200  # that are looked at for one backward
_MOST_PARTS = 3  # of one gradient

Reference = Callable[..., Sequence[torch.Tensor]]


class NotFused(Exception):
    """Why calls stay as they are."""


@dataclass(frozen=True)
class Calls:
    """Some calls of forward.

    Args:
        inputs: what they read, the value whose rows all others have first.
        inner: the calls, in program order, without the last.
        output: the last one.
    """

    inputs: tuple[fx.Node, ...]
    inner: tuple[fx.Node, ...]
    output: fx.Node

    @property
    def known(self) -> set[fx.Node]:
        """Inputs and calls."""
        return {*self.inputs, *self.inner, self.output}


@dataclass(frozen=True)
class Gradients:
    """Where the gradients of the inputs of some calls are.

    Args:
        of_output: dy; None where backward reads nothing of the calls.
        of_inputs: for each input, the calls whose sum is its gradient; none where it has no gradient.
    """

    of_output: fx.Node | None
    of_inputs: tuple[tuple[fx.Node, ...], ...]


@dataclass
class Prover:
    """Compares calls with references, each distinct form once.

    Args:
        position: node -> its place in the program.
    """

    position: dict[fx.Node, float]
    _known: dict[Hashable, Any] = field(default_factory=dict)

    def computes(self, calls: Calls, reference: Reference, form: Hashable) -> bool:
        """Whether calls yield what a reference of their inputs does.

        Args:
            calls: some.
            reference: of the inputs' values.
            form: what the reference depends on.
        """
        lines = [*calls.inner, calls.output]

        def compare() -> bool:
            small = SmallRun(tensor_val(calls.inputs[0]).shape)
            given = small.draw(*calls.inputs)
            small.run(lines)
            return agree(small.values.get(calls.output), reference(*given)[0])

        return bool(self._once((form, "forward", form_of(lines, calls.inputs)), compare, False))

    def gradients(self, calls: Calls, reference: Reference, form: Hashable) -> Gradients:
        """The calls that yield the gradients of the inputs.

        Args:
            calls: some, of forward.
            reference: of dy and the inputs' values; one gradient for each input.
            form: what the reference depends on.

        Raises:
            NotFused: if something else reads a value in between, or no calls yield the gradients.
        """
        readers = [user for node in calls.inner for user in node.users if user not in calls.known]
        if not readers:
            return Gradients(None, ((),) * len(calls.inputs))
        returned = next((user for user in readers if user.op == "output"), None)
        if returned is not None:
            raise NotFused("a value inside of it is returned")
        reason = NotFused(f"%{readers[0]} reads a value inside of it, and no gradient of its output was found")
        for dy in self._candidates(calls, readers):
            lines = self.follows(calls, dy)
            found = self.by_value(lines, (dy, *calls.inputs), reference, form, beside=calls)
            try:
                _check_dies(calls, set(lines), found)
            except NotFused as why:
                reason = why
                continue
            return Gradients(dy, found)
        raise reason

    def follows(self, calls: Calls, *more: fx.Node) -> list[fx.Node]:
        """The calls of backward that follow from some calls, their inputs and further values only, in order."""
        known, found = {*calls.known, *more}, set[fx.Node]()
        queue = deque(user for source in (*more, *sorted(calls.known, key=self._place)) for user in source.users)
        while queue and len(found) < _MOST_CALLS:
            node = queue.popleft()
            if node in known or node in found or node.meta.get("phase") != "backward" or not can_run(node):
                continue
            if all(source in known or source in found for source in node.all_input_nodes):
                found.add(node)
                queue.extend(node.users)
        return sorted(found, key=self._place)

    def by_value(
        self,
        lines: list[fx.Node],
        given: tuple[fx.Node, ...],
        reference: Reference,
        form: Hashable,
        *,
        beside: Calls | None = None,
        like: tuple[fx.Node, ...] | None = None,
    ) -> tuple[tuple[fx.Node, ...], ...]:
        """For each value of a reference, the calls whose sum it is; none where there are no such calls.

        Args:
            lines: the calls, in order.
            given: what the reference takes.
            reference: of these values.
            form: what it depends on.
            beside: further calls, whose values the lines read.
            like: what the found values have dtype and shape of; the given ones but the first, if not said.
        """
        like = given[1:] if like is None else like
        before = [] if beside is None else [*beside.inner, beside.output]
        open_ends = tuple(any(_is_sum(user) and user not in lines for user in node.users) for node in lines)
        kinds = tuple(tensor_val(node).dtype for node in (*lines, *like) if yields_tensor(node))

        def compare() -> tuple[tuple[int, ...], ...]:
            small = SmallRun(tensor_val(like[0]).shape)
            expected = reference(*small.draw(*given))
            small.run([*before, *lines])
            values = [small.values.get(node) for node in lines]
            return tuple(_places(want, lines, values, one, open_ends) for one, want in zip(like, expected, strict=True))

        key = (form, "backward", form_of([*before, *lines], given), kinds, open_ends)
        places = self._once(key, compare, ((),) * len(like))
        return tuple(tuple(lines[place] for place in found) for found in places)

    def _candidates(self, calls: Calls, readers: list[fx.Node]) -> Iterator[fx.Node]:
        """What may be the gradient of the output, the likeliest first."""
        beside = {*calls.known, *self.follows(calls)}
        sources = {source for reader in readers for source in reader.all_input_nodes if source not in beside}
        last, val = min(sources, key=self._place, default=None), tensor_val(calls.output)
        while last is not None and yields_tensor(last):
            if tensor_val(last).shape == val.shape and tensor_val(last).dtype == val.dtype:
                yield last
            last = _before(last, beside)

    def _place(self, node: fx.Node) -> float:
        return self.position[node]

    def _once(self, key: Hashable, compare: Callable[[], Any], otherwise: Any) -> Any:
        if key not in self._known:
            try:
                self._known[key] = compare()
            except NotSmall:
                self._known[key] = otherwise
        return self._known[key]


def _before(node: fx.Node, beside: set[fx.Node]) -> fx.Node | None:
    """What a cast, or a product with a value of the calls, is made of."""
    if node.target is aten._to_copy.default:
        return node.all_input_nodes[0]
    others = [source for source in node.all_input_nodes if source not in beside]
    return others[0] if node.target is aten.mul.Tensor and len(others) == 1 else None


def _places(
    want: torch.Tensor,
    lines: list[fx.Node],
    values: list[Any],
    like: fx.Node,
    open_ends: tuple[bool, ...],
) -> tuple[int, ...]:
    """The first call that yields a value, or those that yield its parts."""
    val = tensor_val(like)
    alike = [
        place
        for place, node in enumerate(lines)
        if not is_getitem(node) and yields_tensor(node) and isinstance(values[place], torch.Tensor)
        and tensor_val(node).dtype == val.dtype and tensor_val(node).shape == val.shape
    ]  # fmt: skip
    for place in alike:
        if agree(values[place], want):
            return (place,)
    ends = [place for place in alike if open_ends[place]]
    for count in range(2, _MOST_PARTS + 1):
        for parts in itertools.combinations(ends, count):
            if agree(sum(values[place] for place in parts), want):
                return parts
    return ()


def _is_sum(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and not node.kwargs and len(node.all_input_nodes) == 2


def _check_dies(calls: Calls, lines: set[fx.Node], found: tuple[tuple[fx.Node, ...], ...]) -> None:
    """Nothing needs the values in between once the gradients that were found come from elsewhere.

    Raises:
        NotFused: with what still reads one.
    """
    replaced = {node for parts in found for node in parts}
    seen = set(calls.known)
    stack = [(node, user) for node in calls.inner for user in node.users]
    while stack:
        node, user = stack.pop()
        if user in seen or user in replaced:
            continue
        seen.add(user)
        if user not in lines:
            raise NotFused(f"a value inside of it, %{node}, is also read by %{user}")
        stack += [(user, further) for further in user.users]
    for parts in found:
        if len(parts) > 1:
            sum_of(parts)


@dataclass(frozen=True)
class Sum:
    """A sum in which the parts of a gradient are, with what else is added to them.

    Args:
        root: the call that yields it.
        rest: what else goes in, in order.
    """

    root: fx.Node
    rest: tuple[fx.Node, ...]


def sum_of(parts: Sequence[fx.Node]) -> Sum:
    """The sum that the parts of a gradient are in.

    Raises:
        NotFused: if they are not added up in one sum that nothing reads half of.
    """
    fault = NotFused(f"the parts of a gradient, %{parts[0]} and %{parts[-1]}, are not in one sum")
    if any(len(part.users) != 1 for part in parts):
        raise fault
    for root in _sums_above(parts[-1]):
        leaves = _leaves(root, parts, root)
        if all(leaves.count(part) == 1 for part in parts):
            return Sum(root, tuple(leaf for leaf in leaves if leaf not in parts))
    raise fault


def _sums_above(node: fx.Node) -> Iterator[fx.Node]:
    while len(node.users) == 1 and _is_sum(node := next(iter(node.users))):
        yield node


def _leaves(node: fx.Node, parts: Sequence[fx.Node], root: fx.Node) -> list[fx.Node]:
    """What a sum is made of: a sum below it counts as one where no part is in it, or others read it."""
    if node in parts or not _is_sum(node) or (node is not root and len(node.users) != 1):
        return [node]
    below = [leaf for source in node.all_input_nodes for leaf in _leaves(source, parts, root)]
    return below if any(leaf in parts for leaf in below) else [node]
