"""What needs a GPU. Not run where there is none; no figure in docs comes from here until it has been."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxzero
from fxzero.runtime.swap import Swapper
from tests.runtime.recorded_faults import faults

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


class Block(nn.Module):
    """An embedding, attention, dropout and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.qkv = nn.Linear(32, 96)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.embed(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(self.drop(mixed)).flatten(0, 1), x.flatten())


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_one_gpu_equals_the_plain_loop(name):
    torch.manual_seed(0)
    model = Block().cuda()
    plain = copy.deepcopy(model)
    batches = [torch.randint(64, (4, 16), device="cuda") for _ in range(10)]
    options = {"lr": 1e-2, "foreach": False}
    ours = getattr(torch.optim, name)(model.parameters(), **options)
    theirs = getattr(torch.optim, name)(plain.parameters(), **options)
    step = fxzero.compile(model, ours)
    torch.manual_seed(1)
    losses = [step(x) for x in batches]
    torch.manual_seed(1)
    for x, mine in zip(batches, losses, strict=True):
        loss = plain(x)
        loss.backward()
        theirs.step()
        theirs.zero_grad()
        assert torch.allclose(loss.detach(), mine, rtol=1e-5)
    for (path, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-6), path


@pytest.mark.parametrize("plan", [{}, {"precision": "bf16", "clip_grad_norm": 1.0}, {"accumulate": 2}, {"fp16": True}])
def test_the_host_never_waits_inside_a_step(plan):
    """The step's own check of the graph, made by CUDA: a wait of the host raises."""
    if plan.pop("fp16", False):
        plan = {"precision": "fp16", "loss_scale": "dynamic"}
    model = Block().cuda()
    step = fxzero.compile(model, torch.optim.AdamW(model.parameters(), lr=1e-2, capturable="loss_scale" in plan), plan)
    batch = torch.randint(64, (4, 16), device="cuda")
    step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tier", ["host", "nvme"])
@pytest.mark.parametrize("parts", [("optimizer",), ("optimizer", "parameters", "activations")])
def test_a_step_with_state_off_the_gpu_is_the_one_without(tier, parts, tmp_path):
    """Streamed state is updated by the same kernels: bit-equal. What rests off the device is a tensor of the CPU."""

    def train(plan):
        torch.manual_seed(0)
        model = Block().cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        step = fxzero.compile(model, optimizer, plan)
        torch.manual_seed(1)
        losses = [step(torch.randint(64, (4, 16), device="cuda")) for _ in range(8)]
        step.state_dict()  # waits until what was sent out is there
        return [value.cpu() for value in (*losses, *model.state_dict().values())], step

    plan = {f"offload_{part}": tier for part in parts} | {"offload_below": 0, "bucket_bytes": 4096}
    if tier == "nvme":
        plan["offload_dir"] = str(tmp_path)
    values, step = train(plan)
    assert all(torch.equal(a, b) for a, b in zip(values, train({})[0], strict=True))
    if "parameters" in parts:
        assert all(p.device.type == "cpu" for p in step.model.parameters())


def test_a_step_updated_on_the_host_is_near_the_one_on_the_gpu():
    def train(plan):
        torch.manual_seed(0)
        model = Block().cuda()
        step = fxzero.compile(model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False), plan)
        torch.manual_seed(1)
        return torch.stack([step(torch.randint(64, (4, 16), device="cuda")) for _ in range(8)])

    plan = {"offload_optimizer": "host", "offload_below": 0, "update_on_host": 1.0}
    assert torch.allclose(train(plan), train({}), rtol=1e-4)


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_tensors_leave_the_gpu_and_come_back_while_it_computes(tier, tmp_path):
    """Written values die at once and their memory is computed in; a slot goes from value to value."""
    with Swapper(torch.device("cuda"), directory=tmp_path, io="buffered", buffer_bytes=2**20) as swapper:
        home = swapper.home("p", (2**20 + 3,), torch.float32, tier)
        assert home.is_pinned() == (tier == "host")
        for step in range(5):
            values = [torch.full((2**20 + 3,), float(10 * step + i), device="cuda") for i in range(4)]
            writes = [swapper.write(value.mul_(2), f"x{i}", tier) for i, value in enumerate(values)]
            at_home = swapper.write(values[0], "p", tier, into=home)
            del values
            stored = []
            for write in writes:
                stored.append(swapper.written(write))
                torch.full((2**20 + 3,), -1.0, device="cuda")  # takes the memory that was freed
            swapper.written(at_home)
            busy = torch.randn(2048, 2048, device="cuda")
            for _ in range(20):
                busy = busy @ busy.T / 2048
            reads = [swapper.read(each) for each in stored]
            for each in stored:
                swapper.drop(each)
            read_home = swapper.read("p")
            for i, read in enumerate(reads):
                assert (swapper.loaded(read) == 2.0 * (10 * step + i)).all()
            assert (swapper.loaded(read_home) == 20.0 * step).all()
            swapper.settle()
            assert (home == 20.0 * step).all()
        size = 4 * (2**20 + 3)
        moved = swapper.traffic()
        assert moved.written[tier] == moved.read[tier] == 25 * (size if tier == "host" else -(-size // 4096) * 4096)


def test_the_host_does_not_wait_for_swaps_to_its_memory():
    with Swapper(torch.device("cuda")) as swapper:
        value = torch.ones(2**20, device="cuda")
        swapper.reserve([value.nbytes], "host")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            stored = swapper.written(swapper.write(value, "x", "host"))
            back = swapper.loaded(swapper.read(stored))
            swapper.drop(stored)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(back, value)


def test_recording_sees_every_call_and_changes_no_bit():
    def losses(recorded):
        torch.manual_seed(0)
        model = Block().cuda()
        step = fxzero.compile(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        x = torch.randint(64, (4, 16), device="cuda")
        found = [step(x).item()]
        recording = step.record(x, steps=3) if recorded else [step(x) for _ in range(3)]
        return [*found, step(x).item()], recording

    (plain, _), (seen, recording) = losses(False), losses(True)
    assert plain == seen and list(faults(recording)) == []
