"""The answer is the cheapest by the model of costs, no larger for more blocks, and what people do by hand."""

import dataclasses
import math
import random
from unittest import mock

import numpy as np
import pytest

from fxzero.cost.hardware import known_hardware
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import REPLICATED, Placement, placement_of, shard
from fxzero.passes.split_tensors import split_tensors
from fxzero.sharding import solve as solver
from fxzero.sharding.hints import pin
from fxzero.sharding.problem import Problem, Value, problem_of
from fxzero.sharding.rules import Rules
from fxzero.sharding.solve import Answer, solve
from fxzero.sharding.strategy import Strategy
from tests.sharding.steps import linears_step, step_on

pytest.importorskip("transformers")

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
Chosen = list[Strategy]


def answer_for(layers: int, *, tp: int, pinned: dict[str, Placement] | None = None, **sizes: int) -> Answer:
    """The answer for a Llama on eight-way nodes of H100s."""
    step = step_on(layers, tp=tp, **sizes)
    pin(step, pinned or {})
    return solve(problem_of(step, "tp", Rules(tp), known_hardware("h100")))


def paid(problem: Problem, chosen: Chosen) -> float:
    """What a choice costs, reckoned from the problem by itself; infinite where something cannot be made."""
    total = 0.0
    for unit, strategy in zip(problem.units, chosen, strict=True):
        total += unit.count * unit.seconds[unit.strategies.index(strategy)]
    for value in problem.values:
        native = native_of(chosen, value.unit, value.output)
        share = 1 / problem.ranks if native.is_shard else 1.0
        total += value.kept * value.count * share / problem.hardware.memory_bytes_s
        asked = {chosen[reader].inputs[index] for reader, index in value.readers} - {native}
        total += sum(value.count * problem.conversion_seconds(value, native, placement) for placement in asked)
    for unit, output, lies_as in problem.results:
        native = native_of(chosen, unit, output)
        wanted = REPLICATED if lies_as < 0 else native_of(chosen, lies_as, 0)
        if native != wanted and lies_as != unit:
            shape, itemsize = problem.result_shapes[(unit, output)]
            value = Value(unit, output, shape, itemsize, 0, ())
            total += problem.units[unit].count * problem.conversion_seconds(value, native, wanted)
    return total


def native_of(chosen: Chosen, unit: int, output: int) -> Placement:
    """How what a unit yields lies."""
    placement = chosen[unit].outputs[output]
    assert placement is not None
    return placement


def with_way(problem: Problem, chosen: Chosen, unit: int, way: int) -> Chosen:
    """The choice with another way of a unit, and of those that follow it."""
    changed = list(chosen)
    changed[unit] = problem.units[unit].strategies[way]
    for number, other in enumerate(problem.units):
        if other.leader >= 0:
            leader = problem.units[other.leader]
            changed[number] = other.strategies[leader.strategies.index(changed[other.leader])]
    return changed


def test_no_other_way_of_any_unit_is_cheaper() -> None:
    answer = answer_for(2, tp=8)
    problem, chosen = answer.problem, list(answer.chosen)
    best = paid(problem, chosen)
    assert best <= answer.seconds * (1 + 1e-9)
    for number, unit in enumerate(problem.units):
        if unit.leader < 0:
            for way in range(len(unit.strategies)):
                assert paid(problem, with_way(problem, chosen, number, way)) >= best * (1 - 1e-6)


def test_no_choice_is_below_the_bound() -> None:
    answer = answer_for(2, tp=4)
    problem, drawn = answer.problem, random.Random(0)
    assert answer.bound_s <= answer.seconds * (1 + 1e-9)
    for _ in range(50):
        assert paid(problem, otherwise(answer, 20, drawn)) >= answer.bound_s * (1 - 1e-9)


def otherwise(answer: Answer, count: int, drawn: random.Random) -> Chosen:
    """An answer with other ways for so many units."""
    units, chosen = answer.problem.units, list(answer.chosen)
    for number in drawn.sample([n for n, unit in enumerate(units) if unit.leader < 0], count):
        chosen = with_way(answer.problem, chosen, number, drawn.randrange(len(units[number].strategies)))
    return chosen


def of_tokens() -> Problem:
    """That of a long row over sp, whose relaxation is in parts."""
    step = step_on(1, tp=16, tokens=8192)
    pin(step, {node.meta["entry"].name: REPLICATED for node in step.inputs("parameter")})
    return problem_of(step, "tp", Rules(16), known_hardware("h100"))


def test_rows_for_readers_of_what_is_in_parts_leave_no_gap() -> None:
    problem = of_tokens()
    with mock.patch.object(solver, "_TIGHTENED", 0):
        loose = solve(problem)
    with mock.patch.object(solver, "search", wraps=solver.search) as asked:
        answer = solve(problem)
    assert loose.relaxed_s < loose.seconds * (1 - 2e-3), "else there is nothing to be shown here"
    assert loose.gap <= 1e-4, "which a search has proven"
    assert loose.relaxed_s < answer.relaxed_s == answer.bound_s <= answer.seconds <= answer.bound_s * (1 + 2e-3)
    assert answer.seconds == pytest.approx(loose.seconds, rel=1e-4), "which was searched for"
    assert not any(call.kwargs["integral"].any() for call in asked.call_args_list)
    assert paid(problem, list(answer.chosen)) == pytest.approx(answer.seconds)
    drawn = random.Random(0)
    for _ in range(20):
        assert paid(problem, otherwise(answer, 3, drawn)) >= answer.bound_s * (1 - 1e-6)


def test_rows_for_readers_are_true_of_every_whole_answer() -> None:
    problem, drawn = of_tokens(), random.Random(0)
    program = solver._Program(problem)
    for number in range(len(problem.values)):
        program._tighten(number)
    within, chosen = program._solver(), list(solve(problem).chosen)
    for _ in range(6):
        expected = paid(problem, chosen)
        lower, upper = np.zeros(len(program.cost)), np.ones(len(program.cost))
        upper[: program.num_ways] = 0
        for unit, start, way in zip(problem.units, program.first, chosen, strict=True):
            if unit.leader < 0:
                column = start + unit.strategies.index(way)
                lower[column] = upper[column] = 1
        found = within(lower, upper).values
        assert (found is None) == math.isinf(expected)
        assert found is None or program._seconds(found) == pytest.approx(expected, rel=1e-6)
        number = drawn.choice([n for n, unit in enumerate(problem.units) if unit.leader < 0])
        chosen = with_way(problem, chosen, number, drawn.randrange(len(problem.units[number].strategies)))


def test_the_problem_does_not_grow_with_depth() -> None:
    problems = [problem_of(step_on(layers, tp=8), "tp", Rules(8), known_hardware("h100")) for layers in (2, 4)]
    assert len(problems[0].units) == len(problems[1].units)


@pytest.mark.parametrize("tp", [2, 8])
def test_llama_is_split_as_megatron_splits_it_and_moves_no_more_bytes(tp: int) -> None:
    layers, tokens, width = 2, 4096, 4096
    step = step_on(layers, tp=tp, tokens=tokens, width=width)
    split_tensors.run(step, axis="tp", hardware="h100")
    lies = {n.meta["entry"].name: placement_of(n, "tp") for n in step.inputs("parameter")}
    for name, placement in lies.items():
        columns = name.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
        )
        rows = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert placement == (shard(0) if columns or name == "lm_head.weight" else shard(1) if rows else placement), name
    moved = sum(c10d.wire_bytes(node, step.mesh) for node in step.calls() if c10d.is_collective(node))
    assert moved <= megatron_bytes(layers, tokens=tokens, width=width, tp=tp)


def megatron_bytes(layers: int, *, tokens: int, width: int, tp: int, itemsize: int = 2) -> float:
    """Bytes that a rank sends in a step of Megatron-LM with sequence parallelism, by its own formulas.

    Of a layer: an all-gather and a reduce-scatter around attention and around the feed-forward part, in forward and in
    backward. Of embedding and head: one of each, in forward and in backward. Of norms: gradients are summed. Of the
    loss: two numbers a row. What backward gathers again (to keep less) is not counted, which favours Megatron.
    Source: Korthikanti et al., Reducing activation recomputation in large transformer models (2022), section 4.2.
    """
    part = (tp - 1) / tp
    between = (8 * layers + 4) * tokens * width * itemsize * part
    norms = 2 * (2 * layers + 1) * width * itemsize * part
    loss = 2 * 2 * tokens * 4 * part
    return between + norms + loss


def test_two_equal_matrices_in_a_list_are_a_pair_of_columns_and_rows() -> None:
    step = linears_step(tp=8)
    answer = solve(problem_of(step, "tp", Rules(8), known_hardware("h100")))
    lies = {node.meta["entry"].name: answer.strategy(node).outputs[0] for node in step.inputs("parameter")}
    assert lies == {"0.weight": shard(0), "2.weight": shard(1)}


def test_what_is_pinned_lies_so() -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    answer = answer_for(2, tp=4, pinned={name: REPLICATED})
    step_inputs = [node for node in answer.problem.of_node if node.op == "placeholder"]
    (found,) = [node for node in step_inputs if node.meta["entry"].key == ("parameter", name)]
    assert answer.strategy(found).outputs == (REPLICATED,)


def test_a_slow_network_splits_nothing_that_has_to_be_sent() -> None:
    step = step_on(2, tp=2, tokens=64, width=1024)
    machine = known_hardware("h100")
    link = dataclasses.replace(machine.node_link, latency_s=1.0)
    answer = solve(problem_of(step, "tp", Rules(2), dataclasses.replace(machine, node_link=link)))
    assert answer.seconds < 1.0, "a message takes a second"
