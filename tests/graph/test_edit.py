"""Editing: what a call yields is worked out once for calls that are alike."""

import torch
from torch import fx

from fxzero import compat
from fxzero.graph import StepGraph, edit
from fxzero.graph.edit import Editor, value_of

aten = torch.ops.aten


def graph_of(*shapes: tuple[int, ...]) -> tuple[StepGraph, list[fx.Node]]:
    graph, mode = fx.Graph(), compat.new_fake_mode()
    nodes = [graph.placeholder(f"x{index}") for index in range(len(shapes))]
    with mode:
        for node, shape in zip(nodes, shapes, strict=True):
            node.meta["val"] = torch.empty(shape)
    graph.output((nodes[0],))
    return StepGraph(graph), nodes


def test_calls_that_are_alike_are_evaluated_once(monkeypatch) -> None:
    step, (x, y, other) = graph_of((2, 3), (2, 3), (3, 2))
    evaluated: list[fx.Node] = []
    evaluate = edit.evaluate
    monkeypatch.setattr(edit, "evaluate", lambda node, mode: evaluated.append(node) or evaluate(node, mode))
    for graph in (step, step.copy()):  # copies know, too
        editor = Editor(graph, phase="forward")
        x, y, other = graph.placeholders
        with editor.before(graph.output):
            shapes = [
                tuple(editor.call(aten.mul.Tensor, *args).meta["val"].shape)
                for args in ((x, y), (y, x), (other, other))
            ]
            halves = [editor.call(aten.sum.dim_IntList, x, [dim]).meta["val"].shape for dim in (0, 1)]
            split = editor.call(aten.split.Tensor, x, 1).meta["val"]
        assert shapes == [(2, 3), (2, 3), (3, 2)]
        assert [tuple(shape) for shape in halves] == [(3,), (2,)] and len(split) == 2
        assert len(evaluated) == 5


def test_numbers_and_sizes_that_vary_are_evaluated_each_time() -> None:
    step, (x,) = graph_of((4,))
    mode = edit.fake_mode(step)
    numbers = []
    for value in (1.0, 2.0):
        with step.graph.inserting_before(step.output):
            node = step.graph.call_function(aten._local_scalar_dense.default, (x,))
        node.meta["val"] = value  # the number that stands there
        numbers.append(value_of(step, node, mode))
    assert numbers == [1.0, 2.0]
    env = mode.shape_env
    size = compat.symbolic_size(env, 4, name="rows")
    with mode:
        x.meta["val"] = torch.empty(size)
    with step.graph.inserting_before(step.output):
        node = step.graph.call_function(aten.neg.default, (x,))
    known = len(step.made)
    assert value_of(step, node, mode).shape == (size,) and len(step.made) == known
