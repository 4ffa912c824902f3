"""ZeRO-3: parameters rest as rows; they are gathered before use, released after, and gathered again in backward.

Source: ZeRO (Rajbhandari et al., 2020), section 5; FSDP (Zhao et al., 2023). As graph rewrites: SimpleFSDP (Zhang et
al., 2024) and DeepCompile (Tanaka et al., 2025).
"""

from __future__ import annotations

import torch
from torch import fx

from fxzero.graph import PHASES, Sharding, StepGraph, ops
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor
from fxzero.graph.repeat_views import repeat_views
from fxzero.graph.step_graph import identifier, iter_views, sharding_of
from fxzero.passes.shard_optimizer_state import is_rows_of

aten = torch.ops.aten


@graph_pass(requires=("optimizer-state-sharded",), provides=("parameters-sharded",))
def shard_parameters(step: StepGraph, *, axis: str, persist_below: int = 0, again: bool = True) -> int:
    """Keep parameters as rows of `axis`; gather, wait, use and release them in forward and again in backward.

    Where a phase reads a parameter only through a cast to fewer bytes, the rows are cast and those bytes gathered.

    Args:
        step: the graph.
        axis: the mesh axis to shard over.
        persist_below: parameters with fewer elements stay whole on every rank; of those that another axis splits, the
            elements of this rank's part count.
        again: gather again in backward; else what forward gathered is kept until backward has used it.
    """
    edits = 0
    position: dict[fx.Node, float] = dict(step.positions())
    results = step.results
    for node in step.inputs("parameter"):
        sharding = sharding_of(node, axis, step.mesh[axis], persist_below)
        if sharding is not None:
            if again:
                edits += repeat_views(node, position)
            edits += _shard(step, node, sharding, position, results, again=again)
    step.set_results(results)
    return edits


def _shard(
    step: StepGraph,
    parameter: fx.Node,
    sharding: Sharding,
    position: dict[fx.Node, float],
    results: dict[tuple[str, str], fx.Node],
    *,
    again: bool,
) -> int:
    name = parameter.meta["entry"].name
    _use_rows_in_update(step, parameter, results)
    users = {
        phase: [u for u in parameter.users if u.op == "call_function" and u.meta["phase"] == phase] for phase in PHASES
    }
    users["update"] = [u for u in users["update"] if "sharding" not in u.meta]
    if not again:
        users["forward"] += users.pop("backward")
    whole = parameter.meta["val"]
    shape = (sharding.padded_rows // sharding.num_shards, *whole.shape[1:])
    editor = Editor(step, phase="forward", module=name.rpartition(".")[0], param=name)
    with editor.mode:
        parameter.meta["val"] = torch.empty(shape, dtype=whole.dtype, device=whole.device)
    parameter.meta["sharding"] = sharding
    for readers in users.values():
        if readers:
            _gather_for(parameter, sharding, readers, editor, position, whole.stride())
    return 1 + sum(bool(u) for u in users.values())


def _use_rows_in_update(step: StepGraph, parameter: fx.Node, results: dict[tuple[str, str], fx.Node]) -> None:
    """The update reads and returns rows: no taking of rows before it, no gather after it."""
    for rows in [u for u in parameter.users if is_rows_of(u)]:
        rows.replace_all_uses_with(parameter)
        step.graph.erase_node(rows)
    key = parameter.meta["entry"].key
    node = results.get(key)
    while node is not None and node.target in (aten.slice.Tensor, c10d.wait, c10d.all_gather):
        node = node.args[0]  # type: ignore[assignment]
    if node is not None and "sharding" in node.meta:
        results[key] = node  # the gather behind it is dead now


def _gather_for(
    parameter: fx.Node,
    sharding: Sharding,
    users: list[fx.Node],
    editor: Editor,
    position: dict[fx.Node, float],
    strides: tuple[int, ...],
) -> None:
    """Gather before the first of `users`, release after the last that reads the parameter or a view of it."""
    stem = identifier(parameter.meta["entry"].name)
    narrow = _common_cast(users)
    casts = users if narrow is not None else []
    if narrow is not None:
        users = [reader for cast in casts for reader in cast.users]
    first = min(users, key=position.__getitem__)
    editor.meta = {**editor.meta, "phase": first.meta["phase"]}
    with editor.before(first):
        rows = parameter
        if narrow is not None:
            rows = editor.call(aten._to_copy.default, parameter, dtype=narrow, name=f"{stem}_cast", sharding=sharding)
        waited, full = editor.all_gather(rows, sharding, stem=stem)
        full = editor.with_strides(full, strides)
    for cast in casts:
        cast.replace_all_uses_with(full)
        cast.graph.erase_node(cast)
    for user in users:
        user.replace_input_with(parameter, full)
    readers = [u for source in (waited, *iter_views(waited)) for u in source.users]
    last = max(readers, key=lambda n: position.get(n, position[first] - 0.5))
    editor.meta = {**editor.meta, "phase": last.meta["phase"]}
    with editor.after(last):
        editor.call(ops.release, [waited], name=f"{stem}_release")


def _common_cast(users: list[fx.Node]) -> torch.dtype | None:
    """The dtype of fewer bytes that all users cast the parameter to, if that is all they do."""
    first = users[0].meta["val"]
    for user in users:
        only_dtype = user.target is aten._to_copy.default and set(user.kwargs) == {"dtype"} and user.users
        if not only_dtype or user.meta["val"].dtype != first.dtype:
            return None
    source = users[0].args[0].meta["val"]  # type: ignore[union-attr]
    return first.dtype if first.dtype.itemsize < source.dtype.itemsize else None
