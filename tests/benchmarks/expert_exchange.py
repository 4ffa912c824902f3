"""What tokens and results of experts cost over ep: gathered and added up, or by all-to-all where that is cheaper.

    python -m tests.benchmarks.expert_exchange                  # the table of docs/tensor_parallel.md
    python -m tests.benchmarks.expert_exchange --cases 64,8,8,1.25

A case is experts, experts for each token, ranks, `expert_room`: of two blocks of Mixtral 8x7B's attention with experts
that have 14336 columns together for each two of a token, one row of 4096 tokens in bfloat16. Nothing is allocated:
models are on the meta device, costs those of H100s in nodes of eight. Bytes are those that one rank sends in a step, as
the program has them, and of these what belongs to experts; times are those of the model of costs, of a whole step.
"""

import argparse

import torch
import transformers
from tabulate import tabulate
from tqdm import tqdm

from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.hardware import known_hardware
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import REPLICATED
from fxzero.graph.row_exchange_ops import add_rows, pick_rows
from fxzero.passes.split_tensors import rewrite
from fxzero.sharding.expert_parameters import experts_over
from fxzero.sharding.hints import pin
from fxzero.sharding.problem import problem_of
from fxzero.sharding.routing import Routing
from fxzero.sharding.rules import Rules
from fxzero.sharding.solve import solve

TOKENS, COLUMNS = 4096, 14336
CASES = (
    (8, 1, 8, 1.5),
    (8, 2, 8, 1.25),
    (8, 2, 8, 2.0),
    (8, 2, 8, 4.0),
    (8, 2, 4, 1.5),
    (64, 8, 8, 1.25),
)


class Gathered(Routing):
    """Rows of experts that go by no all-to-all."""

    def pair_room(self, rows):
        """None."""
        return 0


def captured(experts, per_token):
    """A step in bfloat16 with AdamW."""
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 2 * COLUMNS // max(2, per_token), "vocab_size": 32000, "use_cache": False}
    sizes |= {"num_local_experts": experts, "num_experts_per_tok": per_token}
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).to(torch.bfloat16)
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    inventory = rehearse(Inventory.of(model, torch.optim.AdamW(model.parameters())))[0]
    return capture_step(inventory, None, (), {"input_ids": ids, "labels": ids}).step


def split(step, ranks, room, routing):
    """The program of a rank, with the answer that it is made of."""
    step = step.copy()
    step.mesh = {"dp": 1, "ep": ranks}
    whole = {node.meta["entry"].name: REPLICATED for node in step.inputs("parameter")}
    pin(step, whole | experts_over(step, "ep"), axis="ep")
    rules = Rules(ranks)
    rules.routing = routing.of(step, rules.of, ranks=ranks, factor=room)
    answer = solve(problem_of(step, "ep", rules, known_hardware("h100")))
    ways = {node: answer.strategy(node) for node in answer.problem.of_node}
    rewrite(step, axis="ep", ways=ways, routing=rules.routing)
    return step, answer


def sent_mb(step):
    """Megabytes that a rank sends: in all, and for layers of experts."""
    launches = [node for node in step.calls() if c10d.is_collective(node)]
    sizes = {node: c10d.wire_bytes(node, step.mesh) / 1e6 for node in launches}
    return sum(sizes.values()), sum(size for node, size in sizes.items() if ".mlp" in node.meta["module"])


def measured(experts, per_token, ranks, room):
    """The figures of a case."""
    step = captured(experts, per_token)
    gathered, by_gather = split(step, ranks, room, Gathered)
    free, answer = split(step, ranks, room, Routing)
    (all_gathered, of_gathered), (all_free, of_free) = sent_mb(gathered), sent_mb(free)
    numbers = (all_gathered, all_free, of_gathered, of_free, by_gather.seconds * 1e3, answer.seconds * 1e3)
    moves = sum(node.args[0].target in (pick_rows, add_rows) for node in free.calls(c10d.all_to_all))
    return [experts, per_token, ranks, room, room * per_token / ranks, moves, *numbers, f"{answer.gap:.2%}"]


def main():
    """The table has been printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", help="experts,experts for each token,ranks,room")
    args = parser.parse_args()
    cases = [tuple(case.split(",")) for case in args.cases] if args.cases else CASES
    rows = [measured(*map(int, case[:3]), float(case[3])) for case in tqdm(cases)]
    headers = ["experts", "of a token", "ranks", "room", "f k / n", "all-to-alls", "MB gather", "MB chosen"]
    headers += ["experts' MB gather", "experts' MB chosen", "ms gather", "ms chosen", "gap"]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
