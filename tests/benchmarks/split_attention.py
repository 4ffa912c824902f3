"""Which form of attention is taken over sp, and what each would cost: heads, keys gathered, or keys in a ring.

    python -m tests.benchmarks.split_attention                  # the table of docs/tensor_parallel.md
    python -m tests.benchmarks.split_attention --cases 32768,32,8,8 --not-causal

A case is tokens, heads, heads of keys and values, ranks: of two blocks of a Llama with heads of 128, one row in
bfloat16. Nothing is allocated: models are on the meta device, costs those of H100s in nodes of eight. Times are those
of the model of costs, of a whole step; the gap is that of the answer with all forms open.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.hardware import known_hardware
from fxzero.graph.axis_placement import REPLICATED
from fxzero.sharding.attention import FORMS, is_attention
from fxzero.sharding.hints import pin
from fxzero.sharding.problem import problem_of
from fxzero.sharding.rules import Rules
from fxzero.sharding.solve import solve

HEAD, VOCABULARY, BLOCKS = 128, 32000, 2
CASES = (
    (2048, 32, 32, 8),
    (8192, 32, 8, 8),
    (32768, 32, 8, 8),
    (32768, 20, 4, 8),
    (4096, 20, 20, 8),
    (131072, 20, 4, 8),
    (131072, 20, 20, 8),
    (131072, 32, 8, 32),
    (131072, 20, 20, 32),
)


class Block(nn.Module):
    """Attention of grouped queries and a gated perceptron, with norms before."""

    def __init__(self, heads, kv_heads, *, causal):
        super().__init__()
        width = heads * HEAD
        self.causal = causal
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, kv_heads * HEAD, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x):
        y = self.norms[0](x)
        q, k, v = (layer(y).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """Blocks between an embedding and a head; yields its loss."""

    def __init__(self, heads, kv_heads, *, causal):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, heads * HEAD)
        self.layers = nn.ModuleList(Block(heads, kv_heads, causal=causal) for _ in range(BLOCKS))
        self.head = nn.Linear(heads * HEAD, VOCABULARY, bias=False)

    def forward(self, x, y):
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = layer(hidden)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), y.flatten())


def captured(tokens, heads, kv_heads, *, causal):
    """A step in bfloat16 with AdamW."""
    with torch.device("meta"):
        model = Model(heads, kv_heads, causal=causal).to(torch.bfloat16)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    inventory = rehearse(Inventory.of(model, torch.optim.AdamW(model.parameters())))[0]
    return capture_step(inventory, None, (ids, ids), {}).step


def answer_for(step, ranks, attention):
    """The cheapest answer where attention is made in a form, or in any; None where no rank can make it so."""
    step.mesh = {"dp": 1, "sp": ranks}
    rules = Rules(ranks, attention=attention)
    calls = [node for node in step.calls() if is_attention(node.target)]
    if attention != "auto" and any(rules.of(node)[0].share == 1.0 for node in calls):
        return None
    return solve(problem_of(step, "sp", rules, known_hardware("h100")))


def form_of(answer, ranks):
    """The form in which an answer makes attention, as the plan names it; "whole" where every rank does all."""
    found = set()
    for node in answer.problem.of_node:
        if node.op != "call_function" or not is_attention(node.target):
            continue
        forms = {form: Rules(ranks, attention=form).of(node) for form in FORMS}
        way = answer.strategy(node)
        found.add(next((form for form, ways in forms.items() if way in ways and way.share < 1), "whole"))
    return " and ".join(sorted(found))


def measured(tokens, heads, kv_heads, ranks, *, causal):
    """Predicted seconds of a case by form, with what is chosen."""
    step = captured(tokens, heads, kv_heads, causal=causal)
    pin(step, {node.meta["entry"].name: REPLICATED for node in step.inputs("parameter")}, axis="sp")
    row = {"case": (tokens, heads, kv_heads, ranks)}
    for form in FORMS:
        answer = answer_for(step, ranks, form)
        row[form] = None if answer is None else answer.seconds
    began = time.perf_counter()
    answer = answer_for(step, ranks, "auto")
    row |= {"solve_s": time.perf_counter() - began, "auto": answer.seconds, "chosen": form_of(answer, ranks)}
    return row | {"gap": (answer.seconds - answer.bound_s) / answer.seconds}


def table(rows):
    """The figures as people read them."""
    shown = []
    for row in rows:
        tokens, heads, kv_heads, ranks = row["case"]
        times = ["-" if row[form] is None else f"{row[form] * 1e3:.2f}" for form in FORMS]
        shown.append([f"{tokens:,}", heads, kv_heads, ranks, *times, row["chosen"], f"{row['auto'] * 1e3:.2f}"])
        shown[-1] += [f"{row['gap']:.2%}", f"{row['solve_s']:.1f}"]
    headers = ["tokens", "heads", "kv heads", "ranks", *(f"{form} ms" for form in FORMS), "chosen", "ms", "gap"]
    return tabulate(shown, headers=[*headers, "solve s"], tablefmt="github", disable_numparse=True)


def main():
    """The table has been printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", help="tokens,heads,kv heads,ranks")
    parser.add_argument("--not-causal", action="store_true", help="every query sees all keys")
    args = parser.parse_args()
    cases = [tuple(map(int, case.split(","))) for case in args.cases] if args.cases else CASES
    print(table([measured(*case, causal=not args.not_causal) for case in tqdm(cases)]))


if __name__ == "__main__":
    main()
