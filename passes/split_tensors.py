"""Tensor parallelism: what lies in parts over the ranks of an axis is found by cost, and each rank makes its part.

No model is known by name: the captured step has single-device meaning, rules say which parts of a call's inputs give
which parts of its outputs (`fxzero/sharding/rules.py`), and an integer program finds the cheapest ways that fit
together, state in as state out (`fxzero/sharding/solve.py`). Where a value has to lie in another way, a collective
stands in the graph.
Source: Alpa (Zheng et al., 2022); GSPMD (Xu et al., 2021); Megatron-LM (Shoeybi et al., 2019) for what falls out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxzero.cost.hardware import hardware_of
from fxzero.errors import RewriteError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import REPLICATED, Placement, local_shape
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor, coordinate, fake_mode, value_of
from fxzero.graph.step_graph import PHASES, is_getitem, yields_tensor
from fxzero.sharding.conversions import Axis, OfRows, convert, route
from fxzero.sharding.expert_parameters import experts_over
from fxzero.sharding.expert_room import check_rooms
from fxzero.sharding.hints import pin
from fxzero.sharding.local_arguments import with_local_sizes
from fxzero.sharding.problem import lies_as_input, problem_of
from fxzero.sharding.refused import check_attention, refuse_undivided, refuse_unknown
from fxzero.sharding.routing import NOTHING_ROUTED, Routing
from fxzero.sharding.rules import Rules
from fxzero.sharding.solve import solve
from fxzero.sharding.strategy import Call, Local, Strategy
from fxzero.sharding.told import told
from fxzero.sharding.whole import done_whole


@graph_pass(
    provides=("tensors-split",),
    numerics="sums over ranks are added up in another order: within 1e-5 of one rank",
)
def split_tensors(
    step: StepGraph,
    *,
    axis: str,
    parameters: str = "any",
    expert_room: float | None = None,
    head_blocks: int = 1,
    attention: str = "auto",
    strict: bool = False,
    hardware: str = "auto",
    backend: str = "",
) -> int:
    """Let each rank of an axis hold and compute a part of what is cheaper in parts.

    Args:
        step: the graph as captured; a parameter with `meta["pinned"]` for the axis has to lie so.
        axis: the mesh axis.
        parameters: which of them may lie in parts: "any"; "whole", none; "experts", those of experts, which then do:
            each rank has some experts.
        expert_room: for how many times the rows of an even load over its experts a rank has room; None: for all rows.
        head_blocks: ranks of another axis that is split over later, where heads of attention are its ranks' first.
        attention: a form in which all attention is made, one of `fxzero.sharding.attention.FORMS`; "auto": in any way.
        strict: an op that no rule knows is an error, and so are sizes that ranks do not divide where every rank does
            all of a call then; else it does.
        hardware: name or path of a machine's description; "auto": by the graph's device.
        backend: what carries collectives, for "auto".

    Raises:
        PlanError: if it is strict, and no rule knows an op or ranks do not divide its sizes; if attention cannot be
            made in the form, or experts cannot be split that are to be.
    """
    machine = hardware_of(step, backend=backend, named=hardware)
    if parameters != "any":
        plain = {node.meta["entry"].name: REPLICATED for node in step.inputs("parameter")}
        pin(step, plain | (experts_over(step, axis) if parameters == "experts" else {}), axis=axis)
    rules = Rules(step.mesh[axis], head_blocks=head_blocks, attention=attention)
    if attention != "auto" and rules.ranks > 1:
        check_attention(step, axis, rules)
    if parameters == "experts":
        rules.routing = Routing.of(step, rules.of, ranks=rules.ranks, factor=expert_room or 0.0)
    answer = solve(problem_of(step, axis, rules, machine))
    whole = done_whole(step, answer)
    if strict:
        refuse_unknown(step, rules)
        refuse_undivided(whole, axis, rules.ranks)
    before = [step.remarks["split_tensors"]] if "split_tensors" in step.remarks else []
    step.remarks["split_tensors"] = "\n".join([*before, told(step, axis, answer, rules, whole)])
    ways = {node: answer.strategy(node) for node in answer.problem.of_node}
    edits = rewrite(step, axis=axis, ways=ways, routing=rules.routing)
    return edits + (0 if expert_room is None else check_rooms(step, axis))


def rewrite(step: StepGraph, *, axis: str, ways: Mapping[fx.Node, Strategy], routing: Routing = NOTHING_ROUTED) -> int:
    """Let each rank of an axis do its part of calls that are made in these ways.

    Args:
        step: the graph as captured; it is changed.
        axis: the mesh axis.
        ways: of every call that takes or yields tensors, and of every input that is one.
        routing: of the rows that lie by expert in these ways.

    Returns:
        How many places were changed.
    """
    return _Rewrite(step, axis, ways, routing).run()


class _Rewrite:
    """Goes through a graph and lets each node do what one rank does."""

    def __init__(self, step: StepGraph, axis: str, ways: Mapping[fx.Node, Strategy], routing: Routing) -> None:
        self.step, self.ways, self.routing = step, ways, routing
        self.axis = Axis(axis, step.mesh[axis], coordinate(step, axis))
        self.mode = fake_mode(step)
        self.inputs = {node.meta["entry"].key: node for node in step.placeholders}
        # node that yields a tensor -> the whole's shape, and placement -> what this rank has of it
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.held: dict[fx.Node, dict[Placement, fx.Node]] = {}
        self.lies: dict[fx.Node, Placement] = {}
        self.changed: set[fx.Node] = set()  # whose value is not what one device has
        # of a step that is split over another axis, what lies over that in no way that has a name has no placements
        self.is_first = not any("placements" in node.meta for node in step.graph.nodes)
        self.edits = 0

    def run(self) -> int:
        results = self.step.results
        nodes = list(self.step.graph.nodes)
        for node in nodes:
            if yields_tensor(node):
                self.shapes[node] = tuple(node.meta["val"].shape)
        for node in nodes:
            if node.op == "placeholder" and node in self.ways:
                self._take_part(node)
            elif node.op == "call_function" and node in self.ways:
                self._rewrite(node)
        self._settle_results(results)
        return self.edits

    def _take_part(self, node: fx.Node) -> None:
        (placement,) = self.ways[node].outputs
        assert placement is not None
        self._holds(node, node, placement)
        if placement == REPLICATED:
            return
        val = node.meta["val"]
        with self.mode:
            shape = local_shape(val.shape, placement, self.axis.ranks)
            node.meta["val"] = torch.empty(shape, dtype=val.dtype, device=val.device)
        self.changed.add(node)
        self.edits += 1

    def _holds(self, node: fx.Node, part: fx.Node, placement: Placement) -> None:
        """This rank has a part of the value that a node yielded on one device."""
        self.held[node] = {placement: part}
        self.lies[node] = placement
        self._mark(part, placement, like=node)
        if "grad_of" in part.meta:
            self._settle_gradient(node, part)

    def _settle_gradient(self, node: fx.Node, part: fx.Node) -> None:
        """A gradient lies as its parameter does, from where it is born: what is reduced over other axes is that."""
        wanted = self.lies[self.inputs[("parameter", part.meta["grad_of"][0])]]
        if wanted == self.lies[node]:
            return
        editor = Editor(self.step, phase="backward", module=part.meta["module"])
        with editor.after(part):
            made = self._in(node, wanted, editor, part)
        made.meta["because"] = f"a gradient lies as its parameter: {wanted}"
        made.meta["grad_of"] = part.meta.pop("grad_of")

    def _mark(self, part: fx.Node, placement: Placement, *, like: fx.Node) -> None:
        """Say of a part how its value lies; over other axes, as the value did that it is made of."""
        if "placements" not in like.meta and not self.is_first:
            part.meta.pop("placements", None)
            return
        others = {axis: lies for axis, lies in like.meta.get("placements", {}).items() if axis != self.axis.name}
        part.meta["placements"] = others if placement == REPLICATED else {**others, self.axis.name: placement}

    def _rewrite(self, node: fx.Node) -> None:
        strategy = self.ways[node]
        call = Call.of(node, self.axis.ranks) if strategy.form is not None else None
        taken = iter(strategy.inputs)
        meta = node.meta
        editor = Editor(self.step, phase=meta["phase"], module=meta["module"], param=meta.get("param"))

        def part(source: fx.Node) -> fx.Node:
            return self._in(source, next(taken), editor, node) if yields_tensor(source) else source

        with editor.before(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), part)
            if strategy.form is not None:
                assert call is not None

                def ends(source: fx.Node) -> fx.Node:
                    return self._in(self.routing.ends[(source, 0)], REPLICATED, editor, node)

                local = Local(editor, node, args, kwargs, call, self.axis.name, lambda: self.axis.coordinate, ends)
                self._replace(node, strategy.form(local), strategy)
                return
            if c10d.is_collective(node):
                args = (editor.contiguous(args[0]), *args[1:])  # type: ignore[arg-type]
        if args == node.args and kwargs == node.kwargs and self.changed.isdisjoint(node.all_input_nodes):
            self._yields(node, strategy)
            return
        self.edits += 1
        output = strategy.outputs[0]
        if yields_tensor(node) and output is not None:
            args = with_local_sizes(node.target, args, local_shape(self.shapes[node], output, self.axis.ranks))
        node.args, node.kwargs = args, kwargs
        self._evaluate(node, editor)
        self.changed.add(node)
        self._yields(node, strategy)

    def _in(self, source: fx.Node, wanted: Placement, editor: Editor, reader: fx.Node) -> fx.Node:
        """What this rank has of a value, lying as a reader wants it; made where it is not there yet."""
        held, before, shape = self.held[source], self.lies[source], self.shapes[source]
        if wanted in held:
            return held[wanted]
        for after in route(shape, before, wanted, self.axis.ranks):
            if after not in held:
                ends = self._ends(source, before, after, editor, reader)
                made = convert(editor, held[before], shape, before, after, self.axis, of_rows=ends)
                held[after] = made
                if made is held[before]:  # which is whole, whatever may be made of it
                    return made
                made.meta["because"] = f"{reader.name} takes {wanted}"
                self._mark(made, after, like=held[before])
                self.edits += 1
            before = after
        return held[wanted]

    def _ends(
        self, source: fx.Node, before: Placement, after: Placement, editor: Editor, reader: fx.Node
    ) -> OfRows | None:
        """What a conversion from or to rows of experts has to know; None of another one."""
        ends = self.routing.ends_of(source, before, after)
        if ends is None:
            return None
        whole = self.held[source][before] if ends is source else self._in(ends, REPLICATED, editor, reader)
        return OfRows(whole, self.routing.room(self.routing.number[ends]))

    def _evaluate(self, node: fx.Node, editor: Editor) -> None:
        try:
            node.meta["val"] = value_of(self.step, node, self.mode)
        except Exception:
            self._with_contiguous_input(node, editor)
        # a view of parts that came in another order of memory than the whole's

    def _with_contiguous_input(self, node: fx.Node, editor: Editor) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        try:
            with editor.before(node):
                node.replace_input_with(source, editor.contiguous(source))
            node.meta["val"] = value_of(self.step, node, self.mode)
        except Exception as error:
            raise RewriteError.of(
                where=f"{node.name} = {node.target} of parts over {self.axis.name}",
                expected="an op that takes the parts that its rule names",
                got=str(error).splitlines()[0],
                fix="report this op and its shapes: a rule of fxzero.sharding is wrong",
            ) from error

    def _yields(self, node: fx.Node, strategy: Strategy) -> None:
        """Note what a call yields now, and check that it is what its way says."""
        if yields_tensor(node):
            (placement,) = strategy.outputs
            assert placement is not None
            self._check(node, self.shapes[node], node.meta["val"], placement)
            self._holds(node, node, placement)
            for wait in filter(c10d.is_wait, list(node.users)):
                self._waits(wait, node, placement)
            return
        values = node.meta["val"]
        if not isinstance(values, (list, tuple)):
            return
        for user in node.users:
            placement = strategy.outputs[user.args[1]] if is_getitem(user) else None  # type: ignore[index]
            if placement is None:
                continue
            self._check(user, self.shapes[user], values[user.args[1]], placement)  # type: ignore[index]
            user.meta["val"] = values[user.args[1]]  # type: ignore[index]
            self.changed.add(user)
            self._holds(user, user, placement)

    def _waits(self, wait: fx.Node, launch: fx.Node, placement: Placement) -> None:
        """What waits for a collective over another axis yields what that does."""
        if launch in self.changed:
            wait.meta["val"] = value_of(self.step, wait, self.mode)
            self.changed.add(wait)
        self._holds(wait, wait, placement)

    def _check(self, node: fx.Node, shape: tuple[int, ...], val: Any, placement: Placement) -> None:
        expected = local_shape(shape, placement, self.axis.ranks)
        if tuple(val.shape) != expected:
            raise RewriteError.of(
                where=f"{node.name} = {node.target} over {self.axis.name}",
                expected=f"a part of shape {expected}, {placement} of {shape}",
                got=str(tuple(val.shape)),
                fix="report this op and its shapes: a rule of fxzero.sharding is wrong",
            )

    def _replace(self, node: fx.Node, parts: tuple[fx.Node | None, ...], strategy: Strategy) -> None:
        """Nodes that a form has made stand for what a call yielded."""
        self.edits += 1
        for old, index in [(node, 0)] if yields_tensor(node) else self._parts_of(node):
            part, placement = parts[index], strategy.outputs[index]  # type: ignore[index]
            assert part is not None and placement is not None
            self._check(old, self.shapes[old], part.meta["val"], placement)
            if "grad_of" in old.meta:
                part.meta["grad_of"] = old.meta["grad_of"]
            self._holds(old, part, placement)

    def _parts_of(self, node: fx.Node) -> list[tuple[fx.Node, Any]]:
        """What picks the values of a call, with their numbers; not what its form has inserted."""
        return [(user, user.args[1]) for user in node.users if user in self.shapes]

    def _settle_results(self, results: dict[tuple[str, str], fx.Node]) -> None:
        """State goes out as it came in; all else whole. What that takes stands last, and is of the last phase."""
        last = max((node.meta["phase"] for node in self.step.calls()), key=PHASES.index)
        for key, node in results.items():
            if not yields_tensor(node) or node not in self.held:
                continue
            lies_as = lies_as_input(self.inputs, *key)
            wanted = REPLICATED if lies_as is None else self.lies.get(lies_as, REPLICATED)
            editor = Editor(self.step, phase=last, module=node.meta["module"], param=node.meta.get("param"))
            with editor.before(self.step.output):
                results[key] = self._in(node, wanted, editor, self.step.output)
        self.step.set_results(results)
        self._erase_replaced()

    def _erase_replaced(self) -> None:
        """What forms stand for is read by nobody any more."""
        for node in reversed(self.step.calls()):
            formed = node in self.ways and self.ways[node].form is not None
            replaced = node in self.held and node not in self.held[node].values()
            if not node.users and (replaced or formed):
                self.step.graph.erase_node(node)
