"""shard(model, plan): a model whose parameters rest as rows, for a loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from fxzero import compat_distributed, compat_dynamo
from fxzero.arguments import check_model, device_of
from fxzero.backend.options import check_shard_plan
from fxzero.backend.sharded import WHOLE, Sharded, tell
from fxzero.backend.unshard_ops import unshard
from fxzero.errors import CaptureError, PlanError
from fxzero.graph.ops import local_shard
from fxzero.plan import Plan
from fxzero.runtime.agreement import Agreement
from fxzero.runtime.topology import Topology

_WHERE = "fxzero.shard(model, plan)"
_MARK = "fxzero_sharded"  # of the class of a module with sharded parameters


def shard(model: nn.Module, plan: Plan | Mapping[str, Any] | None = None) -> nn.Module:
    """Let the parameters of a model rest as rows, one set over the ranks; its forward still reads whole tensors.

    Parameters become DTensors, split on dim 0 over dp as by `fxzero.compile` and FSDP2, with rank 0's values. Make the
    optimizer afterwards. [Note: sharded parameters in a loop of one's own].

    Args:
        model: an ordinary module, with values; it is changed in place. All ranks must call this.
        plan: what `torch.compile(model, backend="fxzero")` is to do; default: ZeRO-3 over all ranks.

    Returns:
        The model.

    Raises:
        PlanError: if the plan asks for what cannot be given here.
        CaptureError: if the model is sharded or wrapped already, or keeps parameters where they cannot be replaced.
        RankMismatchError: on every rank, if plans or models differ, or ranks are missing.
    """
    plan = check_shard_plan(plan if isinstance(plan, Plan) else Plan.from_dict({} if plan is None else plan))
    agreement = Agreement(timeout_s=plan.timeout_s)
    try:
        _check(model)
        sharded = Sharded(Topology.of(plan, device_of(model).type), agreement)
        text = _described(model, sharded)
    except Exception as error:
        tell(agreement, error)
        raise
    sharded.agree(text)
    sharded.topology = sharded.topology.sharing_memory()
    if sharded.topology.world_size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
    _replace(model, sharded)
    return model


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        fix = "call it with the model, before torch.compile"
        raise CaptureError.of(_WHERE, expected="a torch Module", got=type(model).__name__, fix=fix)
    if any(hasattr(module, _MARK) for module in model.modules()):
        fix = "shard a model once; for another plan, load its state into a new one"
        raise CaptureError.of(_WHERE, expected="a model that is not sharded", got="one that is", fix=fix)
    check_model(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            fix = "fill it first: model.to_empty(device=..), then your initialisation or a checkpoint"
            raise PlanError.of(f"parameter {name}", expected="one with values", got="the meta device", fix=fix)
    for path, module in model.named_modules():
        _check_attributes(path, module, {id(parameter) for parameter in model.parameters()})


def _check_attributes(path: str, module: nn.Module, parameters: set[int]) -> None:
    """A parameter that a plain attribute holds, too, would be read from there, unsharded (torch's RNNs do)."""
    for attribute, value in vars(module).items():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        if attribute != "_parameters" and any(id(item) in parameters for item in items):
            where = f"module {path!r} of class {type(module).__name__}"
            fix = "let it read its parameters as attributes, or leave it to fxzero.compile"
            got = f"some in its attribute {attribute!r}, too"
            raise CaptureError.of(where, expected="parameters kept as parameters alone", got=got, fix=fix)


def _described(model: nn.Module, sharded: Sharded) -> str:
    """What ranks must agree on before anything is sent."""
    lines = [f"torch {torch.__version__}", f"shard by plan {sharded.plan.fingerprint()}"]
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        lines += [f"{kind} {name} {list(value.shape)} {value.dtype}" for name, value in named]
    return "\n".join(lines)


def _replace(model: nn.Module, sharded: Sharded) -> None:
    """Let modules own sharded parameters, ties kept, and read whole ones."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    classes: dict[Any, type] = {}
    for module in model.modules():
        own = list(module.named_parameters(recurse=False, remove_duplicate=False))
        for name, parameter in own:
            if parameter not in made:
                made[parameter] = _rested(parameter, sharded)
            module.register_parameter(name, made[parameter])
        if own:
            split = tuple((name, sharded.rows_of(parameter.shape) != WHOLE) for name, parameter in own)
            key = type(module), split
            if key not in classes:
                classes[key] = _class_of(type(module), dict(split), sharded)
            module.__class__ = classes[key]


def _rested(parameter: nn.Parameter, sharded: Sharded) -> nn.Parameter:
    """What a module owns in place of a parameter."""
    topology, full = sharded.topology, parameter.detach()
    if topology.mesh is None:
        return parameter
    memory, rows, split = full, full, sharded.rows_of(full.shape) != WHOLE
    if split:
        memory = local_shard(full, topology.plan.axes["dp"], topology.coordinate("dp"))
        first = topology.coordinate("dp") * memory.shape[0]
        rows = memory[: max(0, min(memory.shape[0], full.shape[0] - first))]
    placements = [Shard(0) if split and axis == "dp" else Replicate() for axis in topology.plan.axes]
    stride = torch.empty(full.shape, device="meta").stride()
    owned = compat_distributed.dtensor_over(
        rows.contiguous(), topology.mesh, placements, shape=full.shape, stride=stride
    )
    return nn.Parameter(owned, requires_grad=parameter.requires_grad)


def _class_of(base: type, split: Mapping[str, bool], sharded: Sharded) -> type:
    """The class of a module that reads these parameters whole: name -> whether it is split."""
    is_owned = sharded.topology.mesh is not None
    read = {name: _reading(name, sharded.name, split=split[name], is_owned=is_owned) for name in split}

    def extra_repr(module: Any) -> str:
        """What the plain module says of itself: to print a model is no reason to gather."""
        plain: Any = object.__new__(base)
        object.__setattr__(plain, "__dict__", vars(module))
        return plain.extra_repr()  # type: ignore[no-any-return]

    return type(f"Sharded{base.__name__}", (base,), {**read, "extra_repr": extra_repr, _MARK: sharded})


def _reading(name: str, by: str, *, split: bool, is_owned: bool) -> property:
    """The attribute of a parameter: the whole of it, gathered.

    Args:
        name: of the parameter.
        by: name of what has sharded it.
        split: it rests as rows.
        is_owned: it is a DTensor, since there are process groups.
    """

    def read(module: nn.Module) -> torch.Tensor | None:
        parameter: Any = compat_dynamo.own_parameters(module)[name]
        if parameter is None:
            return None
        if isinstance(parameter, DTensor) != is_owned:
            raise _replaced(name, module, parameter)
        rows = parameter.to_local() if is_owned else parameter
        return unshard(rows, parameter.shape[0] if split else WHOLE, by)  # type: ignore[no-any-return]

    return property(read)


def _replaced(name: str, module: nn.Module, parameter: torch.Tensor) -> CaptureError:
    where = f"parameter {name!r} of {type(module).__name__}"
    fix = "write into it (parameter.copy_, load_state_dict), or replace it before fxzero.shard"
    return CaptureError.of(where, expected="the one that fxzero.shard has made", got=type(parameter).__name__, fix=fix)
