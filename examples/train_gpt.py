"""A byte-level GPT trained on the Python standard library's own sources, sharded by fxzero.

    torchrun --nproc-per-node 2 examples/train_gpt.py            # two ranks, ZeRO-3; two minutes on two cores
    torchrun --nproc-per-node 2 examples/train_gpt.py --resume   # goes on from the newest checkpoint
    torchrun --nproc-per-node 4 examples/train_gpt.py --tp 2     # two by two: tensor parallel, and ZeRO-3 beside it
    python examples/train_gpt.py --zero 0                        # one process

Model and optimizer are plain PyTorch; fxzero.compile makes them one sharded program per rank. The output
folder receives checkpoints (a run without --resume drops those of the run before), loss.png, the program that
rank 0 ran (graph.txt) and what it holds and moves (report.txt).
Shapes: B batch of one rank, T context, D model width, V = 256 byte values.
"""

import argparse
import math
import os
import shutil
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import fxzero


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

    def attention(self, x_BTD, cos, sin):
        """Causal attention with rotary positions."""
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x_BTD, cos, sin):
        x_BTD = x_BTD + self.attention(self.norm_1(x_BTD), cos, sin)
        return x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD))))


def rotate(x, cos, sin):
    """Each pair of features is turned by an angle that grows with the position (rotary embedding)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)  # tables stay in fp32 where parameters are cast
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class GPT(nn.Module):
    """Logits of the next byte at every position; the head shares the embedding's weight."""

    def __init__(self, *, dim, layers, heads, context):
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes_residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if writes_residual else 0.02)
        self.head.weight = self.embed.weight
        half = dim // heads // 2
        angles = torch.outer(torch.arange(context), 1000 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x_BT):
        x_BTD = self.embed(x_BT)
        cos, sin = self.cos[: x_BT.shape[1]], self.sin[: x_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD, cos, sin)
        return self.head(self.norm(x_BTD))


def loss_fn(model, x_BT, y_BT):
    """Mean negative log-likelihood in nats per byte."""
    return F.cross_entropy(model(x_BT).flatten(0, 1), y_BT.flatten())


def corpus():
    """The standard library's top-level sources as bytes: training files, and every tenth file held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [f for i, f in enumerate(files) if i % 10 != 9], files[9::10]
    texts = (bytearray().join(f.read_bytes() for f in part) for part in parts)
    return [torch.frombuffer(text, dtype=torch.uint8) for text in texts]


def windows(data, starts, args):
    """Inputs and the bytes that follow them, for the windows that begin at `starts`."""
    rows = torch.stack([data[i : i + args.context + 1] for i in starts.tolist()]).long().to(args.device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def batch(data, args, *, step, part):
    """Random windows, always the same for the same (seed, step, part of the data-parallel ranks)."""
    generator = torch.Generator().manual_seed((args.seed * 1_000_000 + step) * 1_000 + part)
    return windows(data, torch.randint(len(data) - args.context, (args.batch,), generator=generator), args)


@torch.no_grad()
def held_out_loss(step, data, args):
    """Nats per byte on windows spread evenly over the held-out files; each rank takes its part of them."""
    starts = torch.linspace(0, len(data) - args.context - 1, args.eval_windows).long()
    total = torch.zeros(2, device=args.device)
    with step.unsharded() as model:
        for part in starts[dist.get_rank() :: dist.get_world_size()].split(args.batch):
            total += torch.stack((loss_fn(model, *windows(data, part, args)), total.new_ones(()))) * len(part)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


@torch.no_grad()
def sample(step, args, *, prompt="def ", num_bytes=300, temperature=0.6):
    """Text that the model writes after the prompt. Every rank writes the same, so none waits for another."""
    generator = torch.Generator().manual_seed(args.seed)
    text = list(prompt.encode())
    with step.unsharded() as model:
        for _ in range(num_bytes):
            logits_V = model(torch.tensor([text[-args.context :]], device=args.device))[0, -1]
            chances_V = (logits_V / temperature).softmax(0).cpu()
            text.append(torch.multinomial(chances_V, 1, generator=generator).item())
    return bytes(text).decode(errors="replace")


def learning_rate_factor(step, args):
    """Linear warm-up, then a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / max(1, args.warmup))
    progress = min(1.0, max(0.0, (step - args.warmup) / max(1, args.steps - args.warmup)))
    return warm * (0.525 + 0.475 * math.cos(math.pi * progress))


def train(step, optimizer, data, args, *, done):
    """Steps `done` to `args.steps` have run; returns training losses and held-out losses by step."""
    train_data, held_out_data = data
    rank, part = dist.get_rank(), dist.get_rank() // (args.tp * args.sp)  # ranks of tp and sp have one batch
    bytes_per_step = args.batch * args.context * args.dp
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: learning_rate_factor(i, args), last_epoch=done - 1
    )
    losses, held_out = {}, {}
    bar = tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps, disable=rank > 0, unit="step")
    for i in bar:
        began_s = time.perf_counter()
        losses[i] = step(*batch(train_data, args, step=i, part=part)).item()
        scheduler.step()
        tokens_per_s = bytes_per_step / (time.perf_counter() - began_s)
        bar.set_postfix_str(f"loss {losses[i]:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
        if i % args.eval_every == 0 or i == args.steps:
            held_out[i] = held_out_loss(step, held_out_data, args)
            if rank == 0:
                bar.write(f"step {i}: held-out loss {held_out[i]:.3f} nats per byte")
        if i % args.save_every == 0 or i == args.steps:
            dcp.save(step.state_dict(), checkpoint_id=args.out / "checkpoints" / f"step_{i:06d}")
    return losses, held_out


def resume(step, args):
    """The newest complete checkpoint is loaded; returns how many steps it had done."""
    complete = sorted(args.out.glob("checkpoints/step_*/.metadata"))  # what is written last
    if not complete:
        raise SystemExit(f"--resume: no complete checkpoint under {args.out}; train without --resume first")
    newest = complete[-1].parent
    done = int(newest.name.removeprefix("step_"))
    if done >= args.steps:
        raise SystemExit(f"--resume: {newest} has done {done} steps already; give --steps a larger number")
    state = step.state_dict()
    dcp.load(state, checkpoint_id=newest)
    step.load_state_dict(state)
    return done


def plot(losses, held_out, path):
    """The loss curves are in the PNG at `path`."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(losses), list(losses.values()), linewidth=0.6, alpha=0.6, label="training, rank 0")
    axes.plot(list(held_out), list(held_out.values()), "o-", label="held out")
    axes.set(xlabel="step", ylabel="nats per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def start_ranks():
    """The process group exists, of one rank where torchrun did not start us; returns this rank's device."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **alone)
    return device


def scale(text):
    """A loss scale of the command line."""
    return text if text == "dynamic" else float(text)


def parse_arguments():
    """The command line, with the defaults that make the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8, help="windows of each data-parallel rank in a step")
    parser.add_argument("--context", type=int, default=128, help="bytes the model sees")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=80, help="steps of rising learning rate")
    parser.add_argument("--zero", type=int, default=3, help="ZeRO stage, 0 to 3")
    parser.add_argument("--tp", type=int, default=1, help="ranks over which matrices and heads are split")
    parser.add_argument("--sp", type=int, default=1, help="ranks over which rows or their tokens are split")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16, fp16, autocast:bf16 or autocast:fp16")
    parser.add_argument("--loss-scale", type=scale, help="dynamic, or a number that stays; fp16 needs one")
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches that a step's batch is split into")
    parser.add_argument("--clip-grad-norm", type=float, help="greatest norm of all gradients; default: none")
    parser.add_argument("--recompute", default="none", help="blocks: keep only what enters them")
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--eval-windows", type=int, default=512)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    return parser.parse_args()


def main():
    """Trains, then writes curve, graph, report and a sample."""
    args = parse_arguments()
    args.device = start_ranks()
    args.dp, left = divmod(dist.get_world_size(), args.tp * args.sp)
    if left:
        raise SystemExit(f"--tp {args.tp} --sp {args.sp}: {dist.get_world_size()} ranks are not a multiple of these")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = GPT(dim=args.dim, layers=args.layers, heads=args.heads, context=args.context).to(args.device)
    # A scheduler that starts late wants the peak rate in the group.
    groups = [{"params": model.parameters(), "initial_lr": args.lr}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    plan = fxzero.Plan(
        zero=args.zero,
        mesh={"dp": args.dp, "sp": args.sp, "tp": args.tp},
        precision=args.precision,
        clip_grad_norm=args.clip_grad_norm,
        loss_scale=args.loss_scale,
        accumulate=args.accumulate,
        recompute=args.recompute,
    )
    step = fxzero.compile(model, optimizer, plan, loss=loss_fn)

    if dist.get_rank() == 0 and not args.resume:
        shutil.rmtree(args.out / "checkpoints", ignore_errors=True)
    done = resume(step, args) if args.resume else 0
    losses, held_out = train(step, optimizer, corpus(), args, done=done)
    text = sample(step, args)
    if dist.get_rank() == 0:
        plot(losses, held_out, args.out / "loss.png")
        (args.out / "graph.txt").write_text(f"{step.graph}\n")
        (args.out / "report.txt").write_text(f"{step.report()}\n")
        print(f"{step.report()}\n\nA sample:\n{text}\n\nloss.png, graph.txt and report.txt are in {args.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
