"""Gradients that an axis leaves whole are added up over it by few launches, and over dp by rows where ZeRO says so."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch import fx

from fxzero import compat_distributed
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.passes.bucket_gradient_sums import bucket_gradient_sums
from tests.sharding.test_other_axes import far, split_llama

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def four_ranks() -> Iterator[None]:
    """A process group of four ranks, in place of what others have made, and of which none stays."""
    if dist.is_initialized():
        dist.destroy_process_group()
    compat_distributed.fake_process_group(4)
    yield
    dist.destroy_process_group()


def sums(step: StepGraph, axis: str) -> list[fx.Node]:
    """The all-reduces of backward over an axis."""
    found = [*step.calls(c10d.all_reduce), *step.calls(c10d.all_reduce_coalesced)]
    return [node for node in found if node.meta["phase"] == "backward" and c10d.axis_of(node) == axis]


def test_gradients_over_sp_are_added_up_by_one_launch() -> None:
    alone, _, _ = split_llama({"sp": 4}, rows=1, bucket_bytes=0)
    step, model, values = split_llama({"sp": 4}, rows=1)
    (launch,) = [node for node in sums(step, "sp") if node.target is c10d.all_reduce_coalesced]
    count = len(c10d.sent(launch))
    assert count >= 4
    assert len(sums(alone, "sp")) == len(sums(step, "sp")) - 1 + count
    assert max(part.dim() for part in launch.meta["val"]) <= 2, "no activation is among them"
    found = far(step, model, values)
    assert max(found.values()) < 1e-5, found


def test_buckets_are_no_larger_than_they_are_told() -> None:
    step, _, _ = split_llama({"sp": 4}, rows=1, bucket_bytes=0)
    assert {node.target for node in sums(step, "sp")} == {c10d.all_reduce}
    assert bucket_gradient_sums.run(step, bucket_bytes=500) > 2
    together = [node for node in sums(step, "sp") if node.target is c10d.all_reduce_coalesced]
    assert together
    assert all(sum(source.meta["val"].nbytes for source in c10d.sent(node)) <= 500 for node in together)


@pytest.mark.parametrize("mesh", [{"dp": 2, "sp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_rows_over_dp_are_reduced_of_gradients_that_are_waited_for(mesh: dict[str, int]) -> None:
    step, _, _ = split_llama(mesh, rows=2)
    (axis,) = mesh.keys() - {"dp"}
    assert sums(step, axis)
    assert not sums(step, "dp")
    reduced = {name for node in step.calls() if "grad_of" in node.meta for name in node.meta["grad_of"]}
    assert len(reduced) == len(step.inputs("parameter"))
