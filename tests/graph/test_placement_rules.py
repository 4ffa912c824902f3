"""The rule 'placements' finds what is planted in a step that is split by hand, and in a row of conversions."""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import fx

from fxzero.graph import Sharding, StateEntry, StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import REPLICATED, Placement, partial, routed, shard
from fxzero.graph.edit import Editor, coordinate
from fxzero.graph.placement_rules import check_placements
from fxzero.graph.rules import Context, Violation
from tests.graph.split_by_hand import split_step
from tests.graph.test_text import blank, end

aten = torch.ops.aten
RANKS = 2
EXCHANGE = "all_to_all_single_default"
GATHER = "all_gather_into_tensor_default"


def conversions() -> StepGraph:
    """Each collective over tp, and values of several kinds, as nobody would write them in one step."""
    editor = blank(x=torch.ones(8, 4), y=torch.ones(8, 4))
    x, _ = editor.step.placeholders

    def put(node: fx.Node, **placements: object) -> fx.Node:
        node.meta["placements"] = placements
        return node

    def call(target: object, *args: object, **placements: object) -> fx.Node:
        return put(editor.call(target, *args), **placements)

    with editor.before(editor.step.output):
        rows = put(editor.local_shard(x, Sharding("tp", RANKS, 8), stem="own"), tp=shard(0))
        rows.meta.pop("sharding")
        found = {"rows": rows}
        launch = call(c10d.all_gather, rows, RANKS, "tp", tp=REPLICATED)
        found["gathered"] = call(c10d.wait, launch, tp=REPLICATED)
        launch = call(c10d.all_to_all, rows, [2, 2], [2, 2], "tp", tp=shard(1))
        found["turned"] = call(c10d.wait, launch, tp=shard(1))
        launch = editor.call(c10d.shift, rows, 1, RANKS, coordinate(editor.step, "tp"), "tp")
        found["shifted"] = editor.call(c10d.wait, launch)
        sums = call(aten.neg.default, x, tp=partial())
        launch = call(c10d.reduce_scatter, sums, "sum", RANKS, "tp", tp=shard(0))
        found["scattered"] = call(c10d.wait, launch, tp=shard(0))
        greatest = call(aten.abs.default, x, tp=partial("max"))
        launch = call(c10d.all_reduce, greatest, "max", "tp", tp=REPLICATED)
        found["greatest"] = call(c10d.wait, launch, tp=REPLICATED)
        mean = call(c10d.all_reduce, rows, "avg", "dp", tp=shard(0))
        found["mean"] = call(c10d.wait, mean, tp=shard(0))
        pair = editor.call(c10d.all_reduce_coalesced, [sums, sums], "sum", "tp")
        parts = [editor.call(operator.getitem, pair, index) for index in range(2)]
        found["first"], found["second"] = (call(c10d.wait, part, tp=REPLICATED) for part in parts)
        halves = call(aten.split.Tensor, rows, 2, tp=(shard(0), REPLICATED))
        found["half"] = call(operator.getitem, halves, 0, tp=shard(0))
    for name, node in found.items():
        node.name = name
    put(x, tp=REPLICATED)
    return end(editor, **found)


@pytest.fixture(scope="module")
def graphs() -> dict[str, StepGraph]:
    return {"split": split_step({"dp": 2, "tp": RANKS}), "conversions": conversions()}


def violation(step: StepGraph) -> Violation | None:
    return next(check_placements(Context(step)), None)


@pytest.mark.parametrize("graph", ["split", "conversions"])
def test_a_sound_graph_keeps_the_rule(graphs: dict[str, StepGraph], graph: str) -> None:
    assert violation(graphs[graph]) is None


@dataclass(frozen=True)
class Fault:
    graph: str
    node: str
    says: str
    plant: Callable[[fx.Node, StepGraph], None]


def lies(placement: object, axis: str = "tp") -> Callable[[fx.Node, StepGraph], None]:
    """Say another placement of a node."""

    def plant(node: fx.Node, step: StepGraph) -> None:
        node.meta["placements"] = {**node.meta.get("placements", {}), axis: placement}

    return plant


def argument(index: int, value: object) -> Callable[[fx.Node, StepGraph], None]:
    return lambda node, step: node.update_arg(index, value)


def rows_over(axis: str) -> Callable[[fx.Node, StepGraph], None]:
    def plant(node: fx.Node, step: StepGraph) -> None:
        node.meta["sharding"] = Sharding(axis, RANKS, 2 * node.meta["val"].shape[0])

    return plant


def reads(name: str) -> Callable[[fx.Node, StepGraph], None]:
    """Let a node take another one."""

    def plant(node: fx.Node, step: StepGraph) -> None:
        other = next(found for found in step.graph.nodes if found.name == name)
        node.replace_input_with(node.all_input_nodes[0], other)

    return plant


def is_kind(kind: str, name: str) -> Callable[[fx.Node, StepGraph], None]:
    """Return a node for another entry, or under another kind."""

    def plant(node: fx.Node, step: StepGraph) -> None:
        step.set_results({(kind, name): node})

    return plant


def says_nothing(node: fx.Node, step: StepGraph) -> None:
    del node.meta["placements"]


def lies_nowhere(node: fx.Node, step: StepGraph) -> None:
    node.meta["placements"] = {}


FAULTS = {
    "axis": Fault("split", "gelu", "placements over axes of the mesh", lies(shard(1), "ep")),
    "a tuple for one": Fault("split", "gelu", "one placement over tp", lies((shard(1),))),
    "one for a tuple": Fault("conversions", "split_tensor", "a tuple of 2 placements", lies(shard(0))),
    "too few": Fault("conversions", "split_tensor", "a tuple of 2 placements", lies((shard(0),))),
    "not a placement": Fault("split", "gelu", "a placement: R, S, P or E", lies("S(1)")),
    "no such kind": Fault("split", "gelu", "a placement: R, S, P or E", lies(Placement("T"))),
    "no such reduction": Fault("split", "gelu", "a reduction in", lies(partial("min"))),
    "no such dim": Fault("split", "gelu", "a dim from 0 to 1", lies(shard(2))),
    "a shard of no dims": Fault("split", "mse_loss", "a tensor that has dims", lies(shard(0))),
    "a shard of a number": Fault("split", "neg", "a tensor, where it is not whole", lies(shard(0))),
    "blocks": Fault("split", "gelu", "equal parts of 3 blocks", lies(shard(1, 3))),
    "no blocks": Fault("split", "gelu", "equal parts of 0 blocks", lies(shard(1, 0))),
    "rows of experts": Fault("split", "gelu", "a buffer of 3 rows", lies(routed(0, room=3, rows=8))),
    "rows of experts of no dim": Fault("split", "gelu", "a dim from 0 to 1", lies(routed(2, room=3, rows=8))),
    "an input by experts": Fault(
        "split", "args_0", "an input whole or in parts over tp", lies(routed(0, room=4, rows=8))
    ),
    "a gather of rows of experts": Fault(
        "split", "down_out", "a value that is partial", lies(routed(0, room=4, rows=8))
    ),
    "rows over tp": Fault("conversions", "half", "a value whole over tp, where its rows", rows_over("tp")),
    "a partial input": Fault("split", "args_0", "an input whole or in parts over tp", lies(partial())),
    "a sum of whole values": Fault("split", "down_out", "a value that is partial over tp", lies(REPLICATED)),
    "a sum of shards": Fault("split", "down_out", "a value that is partial over tp", lies(shard(0))),
    "a sum of no axis": Fault("split", "down_out", "which is R", lies_nowhere),
    "a mean of summands": Fault("split", "down_reduce", "reduced by that", argument(1, "avg")),
    "a sum of maxima": Fault("split", "down_out", "reduced by that", lies(partial("max"))),
    "a sum of norms": Fault("split", "down_out", "reduced by that", lies(partial("norm2"))),
    "a maximum of summands": Fault("conversions", "abs_default", "reduced by that", lies(partial())),
    "a scatter of whole values": Fault("conversions", "neg_default", "a value that is partial", lies(REPLICATED)),
    "a sum of whole values in a bucket": Fault("conversions", "all_reduce_coalesced_default", "partial", reads("x")),
    "a gather of whole values": Fault("conversions", GATHER, "a value that is a shard over tp", reads("x")),
    "a gather of summands": Fault("conversions", GATHER, "a value that is a shard over tp", reads("neg_default")),
    "an all-to-all of whole values": Fault(
        "conversions", "all_to_all_single_default", "a shard or partial", reads("x")
    ),
    "whole values that are passed on": Fault("conversions", "shift_default", "a shard or partial", reads("x")),
    "parts that stay where they are": Fault("conversions", "shifted", "partial over tp, as the", lies(shard(0))),
    "a gather that yields shards": Fault("conversions", "gathered", "whole over tp, as the coll", lies(shard(0))),
    "a sum that stays partial": Fault("split", "down_sum", "whole over tp, as the collective", lies(partial())),
    "one of a bucket that stays partial": Fault("conversions", "second", "whole over tp", lies(partial())),
    "a scatter that yields it whole": Fault("conversions", "scattered", "a shard over tp, as", lies(REPLICATED)),
    "a mean over dp that gathers": Fault("conversions", "mean", "S(0) over tp, as %rows", lies(REPLICATED)),
    "a part of a tuple": Fault("conversions", "half", "S(0) over tp, as number 0 of %split", lies(REPLICATED)),
    "rows of rows": Fault("conversions", "x", "a value that is not split over tp yet", lies(shard(1))),
    "rows as columns": Fault("conversions", "rows", "S(0) over tp, the rows that", lies(shard(1))),
    "a partial loss": Fault("split", "mse_loss", "a value added up over tp", lies(partial())),
    "a partial metric": Fault("split", "mm_2", "a value added up over tp", is_kind("metric", "norm")),
    "a partial output": Fault("split", "mm_2", "a value added up over tp", is_kind("output", "0")),
    "state as other parts": Fault("split", "add_7", "S(0) over tp, as %up_weight", lies(shard(1))),
    "state as a whole": Fault(
        "split", "add_10", "S(1) over tp, as %down_weight_mo", lambda n, s: n.meta.pop("placements")
    ),
    "whole state as parts": Fault("split", "add_3", "R over tp, as %inner_weight", lies(shard(0))),
    "a gradient as other parts": Fault("split", "mm_3", "S(1) over tp, as %down", is_kind("gradient", "down.weight")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(graphs: dict[str, StepGraph], name: str) -> None:
    fault = FAULTS[name]
    step = graphs[fault.graph].copy()
    node = next(node for node in step.graph.nodes if node.name == fault.node)
    node.meta["placements"] = dict(node.meta.get("placements", {}))
    fault.plant(node, step)
    found = violation(step)
    assert found is not None
    assert fault.says in f"{found.where}: expected {found.expected}, got {found.got}"
    assert violation(graphs[fault.graph]) is None


def test_what_a_later_pass_says_nothing_about_is_left_out(graphs: dict[str, StepGraph]) -> None:
    step = graphs["split"].copy()
    for name in ("down_out", "down_sum", "hidden_grad_shard", "hidden_grad_full"):
        del next(node for node in step.graph.nodes if node.name == name).meta["placements"]
    assert violation(step) is None
    step = graphs["conversions"].copy()
    del step.results[("metric", "mean")].meta["placements"]
    assert violation(step) is None


def test_sums_of_gradients_between_microbatches_may_be_partial(graphs: dict[str, StepGraph]) -> None:
    step = graphs["split"].copy()
    node = next(node for node in step.placeholders if node.name == "inner_weight_momentum_buffer")
    node.meta |= {"entry": StateEntry("unreduced", "inner.weight", (8, 6)), "placements": {"tp": partial()}}
    gradient = step.gradients()["inner.weight"]
    gradient.meta["placements"] = {"tp": partial()}
    results = {key: value for key, value in step.results.items() if key[1] != "inner.weight:momentum_buffer"}
    step.set_results(results | {("unreduced", "inner.weight"): gradient})
    assert violation(step) is None
    gradient.meta["placements"] = {"tp": REPLICATED}
    assert violation(step) is not None
    gradient.meta["placements"] = {"tp": partial()}
    node.meta["entry"] = StateEntry("optimizer", "inner.weight:momentum_buffer", (8, 6), "inner.weight")
    assert violation(step) is not None


def test_values_over_other_axes_are_nobodys_concern_here(graphs: dict[str, StepGraph]) -> None:
    """A mean over dp, and rows of it, are of what no placement says anything about."""
    step = graphs["split"].copy()
    gradient = step.gradients()["inner.weight"]
    with Editor(step, phase="backward").after(gradient) as editor:
        mean = editor.all_reduce(gradient, "dp", op="avg", stem="mean")
        own = editor.local_shard(mean, Sharding("dp", 2, 8), stem="own")
    mean.meta["placements"] = own.meta["placements"] = {"tp": REPLICATED}
    assert violation(step) is None
