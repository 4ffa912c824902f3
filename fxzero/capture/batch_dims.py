"""Which dims of a batch have sizes of one name: its batch size, its sequence length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxzero import compat
from fxzero.capture.signature import flatten_batch
from fxzero.errors import CaptureError

BATCH, SEQUENCE = "batch", "sequence"

Leaves = Sequence[tuple[str, Any]]
NamedDims = Mapping[str, Mapping[int, str]]


def find_dims(leaves: Leaves) -> dict[str, dict[int, str]]:
    """The dims of a batch that look like its batch size and its sequence length: leaf path -> dim -> name.

    Batch is dim 0 of the first tensor, and dim 0 of every other one where that has the same size. Sequence is dim 1 of
    the first tensor of integers that has one, else of the first tensor with two dims or more; and every other dim,
    of any tensor, that has the same size and is no batch.

    Args:
        leaves: (path, leaf) of the arguments, see `flatten_batch`.
    """
    tensors = [(path, leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not tensors:
        return {}
    batch = tensors[0][1].shape[0]
    dims = {path: {0: BATCH} if leaf.shape[0] == batch else {} for path, leaf in tensors}
    long = sorted((leaf for _, leaf in tensors if leaf.dim() > 1), key=lambda leaf: leaf.dtype.is_floating_point)
    for path, leaf in tensors if long else ():
        matching = [d for d, size in enumerate(leaf.shape) if size == long[0].shape[1] and d not in dims[path]]
        dims[path].update(dict.fromkeys(matching, SEQUENCE))
    return {path: named for path, named in dims.items() if named}


def sizes_of(leaves: Leaves, dims: NamedDims) -> dict[str, int]:
    """The sizes of the named dims in one batch.

    Raises:
        CaptureError: if a leaf or a dim is not there, or two dims of one name have different sizes.
    """
    tensors = {path: leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}
    sizes: dict[str, int] = {}
    for path, named in dims.items():
        for dim, name in named.items():
            if path not in tensors or dim not in range(tensors[path].dim()):
                shapes = ", ".join(f"{p} {list(leaf.shape)}" for p, leaf in tensors.items()) or "no tensors"
                fix = "correct the path or the dim"
                raise CaptureError.of(f"dim {dim} of {path}", expected="a dim of the batch", got=shapes, fix=fix)
            size = tensors[path].shape[dim]
            if sizes.setdefault(name, size) != size:
                raise CaptureError.of(
                    where=f"dim {dim} of {path}",
                    expected=f"{name} = {sizes[name]}, as elsewhere in the batch",
                    got=str(size),
                    fix="give dims of different sizes different names",
                )
    return sizes


def shape_at(path: str, leaf: torch.Tensor, dims: NamedDims, sizes: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shape of a leaf with other sizes, numbers or symbols, for its named dims.

    Raises:
        CaptureError: if the leaf has named dims and is not contiguous: its strides at other sizes are not known.
    """
    named = dims.get(path, {})
    if named and not leaf.is_contiguous():
        raise CaptureError.of(
            where=path,
            expected="a contiguous tensor, as its dims are to have other sizes",
            got=f"shape {tuple(leaf.shape)} with strides {leaf.stride()}",
            fix="give the example batch with .contiguous()",
        )
    return tuple(sizes[named[dim]] if dim in named else size for dim, size in enumerate(leaf.shape))


def resized(args: tuple[Any, ...], kwargs: dict[str, Any], *, dims: NamedDims, sizes: Mapping[str, int]) -> Any:
    """The arguments (args, kwargs) with named dims of other sizes; the tensors among them have no values."""
    leaves, structure = flatten_batch(args, kwargs)

    def at(path: str, leaf: torch.Tensor) -> torch.Tensor:
        shape = shape_at(path, leaf, dims, sizes)
        return torch.empty(shape, dtype=leaf.dtype, device=leaf.device).requires_grad_(leaf.requires_grad)

    return structure.unflatten([at(path, leaf) if path in dims else leaf for path, leaf in leaves])


class SymbolicSizes:
    """Sizes of a batch that are symbols while tracing.

    Args:
        env: the symbol environment of the trace.
        dims: leaf path -> dim -> name.
        hints: name -> the size that decides where the trace asks; guards say what it asked.
        fixed: name -> size, of those that are plain numbers.

    Attributes:
        symbols: sympy symbol -> name.
    """

    def __init__(self, env: Any, dims: NamedDims, *, hints: Mapping[str, int], fixed: Mapping[str, int]) -> None:
        self.dims = dims
        self.values: dict[str, Any] = dict(fixed)
        self.symbols: dict[Any, str] = {}
        self._fakes: dict[int, torch.Tensor] = {}
        for name, hint in hints.items():
            self.values[name] = compat.symbolic_size(env, hint, name=f"size:{name}")
            self.symbols[compat.symbol_of(self.values[name])] = name

    def fake(self, mode: Any, path: str, leaf: torch.Tensor) -> torch.Tensor:
        """The fake that stands for a leaf; one for all places where the batch has the same tensor."""
        if path not in self.dims:
            return compat.fake_like(mode, leaf)
        if id(leaf) not in self._fakes:
            shape = shape_at(path, leaf, self.dims, self.values)
            with mode:
                fake = torch.empty(shape, dtype=leaf.dtype, device=leaf.device)
            self._fakes[id(leaf)] = fake.requires_grad_(leaf.requires_grad)
        return self._fakes[id(leaf)]
