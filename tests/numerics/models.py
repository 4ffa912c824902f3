"""Small models, a hand-written optimizer and the jobs made of them: between them what makes a step hard to shard."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import Optimizer
from torch.utils.checkpoint import checkpoint

VOCAB = 51
WIDTH = 17
BATCH = 8

Batch = tuple[tuple[Any, ...], dict[str, Any]]


class Block(nn.Module):
    """BatchNorm, dropout, an in-place op, a scalar, a single row, a parameter that no loss depends on.

    No bias stands before the norm: its gradient would be nothing but rounding noise, which Adam blows up to a whole
    step, so that ranks that sum in another order could not agree on it to any tolerance.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.1)
        self.unused = nn.Parameter(torch.randn(5, 3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.row = nn.Parameter(torch.zeros(1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.drop(F.relu(self.norm(self.mix(x)), inplace=True)) + self.row


class Network(nn.Module):
    """An embedding tied to the head around one block; 51 and 17 rows divide by no number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.block = Block(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(x)))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(x), y)


class Logits(Network):
    """The network for jobs that bring a loss function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(x)


class Matrices(nn.Module):
    """Nothing but matrices: Muon takes no other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, VOCAB, bias=False)
        self.down = nn.Linear(VOCAB, 16, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.down(F.relu(self.up(F.one_hot(x % 16, 16).float()))), y % 16)


class PartlyFrozen(nn.Module):
    """One frozen layer that the optimizer holds, one that it does not (see `trainable`)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.held = nn.Linear(WIDTH, WIDTH)
        self.left_out = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.held.requires_grad_(False)
        self.left_out.requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.left_out(F.gelu(self.held(self.embed(x)))))
        return F.cross_entropy(self.head(hidden), y)


class TwoPaths(nn.Module):
    """On steps with `side=False` the parameters of one branch have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.side = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, x: torch.Tensor, y: torch.Tensor, *, side: bool) -> torch.Tensor:
        hidden = self.embed(x)
        if side:
            hidden = hidden + torch.tanh(self.side(hidden))
        return F.cross_entropy(self.head(hidden), y)


class Frame(nn.Module):
    """An embedding, something in the middle, a head; the middle is a function of the module and the hidden state."""

    def __init__(self, middle: Callable[[nn.Module, torch.Tensor], torch.Tensor], *, lstm: bool = False) -> None:
        super().__init__()
        self.middle = middle
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.LSTM(WIDTH, WIDTH) if lstm else nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.table = torch.linspace(0.5, 1.5, WIDTH)  # neither parameter nor buffer
        self.register_buffer("previous", torch.zeros(()))
        self.register_buffer("current", torch.ones(()))
        self.register_buffer("average", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.middle(self, self.embed(x))), y)


def dropped_in_checkpoint(model: Frame, hidden: torch.Tensor) -> torch.Tensor:
    """Dropout that runs twice, with one mask."""
    return checkpoint(lambda h: F.relu(F.dropout(model.body(h), 0.3)), hidden, use_reentrant=False)


def dropped_transposed(model: Frame, hidden: torch.Tensor) -> torch.Tensor:
    """Dropout of a tensor whose memory is in another order, as in `nn.MultiheadAttention`."""
    return F.dropout(model.body(hidden).t(), 0.3).t()


def noisy(model: Frame, hidden: torch.Tensor) -> torch.Tensor:
    """Random numbers other than dropout's."""
    noise = torch.randn_like(hidden) + torch.rand(WIDTH) + torch.randperm(WIDTH)
    return model.body(hidden + 0.01 * noise)


def shifting(model: Frame, hidden: torch.Tensor) -> torch.Tensor:
    """A buffer whose next value is another's present one."""
    scale = 1 + 0.1 * model.previous + 0.1 * model.current
    with torch.no_grad():
        model.previous.copy_(model.current)
        model.current.copy_(hidden.mean())
        model.average.mul_(0.9).add_(hidden.mean(), alpha=0.1)
    return model.body(hidden) * scale


def crossing(model: Frame, hidden: torch.Tensor) -> torch.Tensor:
    """Two buffers, each made from the other, by assignment."""
    scale = 1 + 0.1 * model.previous + 0.1 * model.current
    model.previous, model.current = model.current * 0.9, model.previous + 1
    return model.body(hidden) * scale


def tabled(model: Frame, hidden: torch.Tensor) -> torch.Tensor:
    """A tensor that is a plain attribute, read twice."""
    return model.body(hidden * model.table) + model.table


def recurrent(model: Frame, hidden: torch.Tensor) -> torch.Tensor:
    """An LSTM over the batch as one sequence."""
    return model.body(hidden.unsqueeze(1))[0].squeeze(1)


class Smooth(nn.Module):
    """Neither dropout nor BatchNorm: the mean loss over ranks does not depend on how a batch is split over them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        hidden = self.embed(x)
        return F.cross_entropy(self.head(hidden + self.scale * self.norm(torch.tanh(self.body(hidden)))), y)


class Strided(nn.Module):
    """Parameters whose memory is not in the order of their dims."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.out = nn.Parameter(torch.randn(VOCAB, 8).t())

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        image = torch.linspace(0, 1, 108).view(1, 3, 6, 6) * x.view(-1, 1, 1, 1) / VOCAB
        return F.cross_entropy(self.mix(image).mean((2, 3)) @ self.out, y)


class Lion(Optimizer):
    """As people write optimizers: state made at the first step, a step counter that is a Python int.

    Source: Chen et al., 2023, algorithm 2; the bias correction is added so that the counter matters.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if len(state) == 0:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                state["step"] += 1
                correction = 1 - beta2 ** state["step"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                direction = (state["exp_avg"] * beta1).add_(parameter.grad, alpha=1 - beta1)
                parameter.add_(torch.sign(direction), alpha=-group["lr"] * correction)
                state["exp_avg"].mul_(beta2).add_(parameter.grad, alpha=1 - beta2)


class TrustRatio(Optimizer):
    """Not elementwise: the step of a parameter is scaled by norms of the whole of it, as in LAMB and LARS."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg"].lerp_(parameter.grad, 0.1)
                ratio = parameter.norm() / (state["exp_avg"].norm() + 1e-6)
                parameter.add_(state["exp_avg"] * ratio, alpha=-group["lr"])


def by_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as a matrix; a scalar is one row."""
    return tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)


class RowStatistics(Optimizer):
    """State with one number a row of the parameter, as Adafactor keeps it."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                rows = by_rows(parameter.grad)
                if len(state) == 0:
                    state["row"] = torch.zeros(len(rows))
                state["row"].lerp_(rows.square().mean(1), 0.1)
                parameter.sub_((rows / (state["row"].sqrt() + 1e-3).unsqueeze(1)).view_as(parameter) * group["lr"])


class ScaledByNorms(RowStatistics):
    """Its state starts from the norms of a parameter's rows, which no rank has whole."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter]["row"] = by_rows(parameter).norm(dim=1)
        super().step()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but those of a module called `left_out`."""
    return [p for name, p in model.named_parameters() if not name.startswith("left_out")]


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, all else learns faster and does not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "lr": 2e-3, "weight_decay": 0.1}, {"params": others, "lr": 5e-3, "weight_decay": 0.0}]


def loss_with_metrics(
    model: nn.Module, x: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss function that reports what it sees on the way."""
    logits = model(x)
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"accuracy": accuracy, "largest": logits.amax(-1)}


def loss_with_state(
    model: nn.Module, x: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Metrics that show a parameter and a buffer as they were during the step."""
    loss = F.cross_entropy(model(x), labels)
    block = model.block
    return loss, {"scale": block.scale.detach().clone(), "seen": block.norm.num_batches_tracked.clone()}


@dataclass(frozen=True)
class Case:
    """One training job, to be run by the reference and by fxzero.

    Args:
        name: how tests and reports call it.
        model, optimizer: make them anew.
        batch: (step, rank, generator) -> args and kwargs of one call.
        loss: as for `fxzero.compile`.
        scheduler: made on the optimizer and stepped after each step.
        prepare: (model, step), called before each step.
        steps: how many.
        captures: programs that fxzero may compile for it.
        clip: keys of a plan that clip gradients.
    """

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer]
    batch: Callable[[int, int, torch.Generator], Batch]
    loss: Callable[..., Any] | None = None
    scheduler: Callable[[Optimizer], lr_scheduler.LRScheduler] | None = None
    prepare: Callable[[nn.Module, int], None] | None = None
    steps: int = 12
    captures: int = 1
    clip: dict[str, float] = field(default_factory=dict)

    def but(self, **changes: Any) -> "Case":
        """The same job with some parts changed."""
        return replace(self, **changes)


def tokens(generator: torch.Generator, rows: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets."""
    return tuple(torch.randint(0, VOCAB, (rows,), generator=generator) for _ in range(2))  # type: ignore[return-value]


def plain_batch(step: int, rank: int, generator: torch.Generator) -> Batch:
    """Equal shapes at every step."""
    return tokens(generator), {}


def keyword_batch(step: int, rank: int, generator: torch.Generator) -> Batch:
    """Targets as a keyword."""
    x, labels = tokens(generator)
    return (x,), {"labels": labels}


def changing_batch(step: int, rank: int, generator: torch.Generator) -> Batch:
    """Every third batch is shorter."""
    return tokens(generator, BATCH - 3 if step % 3 == 2 else BATCH), {}


def batch_by_rank(step: int, rank: int, generator: torch.Generator) -> Batch:
    """Each rank has its own number of rows."""
    return tokens(generator, BATCH - 2 * rank), {}


def branching_batch(step: int, rank: int, generator: torch.Generator) -> Batch:
    """The branch is not taken at first, then now and then."""
    return tokens(generator), {"side": step % 4 in (1, 2)}


def evaluating_sometimes(model: nn.Module, step: int) -> None:
    """Every fourth step runs in eval mode: no dropout, running statistics."""
    model.train(step % 4 != 3)


def changing_attributes(model: nn.Module, step: int) -> None:
    """Dropout is stronger at every fourth step; the model counts its steps too, which changes nothing."""
    model.block.drop.p = 0.4 if step % 4 == 3 else 0.1
    model.steps = step


def unfreezing(model: nn.Module, step: int) -> None:
    """One weight is frozen for the first steps."""
    model.requires_grad_(True)
    model.block.mix.weight.requires_grad_(step >= 3)


def freezing_norm(model: nn.Module, step: int) -> None:
    """The norm alone is in eval mode."""
    model.block.norm.eval()


class ByHand:
    """What people write instead of a scheduler; weight decay is off at times, and so steers control flow."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.1 if self.steps % 5 == 0 else 0.0
            group["lr"] = 0.0 if self.steps % 7 == 0 else 1e-2


class LoadsItself:
    """Saves and loads the optimizer's state in the middle of a run, with torch's own methods."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps == 4:
            self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))


def stepped_before(model: nn.Module) -> Optimizer:
    """An optimizer that has state already."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _of(kind: type[Optimizer], **options: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: kind(model.parameters(), **options)


# SGD counts once; the variants take other paths through its code
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd_nesterov": _of(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd_dampening": _of(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.3),
    "adam": _of(torch.optim.Adam, lr=1e-2),
    "adamw": _of(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "adamw_amsgrad": _of(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "nadam": _of(torch.optim.NAdam, lr=1e-2),
    "radam": _of(torch.optim.RAdam, lr=1e-2),
    "adamax": _of(torch.optim.Adamax, lr=1e-2),
    "adagrad": _of(torch.optim.Adagrad, lr=1e-2, lr_decay=0.01),
    "adadelta": _of(torch.optim.Adadelta, lr=1.0),
    "rmsprop": _of(torch.optim.RMSprop, lr=1e-3, momentum=0.5, centered=True),
    "asgd": _of(torch.optim.ASGD, lr=1e-2, t0=5.0, weight_decay=0.01),
    "rprop": _of(torch.optim.Rprop, lr=1e-3),
    "muon": _of(torch.optim.Muon, lr=1e-2),
}

# first steps that are unlike later ones, and branches on the step count, are programs of their own
_CAPTURES = {"sgd_nesterov": 2, "sgd_dampening": 2, "radam": 2, "asgd": 3}


def _one_cycle(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=21)


def all_cases() -> dict[str, Case]:
    """Jobs by name: one for each optimizer, then one for each thing that every step may have."""
    cases = [
        Case(
            name,
            Matrices if name == "muon" else Network,
            optimizer,
            plain_batch,
            scheduler=lambda opt: lr_scheduler.ExponentialLR(opt, 0.95),
            captures=_CAPTURES.get(name, 1),
        )
        for name, optimizer in OPTIMIZERS.items()
    ]
    plain = Case("plain", Network, OPTIMIZERS["adamw"], plain_batch)
    cases += [
        plain.but(name="groups", optimizer=lambda model: torch.optim.AdamW(two_groups(model))),
        plain.but(name="one_cycle_sgd", optimizer=_of(torch.optim.SGD, lr=0.01, momentum=0.9), scheduler=_one_cycle),
        plain.but(name="one_cycle_adamw", scheduler=_one_cycle),
        plain.but(name="metrics", model=Logits, loss=loss_with_metrics, batch=keyword_batch),
        plain.but(name="third_party", optimizer=_of(Lion, lr=1e-2)),
        plain.but(name="trust_ratio", optimizer=_of(TrustRatio)),
        plain.but(
            name="frozen",
            model=PartlyFrozen,
            optimizer=lambda model: torch.optim.AdamW(trainable(model), lr=1e-2),
        ),
        plain.but(name="batch_size", batch=changing_batch, captures=2),
        plain.but(name="train_and_eval", prepare=evaluating_sometimes, captures=2),
        plain.but(name="attributes", prepare=changing_attributes, captures=2),
        plain.but(name="loads_state", scheduler=LoadsItself),
        plain.but(name="two_paths", model=TwoPaths, batch=branching_batch, captures=2),
    ]
    return {case.name: case for case in cases}


def clipped_cases() -> dict[str, Case]:
    """Jobs by name whose gradients are clipped, at every step but few."""
    plain = Case("clipped", Network, _of(torch.optim.SGD, lr=0.01, momentum=0.9), plain_batch)
    clips: dict[str, dict[str, float]] = {
        "norm1": {"clip_grad_norm": 2.0, "clip_grad_norm_p": 1.0},
        "norm2": {"clip_grad_norm": 0.5},
        "norm_inf": {"clip_grad_norm": 0.05, "clip_grad_norm_p": math.inf},
        "value": {"clip_grad_value": 0.01},
        "value_norm3": {"clip_grad_value": 0.05, "clip_grad_norm": 0.3, "clip_grad_norm_p": 3.0},
        "loose": {"clip_grad_norm": 1e6},
    }
    return {f"clip_{name}": plain.but(name=f"clip_{name}", clip=keys) for name, keys in clips.items()}


def rarer_cases() -> dict[str, Case]:
    """Jobs by name: what few models do, and what a capture can get wrong without a word."""
    plain = Case("plain", Network, OPTIMIZERS["adamw"], plain_batch)
    middles = (dropped_in_checkpoint, dropped_transposed, noisy, shifting, crossing, tabled)
    cases = [plain.but(name=middle.__name__, model=lambda middle=middle: Frame(middle)) for middle in middles]
    cases += [
        plain.but(name="recurrent", model=lambda: Frame(recurrent, lstm=True)),
        plain.but(name="strided", model=Strided),
        plain.but(name="bfloat16", model=lambda: Network().to(torch.bfloat16)),
        plain.but(name="metrics_of_state", model=Logits, loss=loss_with_state, batch=keyword_batch),
        plain.but(name="unfreezing", prepare=unfreezing, captures=2),
        plain.but(name="freezing_norm", prepare=freezing_norm),
        plain.but(name="by_hand", scheduler=ByHand, captures=2),
        plain.but(name="stepped_before", optimizer=stepped_before),
        plain.but(name="state_by_rows", optimizer=lambda model: RowStatistics(model.parameters())),
        plain.but(
            name="tensor_lr", optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))
        ),
        plain.but(name="maximize", optimizer=_of(torch.optim.AdamW, lr=1e-3, maximize=True)),
    ]
    return {case.name: case for case in cases}
