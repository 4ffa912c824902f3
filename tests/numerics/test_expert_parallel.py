"""One batch for all ranks of ep, each of which has some experts: numbers are those of one device, and memory is a part.

Run as a module, this file is what each rank does.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import fxzero
from fxzero.cost.memory import highest_profile
from fxzero.errors import PlanError
from fxzero.graph.row_exchange_ops import pick_rows
from tests.hf.models import CASES
from tests.numerics.allocations import Counter, build_counter
from tests.numerics.findings import write_findings
from tests.numerics.worker import launch_for_results
from tests.sharding.machines import free_network_file

STEPS = 3
TOLERANCE = 1e-5
TOKENS = 512  # of the model whose memory is measured
TIMEOUT_S = 200
MACHINE = "free_network.toml"  # on which rows go by all-to-all

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(2 * TIMEOUT_S)]
pytest.importorskip("transformers")


def made(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A Mixtral; with another seed from other weights, which a checkpoint has to replace."""
    torch.manual_seed(seed)
    model = CASES["mixtral"].model()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batch(number: int, index: int) -> dict[str, Any]:
    """Of a step, and an index on dp."""
    return CASES["mixtral"].batch(torch.Generator().manual_seed(10 * number + index))


def compiled(mesh: dict[str, int], *, seed: int = 0, **keys: Any) -> fxzero.TrainStep:
    plan = fxzero.Plan(mesh=mesh, lowering="eager", **{"hardware": "cpu", **keys})
    return fxzero.compile(*made(seed), plan)


# ---- what ranks do


def trained(step: fxzero.TrainStep, steps: range, index: int) -> list[float]:
    """The losses of some steps on the batches of an index on dp."""
    return [float(step(**batch(number, index))) for number in steps]


def parameters(step: fxzero.TrainStep) -> dict[str, list[float]]:
    with step.unsharded() as whole:
        return {name: parameter.flatten().tolist() for name, parameter in whole.named_parameters()}


def resumed(step: fxzero.TrainStep, folder: str) -> fxzero.TrainStep:
    """The step with what a checkpoint holds."""
    state = step.state_dict()
    dcp.load(state, checkpoint_id=folder)
    step.load_state_dict(state)
    return step


def on_two_ranks(folder: str) -> dict[str, Any]:
    """Trained at ep=2 and saved; what goes on there, and what resumes at dp=2."""
    rank, later = dist.get_rank(), range(STEPS, 2 * STEPS)
    step = compiled({"ep": 2})
    found: dict[str, Any] = {"losses": trained(step, range(STEPS), 0), "parameters": parameters(step)}
    owned = dict(step.model.named_parameters())
    found["local"] = {name: list(p.to_local().shape) for name, p in owned.items() if "experts" in name}  # type: ignore[attr-defined]
    dcp.save(step.state_dict(), checkpoint_id=folder)
    found["not stopped"] = trained(step, later, 0)
    found["at dp=2"] = trained(resumed(compiled({"dp": 2}, seed=1), folder), later, 0)
    found["at ep=2"] = trained(resumed(compiled({"ep": 2}, seed=1), folder), later, 0)
    sending = compiled({"ep": 2}, expert_room=1.9, hardware=str(Path(folder).parent / MACHINE))
    found["by all-to-all"] = trained(sending, range(STEPS), 0)
    found["sent"] = sum(len(graph.calls(pick_rows)) for graph in sending.graphs)
    refusing = compiled({"ep": 2}, expert_room=1.0)
    before = parameters(refusing)
    try:
        trained(refusing, range(STEPS), 0)
        found["refused"] = ""
    except PlanError as error:
        found["refused"] = str(error)
    found["rank"], found["changed"] = rank, parameters(refusing) != before
    return found


def measured(mesh: dict[str, int] | None, library: str) -> dict[str, float]:
    """Peak bytes of a later step, as the graph says and as the allocator saw it, of a longer row and wider experts."""
    import transformers

    counter = Counter(library)
    with counter.account() as account:
        torch.manual_seed(0)
        config = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2}
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**config, use_cache=False)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        room = {} if mesh is None else {"expert_room": 2.0}
        step = fxzero.compile(model, optimizer, fxzero.Plan(mesh=mesh, hardware="cpu", lowering="eager", **room))
        ids = torch.randint(64, (1, TOKENS), generator=torch.Generator().manual_seed(0))
        for _ in range(STEPS):
            step(input_ids=ids, labels=ids)
    return {"predicted": highest_profile(step.graphs)[1].peak_bytes, "measured": account.later_peak}


def findings(ranks: int, library: str, folder: str) -> dict[str, Any]:
    """What a rank finds."""
    found: dict[str, Any] = {}
    if ranks == 2:
        found = on_two_ranks(folder)
    if ranks == 4:
        step = compiled({"dp": 2, "ep": 2}, zero=3)
        found = {"losses": trained(step, range(STEPS), dist.get_rank() // 2), "parameters": parameters(step)}
    if ranks in (1, 4) and library:
        found["memory"] = measured({"ep": 4} if ranks == 4 else None, library)
    return found


# ---- tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("expert_parallel")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, Any]:
    """Number of ranks -> what each rank has found."""
    library, _ = build_counter(folder)
    assert Path(free_network_file(folder)) == folder / MACHINE
    out = {}
    for ranks in (1, 2, 4):
        args = (str(library or ""), str(folder / "checkpoint"))
        module = "tests.numerics.test_expert_parallel"
        out[ranks] = launch_for_results(module, folder, *args, ranks=ranks, timeout_s=TIMEOUT_S)
    return out


def plain(groups: int, steps: int = STEPS) -> tuple[list[list[float]], dict[str, list[float]]]:
    """(losses by step and group, parameters) of one process on the batches of all groups."""
    model, optimizer = made()
    losses = []
    for number in range(steps):
        optimizer.zero_grad()
        each = [CASES["mixtral"].train(model, batch(number, index)) for index in range(groups)]
        (torch.stack(each).sum() / groups).backward()
        optimizer.step()
        losses.append([float(loss.detach()) for loss in each])
    return losses, {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("ranks", "groups"), [(2, 1), (4, 2)], ids=["ep=2", "dp=2 ep=2, zero 3"])
def test_ranks_of_ep_train_as_one_device(ranks: int, groups: int, found: dict[int, Any]) -> None:
    losses, expected = plain(groups)
    for number, rank in enumerate(found[ranks]):
        assert rank["losses"] == pytest.approx([each[number // 2] for each in losses], rel=TOLERANCE)
        assert rank["parameters"].keys() == expected.keys()
        for name, whole in expected.items():
            assert rank["parameters"][name] == pytest.approx(whole, rel=TOLERANCE, abs=TOLERANCE)


def test_rows_go_by_all_to_all_between_real_ranks(found: dict[int, Any]) -> None:
    for rank in found[2]:
        assert rank["sent"] and rank["by all-to-all"] == pytest.approx(rank["losses"], rel=TOLERANCE)


def test_each_rank_has_half_of_the_experts(found: dict[int, Any]) -> None:
    for rank in found[2]:
        assert len(rank["local"]) == 4 and all(shape[0] == 2 for shape in rank["local"].values())


def test_a_run_resumes_without_ep(folder: Path, found: dict[int, Any]) -> None:
    later = range(STEPS, 2 * STEPS)
    alone = trained(resumed(compiled({"dp": 1}, seed=1), str(folder / "checkpoint")), later, 0)
    for rank in found[2]:
        for other in (rank["at dp=2"], rank["at ep=2"], alone):
            assert other == pytest.approx(rank["not stopped"], abs=TOLERANCE)


def test_too_many_rows_end_the_step_on_every_rank_before_anything_changes(found: dict[int, Any]) -> None:
    said = {rank["refused"] for rank in found[2]}
    assert len(said) == 1 and said.pop().startswith("Plan.expert_room, model.layers.")
    assert not any(rank["changed"] for rank in found[2])


def test_memory_falls_as_predicted(found: dict[int, Any]) -> None:
    if "memory" not in found[1][0]:
        pytest.skip("tests/benchmarks/memory_counter.cpp was not built")
    (alone,), together = (([rank["memory"] for rank in found[ranks]]) for ranks in (1, 4))
    print(f"\nep=1: {alone}\nep=4: {together[0]}")
    assert alone["predicted"] == pytest.approx(alone["measured"], rel=0.03)
    for rank in together:
        assert rank["predicted"] == pytest.approx(rank["measured"], rel=0.03)
        assert rank["measured"] < 0.6 * alone["measured"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_findings(Path(sys.argv[1]), lambda ranks: findings(ranks, *sys.argv[2:]))
