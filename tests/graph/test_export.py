"""JSON and Graphviz: every node, result and edge is there, and reads as what it is."""

import json
import re

import pytest
import torch
from torch import nn

from fxzero.graph import Sharding, StepGraph
from fxzero.graph.edit import Editor
from fxzero.graph.export import COLORS, to_dot, to_json
from fxzero.graph.text import args_text


@pytest.fixture
def step(capture) -> StepGraph:
    """A captured step with one gather by hand, and a title that needs quotes."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 62)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).square().mean()

    model = Model()
    step = capture(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.ones(2, 3))
    step.title, step.mesh, step.facts = 'a "title" \\ here', {"dp": 4}, frozenset({"b", "a"})
    rows = Sharding("dp", 4, 62)
    with Editor(step, phase="forward", module="inner").before(step.calls()[0]) as editor:
        own = editor.local_shard(step.input("parameter", "inner.weight"), rows, stem="weight")
        waited, _ = editor.all_gather(own, rows, stem="weight")
        editor.call(torch.ops.fxzero.release.default, [waited])
    return step


def test_json_holds_the_whole_graph(step) -> None:
    data = json.loads(json.dumps(to_json(step)))
    assert data["title"] == step.title and data["mesh"] == {"dp": 4} and data["facts"] == ["a", "b"]
    assert [node["name"] for node in data["nodes"]] == [n.name for n in (*step.placeholders, *step.calls())]
    nodes = {node["name"]: node for node in data["nodes"]}
    for node in step.calls():
        assert nodes[node.name]["args"] == args_text(node, step.mesh)
        assert nodes[node.name]["phase"] == node.meta["phase"]
        assert nodes[node.name]["inputs"] == [source.name for source in node.all_input_nodes]
    for result, ((kind, name), node) in zip(data["results"], step.results.items(), strict=True):
        assert result == {"kind": kind, "name": name, "node": node.name}


def test_json_of_single_nodes(step) -> None:
    nodes = {node["name"]: node for node in to_json(step)["nodes"]}
    assert nodes["inner_weight"] == {
        "name": "inner_weight",
        "op": "input",
        "args": "",
        "inputs": [],
        "kind": "state",
        "type": "f32[62, 3]",
        "phase": "forward",
        "module": "",
        "bytes": 62 * 3 * 4,
        "sharding": None,
        "grad_of": [],
        "param": None,
        "entry": {"kind": "parameter", "name": "inner.weight", "shape": [62, 3], "param": None},
    }
    local, gather = nodes["weight_local"], nodes["weight_gather"]
    assert local["type"] == "f32[62/dp, 3]" and local["bytes"] == 16 * 3 * 4
    assert local["sharding"] == {"axis": "dp", "num_shards": 4, "rows": 62}
    assert (gather["op"], gather["kind"], gather["module"]) == ("all_gather", "collective", "inner")
    assert gather["args"] == "%weight_local dp, 768 B"
    assert nodes["weight_full"]["kind"] == "wait" and nodes["release_default"]["kind"] == "release"
    assert [node["grad_of"] for node in nodes.values() if node["grad_of"]] == [["inner.weight"], ["inner.bias"]]
    assert {node["param"] for node in nodes.values()} == {None, "inner.weight", "inner.bias"}


QUOTED = r'"((?:[^"\\]|\\.)*)"'


def test_dot_has_every_node_and_edge_once(step) -> None:
    text = to_dot(step)
    drawn = re.findall(rf"^    {QUOTED} \[label={QUOTED}, fillcolor={QUOTED}\];$", text, re.MULTILINE)
    names = [name for name, _, _ in drawn]
    assert len(names) == len(set(names)) == len(step.placeholders) + len(step.calls()) + len(step.results)
    edges = re.findall(rf"^  {QUOTED} -> {QUOTED};$", text, re.MULTILINE)
    wanted = [(source.name, node.name) for node in step.calls() for source in node.all_input_nodes]
    wanted += [(node.name, f"result {index}") for index, node in enumerate(step.results.values())]
    assert edges == wanted
    assert {name for edge in edges for name in edge} <= set(names)
    assert len(text.splitlines()) == 3 + 3 * 5 + len(drawn) + len(edges)


def test_dot_has_a_cluster_for_each_phase(step) -> None:
    text = to_dot(step)
    clusters = {
        match[1]: match[2] for match in re.finditer(r"  subgraph cluster_(\w+) \{\n(.*?)\n  \}\n", text, re.DOTALL)
    }
    assert list(clusters) == ["inputs", "forward", "backward", "update", "results"]
    for phase in ("forward", "backward", "update"):
        assert clusters[phase].count("\n") == len(step.phase(phase))


def test_dot_colors_by_kind_and_quotes(step) -> None:
    text = to_dot(step)
    assert text.startswith('digraph "a \\"title\\" \\\\ here" {\n')
    for name, kind in (
        ("weight_gather", "collective"),
        ("weight_full", "wait"),
        ("release_default", "release"),
        ("addmm", "compute"),
        ("inner_weight", "state"),
    ):
        assert re.search(rf'^    "{name}" \[label={QUOTED}, fillcolor="{COLORS[kind]}"\];$', text, re.MULTILINE)
    assert r'"inner_weight" [label="%inner_weight\nparameter inner.weight\nf32[62, 3]"' in text
    assert len(set(COLORS.values())) == len(COLORS)
