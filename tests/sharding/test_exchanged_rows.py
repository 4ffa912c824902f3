"""Tokens that reach experts by all-to-all, and what these yield that comes back: beside one rank and a gather."""

import re
from pathlib import Path
from typing import Any

import pytest
from torch import fx

from fxzero import StepGraph
from fxzero.errors import PlanError
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import REPLICATED, routed, shard
from fxzero.graph.routing_ops import check_room
from fxzero.graph.row_exchange_ops import add_rows, pick_rows, places_received, rows_to_send
from fxzero.graph.step_graph import num_bytes
from fxzero.graph.verify import verify
from fxzero.sharding.exchanged_rows import by_all_to_all
from fxzero.sharding.routing import Routing
from fxzero.sharding.rules import Rules
from tests.sharding.machines import without_latencies_file
from tests.sharding.test_experts import EXPERTS, TOLERANCE, captured, difference, lies, run, split
from tests.sharding.test_routing import RANKS

pytest.importorskip("transformers")


def many(name: str, mesh: dict[str, int], folder: Path, *, room: float | str, **plan: Any) -> StepGraph:
    """The program of one rank, on a machine on which messages cost what they cost beside large products."""
    machine = {"hardware": without_latencies_file(folder)} | plan
    return split(name, mesh, folder, expert_room=room, **machine)


def moved(step: StepGraph) -> list[Any]:
    """The all-to-alls of rows that are meant for experts, or come from them."""
    found = [node for node in step.calls(c10d.all_to_all) if node.args[0].target in (pick_rows, add_rows)]
    return [node for node in found if c10d.axis_of(node) == "ep"]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go by all-to-all wherever they can, whatever that costs."""
    offered = Rules._with_routed
    monkeypatch.setattr(
        Rules,
        "_with_routed",
        lambda rules, node, plain: tuple(by_all_to_all(node, rules.routing)) or offered(rules, node, plain),
    )


def gathered(step: StepGraph) -> list[Any]:
    """The gathers of tokens for experts."""
    of_experts = [node for node in step.calls(c10d.all_gather) if node.meta["module"].endswith("experts")]
    return [node for node in of_experts if tuple(node.meta["val"].shape) == (256, 128)]


def test_it_is_taken_where_it_moves_less(tmp_path: Path) -> None:
    step = many("many_1", {"ep": 4}, tmp_path, room=2.2)
    verify(step)
    wide = [node for node in moved(step) if node.meta["val"].dim() == 2]
    assert len(wide) == 8, "tokens there, their results back, and the gradients of both, of two layers"
    assert not gathered(step)
    assert difference("many_1", run("many_1", step)) <= TOLERANCE


def test_tokens_are_gathered_where_that_moves_less(tmp_path: Path) -> None:
    step = many("many_2", {"ep": 4}, tmp_path, room=2.5)  # 2.5 times 2 of 4 are more than all
    verify(step)
    forth = [node for node in moved(step) if node.meta["phase"] == "forward" and node.meta["val"].dim() == 2]
    assert len(gathered(step)) == 2 and len(forth) == 2, "results come back as they went, by rows of assignments"
    assert difference("many_2", run("many_2", step)) <= TOLERANCE


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("name", "mesh", "zero"),
    [
        ("mixtral", {"ep": 2}, 0),
        ("mixtral", {"ep": 4}, 0),
        ("auxiliary", {"ep": 4}, 0),
        ("bf16", {"ep": 2}, 0),
        ("mixtral", {"ep": 2, "tp": 2}, 0),
        ("mixtral", {"ep": 2, "sp": 2}, 0),
        ("mixtral", {"dp": 2, "ep": 2}, 3),
    ],
    ids=str,
)
def test_mixtral_is_that_of_one_rank(name: str, mesh: dict[str, int], zero: int, tmp_path: Path) -> None:
    machine = {"hardware": "cpu"} if name == "bf16" else {}  # sums of bfloat16 in parts are others
    step = split(name, mesh, tmp_path, expert_room=mesh["ep"] - 0.01, zero=zero, **machine)  # for any order of 48 rows
    verify(step)
    assert lies(step) == dict.fromkeys(EXPERTS, "S(0)")
    assert len(moved(step)) == 12, "six indices and their gradients"
    assert "no rule" not in step.remarks["split_tensors"]
    assert difference(name, run(name, step, zero=zero), dp=mesh.get("dp", 1)) <= TOLERANCE


@pytest.mark.usefixtures("always")
def test_numbers_of_rows_are_made_once(tmp_path: Path) -> None:
    step = split("mixtral", {"ep": 2}, tmp_path, expert_room=1.5)
    for op in (rows_to_send, places_received):
        assert [node.meta["phase"] for node in step.calls(op)] == ["forward"] * 6, "three indices in each layer"


@pytest.mark.parametrize("mesh", [{"ep": 4}, {"dp": 2, "ep": 2}], ids=str)
def test_too_little_room_between_two_ranks_is_an_error(mesh: dict[str, int], tmp_path: Path) -> None:
    ranks = mesh["ep"] ** 2
    step = many("many_1", mesh, tmp_path, room=1.0)
    assert moved(step)
    where = r"Plan.expert_room, model.layers.\d.mlp.experts, rank \d to rank \d of ep: "
    says = rf"expected at most {256 // ranks} rows that it sends, of 256 rows over {mesh['ep']} ranks, got (\d+); "
    with pytest.raises(PlanError, match=rf"{where}{says}set expert_room to \d.\d+ or more") as refused:
        run("many_1", step)
    got, enough = (float(re.search(each, str(refused.value))[1]) for each in (r"got (\d+)", r"to (\d\.\d+) or more"))
    assert enough == pytest.approx(got * ranks / 256, abs=0.01)
    step = many("many_1", mesh, tmp_path, room=enough)
    assert moved(step)
    assert difference("many_1", run("many_1", step), dp=mesh.get("dp", 1)) <= TOLERANCE


@pytest.mark.parametrize("schedule", ["fixed", "cost"])
def test_room_is_asked_for_once_before_any_update(schedule: str, tmp_path: Path) -> None:
    step = many("many_1", {"dp": 2, "ep": 2}, tmp_path, room=1.5, zero=2, schedule=schedule)
    (check,) = step.calls(check_room)
    calls = step.calls()
    assert moved(step) and set(check.args[1]) == {4, 2}, "pairs of ranks, and ranks"
    assert calls.index(check) < min(index for index, node in enumerate(calls) if node.meta["phase"] == "update")


@pytest.mark.parametrize("room", ["all", 2.0, 3.0])
def test_without_a_room_that_is_less_than_all_there_is_no_such_way(room: float | str, tmp_path: Path) -> None:
    assert not moved(many("many_1", {"ep": 2}, tmp_path, room=room))


def routed_step(factor: float) -> tuple[dict[str, fx.Node], Routing]:
    """The nodes of the captured Mixtral by name, and what is routed in it."""
    step = captured("mixtral")[-1].step.copy()
    step.mesh = {"dp": 1, "ep": RANKS}
    routing = Routing.of(step, Rules(RANKS).of, ranks=RANKS, factor=factor)
    return {node.name: node for node in step.graph.nodes}, routing


def test_rows_move_in_indices_and_in_their_gradients() -> None:
    named, routing = routed_step(1.5)
    by_expert = routed(0, room=36, rows=48)
    ways = {name: tuple(by_all_to_all(node, routing)) for name, node in named.items()}
    to_experts, back = {"index_4", "index_5", "index_7", "index_8"}, {"index_6", "index_9"}
    for name in to_experts | back:
        (way,) = ways[name]
        rows, slots = (shard(0), by_expert) if name in to_experts else (by_expert, shard(0))
        assert (way.inputs, way.outputs) == ((rows, REPLICATED), (slots,))
        assert way.messages[0].num_bytes == num_bytes(named[name].meta["val"]) // 48 * 2 * 18
    for name in ("index_put_5", "index_put_6", "index_put_7"):
        (way,) = ways[name]
        rows, slots = (by_expert, shard(0)) if name == "index_put_5" else (shard(0), by_expert)
        assert (way.inputs, way.outputs) == ((REPLICATED, REPLICATED, slots), (rows,))
    assert not ways["index_put"] and not ways["index_put_1"], "which add nothing"
    assert len([way for way in ways.values() if way]) == 12


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_no_rows_move_where_there_is_room_for_all(factor: float) -> None:
    named, routing = routed_step(factor)
    assert not tuple(by_all_to_all(named["index_4"], routing))


def test_what_is_added_to_has_to_be_zero() -> None:
    named, routing = routed_step(1.5)
    node, key = named["index_put_5"], routing.key(named["index_put_5"])
    node.replace_input_with(named["new_zeros_4"], named["_unsafe_view_17"])
    assert not tuple(by_all_to_all(node, routing)) and routing.key(node) != key


@pytest.mark.parametrize("accumulate", [(), (False,)])
def test_what_is_put_and_not_added_is_not_sent(accumulate: tuple[bool, ...]) -> None:
    named, routing = routed_step(1.5)
    node = named["index_put_7"]  # two assignments of a token: which of them is put is not said
    assert tuple(by_all_to_all(node, routing))
    node.args = (*node.args[:3], *accumulate)
    assert not tuple(by_all_to_all(node, routing))


def test_tokens_that_ranks_do_not_divide_are_not_sent() -> None:
    named, routing = routed_step(1.5)
    assert tuple(by_all_to_all(named["index_4"], routing))
    named["view_9"].meta["val"] = named["view_9"].meta["val"].new_empty((23, 48))
    assert not tuple(by_all_to_all(named["index_4"], routing))
