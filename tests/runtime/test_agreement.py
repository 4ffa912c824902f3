"""What ranks agree through; tests/numerics/test_mismatch.py has the ranks that do not agree."""

import torch.distributed as dist

from fxzero.runtime.agreement import Agreement


def test_steps_that_a_rank_made_before_it_joined_do_not_count() -> None:
    """Ranks find each other's messages by the number of the step, which they must count alike."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    before = Agreement(timeout_s=1.0).number
    dist.destroy_process_group()
    alone = [Agreement(timeout_s=1.0) for _ in range(3)]
    assert all(agreement.store is None for agreement in alone)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert Agreement(timeout_s=1.0).number == before + 1
    assert Agreement(timeout_s=1.0).number == before + 2, "those made together do"
