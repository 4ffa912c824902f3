"""What ranks of a group compare, without ranks; tests/numerics/test_tp_groups.py has some."""

import pytest
import torch

from fxzero.runtime.in_common import CHEAP_BYTES, GENERATOR, InCommon, difference_within, number_of
from fxzero.runtime.microbatches import Batch

CPU = torch.device("cpu")


def found(*args: object, whole: bool = True, number: int = 1, **kwargs: object) -> dict[str, str]:
    return InCommon(Batch.of(args, kwargs, number=number, device=CPU), CPU).found(whole=whole)


def test_paths_name_what_a_step_is_called_with() -> None:
    names = list(found({"ids": torch.ones(2)}, 3, flag=True))
    assert names == ["batch input args.0.ids", "batch input args.1", "batch input kwargs.flag", GENERATOR]
    names = list(found(torch.ones(4), number=2, weights=[1.0, 2.0]))
    assert names == [
        "batch input args.0 of microbatch 0",
        "batch input args.0 of microbatch 1",
        "batch input weights",
        GENERATOR,
    ]


VALUES = [
    torch.zeros(2, 3),
    torch.zeros(3, 2),
    torch.zeros(2, 3, dtype=torch.float64),
    torch.tensor([[0.0, 0, 0], [0, 0, -0.0]]),
    torch.zeros(2, 3, dtype=torch.bfloat16),
    torch.zeros(()),
    torch.zeros(0),
    1,
    1.0,
    "1",
    None,
]


def test_values_that_differ_in_anything_differ() -> None:
    numbers = {number_of(found(value)) for value in VALUES}
    assert len(numbers) == len(VALUES)
    assert numbers == {number_of(found(value)) for value in VALUES}, "and equal ones do not"
    assert all(0 <= number < 2**56 for number in numbers)


def test_strides_are_no_difference() -> None:
    x = torch.randn(3, 4)
    assert found(x) == found(x.t().contiguous().t())


def test_objects_are_compared_by_type() -> None:
    """Their text may hold an address."""
    assert found(object()) == found(object()) != found(frozenset())


def test_generators_are_compared() -> None:
    before = found(1)
    assert found(1) == before
    torch.rand(1)
    assert found(1) != before


@pytest.mark.parametrize(("bytes_above", "is_read"), [(0, True), (8, False)])
def test_later_calls_read_what_costs_nothing(bytes_above: int, is_read: bool) -> None:
    one, other = (torch.full(((CHEAP_BYTES + bytes_above) // 8,), value) for value in (1, 2))
    assert (found(one, whole=False) != found(other, whole=False)) == is_read
    assert found(one) != found(other)
    assert found(one, whole=False) != found(other[1:], whole=False), "a shape costs nothing"


def test_what_has_programs_of_its_own_has_a_form_of_its_own() -> None:
    def form(*args: object) -> int:
        return InCommon(Batch.of(args, {}, number=1, device=CPU), CPU).form

    assert form(torch.ones(2), 1) == form(torch.zeros(2), 1)
    assert (
        len({form(torch.ones(2), 1), form(torch.ones(3), 1), form(torch.ones(2), 2), form(torch.ones(2).int(), 1)}) == 4
    )


def test_the_message_says_which_ranks_and_what_to_do() -> None:
    x, y = found(torch.ones(2)), found(torch.ones(3))
    said = difference_within([4, 5, 6], {4: x, 5: x, 6: y})
    assert said.startswith(
        "batch input args.0: expected the same on all ranks of a tp, sp or ep group, [4, 5, 6]; rank 4 has "
    )
    assert "rank 4 has torch.float32[2] digest " in said and "got rank 6 has torch.float32[3] digest " in said
    assert said.endswith("; call the step with the same batch on all ranks of a tp, sp or ep group")
    torch.rand(1)
    said = difference_within([0, 1], {0: x, 1: found(torch.ones(2))})
    assert said.startswith(f"{GENERATOR}: ") and "torch.manual_seed(seed + dp index)" in said
    assert "rank 1 has nothing" in difference_within([0, 1], {0: found(1, a=2), 1: found(1)})
    assert difference_within([0, 1], {0: x, 1: x}) == ""
