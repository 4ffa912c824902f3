"""One variant of the benchmark job, one rank of it. compare.py starts this file under torchrun; by hand:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tests/benchmarks/job.py --variant fsdp2 --out result.json

A Llama-style decoder learns the bytes of the Python standard library's sources, in fp32 on CPU over gloo, with the
same initial weights and batches for every variant, so that all of them must report the same losses.
Shapes: B microbatch of one rank, T sequence, D model width, H heads, V vocabulary.
"""

import argparse
import collections
import ctypes
import dataclasses
import json
import statistics
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

MB = 2**20


@dataclasses.dataclass(frozen=True)
class Size:
    """What one rank trains on: the model's extent and its share of the batch."""

    dim: int = 512
    layers: int = 8
    heads: int = 8
    vocab: int = 8192
    seq: int = 256
    microbatch: int = 2


# Parameters: llama 34M, a quarter of them in embedding and head; vocab50m 50M, two thirds; demo 0.9M.
JOBS = {
    "llama": Size(),
    "vocab50m": Size(layers=5, vocab=32768),
    "demo": Size(dim=128, layers=4, heads=4, vocab=256, seq=128, microbatch=8),
}


class RMSNorm(nn.Module):
    """Features scaled to root mean square 1, then by a learned weight."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD):
        return x_BTD * torch.rsqrt(x_BTD.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x_BTD, cos, sin):
        q, k, v = (w(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTD):
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))


class Layer(nn.Module):
    """Attention and feed-forward, each normalized before and added after."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(dim), Attention(dim, heads)
        self.ffn_norm, self.ffn = RMSNorm(dim), FeedForward(dim, hidden)

    def forward(self, x_BTD, cos, sin):
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), cos, sin)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Llama(nn.Module):
    """Decoder with untied head; forward returns the mean cross-entropy of the next token."""

    def __init__(self, size):
        super().__init__()
        hidden = -(-size.dim * 8 // 3 // 128) * 128
        self.embed = nn.Embedding(size.vocab, size.dim)
        self.layers = nn.ModuleList(Layer(size.dim, size.heads, hidden) for _ in range(size.layers))
        self.norm, self.head = RMSNorm(size.dim), nn.Linear(size.dim, size.vocab, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        half = size.dim // size.heads // 2
        angles = torch.outer(torch.arange(size.seq), 10000 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x_BT, y_BT):
        x_BTD = self.embed(x_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, self.cos, self.sin)
        logits_BTV = self.head(self.norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1), y_BT.flatten())


def rotate(x, cos, sin):
    """Each pair of features is turned by an angle that grows with the position."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)  # tables stay in fp32 where parameters are cast
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def corpus():
    """The standard library's top-level sources as one byte tensor."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray().join(f.read_bytes() for f in files), dtype=torch.uint8)


def batch(data, size, *, step, rank, world_size):
    """This rank's rows of the global batch of a step, which is the same for every variant."""
    generator = torch.Generator().manual_seed(1234 + step)
    starts = torch.randint(len(data) - size.seq, (world_size, size.microbatch), generator=generator)[rank]
    rows = torch.stack([data[i : i + size.seq + 1] for i in starts.tolist()]).long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def adamw(parameters):
    """The optimizer of every variant."""
    return torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)


def plain_loop(model, optimizer):
    """A step as users write it by hand."""

    def step(x_BT, y_BT):
        loss = model(x_BT, y_BT)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def fxzero_step(zero, **own):
    """The builder of fxzero's step at a ZeRO stage, with further keys of the plan; --plan adds more."""

    def build(model, plan):
        import fxzero

        keys = {"zero": zero, "mesh": {"dp": dist.get_world_size()}, "lowering": "eager", **own, **plan}
        return fxzero.compile(model, adamw(model.parameters()), fxzero.Plan(**keys))

    return build


def ddp_step(*, compiled=False):
    """The builder of DDP's step, `compiled` as a whole; no buffer broadcast: these constant tables need none."""

    def build(model, _plan):
        from torch.nn.parallel import DistributedDataParallel

        replicated = DistributedDataParallel(model, broadcast_buffers=False)
        return plain_loop(torch.compile(replicated) if compiled else replicated, adamw(model.parameters()))

    return build


def one_rank_step(*, compiled=False):
    """The builder of the plain loop of one process with the fused optimizer, the model `compiled` as a whole."""

    def build(model, _plan):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        return plain_loop(torch.compile(model) if compiled else model, optimizer)

    return build


def fsdp2_step(*, compiled=False, bf16=False):
    """The builder of FSDP2's step, one group per layer and one for the rest; `compiled` layer by layer."""

    def build(model, _plan):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        for layer in model.layers:
            if compiled:
                layer.compile()
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return plain_loop(model, adamw(model.parameters()))

    return build


def tensor_parallel_step(*, sequence, compiled=False):
    """The builder of a step by `parallelize_module` over all ranks, by the plan of torch's tutorial on a Llama.

    Column and row pairs, and the vocabulary of head and loss in parts; with `sequence` activations between blocks too.
    """

    def build(model, _plan):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            PrepareModuleInput,
            RowwiseParallel,
            SequenceParallel,
            loss_parallel,
            parallelize_module,
        )

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        between = Shard(1) if sequence else Replicate()
        words = ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(model, mesh, {"head": words})
        rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
        parallelize_module(model, mesh, {"embed": rows} | ({"norm": SequenceParallel()} if sequence else {}))
        for layer in model.layers:
            layer.attn.heads //= mesh.size()
            columns = [f"attn.w{name}" for name in "qkv"] + ["ffn.w1", "ffn.w3"]
            styles = {name: ColwiseParallel() for name in columns}
            styles |= {name: RowwiseParallel(output_layouts=between) for name in ("attn.wo", "ffn.w2")}
            if sequence:
                whole = {"desired_input_layouts": (Replicate(), None, None), "input_layouts": (Shard(1), None, None)}
                one = {"desired_input_layouts": (Replicate(),), "input_layouts": (Shard(1),)}
                styles |= {"attn": PrepareModuleInput(**whole), "ffn": PrepareModuleInput(**one)}
                styles |= {"attn_norm": SequenceParallel(), "ffn_norm": SequenceParallel()}
            parallelize_module(layer, mesh, styles)
        if compiled:  # as a whole: the gradient of a compiled layer is no DTensor, which torch 2.13 cannot go on from
            model.compile()
        optimizer = adamw(model.parameters())

        def step(x_BT, y_BT):
            with loss_parallel():
                loss = model(x_BT, y_BT)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss = loss.detach()
            return loss.full_tensor() if hasattr(loss, "full_tensor") else loss

        return step

    return build


def fxzero_tensor_parallel_step(**own):
    """The builder of fxzero's step with all ranks on the axis tp."""

    def build(model, plan):
        return fxzero_step(0, **own)(model, {"mesh": {"dp": 1, "tp": dist.get_world_size()}, **plan})

    return build


def data_of(variant):
    """(rank, world size) by which a variant's batch is chosen: ranks of tensor parallelism share theirs."""
    return (0, 1) if "tp" in variant.split("+") else (dist.get_rank(), dist.get_world_size())


def deepspeed3_step(model, _plan):
    """DeepSpeed ZeRO-3, with its thresholds scaled from billions of parameters down to this model's."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    zero = {
        "stage": 3,
        "reduce_bucket_size": 6_500_000,
        "allgather_bucket_size": 6_500_000,
        "stage3_param_persistence_threshold": 1000,
        "stage3_prefetch_bucket_size": 5_000_000,
        "stage3_max_live_parameters": 10_000_000,
        "stage3_max_reuse_distance": 10_000_000,
    }
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,  # its default is 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adamw(model.parameters()), config=config, dist_init_required=False
    )

    def step(x_BT, y_BT):
        loss = engine(x_BT, y_BT)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


VARIANTS = {
    **{f"fxzero{zero}": fxzero_step(zero) for zero in range(4)},
    "fxzero3+inductor": fxzero_step(3, lowering="inductor"),
    "fxzero0+inductor": fxzero_step(0, lowering="inductor"),
    "tp": tensor_parallel_step(sequence=False),
    "tp+compile": tensor_parallel_step(sequence=False, compiled=True),
    "tp+sp": tensor_parallel_step(sequence=True),
    "tp+sp+compile": tensor_parallel_step(sequence=True, compiled=True),
    "fxzero+tp": fxzero_tensor_parallel_step(),
    "fxzero+tp+inductor": fxzero_tensor_parallel_step(lowering="inductor"),
    "ddp": ddp_step(),
    "ddp+compile": ddp_step(compiled=True),
    "plain": one_rank_step(),
    "plain+compile": one_rank_step(compiled=True),
    "fxzero3+bf16": fxzero_step(3, precision="bf16"),
    "fxzero3+cost": fxzero_step(3, schedule="cost"),
    "fsdp2": fsdp2_step(),
    "fsdp2+bf16": fsdp2_step(bf16=True),
    "fsdp2+compile": fsdp2_step(compiled=True),
    "deepspeed3": deepspeed3_step,
}


class MemoryCounter:
    """Live and peak bytes of tensor storages, from the library that compare.py built; None without it."""

    def __init__(self, library):
        self.library = ctypes.CDLL(library) if library else None
        if self.library:
            for read in (self.library.memory_counter_live, self.library.memory_counter_peak):
                read.restype = ctypes.c_int64
            self.library.memory_counter_start()

    def reset_peak(self):
        """What was live at most is forgotten."""
        if self.library:
            self.library.memory_counter_reset_peak()

    def read(self):
        """Returns (live, peak) in MB."""
        if not self.library:
            return None, None
        return self.library.memory_counter_live() / MB, self.library.memory_counter_peak() / MB


def sent_bytes(interface):
    """Bytes that every process of this machine has sent through a network interface."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise SystemExit(f"--interface: no '{interface}' in /proc/net/dev")


def count_collectives(step, x_BT, y_BT):
    """How often a further step starts each collective on this rank, by the backend's own name for it."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step(x_BT, y_BT)
    return collections.Counter(e.name for e in recorded.events() if e.name.startswith("gloo:"))


def predicted_mb(step):
    """The peak that fxzero's step says it has, in MB; None for a peer's."""
    if not hasattr(step, "graphs"):
        return None
    from fxzero.cost.memory import highest_profile

    return highest_profile(step.graphs)[1].peak_bytes / MB


def rows_mb(step):
    """MB of parameters of a rank of fxzero's that lie in memory shared by the host, which no allocator counts."""
    return step.shared_bytes.rows / MB if hasattr(step, "shared_bytes") else 0.0


def measure(args):
    """Builds the variant and runs its steps; returns the figures of all ranks together."""
    size, world_size = JOBS[args.job], dist.get_world_size()
    rank, parts = data_of(args.variant)
    memory = MemoryCounter(args.memory_counter)
    data = corpus()
    torch.manual_seed(0)
    model = Llama(size)
    parameter_bytes = sum(p.nbytes for p in model.parameters())
    began = time.perf_counter()
    step = VARIANTS[args.variant](model, json.loads(args.plan))
    build_s = time.perf_counter() - began

    losses, times_s, sent_before = [], [], 0
    for i in range(args.steps):
        inputs = batch(data, size, step=i, rank=rank, world_size=parts)
        if i == args.warmup:  # no barrier: what a step has launched for the next one would be over, and cost nothing
            memory.reset_peak()
            sent_before = sent_bytes(args.interface)
        began = time.perf_counter()
        losses.append(step(*inputs))
        times_s.append(time.perf_counter() - began)
    live_mb, peak_mb = (None if seen is None else seen + rows_mb(step) for seen in memory.read())
    sent = (sent_bytes(args.interface) - sent_before) / (args.steps - args.warmup)
    dist.barrier()
    inputs = batch(data, size, step=args.steps, rank=rank, world_size=parts)
    collectives = count_collectives(step, *inputs)

    step_s = statistics.median(times_s[args.warmup :])
    own = {
        "losses": torch.stack(losses).tolist(),
        "times_s": times_s,
        "step_s": step_s,
        "setup_s": build_s + sum(t - step_s for t in times_s[: args.warmup] if t > 1.5 * step_s),
        "live_mb": live_mb,
        "peak_mb": peak_mb,
        "predicted_mb": predicted_mb(step),
    }
    ranks = [None] * world_size
    dist.all_gather_object(ranks, own)
    counts = {"parameter_bytes": parameter_bytes, "sent_bytes_per_step": sent, "collectives": dict(collectives)}
    return counts | {"ranks": ranks}


def parse_arguments():
    """The command line of one rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--job", choices=JOBS, default="llama")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5, help="first steps, not in times, memory and wire")
    parser.add_argument("--plan", default="{}", help="JSON: further keys of fxzero's plan")
    parser.add_argument("--memory-counter", help="the built memory_counter.cpp; without it no memory figures")
    parser.add_argument("--interface", default="lo", help="network interface whose sent bytes are counted")
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    args = parser.parse_args()
    if not 0 < args.warmup < args.steps:
        parser.error(f"--warmup {args.warmup}: expected at least 1 and fewer than --steps {args.steps}")
    return args


def main():
    """Rank 0 has written what all ranks measured."""
    args = parse_arguments()
    dist.init_process_group("gloo")
    result = measure(args)
    if dist.get_rank() == 0:
        args.out.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
