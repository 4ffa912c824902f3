"""What ranks agree through; tests/numerics/test_mismatch.py has the ranks that do not agree."""

import torch.distributed as dist

from fxzero.plan import Plan
from fxzero.runtime.agreement import Agreement, first_difference


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


def texts(first: Plan, second: Plan, *, before: str = "plan ") -> tuple[str, str]:
    """Two programs that differ in their plan, and behind it."""
    return tuple(f"torch 2\n{before}{plan.fingerprint()}\npass {number}" for number, plan in enumerate((first, second)))


def test_of_plans_that_differ_the_keys_are_named_with_both_values() -> None:
    first = Plan(zero=3, mesh={"dp_replicate": 2, "dp": 4}, disable=("cut_regions",))
    second = Plan(zero=1, mesh={"dp": 4, "dp_replicate": 2}, timeout_s=5, disable=("cut_regions",))
    for before in ("plan ", "shard by plan "):
        assert first_difference(*texts(first, second, before=before), 2) == (
            "Plan.mesh, Plan.timeout_s, Plan.zero: expected all ranks to agree; "
            "rank 0 has mesh=[['dp_replicate', 2], ['dp', 4]], timeout_s=60.0, zero=3, "
            "got rank 2 has mesh=[['dp', 4], ['dp_replicate', 2]], timeout_s=5.0, zero=1; give every rank the same plan"
        )


def test_of_plans_of_other_versions_the_key_that_only_one_knows_is_named() -> None:
    mine, theirs = texts(Plan(), Plan())
    theirs = theirs.replace('"zero":3', '"zone":3')
    said = first_difference(mine, theirs, 1)
    assert said.startswith("Plan.zero, Plan.zone: ")
    assert "rank 0 has zero=3, zone=(no such key), got rank 1 has zero=(no such key), zone=3" in said


def test_other_lines_are_shown_as_they_are() -> None:
    plan = Plan().fingerprint()
    assert first_difference(f"plan {plan}", f"plan {plan}", 1) == ""
    assert first_difference(f"plan {plan}\na", f"plan {plan}\nb", 1) == (
        "line 2 of the program: expected all ranks to agree; rank 0 has 'a', got rank 1 has 'b'; "
        "give every rank the same model, optimizer and plan"
    )
    assert first_difference("a", "a\nplan {}", 1).startswith(
        "line 2 of the program: expected all ranks to agree; rank 0"
    )
