"""The answers for activations: those of each block's frontier, and what they come to for passes and for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import fx

from fxzero.cost.compute import compute_seconds
from fxzero.cost.hardware import Hardware
from fxzero.decide.activations import Activations, Block, Problem
from fxzero.decide.combination import Alternative
from fxzero.decide.decision import ACTIVATIONS, RECOMPUTED, Group, where_of
from fxzero.decide.frontier import Choice, frontier
from fxzero.decide.lifetimes import Lifetimes
from fxzero.graph import StepGraph
from fxzero.graph.blocks import list_of
from fxzero.graph.swap_ops import TIERS
from fxzero.recipe import Decided

_NEVER_S = 1e3  # more than any step takes


class ActivationAnswers:
    """For each block of a captured step, the answers of its frontier, the fastest first.

    Args:
        activations: of the captured step.
        program: what the recipe makes of it with nothing decided.
        host_is_bounded: answers that leave the host alone are wanted, too.
    """

    def __init__(self, activations: Activations, program: StepGraph, *, host_is_bounded: bool = False) -> None:
        self.activations = activations
        self.choices = [frontier(block.problem) for block in activations.blocks]
        if host_is_bounded and len(activations.tiers) > 1:
            others = [frontier(_without_host(block.problem)) for block in activations.blocks]
            self.choices = [(*own, *other) for own, other in zip(self.choices, others, strict=True)]
        lifetimes = Lifetimes(activations, program)
        self.alternatives = [
            [
                Alternative(
                    choice.seconds - choices[0].seconds,
                    lifetimes.change(block, choice, choices[0]),
                    _host_bytes(block, choice),
                )
                for choice in choices
            ]
            for block, choices in zip(activations.blocks, self.choices, strict=True)
        ]

    def least(self) -> list[int]:
        """The answers that keep the least in every repeated block; of these, those that take the least of the host."""
        kept = [
            [(choice.kept_bytes, _host_bytes(block, choice)) for choice in choices]
            for block, choices in zip(self.activations.blocks, self.choices, strict=True)
        ]
        pairs = zip(self.activations.blocks, kept, strict=True)
        return [sizes.index(min(sizes)) if block.name else 0 for block, sizes in pairs]

    def decided(self, numbers: Sequence[int]) -> Decided:
        """What passes are told, for the number of an answer a block; 0 tells nothing."""
        answers = [(block, after) for block, before, after in self._changes(numbers) if after is not before]
        return Decided(
            recomputed=tuple(name for block, choice in answers for name in names_of(block, choice)),
            offloaded=tuple(
                (root.name, tier)
                for tier in self.activations.tiers
                for block, choice in answers
                for root in _kept_as(block, choice, tier)
            ),
        )

    def groups(self, numbers: Sequence[int]) -> list[Group]:
        """What that is, for people."""
        changes = list(self._changes(numbers))
        return groups_of(changes, hardware=self.activations.hardware, free=self.activations.free)

    def _changes(self, numbers: Sequence[int]) -> Iterator[tuple[Block, Choice, Choice]]:
        """(block, its fastest answer, the one of that number)."""
        for block, choices, number in zip(self.activations.blocks, self.choices, numbers, strict=True):
            yield block, choices[0], choices[number]


def _without_host(problem: Problem) -> Problem:
    """The same problem, options at their places, with the host's too dear to be chosen."""
    storages = tuple(
        tuple(
            replace(o, kept_bytes=options[0].kept_bytes, seconds=_NEVER_S) if o.name == "host" else o for o in options
        )
        for options in problem.storages
    )
    return replace(problem, storages=storages)


def _host_bytes(block: Block, choice: Choice) -> int:
    options = block.problem.storages
    return sum(options[s][0].kept_bytes for s, option in choice.kept if options[s][option].name == "host")


def names_of(block: Block, choice: Choice) -> list[str]:
    """What `recompute_chosen` is told: nodes to have again, and masks to keep as booleans."""
    again = [block.nodes[index].name for index in choice.again]
    return again + [root.name for root in _kept_as(block, choice, "bool")]


def _kept_as(block: Block, choice: Choice, name: str) -> list[fx.Node]:
    return [block.roots[s] for s, option in choice.kept if block.problem.storages[s][option].name == name]


def groups_of(changes: list[tuple[Block, Choice, Choice]], *, hardware: Hardware, free: set[fx.Node]) -> list[Group]:
    """What an answer a block means, by the modules that it is about."""
    copies: dict[str, int] = {}
    touched: dict[tuple[str, str], set[str]] = {}
    saved: dict[tuple[str, str], int] = {}
    seconds: dict[tuple[str, str], float] = {}
    for block, _, _ in changes:
        copies[list_of(block.name)] = copies.get(list_of(block.name), 0) + 1
    for block, before, after in changes:
        if before is after:
            continue
        for storage, was, now in _changed(before, after):
            options = block.problem.storages[storage]
            tier = options[now].name if now is not None and options[now].name in TIERS else None
            key = (_where(block.roots[storage], block), RECOMPUTED if tier is None else f"offloaded to {tier}")
            sizes = [0 if option is None else options[option].kept_bytes for option in (was, now)]
            saved[key] = saved.get(key, 0) + sizes[0] - sizes[1]
            if tier is not None and now is not None:
                seconds[key] = seconds.get(key, 0.0) + options[now].seconds
                touched.setdefault(key, set()).add(block.name)
        for index in after.again:
            node = block.nodes[index]
            key = (_where(node, block), RECOMPUTED)
            if node not in free:
                seconds[key] = seconds.get(key, 0.0) + compute_seconds(node, hardware)
                touched.setdefault(key, set()).add(block.name)
    return [
        Group(
            where,
            ACTIVATIONS,
            how,
            len(names),
            copies[list_of(min(names))],
            saved.get((where, how), 0),
            seconds[where, how],
        )
        for (where, how), names in touched.items()
    ]


def _changed(before: Choice, after: Choice) -> Iterator[tuple[int, int | None, int | None]]:
    """(storage, its option before, its option after) where these differ; None: it is not kept."""
    was, now = dict(before.kept), dict(after.kept)
    for storage in sorted(was.keys() | now.keys()):
        if was.get(storage) != now.get(storage):
            yield storage, was.get(storage), now.get(storage)


def _where(node: fx.Node, block: Block) -> str:
    return where_of(str(node.meta["module"]), block.name)
