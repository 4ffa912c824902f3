"""A byte-level GPT trained on the Python standard library's own sources, sharded by fxzero.

    torchrun --nproc-per-node 2 examples/train_gpt.py              # two ranks, ZeRO-3, about two minutes on two cores
    torchrun --nproc-per-node 2 examples/train_gpt.py --resume     # goes on from the newest checkpoint
    python examples/train_gpt.py --zero 0                          # one process

The model and the optimizer are plain PyTorch; only `fxzero.compile` knows of more than one rank. The output folder
receives the checkpoints, `loss.png`, the program that rank 0 ran (`graph.txt`) and what it costs (`report.txt`).
Shapes: B batch of one rank, T context, D model width, V = 256 byte values.
"""

import argparse
import glob
import math
import os
import sysconfig
import time
from pathlib import Path

import matplotlib
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import fxzero

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each added to the residual stream."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def attention(self, x_BTD):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x_BTD).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x_BTD):
        x_BTD = x_BTD + self.attention(self.norm_1(x_BTD))
        return x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD))))


class GPT(nn.Module):
    """Logits of the next byte at each position; the head shares the embedding's weight."""

    def __init__(self, dim, layers, heads, context):
        super().__init__()
        self.context = context
        self.embed, self.position = nn.Embedding(256, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
        self.head.weight = self.embed.weight

    def forward(self, x_BT):
        x_BTD = self.embed(x_BT) + self.position(torch.arange(x_BT.shape[1], device=x_BT.device))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))


def loss_fn(model, x_BT, y_BT):
    """Mean negative log-likelihood in nats per byte."""
    return F.cross_entropy(model(x_BT).flatten(0, 1), y_BT.flatten())


def corpus():
    """The standard library's top-level sources as two byte tensors: training, and every tenth file, held out."""
    files = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py")))
    parts = ([f for i, f in enumerate(files) if i % 10 != 9], files[9::10])
    return [torch.frombuffer(bytearray(b"".join(Path(f).read_bytes() for f in part)), dtype=torch.uint8) for part in parts]


def batch(data, args, *, step, rank):
    """Inputs and next bytes of random windows, the same for the same (seed, step, rank)."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step * 1_009 + rank)
    starts = torch.randint(len(data) - args.context, (args.batch,), generator=generator)
    windows = torch.stack([data[i : i + args.context + 1] for i in starts]).long().to(args.device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


@torch.no_grad()
def held_out_loss(step, data, args):
    """Nats per byte on windows spread evenly over the held-out files, each rank taking its part of them."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    starts = torch.linspace(0, len(data) - args.context - 1, args.eval_windows).long()[rank::world_size]
    windows = torch.stack([data[i : i + args.context + 1] for i in starts]).long().to(args.device)
    total = torch.zeros(2, device=args.device)
    with step.unsharded() as model:
        for w in windows.split(args.batch):
            total += torch.tensor([loss_fn(model, w[:, :-1], w[:, 1:]).item() * len(w), len(w)], device=args.device)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


@torch.no_grad()
def sample(step, args, *, prompt=b"def ", num_bytes=200, temperature=0.7):
    """Text that the model writes after the prompt. All ranks write the same, so none waits for another."""
    generator = torch.Generator().manual_seed(args.seed)
    text = list(prompt)
    with step.unsharded() as model:
        for _ in range(num_bytes):
            logits_V = model(torch.tensor([text[-args.context :]], device=args.device))[0, -1]
            text.append(torch.multinomial((logits_V / temperature).softmax(0).cpu(), 1, generator=generator).item())
    return bytes(text).decode("utf-8", errors="replace")


def learning_rate_factor(args):
    """Linear warm-up, then a cosine down to a twentieth, as a factor for LambdaLR."""
    def factor(step):
        progress = min(1.0, max(0.0, (step - args.warmup) / max(1, args.steps - args.warmup)))
        return min(1.0, (step + 1) / args.warmup) * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))
    return factor


def plot(losses, held_out, path):
    """The loss curve is in the PNG at `path`."""
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(list(losses), list(losses.values()), lw=0.7, alpha=0.6, label="training, rank 0")
    axes.plot(list(held_out), list(held_out.values()), "o-", label="held out")
    axes.set(xlabel="step", ylabel="nats per byte")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def init_ranks():
    """The process group exists, of one rank where torchrun did not start us; returns this rank's device."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if backend == "gloo":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def train(step, optimizer, data, args, *, done):
    """Runs steps `done` to `args.steps`; returns training losses and held-out losses by step."""
    train_data, held_out_data = data
    rank, world_size = dist.get_rank(), dist.get_world_size()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(args), last_epoch=done - 1)
    losses, held_out = {}, {}
    bar = tqdm(range(done, args.steps), initial=done, total=args.steps, disable=rank > 0, unit="step")
    for i in bar:
        began = time.perf_counter()
        loss = step(*batch(train_data, args, step=i, rank=rank)).item()
        scheduler.step()
        losses[i + 1] = loss
        tokens_s = args.batch * args.context * world_size / (time.perf_counter() - began)
        if (i + 1) % args.eval_every == 0 or i + 1 == args.steps:
            held_out[i + 1] = held_out_loss(step, held_out_data, args)
            bar.write(f"step {i + 1}: held-out loss {held_out[i + 1]:.3f} nats per byte") if rank == 0 else None
        if (i + 1) % args.save_every == 0 or i + 1 == args.steps:
            dcp.save(step.state_dict(), checkpoint_id=args.out / f"checkpoint_{i + 1:06d}")
        bar.set_postfix(loss=f"{loss:.3f}", tokens_s=f"{tokens_s:,.0f}")
    return losses, held_out
