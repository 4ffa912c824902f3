"""The programs of one captured graph: joint graph, passes, two halves, and what runs each of them."""

from __future__ import annotations

import fnmatch
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero import compat_dynamo
from fxzero.backend.calls import Call
from fxzero.backend.dropout import draw_as_eager
from fxzero.backend.halves import halves_of
from fxzero.backend.joint import Joint, Key, Name, read_joint
from fxzero.backend.look import Compiled, show
from fxzero.backend.one_device import bring_to_one_device
from fxzero.backend.open_sizes import OpenSizes
from fxzero.backend.options import Options, check_lowering
from fxzero.backend.slots import Slots
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.blocks import repeated_blocks
from fxzero.graph.step_graph import device_of
from fxzero.graph.verify import verify
from fxzero.lower.choose import with_lowering
from fxzero.lower.inductor import check_compiler
from fxzero.lower.lower_regions import Lowered, lower_by_plan
from fxzero.pass_manager import Pipeline
from fxzero.passes.cut_regions import cut_regions
from fxzero.passes.recompute_chosen import can_be_had_again, is_mask, recompute_chosen
from fxzero.plan import Plan
from fxzero.recipe import recipe
from fxzero.runtime.agreement import agreed_text
from fxzero.runtime.program import Program

log = logging.getLogger("fxzero")


class Compilation:
    """What AOTAutograd asks for one graph, in turn: to part it, to compile forward, to compile backward.

    Backward is compiled together with forward, so that what cannot be is an error of the first call and not of the
    first `backward()`.

    Args:
        options: of torch.compile.
        names: of the graph's inputs.
        sizes: those that Dynamo leaves open.
    """

    def __init__(self, options: Options, names: Sequence[Name], sizes: OpenSizes | None = None) -> None:
        self.options = options
        self.names = names
        self.sizes = sizes if options.plan.dynamic else None
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
        step, passes = self._rewritten(joint)
        halves = halves_of(step, mutated=joint.mutated)
        made = _Making(self.options, joint, passes, show(self.options.dump), self._slots(halves.forward), self.sizes)
        self._forward = made.call(halves.forward, (*joint.outputs, *halves.saved))
        self._backward = made.call(halves.backward, joint.gradients)
        return self._forward.signature(), self._backward.signature()

    def _inference(self, module: fx.GraphModule, _: Sequence[Any]) -> compat_dynamo.Boxed:
        joint = self._joint(module, len(module.graph.output_node().args[0]))  # type: ignore[arg-type]
        step, passes = self._rewritten(joint)
        step.title = "forward"
        made = _Making(self.options, joint, passes, show(self.options.dump), sizes=self.sizes)
        return made.call(step, joint.outputs).boxed()

    @staticmethod
    def _given(call: Call | None) -> compat_dynamo.Boxed:
        assert call is not None, "AOTAutograd compiles what it has partitioned"
        return call.boxed()

    def _joint(self, module: fx.GraphModule, num_outputs: int) -> Joint:
        joint = read_joint(module, num_outputs=num_outputs, names=self.names)
        if self.options.sharded is not None:
            bring_to_one_device(joint, self.options.plan.axes)
        draw_as_eager(joint)
        return joint

    def _rewritten(self, joint: Joint) -> tuple[StepGraph, str]:
        """Forward and backward as the plan wants them, and the passes that made them so, a line each."""
        plan = self.options.plan.replace(lowering="eager", recompute=_found_here(self.options.plan, joint.step))
        if not joint.step.phase("backward"):
            plan = plan.replace(recompute="none", offload_activations="none", **_OFFLOAD_DEFAULTS)
        sharded = self.options.sharded
        pipeline = recipe(plan, backend="none" if sharded is None else sharded.topology.backend)
        again = [node for node in joint.step.calls() if node in joint.again]  # in an order that all ranks have
        names = tuple(node.name for node in again if can_be_had_again(node) or is_mask(node))
        if names:
            pipeline = Pipeline([recompute_chosen.using(names=names), *pipeline.passes], disable=plan.disable)
        return pipeline.run(joint.step), pipeline.describe()

    def _slots(self, forward: StepGraph) -> Slots | None:
        plan = self.options.plan
        return None if plan.offload_activations == "none" else Slots(plan, torch.device(device_of(forward)))


@dataclass(frozen=True)
class _Making:
    """What the programs of one captured graph are made with.

    Args:
        options: of torch.compile.
        joint: the graph.
        passes: that have rewritten it, a line each.
        look: where people find them.
        slots: where activations wait off the device, if they do.
        sizes: those that Dynamo leaves open, if regions may serve all of them.
    """

    options: Options
    joint: Joint
    passes: str
    look: Compiled
    slots: Slots | None = None
    sizes: OpenSizes | None = None

    def call(self, step: StepGraph, outputs: Sequence[Any]) -> Call:
        """A program that returns these outputs: keys of results, and constants as they are."""
        plan, title, slots = _lowered_here(self.options.plan, step), step.title, self.slots
        if plan.lowering != "eager":
            step = Pipeline([cut_regions], disable=plan.disable).run(step)
        step.title = f"{title} of graph {self.look.number}"
        verify(step)
        if plan.lowering != "eager":
            check_compiler(torch.device(device_of(step)))
        lowered = self._lowered(step, plan, title)
        groups = {} if self.options.sharded is None else self.options.sharded.topology.groups
        program = Program(step, groups=groups, swapper=slots and slots.swapper, lowered=lowered, name=step.title)
        self.look.add(title, step)
        return Call(program, outputs, self._fixed(step), slots=slots, agree=self._agreement(step, title))

    def _lowered(self, step: StepGraph, plan: Plan, title: str) -> Lowered | None:
        if self.sizes is None or plan.lowering == "eager":
            return lower_by_plan(step, plan)
        siblings = self.sizes.of(title)
        lowered = lower_by_plan(step, plan, at=siblings.at(self.sizes.sizes))
        siblings.keep(step, self.sizes.sizes)
        return lowered

    def _fixed(self, step: StepGraph) -> dict[Key, Any]:
        """Inputs that no call brings."""
        fixed: dict[Key, Any] = {("constant", name): value for name, value in self.joint.constants.items()}
        sharded = self.options.sharded
        for node in step.inputs("coordinate"):
            assert sharded is not None, "only a graph of several ranks asks where it is"
            fixed[node.meta["entry"].key] = sharded.topology.coordinate(node.meta["entry"].name)
        return fixed

    def _agreement(self, step: StepGraph, title: str) -> Callable[[], None] | None:
        """What settles that all ranks are about to run a program; None where it tells them nothing."""
        sharded = self.options.sharded
        if sharded is None or not any(map(c10d.is_collective, step.calls())):
            return None
        text = agreed_text(step, plan=self.options.plan.fingerprint(), passes=self.passes)
        return functools.partial(sharded.agree, f"{title} of a captured graph\n{text}")


_OFFLOAD_DEFAULTS: dict[str, Any] = {
    name: Plan.__dataclass_fields__[name].default
    for name in ("offload_below", "offload_dir", "offload_io", "offload_buffer_bytes", "host_budget")
}


def _lowered_here(plan: Plan, step: StepGraph) -> Plan:
    """The plan with its lowering chosen for a program; some only hand their inputs on."""
    if not step.calls():
        return plan.replace(lowering="eager")
    plan = with_lowering(plan, torch.device(device_of(step)))
    check_lowering(plan)
    return plan


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
