"""What jobs of several ranks leave out because it was done before, or is done elsewhere: most of their time."""

import contextlib
import copy
import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch.distributed as dist


@contextlib.contextmanager
def verifying_less(plan: dict[str, Any], *, broken: bool = False) -> Iterator[None]:
    """Rank 0 verifies for all, whose programs must be its own, letter by letter, before they run.

    The verifier's slowest rule, which computes every value anew, is left to ZeRO-3: it runs all the passes.

    Args:
        plan: the job's.
        broken: each rank verifies, since something was planted that it may have to find.
    """
    manager = importlib.import_module("fxzero.pass_manager")
    verify = manager.verify
    values = plan.get("zero", 3) == 3
    leaves_out = not broken and dist.is_initialized() and dist.get_rank() > 0

    def less(*args: Any, **options: Any) -> Any:
        return None if leaves_out else verify(*args, **options, values=values)

    with mock.patch.object(manager, "verify", less):
        yield


@contextlib.contextmanager
def sharing_first_capture(known: dict[str, Any], case: str) -> Iterator[None]:
    """A job's first capture knows nothing of a plan but its options for captures: it is made once for many jobs.

    With microbatches that is the first of each place in the step. Later ones, when something has changed, are made.

    Args:
        known: captures of earlier jobs, which this one's are added to.
        case: the same for the same model, optimizer and shapes of a batch, and no fault in what captures.
    """
    page = importlib.import_module("fxzero.capture.changing_sizes")
    capture_step = page.capture_step
    asked: set[str] = set()

    def capture(*args: Any, **keys: Any) -> Any:
        key = f"{case} {keys['options']}"
        if key in asked:
            return capture_step(*args, **keys)
        asked.add(key)
        if key not in known:
            known[key] = capture_step(*args, **keys)
        first = known[key]
        return replace(first, step=first.step.copy(), guards=copy.copy(first.guards))

    with mock.patch.object(page, "capture_step", capture):
        yield
