"""What each rank of a multi-rank numerics test runs, and how a test starts the ranks.

One start serves many jobs: a table of jobs is run in a loop, and rank 0 writes one JSON object a
job. A job that fails on all ranks alike does not end the loop.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fxzero
from fxzero.errors import VerifyError
from fxzero.graph import StepGraph
from tests.numerics import reference
from tests.numerics.models import OPTIMIZERS, Case, all_cases, batch_by_rank, clipped_cases
from tests.numerics.rank_servers import RanksFailed, run_ranks
from tests.numerics.reference import Outcome, first_difference, num_programs, planted, run_compiled, run_plain
from tests.numerics.sparing import sharing_first_capture, verifying_less

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """One comparison with DDP.

    Args:
        case: name of the case.
        plan: keys of the plan.
        rtol: 0 for bit-equal.
        fault: what to break in the compiled step.
        verified: whether the verifier may find it.
    """

    case: str
    plan: dict[str, Any] = field(default_factory=dict)
    rtol: float = 0.0
    fault: Callable[[StepGraph], int] | None = None
    verified: bool = True

    @property
    def name(self) -> str:
        """As tests and results call it."""
        keys = [f"{key}={value}" for key, value in self.plan.items()]
        return " ".join([self.case, *keys, *([self.fault.__name__] if self.fault else [])])


# plan keys that say where and when things move: none of them may change a bit
OPTIONS: list[dict[str, Any]] = [
    {"prefetch": 0},
    {"prefetch": 2, "bucket_bytes": 0},
    {"bucket_bytes": 2**20},
    {"bucket_bytes": 4096, "bucket_form": "coalesced"},
    {"cross_step": True, "bucket_bytes": 0},
    {"bucket_form": "coalesced", "zero": 0},
    {"reduce_scatter": "send_recv", "all_gather": "send_recv"},
    {"reduce_scatter": "native"},
    {"reduce_scatter": "all_to_all", "all_gather": "native"},
    {"bucket_bytes": "auto", "bucket_form": "coalesced", "regather": "auto", "memory_budget": "1 GiB"},
    {"regather": False, "schedule": "cost"},
    {"persist_below": 40},
    {"persist_below": 40, "zero": 1},
    {"recompute": ["block"], "zero": 0},
    {"recompute": ["block"]},
    {"offload_optimizer": "nvme", "offload_parameters": "nvme", "offload_activations": "nvme", "offload_below": 0},
    {"offload_optimizer": "host", "offload_parameters": "nvme", "offload_below": 0, "update_on_host": 0.5, "zero": 1},
    {"offload_optimizer": "host", "offload_activations": "host", "offload_below": 0, "update_on_host": 1.0, "zero": 0},
]


def cases() -> dict[str, Case]:
    """All cases, and those that take more than one rank."""
    plain = all_cases()
    return (
        plain
        | clipped_cases()
        | {"batch_by_rank": plain["adamw"].but(name="batch_by_rank", batch=batch_by_rank, scheduler=None)}
    )


# At stage 0 an update runs on whole tensors, from 1 on on rows. What else differs between stages is not the optimizer's
# or the model's, so few of them are run at all four.
AT_EVERY_STAGE = ("adamw", "sgd_dampening", "muon", "one_cycle_sgd", "clip_norm2", "clip_value_norm3")
ONLY_OF_THE_CALL = ("metrics", "batch_size", "train_and_eval", "attributes", "batch_by_rank")  # not of the update


def optimizers() -> list[Job]:
    """Two ranks, bit-equal to DDP (a sum of two has one order only): each optimizer on rows.

    On whole tensors they do what they do on one rank (`test_world1.py`), with gradients that stage 0 has for all alike.
    """
    return [Job(name, {"zero": zero}) for name in OPTIMIZERS for zero in _stages(name, (3,))]


def features() -> list[Job]:
    """Two ranks, bit-equal to DDP: what else a step may have, each option of a plan, planted faults."""
    jobs = [
        Job(name, {"zero": zero})
        for name in cases()
        if name not in OPTIMIZERS and name not in clipped_cases()
        for zero in _stages(name, (3,) if name in ONLY_OF_THE_CALL else (1, 3))
    ]
    jobs += [Job("adamw", options) for options in OPTIONS]
    jobs += [_clipped(name, zero) for name in clipped_cases() for zero in _stages(name, (0, 3))]
    jobs += [Job("clip_norm2", {"zero": zero}, rtol=1e-6, fault=reference.forget_ranks_norm) for zero in (2, 3)]
    jobs += [Job(name, {"zero": 3, "loss_scale": 1.0}) for name in ("muon", "radam", "sgd_nesterov", "trust_ratio")]
    jobs += [
        Job("adam", {"zero": 0}, fault=reference.skip_ranks),
        Job("adam", {"zero": 1}, fault=reference.skip_ranks),
        Job("adam", {"zero": 2, "reduce_scatter": "all_to_all"}, fault=reference.skip_ranks),
        Job("adam", {"zero": 3}, fault=reference.skip_ranks),
        Job("adam", {"zero": 1}, fault=reference.take_rows_of_first),
        Job("adam", {"zero": 0}, fault=reference.drop_wait),
        Job("adam", {"zero": 3}, fault=reference.drop_wait),
        Job("adam", {"zero": 3}, fault=reference.read_released),
        Job("one_cycle_sgd", {"zero": 0}, fault=reference.double_gradient),
        Job("one_cycle_sgd", {"zero": 3}, fault=reference.double_gradient),
    ]
    return jobs


def _stages(name: str, few: tuple[int, ...]) -> tuple[int, ...]:
    return (0, 1, 2, 3) if name in AT_EVERY_STAGE else few


def _clipped(name: str, zero: int) -> Job:
    """Norms of rows add up in another order: from stage 2 on, and where values that are rows already are bounded.

    With p = 3 the norm that torch takes of whole gradients is itself 1.2e-6 from the true one, that of rows 1e-7.
    """
    if name == "clip_value_norm3":
        return Job(name, {"zero": zero}, rtol=2e-6 * (zero > 0))
    return Job(name, {"zero": zero}, rtol=1e-6 * (zero > 1))


def four_ranks() -> list[Job]:
    """Within 1e-6 of DDP: ranks sum in another order, over all ranks or first over the shards of one replica.

    Not for optimizers that enlarge the last bit of a gradient: by a sign, or by Muon's products in bfloat16.
    """
    hybrid = {"mesh": {"dp_replicate": 2, "dp": 2}}
    jobs = [Job("one_cycle_sgd", {"zero": zero}, rtol=1e-6) for zero in range(4)]
    jobs += [Job("adam", {"zero": 3}, rtol=1e-6)]
    jobs += [
        Job("groups", {"zero": 3, "cross_step": True}, rtol=1e-6),
        Job("one_cycle_sgd", {"node_size": 2}, rtol=1e-6),
    ]
    jobs += [Job("clip_norm2", {"zero": 0}, rtol=1e-6), Job("clip_norm1", {"zero": 3}, rtol=1e-6)]
    jobs += [Job("clip_norm_inf", {"zero": 2, **hybrid}, rtol=1e-6)]
    jobs += [Job("one_cycle_sgd", {"zero": zero, **hybrid}, rtol=1e-6) for zero in range(4)]
    jobs += [Job("adam", {"zero": 1, **hybrid}, rtol=1e-6)]
    jobs += [Job("adam", {"zero": 3, "cross_step": True, **hybrid}, rtol=1e-6)]
    jobs += [
        Job("one_cycle_sgd", {"zero": 0}, rtol=1e-6, fault=reference.skip_ranks),
        Job("one_cycle_sgd", {"zero": 3}, rtol=1e-6, fault=reference.skip_ranks),
        Job("one_cycle_sgd", {"zero": 3, **hybrid}, rtol=1e-6, fault=reference.skip_replicas),
        Job("one_cycle_sgd", {"zero": 3}, rtol=1e-6, fault=reference.double_gradient),
    ]
    return jobs


def scheduled() -> list[Job]:
    """Two ranks, bit-equal to DDP: the order that is found by cost, for links slower and faster than compute."""
    by_cost = {"schedule": "cost", "hardware": "h100_ethernet"}
    jobs = [Job("adamw", {"zero": zero, **by_cost}) for zero in (1, 3)]
    jobs += [Job("one_cycle_sgd", {"zero": zero, **by_cost}) for zero in (0, 2)]
    jobs += [
        Job(name, {"zero": 3, "cross_step": True, **by_cost}) for name in ("muon", "radam", "sgd_nesterov", "groups")
    ]
    jobs += [Job("adamw", {"schedule": "cost", "hardware": hardware}) for hardware in ("auto", "cpu", "h100")]
    jobs += [
        Job("adamw", {**by_cost, "bucket_form": "coalesced", "all_gather": "native", "reduce_scatter": "native"}),
        Job("adamw", {**by_cost, "offload_optimizer": "host", "offload_activations": "host", "offload_below": 8}),
        Job("adamw", {**by_cost, "recompute": ["block"]}),
        Job("adamw", by_cost, fault=reference.drop_wait),
        Job("adamw", by_cost, fault=reference.read_released),
    ]
    return jobs


SETS: dict[str, Callable[[], list[Job]]] = {
    "optimizers": optimizers,
    "features": features,
    "four_ranks": four_ranks,
    "scheduled": scheduled,
}


def launch(module: str, *args: str, ranks: int, timeout_s: float) -> str:
    """Run a module of this checkout on several ranks, in forks of warm processes; returns its output.

    Raises:
        AssertionError: if one of them fails or they take too long (all are killed then), with the end of the output.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output.txt"
        path.touch()
        environment = rank_environment()
        try:
            run_ranks(module, args, ranks=ranks, timeout_s=timeout_s, environment=environment, root=ROOT, output=path)
        except RanksFailed as error:
            end = path.read_text(errors="replace")[-12000:]
            raise AssertionError(f"{module} {' '.join(args)}, {timeout_s} s: {error}\n{end}") from None
        return path.read_text(errors="replace")


def launch_for_results(module: str, folder: Path, *args: str, ranks: int, timeout_s: float) -> Any:
    """What a module that takes a path writes there as JSON, run as by `launch`."""
    path = folder / "found.json"
    launch(module, str(path), *args, ranks=ranks, timeout_s=timeout_s)
    return json.loads(path.read_text())


def torchrun(*args: str, ranks: int, timeout_s: float, cwd: Path) -> str:
    """Run a script or module under torchrun; returns its output.

    Raises:
        AssertionError: if it fails or takes too long (its processes are killed then), with the end of the output.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [*command, *args],
        cwd=cwd,
        env=rank_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{' '.join(args)} took more than {timeout_s} s\n{output[-12000:]}") from None
    assert process.returncode == 0, f"{' '.join(args)} exited {process.returncode}\n{output[-12000:]}"
    return output


def rank_environment() -> dict[str, str]:
    """The environment of a rank: this checkout first, one thread (two ranks share two cores), a trace if it crashes."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def run_job(job: Job, expected: Outcome, *, rank: int) -> dict[str, Any]:
    """What one rank finds."""
    start = time.perf_counter()
    case = cases()[job.case]
    found: dict[str, Any] = {"difference": "", "error": "", "programs": 0}
    try:
        if job.fault is None:
            got, step = run_compiled(case, fxzero.Plan(**job.plan), rank=rank)
        else:
            with planted(job.fault, verified=job.verified):
                got, step = run_compiled(case, fxzero.Plan(**job.plan), rank=rank)
        found["programs"] = num_programs(step)
        found["difference"] = str(first_difference(expected, got, rtol=job.rtol) or "")
    except VerifyError as error:
        found["error"] = f"VerifyError: {error}"
    except Exception:
        found["error"] = traceback.format_exc()
    return found | {"seconds": time.perf_counter() - start}


def main(which: str, path: str) -> None:
    """Run the jobs of one set on this rank; rank 0 writes the results as they come."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, results = dist.get_rank(), {}
    expected: dict[str, Outcome] = {}
    captures: dict[str, Any] = {}
    for job in SETS[which]():
        if job.case not in expected:
            expected[job.case] = run_plain(cases()[job.case], rank=rank, distributed=True)
        found: list[Any] = [None] * dist.get_world_size()
        with sharing_first_capture(captures, job.case), verifying_less(job.plan, broken=job.fault is not None):
            mine = run_job(job, expected[job.case], rank=rank)
        dist.all_gather_object(found, mine)
        results[job.name] = found
        if rank == 0:
            Path(path).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
