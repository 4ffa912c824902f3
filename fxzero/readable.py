"""What a person can look at of a TrainStep: its graphs, its report, the source that runs."""

from __future__ import annotations

from pathlib import Path

from fxzero.errors import CaptureError
from fxzero.graph import StepGraph
from fxzero.plan import Plan
from fxzero.programs import Compiled, Programs
from fxzero.report import report
from fxzero.runtime.graphed_program import GraphedProgram
from fxzero.runtime.topology import SharedBytes, Topology
from fxzero.step_source import ProgramSource, write_source


class Readable:
    """The part of a TrainStep that shows it."""

    plan: Plan
    _last: list[Compiled]
    _programs: Programs
    _topology: Topology

    @property
    def graph(self) -> StepGraph:
        """The program of the last step (of its last microbatch), as an annotated graph; print it."""
        return self._require_last()[-1].step

    @property
    def graphs(self) -> list[StepGraph]:
        """The programs of the last step, one a microbatch; equal ones are the same object."""
        return [compiled.step for compiled in self._require_last()]

    @property
    def captured(self) -> StepGraph:
        """The graph of the last step (of its last microbatch) before any pass."""
        return self._require_last()[-1].captured

    def report(self) -> str:
        """Tables: state on this rank, communication per step, predicted peak and time, passes, time to compile."""
        last = self._require_last()[-1]
        return report(
            self.graphs,
            self.plan,
            last.records,
            last.seconds,
            decision=last.decision,
            lowered=last.program.lowered,
            shared=self.shared_bytes,
            graphed=last.program.status() if isinstance(last.program, GraphedProgram) else "",
            shapes=self._programs.shapes(last),
        )

    def write_source(self, folder: str | Path) -> list[Path]:
        """Write the program of the last step and what its regions became as files to read, with an index.

        Args:
            folder: new or empty.

        Returns:
            The files.

        Raises:
            LoweringError: if the folder has contents, or a compiled region is gone from disk.
        """
        programs = [
            ProgramSource(compiled.program.body, compiled.program.source, compiled.program.lowered, self.plan.lowering)
            for compiled in self._require_last()
        ]
        return write_source(Path(folder), programs, where="step.write_source(...)")

    @property
    def shared_bytes(self) -> SharedBytes:
        """What of this step lies in memory that ranks of one host share; torch's allocator does not know of it."""
        return self._topology.shared

    def _require_last(self) -> list[Compiled]:
        if not self._last:
            raise CaptureError.of(
                where="TrainStep",
                expected="a step that has run",
                got="none yet",
                fix="call step(batch) first: capture happens then",
            )
        return self._last
