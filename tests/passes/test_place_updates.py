"""An update stands behind all that reads the old value, wherever its gradient is born."""

import pytest

from fxzero.graph import StepGraph
from fxzero.graph.order_rules import late, reads_before_writes
from fxzero.graph.verify import verify
from fxzero.passes.place_updates import place_updates
from tests.schedule.steps import captured


def with_a_late_reader(step: StepGraph) -> None:
    """The product of a weight whose update is one of the first is made once more, behind the last call of backward."""
    weight = step.input("parameter", "layers.2.3.weight")
    readers = (reader for reader, _ in reads_before_writes(step) if reader.meta["phase"] == "backward")
    reader = next(reader for reader in readers if weight in reader.all_input_nodes)
    with step.graph.inserting_after(step.phase("backward")[-1]):
        twin = step.graph.node_copy(reader)
    twin.meta = dict(reader.meta)


@pytest.mark.parametrize("distance", [1, 2])
def test_an_update_waits_for_what_still_reads_the_old_value(distance: int) -> None:
    step = captured()
    with_a_late_reader(step)
    before = verify(step)
    assert place_updates.run(step, distance=distance) > 0
    assert not late(step, step.positions())
    verify(step, before=before)
