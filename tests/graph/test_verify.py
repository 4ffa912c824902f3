"""Every rule of the verifier finds the faults planted here, by hand, in the graph of a real captured step."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxzero.capture import Inventory, capture_step
from fxzero.errors import VerifyError
from fxzero.graph import Sharding, StateEntry, StepGraph, axis_placement, ops
from fxzero.graph import collectives as c10d
from fxzero.graph import verify as verifier
from fxzero.graph.axis_placement import REPLICATED, Placement
from fxzero.graph.collective_rules import check_sharding
from fxzero.graph.compression_ops import dequantize_blockwise, dequantize_reduce, quantize_blockwise
from fxzero.graph.edit import Editor, coordinate, replace_uses, retype
from fxzero.graph.error_feedback_ops import drop_top_k, sum_top_k
from fxzero.graph.randomness import is_random
from fxzero.graph.regions import regions
from fxzero.graph.rules import Context
from fxzero.graph.step_graph import iter_views
from fxzero.graph.swap_ops import OPS, swap_in, swap_out, swap_wait, wait_of
from fxzero.graph.verify import RULES, verify
from fxzero.passes.compress_with_top_k import compress_with_top_k
from fxzero.passes.cut_regions import cut_regions
from fxzero.passes.gather_for_next_step import gather_for_next_step
from fxzero.passes.gather_within_nodes import gather_within_nodes
from fxzero.passes.offload_activations import offload_activations
from fxzero.passes.offload_state import offload_state
from fxzero.passes.quantize_all_gathers import quantize_all_gathers
from fxzero.passes.quantize_reductions import quantize_reductions

aten = torch.ops.aten
RANKS = 4


class Model(nn.Module):
    """Rows that divide by RANKS and rows that do not, a buffer, a frozen parameter, two independent masks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)
        self.shift = nn.Parameter(torch.zeros(10), requires_grad=False)
        self.outer = nn.Linear(10, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.norm(self.inner(x))) + self.shift
        mixed = F.dropout(hidden, 0.1) + F.dropout(hidden, 0.2)
        return F.cross_entropy(self.outer(mixed), y)


def capture(model: nn.Module, *batch: torch.Tensor, fresh: bool = False) -> StepGraph:
    optimizer = torch.optim.AdamW(model.parameters())
    if not fresh:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
    return capture_step(Inventory.of(model, optimizer), None, batch, {}, fresh=fresh).step


def shard(step: StepGraph, name: str) -> None:
    """ZeRO-3 for one parameter, as plainly as it can be written."""
    parameter = step.input("parameter", name)
    sharding = Sharding("dp", RANKS, parameter.meta["entry"].shape[0])
    stem = name.replace(".", "_")
    for phase in ("forward", "backward"):
        position = step.positions()
        users = [user for user in parameter.users if user.meta.get("phase") == phase]
        editor = Editor(step, phase=phase, param=name)
        if not users:
            continue  # the first layer's weight is not read in backward
        with editor.before(min(users, key=position.__getitem__)):
            waited, full = editor.all_gather(parameter, sharding, stem=stem)
        replace_uses(parameter, full, users)
        position = step.positions()
        readers = [reader for alias in (waited, *iter_views(waited)) for reader in alias.users]
        with editor.after(max(readers, key=position.__getitem__)):
            editor.call(ops.release, [waited], name=f"{stem}_release")
    gradient = step.gradients()[name]
    with editor.after(gradient):
        rows = editor.reduce_scatter(gradient, sharding, op="avg", stem=f"{stem}_grad")
    replace_uses(gradient, rows, [user for user in gradient.users if user.meta["phase"] == "update"])
    inputs = [n for n in step.inputs("parameter", "optimizer") if name in (n.meta["entry"].name, n.meta["entry"].param)]
    inputs = [node for node in inputs if node.meta["entry"].shape == parameter.meta["entry"].shape]
    for node in inputs:
        with editor.mode:
            node.meta["val"] = torch.empty(-(-sharding.rows // RANKS), *node.meta["entry"].shape[1:])
    updates = [n for n in step.phase("update") if n.meta.get("param") == name and is_matrix(n)]
    for node in (*inputs, *updates):
        node.meta["sharding"] = sharding
    retype(step, [*inputs, rows])


def is_matrix(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].dim() == 2


def reduce_together(step: StepGraph, *names: str) -> None:
    """One coalesced all-reduce of the gradients of several parameters."""
    gradients = [step.gradients()[name] for name in names]
    readers = [[user for user in g.users if user.meta["phase"] == "update"] for g in gradients]
    editor = Editor(step, phase="backward")
    with editor.after(max(gradients, key=step.positions().__getitem__)):
        joint = editor.call(c10d.all_reduce_coalesced, gradients, "avg", "dp", name="bucket")
        parts = [editor.call(operator.getitem, joint, index) for index in range(len(names))]
        waits = [editor.call(c10d.wait, part) for part in parts]
    for gradient, wait, users in zip(gradients, waits, readers, strict=True):
        replace_uses(gradient, wait, users)


def gather_own_rows(step: StepGraph, name: str) -> None:
    """Each rank of tp takes its rows of a parameter, and forward reads what all of them take."""
    parameter, rows = step.input("parameter", name), Sharding("tp", 2, 10)
    readers = [user for user in parameter.users if user.meta["phase"] == "forward"]
    with Editor(step, phase="forward").before(readers[0]) as editor:
        own = editor.local_shard(parameter, rows, stem="own")
        waited, _ = editor.all_gather(own, rows, stem="own")
    replace_uses(parameter, waited, readers)
    del own.meta["sharding"]
    own.meta["placements"], waited.meta["placements"] = {"tp": axis_placement.shard(0)}, {"tp": REPLICATED}


@pytest.fixture(scope="module")
def graphs() -> dict[str, StepGraph]:
    captured = capture(Model(), torch.randn(5, 6), torch.randint(0, 8, (5,)))
    sharded = captured.copy()
    sharded.mesh = {"dp": RANKS}
    sharded.title = "sharded by hand"
    shard(sharded, "inner.weight")
    shard(sharded, "outer.weight")
    reduce_together(sharded, "inner.bias", "norm.weight")
    packed = sharded.copy()
    packed.title = "packed by hand"
    assert quantize_all_gathers.run(packed, form="int8", block=16) == 3
    assert quantize_reductions.run(packed, form="int8", block=16) == 2
    chosen = sharded.copy()
    chosen.title = "chosen by hand"
    assert compress_with_top_k.run(chosen, axis="dp", fraction=0.1, below=50) == 2
    kept = packed.copy()
    kept.title = "kept by hand"
    assert gather_within_nodes.run(kept, axis="dp", node=2) == 1
    carried = sharded.copy()
    carried.title = "carried by hand"
    assert gather_for_next_step.run(carried) == 1
    swapped = captured.copy()
    swapped.title = "swapped by hand"
    assert offload_activations.run(swapped, names=(("relu", "host"),)) == 1
    assert offload_state.run(swapped, tiers={"parameter": "nvme", "optimizer": "host"}, on_host=0.5) > 0
    cut = sharded.copy()
    cut.title = "cut by hand"
    assert cut_regions.run(cut) > 2
    split = captured.copy()
    split.title, split.mesh = "split by hand", {"tp": 2}
    gather_own_rows(split, "inner.weight")
    graphs = {"captured": captured, "sharded": sharded, "packed": packed, "chosen": chosen, "kept": kept}
    graphs |= {"split": split}
    return graphs | {"swapped": swapped, "carried": carried, "cut": cut}


# ---- sound graphs


def test_a_captured_graph_keeps_all_rules(graphs: dict[str, StepGraph]) -> None:
    verify(graphs["captured"])
    verify(graphs["captured"].copy(), before=graphs["captured"])


def test_a_sharded_graph_keeps_all_rules(graphs: dict[str, StepGraph]) -> None:
    verify(graphs["sharded"], before=graphs["captured"])


def test_a_packed_graph_keeps_all_rules(graphs: dict[str, StepGraph]) -> None:
    verify(graphs["packed"], before=graphs["sharded"])
    verify(graphs["chosen"], before=graphs["sharded"])
    verify(graphs["kept"], before=graphs["packed"])


def test_a_graph_that_gathers_for_the_next_step_keeps_all_rules(graphs: dict[str, StepGraph]) -> None:
    verify(graphs["carried"], before=graphs["sharded"])


def test_a_split_graph_keeps_all_rules(graphs: dict[str, StepGraph]) -> None:
    verify(graphs["split"], before=graphs["captured"])


def test_a_swapped_graph_keeps_all_rules(graphs: dict[str, StepGraph]) -> None:
    verify(graphs["swapped"], before=graphs["captured"])


def test_the_first_step_of_an_optimizer_keeps_all_rules() -> None:
    step = capture(Model(), torch.randn(5, 6), torch.randint(0, 8, (5,)), fresh=True)
    assert not step.inputs("optimizer")
    verify(step)


def test_sizes_known_only_when_the_step_runs_are_left_out() -> None:
    class Masked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[x > 0].sum()

    verify(capture(Masked(4, 4), torch.randn(3, 4)))


@pytest.mark.parametrize("graph", ["captured", "sharded"])
def test_values_can_be_left_out(graphs: dict[str, StepGraph], graph: str) -> None:
    step = graphs[graph].copy()
    wrong_shape(step)
    verify(step, values=False)
    with pytest.raises(VerifyError, match="rule 'values'"):
        verify(step)


def test_the_cost_of_values_is_that_of_distinct_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deep(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = F.gelu(layer(x))
            return x.sum()

    counts = []
    evaluate = verifier.evaluate
    for depth in (3, 12):
        evaluated: list[fx.Node] = []
        monkeypatch.setattr(verifier, "evaluate", lambda n, m, seen=evaluated: seen.append(n) or evaluate(n, m))
        step = capture(Deep(depth), torch.randn(5, 6))
        verify(step)
        counts.append(len(evaluated))
        verify(step.copy())  # as another pipeline over the same capture does
        assert len(evaluated) == counts[-1]
    assert counts[0] == counts[1]


# ---- planted faults


@dataclass(frozen=True)
class Fault:
    rule: str
    graph: str
    says: str
    plant: Callable[[StepGraph], None]


FAULTS: list[Fault] = []


def fault(rule: str, says: str, *, graph: str = "sharded") -> Callable:
    """Register a function that breaks one rule of a sound graph; `says` is a part of the message."""

    def register(plant: Callable[[StepGraph], None]) -> Callable[[StepGraph], None]:
        FAULTS.append(Fault(rule, graph, says, plant))
        return plant

    return register


@pytest.mark.parametrize("planted", FAULTS, ids=lambda f: f"{f.rule}-{f.plant.__name__}")
def test_a_planted_fault_is_found(graphs: dict[str, StepGraph], planted: Fault) -> None:
    sound = graphs[planted.graph]
    step = sound.copy()
    planted.plant(step)
    with pytest.raises(VerifyError) as caught:
        verify(step, before=sound)
    message = str(caught.value)
    assert f"{step.title}, rule '{planted.rule}'" in message
    assert planted.says in message
    verify(sound)  # and what was planted did not reach the graph that it was planted in a copy of


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_a_planted_fault(rule: str) -> None:
    assert any(planted.rule == rule for planted in FAULTS)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_says_what_holds(rule: Callable) -> None:
    assert rule.__doc__


def the(step: StepGraph, *targets: object, phase: str = "forward") -> fx.Node:
    """The first call of a target in a phase."""
    return next(node for node in step.calls(*targets) if node.meta["phase"] == phase)


def returned(step: StepGraph, name: str, kind: str = "parameter") -> fx.Node:
    return step.results[(kind, name)]


# structure


@fault("structure", "used before it has been defined", graph="captured")
def read_before_it_is_made(step: StepGraph) -> None:
    step.output.prepend(the(step, aten.relu.default))


@fault("structure", "one output node", graph="captured")
def output_that_is_not_last(step: StepGraph) -> None:
    step.output.append(step.graph.call_function(aten.relu.default, (the(step, aten.relu.default),)))


@fault("structure", "one a value", graph="captured")
def result_without_a_name(step: StepGraph) -> None:
    step.output.meta["results"] = step.output.meta["results"][:-1]


@fault("structure", "one tuple of nodes", graph="captured")
def result_that_is_a_number(step: StepGraph) -> None:
    step.output.args = ((*step.output.args[0][:-1], 1.0),)


@fault("structure", "expected one value, got 2 values", graph="captured")
def two_results_of_one_name(step: StepGraph) -> None:
    step.output.args = ((*step.output.args[0], step.output.args[0][0]),)
    step.output.meta["results"] += step.output.meta["results"][:1]


@fault("structure", "inputs before the first call", graph="captured")
def input_after_a_call(step: StepGraph) -> None:
    the(step, aten.relu.default).append(step.graph.placeholder("late"))


@fault("structure", "got get_attr", graph="captured")
def attribute_of_a_module(step: StepGraph) -> None:
    with step.graph.inserting_after(step.placeholders[-1]):
        step.graph.create_node("get_attr", "table")


# meta


@fault("meta", "meta['phase']", graph="captured")
def no_phase(step: StepGraph) -> None:
    del the(step, aten.relu.default).meta["phase"]


@fault("meta", "got 'optimizer'", graph="captured")
def unknown_phase(step: StepGraph) -> None:
    the(step, aten.relu.default).meta["phase"] = "optimizer"


@fault("meta", "expected meta['val']", graph="captured")
def no_value(step: StepGraph) -> None:
    del the(step, aten.relu.default).meta["val"]


@fault("meta", "got a real one", graph="captured")
def real_tensor(step: StepGraph) -> None:
    the(step, aten.relu.default).meta["val"] = torch.zeros(5, 10)


@fault("meta", "a StateEntry", graph="captured")
def input_without_an_entry(step: StepGraph) -> None:
    del step.placeholders[0].meta["entry"]


@fault("meta", "kind='weights'", graph="captured")
def entry_of_unknown_kind(step: StepGraph) -> None:
    node = step.placeholders[0]
    node.meta["entry"] = replace(node.meta["entry"], kind="weights")


@fault("meta", "got it also on", graph="captured")
def entry_twice(step: StepGraph) -> None:
    node = step.placeholders[0]
    with step.graph.inserting_after(node):
        step.graph.placeholder("again").meta = dict(node.meta)


# functional


@fault("functional", "a write to self", graph="captured")
def in_place_op(step: StepGraph) -> None:
    the(step, aten.relu.default).target = aten.relu_.default


@fault("functional", "a write to its first argument", graph="captured")
def in_place_function(step: StepGraph) -> None:
    node = the(step, aten.relu.default)
    with Editor(step, phase="forward").after(node) as editor:
        written = step.graph.call_function(operator.setitem, (node, 0, 0.0))
    written.meta = {**editor.meta, "val": None}


# state


def drop_result(step: StepGraph, key: tuple[str, str]) -> None:
    step.set_results({other: node for other, node in step.results.items() if other != key})


@fault("state", "'norm.running_mean'): expected returned", graph="captured")
def dropped_result(step: StepGraph) -> None:
    drop_result(step, ("buffer", "norm.running_mean"))


@fault("state", "one loss, got 0", graph="captured")
def no_loss(step: StepGraph) -> None:
    drop_result(step, ("loss", "loss"))


@fault("state", "one loss, got 2", graph="captured")
def two_losses(step: StepGraph) -> None:
    step.set_result("loss", "auxiliary", step.results[("loss", "loss")])


@fault("state", "none of that name", graph="captured")
def result_for_no_entry(step: StepGraph) -> None:
    step.set_result("buffer", "norm.running_max", returned(step, "norm.running_mean", "buffer"))


@fault("state", "none of that name", graph="captured")
def result_for_new_state_beside_old(step: StepGraph) -> None:
    step.set_result("optimizer", "inner.bias:momentum", returned(step, "inner.bias"))


@fault("state", "expected not returned", graph="captured")
def added_result(step: StepGraph) -> None:
    step.set_result("parameter", "shift", step.input("parameter", "shift"))


@fault("state", "input ('parameter', 'shift')", graph="captured")
def lost_parameter(step: StepGraph) -> None:
    lost = step.input("parameter", "shift")
    lost.replace_all_uses_with(step.input("buffer", "norm.running_mean"))
    step.graph.erase_node(lost)


@fault("state", "float32 [10, 6]", graph="captured")
def result_of_wrong_shape(step: StepGraph) -> None:
    step.set_result("parameter", "inner.weight", returned(step, "inner.bias"))


@fault("state", "got torch.bfloat16 [10]", graph="captured")
def result_of_wrong_dtype(step: StepGraph) -> None:
    with Editor(step, phase="update").before(step.output) as editor:
        cast = editor.call(aten._to_copy.default, returned(step, "inner.bias"), dtype=torch.bfloat16)
    step.set_result("parameter", "inner.bias", cast)


@fault("state", "expected sharding Sharding")
def result_that_is_no_shard(step: StepGraph) -> None:
    del returned(step, "inner.weight").meta["sharding"]


# phases


@fault("phases", "of phase backward", graph="captured")
def forward_reads_backward(step: StepGraph) -> None:
    gradient = step.gradients()["inner.weight"]
    with Editor(step, phase="forward").after(gradient) as editor:
        editor.call(aten.neg.default, gradient)


@fault("phases", "of phase update", graph="captured")
def backward_reads_update(step: StepGraph) -> None:
    with Editor(step, phase="backward").before(step.output) as editor:
        editor.call(aten.neg.default, returned(step, "inner.weight"))


# collectives


@fault("collectives", "one wait, got 0")
def dropped_wait(step: StepGraph) -> None:
    wait = the(step, c10d.wait)
    wait.replace_all_uses_with(wait.args[0])
    step.graph.erase_node(wait)


@fault("collectives", "one wait, got 2")
def second_wait(step: StepGraph) -> None:
    wait = the(step, c10d.wait, phase="backward")
    with Editor(step, phase="backward").after(wait) as editor:
        editor.call(c10d.wait, wait.args[0])


@fault("collectives", "no reader but its wait")
def read_before_the_wait(step: StepGraph) -> None:
    launch = the(step, c10d.reduce_scatter, phase="backward")
    with Editor(step, phase="backward").before(step.output) as editor:
        editor.call(aten.neg.default, launch)


@fault("collectives", "a wait for a collective")
def wait_for_no_collective(step: StepGraph) -> None:
    node = the(step, aten.relu.default)
    with Editor(step, phase="forward").after(node) as editor:
        editor.call(c10d.wait, node)


@fault("collectives", "a wait for a collective")
def wait_for_an_element_of_no_collective(step: StepGraph) -> None:
    node = next(n for n in step.calls(operator.getitem) if not c10d.is_collective(n.args[0]))
    with Editor(step, phase="backward").after(node) as editor:
        editor.call(c10d.wait, node)


@fault("collectives", "getitems [0, 1] and 1 other readers")
def wait_for_a_whole_bucket(step: StepGraph) -> None:
    bucket = the(step, c10d.all_reduce_coalesced, phase="backward")
    with Editor(step, phase="backward").after(bucket):
        step.graph.call_function(c10d.wait, (bucket,)).meta = {"phase": "backward", "val": None}


@fault("collectives", "one getitem for each of 2")
def element_of_a_bucket_that_is_not_waited_for(step: StepGraph) -> None:
    bucket = the(step, c10d.all_reduce_coalesced, phase="backward")
    first, second = bucket.users
    second.replace_all_uses_with(first)
    step.graph.erase_node(second)


@fault("collectives", "one wait, got 2")
def element_of_a_bucket_waited_for_twice(step: StepGraph) -> None:
    part = next(iter(the(step, c10d.all_reduce_coalesced, phase="backward").users))
    with Editor(step, phase="backward").after(part) as editor:
        editor.call(c10d.wait, part)


@fault("state", "returned, as before the pass", graph="carried")
def launch_for_the_next_step_that_is_lost(step: StepGraph) -> None:
    step.set_results({key: node for key, node in step.results.items() if key[0] != "launched"})


@fault("collectives", "no reader but its wait", graph="carried")
def launch_for_the_next_step_waited_for_too(step: StepGraph) -> None:
    launch = returned(step, "inner.weight", "launched")
    with Editor(step, phase="update").before(step.output) as editor:
        editor.call(c10d.wait, launch)


@fault("collectives", "one wait, got 0", graph="carried")
def launch_of_the_step_before_read_without_a_wait(step: StepGraph) -> None:
    wait = next(iter(step.inputs("launched")[0].users))
    wait.replace_all_uses_with(wait.args[0])
    step.graph.erase_node(wait)


@fault("collectives", "a sharded parameter 'norm.weight' beside it", graph="carried")
def launch_of_a_parameter_that_is_not_sharded(step: StepGraph) -> None:
    step.inputs("launched")[0].meta["entry"] = StateEntry("launched", "norm.weight", (10,))


@fault("collectives", "shape [12, 6], all rows of %inner_weight", graph="carried")
def launch_of_fewer_rows(step: StepGraph) -> None:
    node = step.inputs("launched")[0]
    node.meta["val"] = returned(step, "inner.weight", "launched").meta["val"] = node.meta["val"][:8]


@fault("collectives", "the launch of a gather, for the next program", graph="carried")
def something_else_for_the_next_step(step: StepGraph) -> None:
    step.set_result("launched", "outer.weight", returned(step, "outer.weight"))


@fault("collectives", "group_size for the 4 ranks of dp, got 2")
def wrong_group_size(step: StepGraph) -> None:
    the(step, c10d.all_gather).update_arg(1, 2)


@fault("collectives", "output_split_sizes [5, 5] for the 4 ranks of dp")
def wrong_splits(step: StepGraph) -> None:
    node = step.input("parameter", "shift")
    with Editor(step, phase="forward").after(node) as editor:
        editor.call(c10d.wait, editor.call(c10d.all_to_all, node, [5, 5], [5, 5], "dp"))


def shifted(step: StepGraph, by: int, axis: str) -> None:
    node = step.input("parameter", "shift")
    index = coordinate(step, axis)
    with Editor(step, phase="forward").after(node) as editor:
        editor.call(c10d.wait, editor.call(c10d.shift, node, by, 4, index, "dp"))


@fault("collectives", "from 1 to 3 places on dp, got 4")
def all_the_way_round(step: StepGraph) -> None:
    shifted(step, 4, "dp")


@fault("collectives", "this rank's index on dp, got sp_index")
def place_on_another_axis(step: StepGraph) -> None:
    shifted(step, 1, "sp")


@fault("collectives", "an axis of the mesh {'dp': 4}, got 'tp'")
def unknown_axis(step: StepGraph) -> None:
    the(step, c10d.all_gather).update_arg(2, "tp")


@fault("collectives", "an axis of the mesh {'dp': 4}, got None")
def axis_as_keyword(step: StepGraph) -> None:
    launch = the(step, c10d.all_gather)
    launch.kwargs = {"group_name": launch.args[2]}
    launch.args = launch.args[:2]


@fault("collectives", "expected contiguous tensors")
def strided_input(step: StepGraph) -> None:
    node = the(step, aten.relu.default)
    with Editor(step, phase="forward").after(node) as editor:
        strided = editor.call(aten.t.default, node)
        editor.call(c10d.wait, editor.call(c10d.all_reduce, strided, "sum", "dp"))


@fault("collectives", "a collective of the table")
def unknown_collective(step: StepGraph) -> None:
    node = the(step, aten.relu.default)
    with Editor(step, phase="forward").after(node) as editor:
        editor.call(torch.ops._c10d_functional.broadcast.default, node, 0, "dp")


# placements; test_placement_rules.py has the others


@fault("placements", "a value that is a shard over tp, got %neg", graph="split")
def gather_of_what_is_whole(step: StepGraph) -> None:
    launch = the(step, c10d.all_gather)
    with Editor(step, phase="forward").before(launch) as editor:
        whole = editor.call(aten.neg.default, launch.args[0])
    whole.meta["placements"] = {"tp": REPLICATED}
    launch.update_arg(0, whole)


@fault("placements", "result ('parameter', 'outer.bias')", graph="split")
def state_that_goes_out_as_a_shard(step: StepGraph) -> None:
    returned(step, "outer.bias").meta["placements"] = {"tp": axis_placement.shard(0)}


# sharding


@fault("sharding", "as if it were the whole tensor")
def shard_used_as_whole(step: StepGraph) -> None:
    node = step.input("parameter", "inner.weight")
    with Editor(step, phase="forward").after(node) as editor:
        editor.call(aten.t.default, node)


@fault("sharding", "as if it were the whole tensor")
def cast_of_a_shard_used_as_whole(step: StepGraph) -> None:
    node = step.input("parameter", "inner.weight")
    with Editor(step, phase="backward").after(node) as editor:
        cast = editor.call(aten._to_copy.default, node, dtype=torch.bfloat16, sharding=node.meta["sharding"])
        editor.call(aten.t.default, cast)


@fault("sharding", "a tensor of 4 rows, got (3, 6)")
def wrong_rows(step: StepGraph) -> None:
    node = next(n for n in step.calls(c10d.reduce_scatter) if n.meta["val"].shape == (3, 6))
    node.meta["sharding"] = replace(node.meta["sharding"], rows=13)


@fault("sharding", "a tensor of 3 rows, got float")
def sharded_number(step: StepGraph) -> None:
    the(step, aten._local_scalar_dense.default, phase="update").meta["sharding"] = Sharding("dp", RANKS, 10)


@fault("sharding", "an axis of the mesh {'dp': 4} with as many ranks")
def wrong_number_of_shards(step: StepGraph) -> None:
    node = step.input("parameter", "outer.weight")
    node.meta["sharding"] = returned(step, "outer.weight").meta["sharding"] = Sharding("dp", 2, 4)


@fault("sharding", "expected axis dp of Sharding")
def gathered_over_another_axis(step: StepGraph) -> None:
    step.mesh["tp"] = RANKS
    the(step, c10d.all_gather).update_arg(2, "tp")


@fault("sharding", "expected axis dp of Sharding")
def scattered_over_another_axis(step: StepGraph) -> None:
    step.mesh["tp"] = RANKS
    the(step, c10d.reduce_scatter, phase="backward").update_arg(3, "tp")


@fault("sharding", "expected shape (12,), or a shard of it, got (10,)")
def input_unlike_its_entry(step: StepGraph) -> None:
    node = step.input("parameter", "shift")
    node.meta["entry"] = replace(node.meta["entry"], shape=(12,))


def place(step: StepGraph, shape: tuple[int, ...], *, name: str = "shift", **over: Placement) -> None:
    """Let an input that a rank has 10 rows of lie over other axes, as a part of a tensor of this shape."""
    step.mesh["tp"] = 2
    node = step.input("parameter", name)
    node.meta["entry"] = replace(node.meta["entry"], shape=shape)
    node.meta["placements"] = over


@pytest.mark.parametrize(
    ("name", "shape", "over"),
    [
        ("shift", (20,), axis_placement.shard(0)),
        ("shift", (10,), axis_placement.REPLICATED),
        ("inner.weight", (20, 6), axis_placement.shard(0)),  # of which dp has split what tp has left
        ("inner.weight", (10, 12), axis_placement.shard(1)),
    ],
)
def test_an_input_may_be_a_part_of_a_tensor(
    name: str, shape: tuple[int, ...], over: Placement, graphs: dict[str, StepGraph]
) -> None:
    step = graphs["sharded"].copy()
    place(step, shape, name=name, tp=over)
    assert list(check_sharding(Context(step))) == []


@fault("sharding", "expected shape (10,), or a shard of it, got (10,), S(0) over tp")
def input_that_is_whole_placed_as_a_part(step: StepGraph) -> None:
    place(step, (10,), tp=axis_placement.shard(0))


@fault("sharding", "expected shape (20,), or a shard of it, got (10,), R over tp")
def input_that_is_a_part_placed_as_whole(step: StepGraph) -> None:
    place(step, (20,), tp=axis_placement.REPLICATED)


@fault("placements", "%addcdiv: expected S(0) over tp, as %inner_weight, got R")
def rows_of_the_whole_placed_as_rows_of_a_part(step: StepGraph) -> None:
    place(step, (10, 6), name="inner.weight", tp=axis_placement.shard(0))


@fault("sharding", "got (10,), S(0, 2) over tp; ")
def parameter_in_parts_of_blocks(step: StepGraph) -> None:
    place(step, (20,), tp=axis_placement.shard(0, 2))


@fault("sharding", "an axis of the mesh {'dp': 4}, got tp")
def coordinate_on_no_axis(step: StepGraph) -> None:
    with step.graph.inserting_after(step.placeholders[-1]):
        node = step.graph.placeholder("tp_index")
    node.meta = {"entry": StateEntry("coordinate", "tp"), "val": 0, "phase": "forward", "module": ""}


# release


def readers_in_order(step: StepGraph, wait: fx.Node) -> list[fx.Node]:
    readers = {reader for alias in (wait, *iter_views(wait)) for reader in alias.users}
    return sorted(readers, key=step.positions().__getitem__)


@fault("release", "no use after release")
def use_after_release(step: StepGraph) -> None:
    wait = next(n for n in step.calls(c10d.wait) if n.name == "outer_weight_full")
    *_, last, release = readers_in_order(step, wait)
    last.prepend(release)


@fault("release", "no use after release")
def use_of_a_view_after_release(step: StepGraph) -> None:
    release = the(step, ops.release)
    view = next(n for n in iter_views(release.args[0][0]) if n.target is aten.t.default)
    with Editor(step, phase="update").before(step.output) as editor:
        editor.call(aten.neg.default, view)


@fault("release", "no use after release")
def use_of_one_of_several_views_after_release(step: StepGraph) -> None:
    release = the(step, ops.release)
    with Editor(step, phase="forward").after(release.args[0][0]) as editor:
        part = editor.call(operator.getitem, editor.call(aten.split.Tensor, release.args[0][0], 2), 1)
    with Editor(step, phase="forward").after(release) as editor:
        editor.call(aten.neg.default, part)


@fault("release", "no use after release")
def use_of_an_unannounced_view_after_release(step: StepGraph) -> None:
    release = the(step, ops.release)
    with Editor(step, phase="forward").after(release.args[0][0]) as editor:
        flat = editor.call(aten._unsafe_view.default, release.args[0][0], [-1])
    with Editor(step, phase="forward").after(release) as editor:
        editor.call(aten.neg.default, flat)


@fault("release", "by %output")
def returned_after_release(step: StepGraph) -> None:
    step.set_result("loss", "loss", the(step, ops.release).args[0][0])


@fault("release", "alive, got released by")
def released_twice(step: StepGraph) -> None:
    release = the(step, ops.release)
    with Editor(step, phase="forward").after(release) as editor:
        editor.call(ops.release, [release.args[0][0]])


@fault("release", "alive, got released by")
def released_and_its_true_rows_too(step: StepGraph) -> None:
    rows = next(n for n in step.calls(aten.slice.Tensor) if n.name == "inner_weight_rows")
    release = next(n for n in rows.args[0].users if c10d.is_release(n))
    release.args = ([rows.args[0], rows],)


@fault("release", "a release of this gathered parameter, got none")
def forgotten_release(step: StepGraph) -> None:
    step.graph.erase_node(the(step, ops.release, phase="backward"))


@fault("release", "a release of this gathered parameter, got none")
def forgotten_release_of_a_cast(step: StepGraph) -> None:
    node = step.input("parameter", "inner.weight")
    sharding = node.meta["sharding"]
    with Editor(step, phase="forward").after(node) as editor:
        cast = editor.call(aten._to_copy.default, node, dtype=torch.bfloat16, sharding=sharding)
        editor.all_gather(cast, sharding, stem="cast")


@fault("release", "expected the gather of a parameter")
def released_input(step: StepGraph) -> None:
    release = the(step, ops.release)
    release.args = ([*release.args[0], step.inputs("batch")[0]],)


@fault("release", "expected the gather of a parameter")
def released_reduction(step: StepGraph) -> None:
    wait = next(iter(the(step, c10d.reduce_scatter, phase="backward").users))
    with Editor(step, phase="update").before(step.output) as editor:
        editor.call(ops.release, [wait])


# compression


def with_argument(node: fx.Node, index: int, value: object) -> None:
    node.args = (*node.args[:index], value, *node.args[index + 1 :])


@fault("release", "no use after release", graph="packed")
def use_of_what_was_dequantized_after_release(step: StepGraph) -> None:
    release = the(step, ops.release)
    with Editor(step, phase="forward").after(release) as editor:
        editor.call(aten.neg.default, release.args[0][0])


@fault("release", "a release of this gathered parameter, got none", graph="packed")
def forgotten_release_of_what_was_dequantized(step: StepGraph) -> None:
    step.graph.erase_node(the(step, ops.release, phase="backward"))


@fault("release", "alive, got released by", graph="packed")
def dequantized_and_released_twice(step: StepGraph) -> None:
    release = the(step, ops.release)
    with Editor(step, phase="forward").after(release) as editor:
        editor.call(ops.release, [release.args[0][0]])


@fault("release", "expected the gather of a parameter", graph="packed")
def released_mean_of_packed_gradients(step: StepGraph) -> None:
    with Editor(step, phase="update").before(step.output) as editor:
        editor.call(ops.release, [step.calls(dequantize_reduce)[0]])


@fault("compression", "one reader, which dequantizes it", graph="packed")
def released_packed_bytes(step: StepGraph) -> None:
    full = the(step, dequantize_blockwise)
    with Editor(step, phase="forward").after(full) as editor:
        editor.call(ops.release, [full.args[0]])


@fault("compression", "one reader, which dequantizes it", graph="packed")
def packed_bytes_read_twice(step: StepGraph) -> None:
    full = the(step, dequantize_blockwise)
    with Editor(step, phase="forward").after(full) as editor:
        editor.call(dequantize_blockwise, *full.args)


@fault("compression", "one reader, which dequantizes it, got none", graph="packed")
def packed_bytes_never_read(step: StepGraph) -> None:
    mean = step.calls(dequantize_reduce)[0]
    mean.replace_all_uses_with(step.input("parameter", mean.meta["param"]))
    step.graph.erase_node(mean)


@fault("compression", "no reader but its collective", graph="packed")
def quantized_rows_read_at_once(step: StepGraph) -> None:
    packed = the(step, quantize_blockwise)
    with Editor(step, phase="forward").after(packed) as editor:
        editor.call(aten.neg.default, packed)


@fault("compression", "form and block ('int8', 16)", graph="packed")
def read_in_another_form(step: StepGraph) -> None:
    with_argument(the(step, dequantize_blockwise), 2, "fp8")


@fault("compression", "form and block ('int8', 16)", graph="packed")
def read_in_other_blocks(step: StepGraph) -> None:
    with_argument(step.calls(dequantize_reduce)[0], 3, 32)


@fault("compression", f"parts {RANKS}, got 2", graph="packed")
def read_as_fewer_parts(step: StepGraph) -> None:
    with_argument(the(step, dequantize_blockwise), 4, 2)


@fault("compression", f"parts of what was sent {RANKS}, got 1", graph="packed")
def packed_for_one_rank(step: StepGraph) -> None:
    mean = step.calls(dequantize_reduce)[0]
    with_argument(c10d.sent_to(mean.args[0]), 3, 1)


@fault("compression", "shape [8, 10], got [4, 20]", graph="packed")
def read_as_another_shape(step: StepGraph) -> None:
    full = next(n for n in step.calls(dequantize_blockwise) if n.meta["param"] == "outer.weight")
    with_argument(full, 1, [4, 20])


@fault("compression", "the wait of a quantized all_gather", graph="packed")
def dequantized_without_a_gather(step: StepGraph) -> None:
    wait = the(step, dequantize_blockwise).args[0]
    launch, packed = c10d.launched_by(wait), c10d.sent_to(wait)
    wait.replace_all_uses_with(step.inputs("batch")[0])
    for node in (wait, launch, packed):
        step.graph.erase_node(node)


@fault("compression", "one all_gather and one drop_top_k", graph="chosen")
def nothing_taken_out_of_what_is_kept(step: StepGraph) -> None:
    drop = step.calls(drop_top_k)[0]
    drop.replace_all_uses_with(drop.args[0])
    step.graph.erase_node(drop)


@fault("compression", "one all_gather and one drop_top_k", graph="chosen")
def taken_out_of_what_was_kept_before(step: StepGraph) -> None:
    drop = step.calls(drop_top_k)[0]
    drop.replace_input_with(drop.args[0], drop.args[0].args[0])


@fault("compression", f"{RANKS} parts of 60 elements, got 2 parts of [10, 6]", graph="chosen")
def fewer_parts_added_up(step: StepGraph) -> None:
    with_argument(next(n for n in step.calls(sum_top_k) if n.meta["param"] == "inner.weight"), 2, 2)


@fault("compression", "the wait of gathered pack_top_k", graph="chosen")
def something_else_added_up(step: StepGraph) -> None:
    node = step.calls(sum_top_k)[0]
    wait = the(step, c10d.wait, phase="backward")
    node.replace_input_with(node.args[0], wait)


@fault("sharding", "axis dp_node of Sharding", graph="kept")
def kept_part_gathered_over_all_nodes(step: StepGraph) -> None:
    launch = the(step, c10d.all_gather, phase="backward")
    launch.args = (launch.args[0], RANKS, "dp")


@fault("compression", f"parts {RANKS}, got 2", graph="kept")
def kept_parts_read_as_those_of_a_node(step: StepGraph) -> None:
    with_argument(the(step, dequantize_blockwise, phase="backward"), 4, 2)


@fault("compression", "one reader, which dequantizes it", graph="kept")
def packed_bytes_read_beside_what_is_kept(step: StepGraph) -> None:
    kept = the(step, ops.local_shard)
    with Editor(step, phase="forward").after(kept) as editor:
        editor.call(aten.neg.default, kept.args[0])


@fault("release", "a release of this gathered parameter, got none", graph="kept")
def forgotten_release_of_what_a_node_gathered(step: StepGraph) -> None:
    step.graph.erase_node(the(step, ops.release, phase="backward"))


@fault("sharding", "axis dp of Sharding", graph="packed")
def packed_rows_gathered_over_another_axis(step: StepGraph) -> None:
    step.mesh = {"dp": RANKS, "tp": RANKS}
    launch = the(step, c10d.all_gather)
    with_argument(launch, 2, "tp")


# random


@fault("random", "as number 0", graph="captured")
def random_calls_swapped(step: StepGraph) -> None:
    first, second = (node for node in step.calls() if is_random(node))
    for node in (second.args[0], second):
        first.prepend(node)


@fault("random", "with nothing as number 1", graph="captured")
def random_call_dropped(step: StepGraph) -> None:
    first, second = (node for node in step.calls() if is_random(node))
    second.replace_all_uses_with(first)
    step.graph.erase_node(second)


@fault("random", "as number 2", graph="captured")
def random_call_added(step: StepGraph) -> None:
    second = [node for node in step.calls() if is_random(node)][1]
    with Editor(step, phase="forward").after(second) as editor:
        editor.call(second.target, *second.args)


# order


@fault("order", "after %outer_weight_release, got it before")
def gathered_again_before_it_is_released(step: StepGraph) -> None:
    first, second = (
        n for n in step.calls(c10d.all_gather) if c10d.sent(n)[0] is step.input("parameter", "outer.weight")
    )
    release = next(r for r in step.calls(ops.release) if c10d.launched_by(r.args[0][0]) is first)
    second.append(release)


@fault("order", "after %inner_weight_release, got it before", graph="carried")
def gathered_for_the_next_step_before_it_is_released(step: StepGraph) -> None:
    launch = returned(step, "inner.weight", "launched")
    release = next(r for r in step.calls(ops.release) if "inner" in r.name)
    launch.append(release)


@fault("order", "got it before", graph="captured")
def old_value_read_after_the_next_is_made(step: StepGraph) -> None:
    state = step.input("parameter", "inner.weight")
    with Editor(step, phase="update").before(step.output) as editor:
        editor.call(aten.relu.default, state)


# synchronisation


@fault("synchronisation", "no wait of the host for the device, as before the pass, got reads a tensor's value")
def read_by_host(step: StepGraph) -> None:
    loss = step.results[("loss", "loss")]
    with Editor(step, phase="update").before(step.output) as editor:
        node = editor.graph.call_function(aten._local_scalar_dense.default, (loss,))
    node.meta = {"phase": "update", "module": "", "val": 1.0}


# gradients


@fault("gradients", "result of parameter 'inner.weight': expected one computed from its gradient")
def update_without_gradient(step: StepGraph) -> None:
    gradient = next(iter(step.gradients()["inner.weight"].users))
    while not c10d.is_wait(gradient):
        gradient = next(iter(gradient.users))
    with Editor(step, phase="update").after(gradient) as editor:
        zeros = editor.call(aten.zeros_like.default, step.input("optimizer", "inner.weight:exp_avg"))
    for user in list(gradient.users):
        user.replace_input_with(gradient, zeros)


@fault("gradients", "result of parameter 'outer.bias': expected one computed from its gradient")
def gradient_without_its_name(step: StepGraph) -> None:
    del step.gradients()["outer.bias"].meta["grad_of"]


# regions


@fault("regions", "the calls of a region together, got a call of region 0 behind", graph="cut")
def call_that_went_elsewhere(step: StepGraph) -> None:
    step.output.prev.meta["region"] = 0


@fault("regions", "an op that a region may hold, got _c10d_functional.wait_tensor", graph="cut")
def wait_in_a_region(step: StepGraph) -> None:
    wait = next(node for node in step.calls(c10d.wait) if node.next.meta.get("region") is not None)
    wait.meta["region"] = wait.next.meta["region"]


@fault("regions", "one phase in a region, got", graph="cut")
def region_of_two_phases(step: StepGraph) -> None:
    inside = (node for found in regions(step) for node in found.calls[1:] if node.meta["phase"] == "forward")
    kept = next(node for node in inside if all(user.meta.get("phase") == "backward" for user in node.users))
    kept.meta["phase"] = "backward"


@fault("regions", "in its region, got one outside", graph="cut")
def part_outside_of_its_region(step: StepGraph) -> None:
    several = (node for node in step.calls() if isinstance(node.meta["val"], tuple) and "region" in node.meta)
    list(next(several).users)[-1].meta.pop("region")


# swaps


def loaded(step: StepGraph, kind: str, name: str) -> fx.Node:
    """The launch that brings an input in first."""
    return next(user for user in step.input(kind, name).users if user.target is swap_in)


@fault("swaps", "its one wait as only reader", graph="swapped")
def read_before_it_is_there(step: StepGraph) -> None:
    launch = loaded(step, "parameter", "inner.weight")
    wait = wait_of(launch)
    next(iter(wait.users)).replace_input_with(wait, launch)


@fault("swaps", "its one wait as only reader, got none", graph="swapped")
def launch_without_wait(step: StepGraph) -> None:
    source = the(step, aten.relu.default)
    with Editor(step, phase="forward").after(source) as editor:
        editor.call(swap_out, source, "host").meta["tier"] = "host"


@fault("swaps", "a move that it waits for", graph="swapped")
def wait_without_launch(step: StepGraph) -> None:
    source = the(step, aten.relu.default)
    with Editor(step, phase="forward").after(source) as editor:
        editor.call(swap_wait, source)


@fault("swaps", "a tier to read from, got %relu on device", graph="swapped")
def swap_in_of_what_is_here(step: StepGraph) -> None:
    source = the(step, aten.relu.default)
    with Editor(step, phase="forward").after(source) as editor:
        editor.call(swap_wait, editor.call(swap_in, source))


@fault("swaps", "inputs where it computes, got a read of", graph="swapped")
def op_that_reads_a_file(step: StepGraph) -> None:
    launch = loaded(step, "parameter", "inner.weight")
    wait = wait_of(launch)
    next(iter(wait.users)).replace_input_with(wait, launch.args[0])


@fault("swaps", "inputs where it computes, got a read of", graph="swapped")
def host_op_taken_for_one_of_the_device(step: StepGraph) -> None:
    del next(n for n in step.phase("update") if n.meta.get("tier") == "host" and n.target not in OPS).meta["tier"]


@fault("swaps", "meta['tier'] of where it moves to, got nvme", graph="swapped")
def wrong_tier(step: StepGraph) -> None:
    the(step, swap_out).meta["tier"] = "nvme"


@fault("swaps", "a value on nvme, got %", graph="swapped")
def state_that_stays_on_the_device(step: StepGraph) -> None:
    stored = returned(step, "outer.weight")
    step.set_result("parameter", "outer.weight", stored.args[0].args[0])


@fault("swaps", "no read after its next value is stored", graph="swapped")
def read_of_the_next_value(step: StepGraph) -> None:
    stored = returned(step, "outer.weight")
    reads = [user for user in step.input("parameter", "outer.weight").users if user.target is swap_in]
    with Editor(step, phase="update").after(stored) as editor:
        editor.call(swap_wait, editor.call(swap_in, reads[0].args[0]))


# values


@fault("values", "got (torch.float32, (5, 11)", graph="captured")
def wrong_shape(step: StepGraph) -> None:
    node = the(step, aten.relu.default)
    with Editor(step, phase="forward").mode:
        node.meta["val"] = torch.empty(5, 11)


@fault("values", "got (torch.bfloat16, (5, 10)", graph="captured")
def wrong_dtype(step: StepGraph) -> None:
    node = the(step, aten.relu.default)
    node.meta["val"] = node.meta["val"].to(torch.bfloat16)


@fault("values", "got (torch.float32, (5, 10), (1, 5)", graph="captured")
def wrong_strides(step: StepGraph) -> None:
    node = the(step, aten.relu.default)
    node.meta["val"] = node.meta["val"].t().contiguous().t()


@fault("values", "'meta')", graph="captured")
def wrong_device(step: StepGraph) -> None:
    node = the(step, aten.relu.default)
    node.meta["val"] = node.meta["val"].to("meta")


@fault("values", "meta['val'] float, got int", graph="captured")
def wrong_number(step: StepGraph) -> None:
    the(step, operator.mul, operator.sub, operator.pow, phase="update").meta["val"] = 1


@fault("values", "meta['val'] float, got bool", graph="captured")
def wrong_type_of_a_read_number(step: StepGraph) -> None:
    the(step, aten._local_scalar_dense.default, phase="update").meta["val"] = True


@fault("values", "meta['val'] a tensor, got float", graph="captured")
def number_for_a_tensor(step: StepGraph) -> None:
    the(step, aten.gt.Scalar, aten.relu.default).meta["val"] = 0.5


@fault("values", "an op that takes what its inputs are now", graph="captured")
def op_that_cannot_take_its_inputs(step: StepGraph) -> None:
    node = the(step, aten.addmm.default)
    node.args = (node.args[0], node.args[2], node.args[1])


@fault("values", "expected meta['val']", graph="captured")
def stale_value_of_a_distinct_twin(step: StepGraph) -> None:
    """1 and 1.0 are equal keys of a dict; a look-up that took one for the other would miss this."""
    counter = step.input("buffer", "norm.num_batches_tracked")
    with Editor(step, phase="forward").after(counter) as editor:
        whole = editor.call(aten.add.Tensor, counter, 1)
        stale = editor.call(aten.add.Tensor, counter, 1.0)
    stale.meta["val"] = whole.meta["val"]
