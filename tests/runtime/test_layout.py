"""How one tensor of the state lies: the parts of all ranks, in one process."""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxzero.errors import CaptureError
from fxzero.graph.axis_placement import REPLICATED, Placement, partial, shard
from fxzero.plan import Plan
from fxzero.runtime.layout import Layout, Layouts, Place
from fxzero.runtime.state import StepState
from fxzero.runtime.topology import Topology, ranks_along
from tests.numerics.models import ScaledByNorms


class OneRank(Topology):
    """A topology without process groups, at the first place of its mesh."""

    def coordinate(self, axis: str) -> int:
        return 0


def layouts(mesh: dict[str, int], **keys: object) -> Layouts:
    return Layouts(OneRank(Plan(mesh=mesh, **keys), None, "none"))  # type: ignore[arg-type]


def places(layout: Layout) -> list[Layout]:
    """The same on all ranks, tp the slower axis."""
    ranks = itertools.product(range(layout.tp.size), range(layout.dp.size))
    return [
        Layout(layout.shape, layout.over_tp, layout.as_rows, Place(layout.tp.size, tp), Place(layout.dp.size, dp))
        for tp, dp in ranks
    ]


@given(
    tp=st.integers(1, 4),
    dp=st.integers(1, 4),
    dim=st.none() | st.integers(0, 1),
    rows=st.integers(1, 7),
    data=st.data(),
)
def test_the_parts_of_all_ranks_are_the_whole(
    tp: int, dp: int, dim: int | None, rows: int, data: st.DataObject
) -> None:
    shape = [rows, data.draw(st.integers(1, 3))]
    if dim is not None:
        shape[dim] *= tp
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    over_tp = REPLICATED if dim is None else shard(dim)
    as_rows = data.draw(st.booleans())
    ranks = places(Layout(tuple(shape), over_tp, as_rows, Place(tp), Place(dp)))
    memories = [rank.memory_of_whole(whole) for rank in ranks]
    for rank, memory in zip(ranks, memories, strict=True):
        assert tuple(memory.shape) == rank.memory_shape == ranks[0].memory_shape, (
            "a program is the same text everywhere"
        )
        assert memory.is_contiguous()
        assert not rank.is_split or memory.untyped_storage().nbytes() == memory.nbytes
        assert torch.equal(rank.memory_of_local(rank.local_of(memory)), memory)
        assert not memory[rank.local_of(memory).shape[0] :].any(), "padding is zero"
    parts = [rank.local_of(memory) for rank, memory in zip(ranks, memories, strict=True)]
    of_tp = [torch.cat(parts[i : i + dp]) if as_rows else parts[i] for i in range(0, len(parts), dp)]
    assert torch.equal(torch.cat(of_tp, dim) if dim is not None else of_tp[0], whole)


def test_what_dp_alone_splits_is_taken_of_a_part_too() -> None:
    whole = torch.arange(24).view(6, 4)
    for rank in places(Layout((6, 4), shard(1), True, Place(2), Place(2))):
        part = whole[:, rank.tp.index * 2 :][:, :2]
        assert torch.equal(rank.memory_of_part(part), rank.memory_of_whole(whole))


def test_a_part_keeps_nothing_of_the_whole_alive() -> None:
    whole = torch.zeros(8, 2)
    memory = Layout((8, 2), shard(0), False, Place(2)).memory_of_whole(whole)
    assert memory.untyped_storage().nbytes() == 32


def test_a_whole_tensor_is_taken_as_it_is_unless_it_has_holes() -> None:
    whole = torch.zeros(4, 4)
    layout = Layout((4, 4), dp=Place(2))
    assert layout.memory_of_whole(whole).data_ptr() == whole.data_ptr()
    assert layout.memory_of_whole(whole.t()).stride() == (1, 4)
    assert Layout((4, 2)).memory_of_whole(whole[:, :2]).stride() == (2, 1)


def test_a_shape_that_does_not_divide_is_no_layout() -> None:
    with pytest.raises(AssertionError, match=r"divides by S\(0\) over 2 ranks of tp: \(3, 4\)"):
        Layout((3, 4), shard(0), tp=Place(2))


def test_rows_are_those_that_tp_leaves() -> None:
    given = layouts({"dp": 2, "tp": 2}, persist_below=12)
    given.give({("parameter", "w"): {"tp": shard(0)}, ("parameter", "c"): {"tp": shard(1)}})
    assert given.of_parameter("w", (6, 4)).memory_shape == (2, 4), "3 of 6 rows, which two ranks share"
    assert not given.of_parameter("w", (4, 4)).as_rows, "8 elements are left"
    assert not given.of_parameter("w", (2, 99)).as_rows, "a single row is left"
    assert given.of_parameter("c", (6, 4)).memory_shape == (3, 2)
    assert given.of_parameter("other", (4, 4)).memory_shape == (2, 4), "what is not said lies whole over tp"


@pytest.mark.parametrize(("zero", "parameter", "state"), [(0, 5, 5), (1, 5, 3), (2, 5, 3), (3, 3, 3)])
def test_stages_shard_over_dp_what_they_always_do(zero: int, parameter: int, state: int) -> None:
    given = layouts({"dp": 2, "tp": 2}, zero=zero)
    given.give({("parameter", "w"): {"tp": shard(0)}})
    assert given.of_parameter("w", (10, 4)).memory_shape == (parameter, 4)
    assert given.of_state("w:m", (10, 4), owner=(10, 4)).memory_shape == (state, 4)


def test_state_lies_as_its_parameter_unless_it_is_said_otherwise() -> None:
    given = layouts({"dp": 2, "tp": 2})
    given.give(
        {
            ("parameter", "w"): {"tp": shard(1)},
            ("optimizer", "w:whole"): {"tp": REPLICATED},
            ("optimizer", "w:columns"): {"tp": shard(0)},
        }
    )
    owner = (6, 4)
    assert given.of_state("w:m", owner, owner=owner).memory_shape == (3, 2)
    assert given.of_state("w:whole", owner, owner=owner).memory_shape == owner, "not sharded: its rows are others"
    assert given.of_state("w:columns", (4,), owner=owner).memory_shape == (2,)
    assert given.of_state("w:rows", (6,), owner=owner).memory_shape == (6,)
    assert given.of_state("w:part", (6, 2), owner=owner).memory_shape == (6, 2), "the shape of a part, not of w"


def test_before_it_is_known_tensors_lie_in_parts_of_dim_0() -> None:
    early = layouts({"dp": 2, "tp": 2})
    assert not early.are_known
    assert early.of_parameter("w", (8, 4)).memory_shape == (2, 4)
    assert early.of_parameter("w", (7, 4)).memory_shape == (4, 4), "tp does not divide 7"
    assert early.of_state("w:m", (8, 4), owner=(8, 4)).memory_shape == (2, 4)
    early.give({})
    assert early.are_known and early.of_parameter("w", (8, 4)).memory_shape == (4, 4)


def test_without_tp_there_is_nothing_to_know() -> None:
    plain = layouts({"dp": 4})
    assert plain.are_known and plain.of_parameter("w", (8, 4)).memory_shape == (2, 4)


@pytest.mark.parametrize(
    ("key", "axis", "placement"),
    [
        (("parameter", "w"), "tp", partial()),
        (("parameter", "w"), "tp", shard(0, 2)),
        (("optimizer", "w:m"), "tp", partial("max")),
        (("buffer", "b"), "tp", shard(0)),
        (("parameter", "w"), "dp", shard(0)),
    ],
)
def test_state_lies_in_plain_parts_over_tp(key: tuple[str, str], axis: str, placement: Placement) -> None:
    with pytest.raises(AssertionError, match=f"{key[0]} {key[1]}: expected R"):
        layouts({"dp": 2, "tp": 2}).give({key: {axis: placement}})


def test_there_is_one_layout() -> None:
    given = layouts({"tp": 2})
    given.give({})
    with pytest.raises(AssertionError, match="one layout for all programs"):
        given.give({})


def test_ranks_along_an_axis() -> None:
    ranks = torch.arange(8).view(2, 2, 2)
    assert ranks_along(ranks, ("dp", "tp", "pp"), "tp").tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert ranks_along(ranks, ("dp", "tp", "pp"), "pp").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_state_that_starts_from_whole_values_is_refused_where_tp_may_split_it() -> None:
    model = nn.Linear(4, 4)
    optimizer = ScaledByNorms(model.parameters())
    for mesh, refused in (({"dp": 1, "tp": 1}, False), ({"dp": 1, "tp": 2}, True)):
        topology = OneRank(Plan(mesh=mesh, zero=0), None, "none")
        state = StepState(model, optimizer, topology, device=torch.device("cpu"))
        with pytest.raises(CaptureError, match="use zero=0 and no tp") if refused else contextlib.nullcontext():
            state.rehearsal()


@given(ep=st.integers(1, 3), tp=st.integers(1, 2), dp=st.integers(1, 2), dim=st.integers(0, 1), as_rows=st.booleans())
def test_ep_splits_first_then_tp_then_dp(ep: int, tp: int, dp: int, dim: int, as_rows: bool) -> None:
    shape = (ep * tp * 3, 2 * tp)
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    for i, j, k in itertools.product(range(ep), range(tp), range(dp)):
        layout = Layout(shape, shard(dim), as_rows, Place(tp, j), Place(dp, k), over_ep=shard(0), ep=Place(ep, i))
        part = whole.chunk(ep)[i].chunk(tp, dim)[j]
        assert layout.is_split and layout.part_shape == tuple(part.shape)
        memory = layout.memory_of_whole(whole)
        rows = -(-len(part) // dp)
        expected = part[k * rows : (k + 1) * rows] if as_rows else part
        assert torch.equal(layout.local_of(memory), expected)
        assert tuple(memory.shape) == layout.memory_shape and memory.is_contiguous()


def test_experts_lie_over_ep_as_programs_say() -> None:
    given = layouts({"ep": 2, "tp": 2, "dp": 2})
    assert not given.are_known and given.may_split_state
    assert given.of_parameter("w", (8, 4)).memory_shape == (1, 4), "before it is known: 2 of ep, 2 of tp, 2 of dp"
    given.give({("parameter", "w"): {"ep": shard(0), "tp": shard(1)}})
    lies = given.of_parameter("w", (4, 6, 2))
    assert lies.memory_shape == (1, 3, 2)
    assert [str(p) for p in lies.placements(("ep", "tp", "dp"))] == ["S(0)", "S(1)", "S(0)"]
    assert given.of_state("w:m", (4, 6, 2), owner=(4, 6, 2)).memory_shape == (1, 3, 2)
    assert given.of_parameter("gate", (4, 6)).memory_shape == (2, 6), "what is not said lies whole over ep and tp"


def test_ep_alone_is_to_be_laid_out() -> None:
    alone = layouts({"ep": 2, "dp": 1})
    assert not alone.are_known and alone.of_parameter("w", (8, 4)).memory_shape == (4, 4)
