"""record() and profile() of a TrainStep: what its calls take when they run, beside what was predicted."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

from fxzero.errors import CaptureError
from fxzero.runtime.recorder import Recorder
from fxzero.runtime.recording import Recording, Sample


class Profiled:
    """The part of a TrainStep that measures it."""

    _device: torch.device
    _last: list[Any]

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A step; TrainStep says how."""
        raise NotImplementedError

    def record(self, *args: Any, steps: int = 5, **kwargs: Any) -> Recording:
        """Run real steps, which train, with a time stamp between their calls; every rank must call it alike.

        Where no step has run yet, one more runs first, which compiles it.

        Args:
            args, kwargs: a batch, as for a step.
            steps: how many to record.

        Raises:
            CaptureError: if `steps` is not 1 or more, or each step was captured anew.
        """
        if steps < 1:
            where = "step.record(..., steps=)"
            raise CaptureError.of(where, expected="1 or more", got=repr(steps), fix="leave it out, or give 5")
        if not self._last:
            self(*args, **kwargs)
        samples: list[Sample] = []
        recorder = Recorder(self._device)
        attached: set[int] = set()
        with contextlib.ExitStack() as stack:
            stack.callback(recorder.close)
            for _ in range(steps):
                for program in (compiled.program for compiled in self._last):
                    if id(program) not in attached:
                        stack.enter_context(recorder.attached(program))
                        attached.add(id(program))
                start = time.perf_counter()
                self(*args, **kwargs)
                sample = recorder.take(call_s=time.perf_counter() - start)
                if len(sample.steps) == len(self._last):  # else this batch had other programs than the step before
                    samples.append(sample)
        if not samples:
            where = f"step.record(..., steps={steps})"
            fix = "give more steps; if that does not help, see what causes the captures in the log 'fxzero'"
            raise CaptureError.of(where, expected="a step of known programs", got="a new capture each time", fix=fix)
        last = [id(step) for step in samples[-1].steps]
        return Recording(tuple(sample for sample in samples if [id(step) for step in sample.steps] == last))
