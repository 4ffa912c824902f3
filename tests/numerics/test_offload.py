"""What rests or waits off the device changes no bit; files that fail are named, and what was saved still loads."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import fxzero
from fxzero.errors import OffloadError
from fxzero.graph.swap_ops import swapped_bytes
from fxzero.runtime.swap import Swapper
from tests.numerics.side_by_side import Values, first_difference, parameters
from tests.numerics.sparing import sharing_first_capture
from tests.passes import test_recompute_blocks as model_of
from tests.passes.test_recompute_blocks import batch


class Reader(model_of.Reader):
    """Two blocks of the small GPT, dropout and attention dropout in them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = self.layers[:2]


OPTIMIZER = {"offload_optimizer": "nvme", "offload_below": 0}
STATE = {**OPTIMIZER, "offload_parameters": "nvme"}
EVERYTHING = {**STATE, "offload_activations": "nvme"}
HOST = {key: "host" if value == "nvme" else value for key, value in EVERYTHING.items()}
PLANS: dict[str, dict[str, Any]] = {
    "optimizer_nvme": OPTIMIZER,
    "everything_nvme": EVERYTHING,
    "everything_nvme_blocks": {**EVERYTHING, "recompute": "blocks", "prefetch": 2, "bucket_bytes": 8192},
    "everything_host": HOST,
    "updated_on_host": {**HOST, "update_on_host": 1.0},
    "half_updated_on_host": {"offload_optimizer": "host", "offload_below": 0, "update_on_host": 0.5},
    "parameters_nvme_updated_on_host": {**STATE, "offload_optimizer": "host", "update_on_host": 1.0},
    "buffered": {**STATE, "offload_io": "buffered", "offload_buffer_bytes": 16384},
}


def make(plan: dict[str, Any], seed: int = 0) -> tuple[Reader, torch.optim.Optimizer, fxzero.TrainStep]:
    torch.manual_seed(seed)
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    return model, optimizer, fxzero.compile(model, optimizer, fxzero.Plan(**plan))


_captures: dict[str, Any] = {}


def train(plan: dict[str, Any], *, steps: int = 20) -> tuple[Values, fxzero.TrainStep]:
    """Losses, and parameters and state after the last step."""
    model, optimizer, step = make(plan)
    torch.manual_seed(1)
    with sharing_first_capture(_captures, ""):
        losses = {f"loss {i}": step(batch(i)) for i in range(steps)}
    return losses | states(model, optimizer), step


@pytest.fixture(scope="module")
def reference() -> Values:
    return train({})[0]


@pytest.mark.parametrize("name", PLANS)
def test_twenty_steps_are_those_without_offload(name: str, reference: Values, tmp_path: Path) -> None:
    directory = {"offload_dir": str(tmp_path)} if "nvme" in PLANS[name].values() else {}
    values, step = train({**PLANS[name], **directory})
    assert first_difference(values, reference) == ""
    assert swapped_bytes(step.graph.calls())
    assert ("nvme", "in") not in swapped_bytes(step.graph.calls()) or list(tmp_path.iterdir())


def test_a_move_that_brings_other_bytes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Swapper.loaded
    monkeypatch.setattr(Swapper, "loaded", lambda self, transfer: loaded(self, transfer).neg_())
    values, _ = train(HOST, steps=2)
    monkeypatch.undo()
    assert first_difference(values, train({}, steps=2)[0])


def states(model: Reader, optimizer: torch.optim.Optimizer) -> Values:
    """Parameters and optimizer state, by name."""
    out = parameters(model)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            out[f"{name}:{key}"] = torch.as_tensor(value).clone()
    return out


@pytest.mark.parametrize("plan", [STATE, {**HOST, "update_on_host": 1.0}], ids=["nvme", "host"])
def test_checkpoints_pass_between_plans(plan: dict[str, Any], tmp_path: Path) -> None:
    model, optimizer, step = make(plan)
    for index in range(3):
        step(batch(index))
    dcp.save(step.state_dict(), checkpoint_id=tmp_path / "saved")
    saved = states(model, optimizer)
    for other in ({}, EVERYTHING):
        model, optimizer, step = make(other, seed=7)
        found = step.state_dict()
        dcp.load(found, checkpoint_id=tmp_path / "saved")
        step.load_state_dict(found)
        assert first_difference(states(model, optimizer), saved) == ""
        torch.manual_seed(3)
        losses = [step(batch(index)).item() for index in range(3)]
        assert first_difference({"loss": torch.tensor(losses)}, {"loss": torch.tensor(resumed(saved))}) == ""


def resumed(saved: Values) -> list[float]:
    """Three more losses of the plain loop from saved state."""
    torch.manual_seed(0)
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])
            keys = [key.removeprefix(f"{name}:") for key in saved if key.startswith(f"{name}:")]
            optimizer.state[parameter] = {key: saved[f"{name}:{key}"].clone() for key in keys}
    torch.manual_seed(3)
    losses = []
    for index in range(3):
        optimizer.zero_grad()
        loss = model(batch(index))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("plan", [{}, STATE, HOST], ids=["none", "nvme", "host"])
def test_what_a_user_writes_between_steps_counts(plan: dict[str, Any]) -> None:
    def run(keys: dict[str, Any]) -> Values:
        model, optimizer, step = make(keys)
        for index in range(4):
            torch.manual_seed(index)
            step(batch(index))
            with torch.no_grad():
                model.layers[1].out.weight.mul_(0.5)
                optimizer.state[model.layers[0].out.weight]["exp_avg"].zero_()
                if index == 2:  # torch puts tensors of its own in the place of ours
                    optimizer.load_state_dict(optimizer.state_dict())
        return states(model, optimizer)

    assert first_difference(run(plan), run({})) == ""


def test_files_are_gone_when_the_step_is(tmp_path: Path) -> None:
    _, _, step = make({**STATE, "offload_dir": str(tmp_path)})
    step(batch(0))
    (run,) = tmp_path.iterdir()
    assert len(list(run.iterdir())) > 20
    step._state.homes.swapper.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["exp_avg_sq of layers.1.qkv.weight", "parameter layers.1.qkv.weight"])
@pytest.mark.parametrize("fault", ["gone", "short"])
def test_a_file_that_fails_is_named_and_what_was_saved_loads(what: str, fault: str, tmp_path: Path) -> None:
    _, _, step = make({**STATE, "offload_dir": str(tmp_path)})
    step(batch(0))
    dcp.save(step.state_dict(), checkpoint_id=tmp_path / "saved")
    entry, _, name = what.partition(" of ") if " of " in what else what.partition(" ")
    files = [p for p in tmp_path.glob("*/*") if entry in p.name and name in p.name.replace("_", ".")]
    files = [p for p in files if entry != "exp_avg_sq" or "exp_avg_sq" in p.name]
    assert len(files) == 1, [p.name for p in tmp_path.glob("*/*")]
    if fault == "gone":
        files[0].unlink()
    else:
        os.truncate(files[0], 4096)
    with pytest.raises(OffloadError) as caught:
        for index in range(2):
            step(batch(index))
    assert what in str(caught.value) and files[0].name in str(caught.value), caught.value
    _, _, other = make({**STATE, "offload_dir": str(tmp_path)}, seed=5)
    found = other.state_dict()
    dcp.load(found, checkpoint_id=tmp_path / "saved")
    other.load_state_dict(found)
    assert other(batch(1)).isfinite()


def test_a_full_disk_is_seen_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, step = make({**STATE, "offload_dir": str(tmp_path)})
    before = parameters(model)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10_000})())
    with pytest.raises(OffloadError, match="bytes free"):
        step(batch(0))
    assert first_difference(parameters(model), before) == ""


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match="nowhere"):
        make({**STATE, "offload_dir": str(tmp_path / "nowhere")})


def test_state_off_the_device_is_made_there_from_meta(tmp_path: Path) -> None:
    def init(module: torch.nn.Module) -> None:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def run(plan: dict[str, Any]) -> Values:
        with torch.device("meta"):
            model = Reader()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        step = fxzero.compile(model, optimizer, fxzero.Plan(**plan), init=init)
        torch.manual_seed(1)
        losses = {f"loss {i}": step(batch(i)) for i in range(3)}
        return losses | states(model, optimizer)

    assert first_difference(run({**STATE, "offload_dir": str(tmp_path)}), run({})) == ""


def test_predicted_traffic_is_what_moves(tmp_path: Path) -> None:
    for plan, tier in ((EVERYTHING, "nvme"), (HOST, "host"), ({**HOST, "update_on_host": 0.5}, "host")):
        _, _, step = make({**plan, **({"offload_dir": str(tmp_path)} if tier == "nvme" else {})})
        step(batch(0))
        swapper = step._state.homes.swapper
        before = swapper.traffic()
        step(batch(1))
        after = swapper.traffic()
        moved = swapped_bytes(step.graph.calls())
        assert after.written[tier] - before.written[tier] == moved[(tier, "out")]
        assert after.read[tier] - before.read[tier] == moved[(tier, "in")]


@pytest.mark.parametrize(("optimizer", "weights"), [("nvme", "host"), ("host", "nvme"), ("none", "host")])
def test_state_may_rest_on_different_tiers(optimizer: str, weights: str) -> None:
    plan = {"offload_optimizer": optimizer, "offload_parameters": weights, "offload_below": 0}
    assert first_difference(train(plan, steps=3)[0], train({}, steps=3)[0]) == ""
