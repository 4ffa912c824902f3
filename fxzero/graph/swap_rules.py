"""The rule of a step graph whose tensors leave the device: moves are waited for, and read where they are."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fxzero.graph.rules import Context, Violation, equation
from fxzero.graph.step_graph import STATE_KINDS, first_argument, yields_tensor
from fxzero.graph.swap_ops import DEVICE, TIERS, is_launch, is_wait, swap_in, swap_out, tier_of, wait_of


def check_swaps(context: Context) -> Iterator[Violation]:
    """Each move is waited for once; a value is read where it is; no state is read after its next value is stored."""
    for node in context.calls:
        if is_launch(node):
            yield from _check_launch(node)
        elif is_wait(node):
            if not is_launch(first_argument(node)):
                yield Violation(node, "a move that it waits for", f"%{first_argument(node)}", "remove the wait")
            elif tier_of(node) != tier_of(first_argument(node)):
                yield Violation(node, f"meta['tier'] of %{first_argument(node)}", tier_of(node), "copy it")
        else:
            yield from _check_reads(node)
    for key, node in context.step.results.items():
        source = context.entries.get(key)
        if key[0] in STATE_KINDS and source is not None and yields_tensor(node):
            yield from _check_stored(context, source, node)


def _check_launch(node: fx.Node) -> Iterator[Violation]:
    out, source = node.target is swap_out, first_argument(node)
    if (out and tier_of(node) != node.args[1]) or tier_of(node) not in ((*TIERS,) if out else (DEVICE,)):
        yield Violation(node, "meta['tier'] of where it moves to", tier_of(node), "let the pass set it")
    if (tier_of(source) == DEVICE) is not out:
        fix = "swap out what is on the device, swap in what is not"
        yield Violation(
            node, "the device" if out else "a tier to read from", f"%{source.name} on {tier_of(source)}", fix
        )
    if [is_wait(user) for user in node.users] != [True]:
        got = ", ".join(f"%{user.name}" for user in node.users) or "none"
        yield Violation(node, "its one wait as only reader", got, "let all readers read the wait")


def _check_reads(node: fx.Node) -> Iterator[Violation]:
    """An op takes all its tensors where its value is; numbers and scalars of the host may go anywhere."""
    for source in node.all_input_nodes:
        if not yields_tensor(source) or source.meta["val"].dim() == 0:
            continue
        there, here = tier_of(source), tier_of(node)
        if there == "nvme" or there != here:
            got = f"a read of %{source.name}, on {there}, by a node on {here}: {equation(node)}"
            yield Violation(node, "inputs where it computes", got, "move them with swap_in or swap_out")


def _check_stored(context: Context, source: fx.Node, node: fx.Node) -> Iterator[Violation]:
    if tier_of(source) != tier_of(node):
        got = f"%{node.name} on {tier_of(node)}"
        yield Violation(f"result {source.meta['entry'].key}", f"a value on {tier_of(source)}", got, "swap it there")
    if not is_wait(node):
        return
    stored = context.positions[first_argument(node)]
    for reader in source.users:
        if reader.target is swap_in and context.positions[wait_of(reader)] > stored:
            got, fix = f"%{reader.name} after %{first_argument(node).name}", "store it behind the last wait"
            yield Violation(source, "no read after its next value is stored", got, fix)
