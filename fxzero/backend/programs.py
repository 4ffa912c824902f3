"""The programs of one captured graph: joint graph, passes, two halves, and what runs each of them."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxzero import compat_dynamo
from fxzero.backend.calls import Call
from fxzero.backend.dropout import draw_as_eager
from fxzero.backend.halves import halves_of
from fxzero.backend.joint import Joint, Name, read_joint
from fxzero.backend.look import Compiled, show
from fxzero.backend.options import Options
from fxzero.backend.slots import Slots
from fxzero.graph import StepGraph
from fxzero.graph.blocks import repeated_blocks
from fxzero.graph.step_graph import device_of
from fxzero.graph.verify import verify
from fxzero.lower.inductor import check_compiler
from fxzero.lower.lower_regions import lower_by_plan
from fxzero.pass_manager import Pipeline
from fxzero.passes.cut_regions import cut_regions
from fxzero.passes.recompute_chosen import can_be_had_again, is_mask, recompute_chosen
from fxzero.plan import Plan
from fxzero.recipe import recipe
from fxzero.runtime.program import Program

log = logging.getLogger("fxzero")


class Compilation:
    """What AOTAutograd asks for one graph, in turn: to part it, to compile forward, to compile backward.

    Backward is compiled together with forward, so that what cannot be is an error of the first call and not of the
    first `backward()`.

    Args:
        options: of torch.compile.
        names: of the graph's inputs.
    """

    def __init__(self, options: Options, names: Sequence[Name]) -> None:
        self.options = options
        self.names = names
        self._backward: Call | None = None
        self._forward: Call | None = None

    def run(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Compile Dynamo's graph; returns a function of its inputs."""
        return compat_dynamo.aot_compiled(
            module,
            inputs,
            partition=self._partition,
            forward=lambda _, __: self._given(self._forward),
            backward=lambda _, __: self._given(self._backward),
            inference=self._inference,
        )

    def _partition(
        self, module: fx.GraphModule, _: Any, *, num_fwd_outputs: int, **__: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        joint = self._joint(module, num_fwd_outputs)
        halves = halves_of(self._rewritten(joint), mutated=joint.mutated)
        slots = self._slots(halves.forward)
        look = show(self.options.dump)
        outputs = (*joint.outputs, *halves.saved)
        self._forward = self._call(halves.forward, outputs, joint, slots, look)
        self._backward = self._call(halves.backward, joint.gradients, joint, slots, look)
        return self._forward.signature(), self._backward.signature()

    def _inference(self, module: fx.GraphModule, _: Sequence[Any]) -> compat_dynamo.Boxed:
        joint = self._joint(module, len(module.graph.output_node().args[0]))  # type: ignore[arg-type]
        step = self._rewritten(joint)
        step.title = "forward"
        return self._call(step, joint.outputs, joint, None, show(self.options.dump)).boxed()

    @staticmethod
    def _given(call: Call | None) -> compat_dynamo.Boxed:
        assert call is not None, "AOTAutograd compiles what it has partitioned"
        return call.boxed()

    def _joint(self, module: fx.GraphModule, num_outputs: int) -> Joint:
        joint = read_joint(module, num_outputs=num_outputs, names=self.names)
        draw_as_eager(joint)
        return joint

    def _rewritten(self, joint: Joint) -> StepGraph:
        plan = self.options.plan.replace(lowering="eager", recompute=_found_here(self.options.plan, joint.step))
        if not joint.step.phase("backward"):
            plan = plan.replace(recompute="none", offload_activations="none", **_OFFLOAD_DEFAULTS)
        pipeline = recipe(plan, backend="none")
        names = tuple(node.name for node in joint.again if can_be_had_again(node) or is_mask(node))
        if names:
            pipeline = Pipeline([recompute_chosen.using(names=names), *pipeline.passes], disable=plan.disable)
        return pipeline.run(joint.step)

    def _slots(self, forward: StepGraph) -> Slots | None:
        plan = self.options.plan
        return None if plan.offload_activations == "none" else Slots(plan, torch.device(device_of(forward)))

    def _call(self, step: StepGraph, outputs: Sequence[Any], joint: Joint, slots: Slots | None, look: Compiled) -> Call:
        """A program that returns these outputs: keys of results, and constants as they are."""
        plan, title = self.options.plan, step.title
        if plan.lowering != "eager" and step.calls():  # some graphs only hand their inputs on
            step = Pipeline([cut_regions], disable=plan.disable).run(step)
        step.title = f"{title} of graph {look.number}"
        verify(step)
        if plan.lowering != "eager":
            check_compiler(torch.device(device_of(step)))
        lowered = lower_by_plan(step, plan)
        program = Program(step, groups={}, swapper=slots and slots.swapper, lowered=lowered, name=step.title)
        look.add(title, step)
        return Call(program, outputs, joint.constants, slots)


_OFFLOAD_DEFAULTS: dict[str, Any] = {
    name: Plan.__dataclass_fields__[name].default
    for name in ("offload_below", "offload_dir", "offload_io", "offload_buffer_bytes", "host_budget")
}


def _found_here(plan: Plan, step: StepGraph) -> str | float | tuple[str, ...]:
    """What of the plan's `recompute` concerns a graph: between graph breaks not every one holds blocks."""
    wanted = plan.recompute
    paths = {node.meta["module"] for node in step.phase("forward")}
    modules = {".".join(path.split(".")[: count + 1]) for path in paths for count in range(path.count(".") + 1)}
    if isinstance(wanted, tuple):
        found = tuple(pattern for pattern in wanted if fnmatch.filter(modules, pattern))
        if len(found) < len(wanted):
            log.info("fxzero: recompute: no module of this graph matches %s", sorted({*wanted} - {*found}))
        return found or "none"
    if wanted == "none" or repeated_blocks(paths):
        return wanted
    log.info("fxzero: recompute=%r: this graph has no repeated blocks", wanted)
    return "none"
