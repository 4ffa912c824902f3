"""A step rewritten by hand to what one rank of the axis tp runs: a linear layer by columns, then one by rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.graph import Sharding, StepGraph
from fxzero.graph.axis_placement import REPLICATED, Placement, local_shape, partial, shard
from fxzero.graph.edit import Editor, replace_uses, retype

aten = torch.ops.aten

# parameter -> how it lies over tp, and its momentum with it
PARAMETERS = {"up.weight": shard(0), "up.bias": shard(0), "down.weight": shard(1)}
# call -> how its value lies; others are replicated
CALLS = {
    "t_1": shard(1),
    "addmm_1": shard(1),
    "gelu": shard(1),
    "t_2": shard(0),
    "down_out": partial(),
    "down_reduce": partial(),
    "mm": shard(1),
    "mm_1": shard(1),
    "gelu_backward": shard(1),
    "mm_2": partial(),
    "t_8": shard(0),
    "mm_3": shard(0),
    "sum_2": shard(1),
    "view_1": shard(0),
    "hidden_grad_reduce": shard(0),
    "hidden_grad_shard": shard(0),
    **dict.fromkeys(("mul_2", "add_6", "add_7", "mul_3", "add_8", "add_9"), shard(0)),
    **dict.fromkeys(("mul_4", "add_10", "add_11"), shard(1)),
}


class Perceptron(nn.Module):
    """A layer that is left alone, then a pair of which tp takes columns and rows, beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(x)
        return F.mse_loss(hidden + self.down(F.gelu(self.up(hidden))), y)


def make() -> tuple[Perceptron, torch.optim.Optimizer]:
    """The model and an optimizer with state of the parameters' shapes."""
    torch.manual_seed(0)
    model = Perceptron()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One batch for each rank of the data axes."""
    torch.manual_seed(1)
    return [(torch.randn(4, 6), torch.randn(4, 8)) for _ in range(count)]


def split_step(mesh: dict[str, int]) -> StepGraph:
    """The step of `make`, captured and then split over the axis tp of a mesh; gradients are not reduced over others."""
    model, optimizer = make()
    captured = capture_step(rehearse(Inventory.of(model, optimizer))[0], None, batches(1)[0], {})
    step, ranks = captured.step, mesh["tp"]
    step.mesh, step.title = dict(mesh), "split by hand"
    inputs = {node: PARAMETERS[name] for node in step.placeholders if (name := _parameter_of(node)) in PARAMETERS}
    for node, placement in inputs.items():
        node.meta["val"] = node.meta["val"].new_empty(local_shape(node.meta["val"].shape, placement, ranks))
    bias_gradient = step.gradients()["up.bias"]
    bias_gradient.update_arg(1, [16 // ranks])
    bias_gradient.meta["val"] = bias_gradient.meta["val"].new_empty(16 // ranks)
    retype(step, (*inputs, bias_gradient))
    _reduce_forward(step)
    _reduce_backward(step)
    for node in (*step.placeholders, *step.calls()):
        found: Placement = inputs.get(node, CALLS.get(node.name, REPLICATED))
        node.meta["placements"] = {"tp": found}
    return step


def _parameter_of(node: torch.fx.Node) -> str:
    return str(node.meta["entry"].param or node.meta["entry"].name)


def _reduce_forward(step: StepGraph) -> None:
    """What the rows of `down` yield is added up over tp, then the bias is added once."""
    addmm = next(node for node in step.calls() if node.name == "addmm_2")
    bias, left, right = addmm.args
    with Editor(step, phase="forward", module="down").before(addmm) as editor:
        product = editor.call(aten.mm.default, left, right, name="down_out")
        total = editor.all_reduce(product, "tp", op="sum", stem="down")
        whole = editor.call(aten.add.Tensor, total, bias, name="down_whole")
    for node in step.calls():
        if node.name in ("down_reduce", "down_sum"):
            node.meta["because"] = "add.Tensor needs it added up"
    replace_uses(addmm, whole, addmm.users)
    step.graph.erase_node(addmm)


def _reduce_backward(step: StepGraph) -> None:
    """The gradient of the hidden is added up by rows, and the rows are gathered."""
    partial_sum = next(node for node in step.calls() if node.name == "mm_2")
    (reader,) = partial_sum.users
    rows = Sharding("tp", step.mesh["tp"], 4)
    with Editor(step, phase="backward", module="up").before(reader) as editor:
        part = editor.reduce_scatter(partial_sum, rows, op="sum", stem="hidden_grad")
        waited, whole = editor.all_gather(part, rows, stem="hidden_grad")
    for node in (part, part.args[0], waited, waited.args[0]):
        node.meta.pop("sharding", None)
        node.meta["because"] = "add.Tensor needs all of dim 0"
    replace_uses(partial_sum, whole, [reader])


def shard_rows(step: StepGraph, name: str) -> None:
    """ZeRO-3 over dp for one parameter and its momentum, on top of what tp has split."""
    parameter = step.inputs("parameter")[[n.meta["entry"].name for n in step.inputs("parameter")].index(name)]
    sharding = Sharding("dp", step.mesh["dp"], parameter.meta["val"].shape[0])
    stem, made = name.replace(".", "_"), []
    for phase in ("forward", "backward"):
        users = [user for user in parameter.users if user.meta["phase"] == phase]
        if users:
            with Editor(step, phase=phase, param=name).before(users[0]) as editor:
                made.append(editor.all_gather(parameter, sharding, stem=stem)[0])
            replace_uses(parameter, made[-1], users)
    gradient = step.gradients()[name]
    with Editor(step, phase="backward", param=name).after(gradient) as editor:
        made.append(editor.reduce_scatter(gradient, sharding, op="avg", stem=f"{stem}_grad"))
    replace_uses(gradient, made[-1], [user for user in gradient.users if user.meta["phase"] == "update"])
    state = [node for node in step.inputs("parameter", "optimizer") if _parameter_of(node) == name]
    for node in state:
        node.meta["val"] = node.meta["val"].new_empty(sharding.padded_rows // sharding.num_shards, *_columns(node))
    retype(step, state)
    for node in (*state, *(node for node in step.phase("update") if node.meta.get("param") == name)):
        node.meta["sharding"] = sharding
    for node in (*made, *(node.args[0] for node in made)):
        node.meta["placements"] = parameter.meta["placements"]


def _columns(node: torch.fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape[1:])
