"""The plan's hints about tensor parallelism: which parameters lie how over the axis tp, as far as a user says it.

[Note: hints]
A hint is a pattern of module paths (or of names of parameters) with a word. The words are torch's, for what
ColwiseParallel and RowwiseParallel do to the parameters of nn.Linear and nn.Embedding; a hint says nothing about
activations, which are solved for. So the styles of torch and of transformers (`base_model_tp_plan`) become words, or
nothing where they are about inputs and outputs alone. sharding/hints.py makes of a word how a parameter lies.

    colwise         a linear layer's output features, and its bias; an embedding's columns
    rowwise         a linear layer's input features; an embedding's rows (its vocabulary)
    packed_colwise  as colwise, where the output features are two blocks, such as gate and up: a part of each
    packed_rowwise  as rowwise, where the input features are two blocks
    replicate       whole on each rank
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from fxzero.errors import PlanError
from fxzero.plan_values import nearest, show

log = logging.getLogger("fxzero")

WORDS = ("colwise", "rowwise", "packed_colwise", "packed_rowwise", "replicate")
# styles of transformers -> words; "" for those that say nothing about parameters
_STYLES = {
    **{word: word for word in WORDS},
    **dict.fromkeys(("colwise_rep", "colwise_gather_output", "local_colwise", "embedding_colwise"), "colwise"),
    **dict.fromkeys(("rowwise_rep", "rowwise_split_input", "local_rowwise", "embedding_rowwise"), "rowwise"),
    "local_packed_rowwise": "packed_rowwise",
    **dict.fromkeys(("sequence_parallel", "replicated_with_grad_allreduce", "mla_kv_a_proj"), "replicate"),
    **dict.fromkeys(("all_reduce", "gather", "local", "local_params", "moe_tp_experts", "moe_identity_expert"), ""),
}
# styles that split experts, not tensors: those of transformers' base_model_ep_plan
_OF_EXPERTS = ("grouped_gemm", "ep_dispatch_experts", "ep_router")
# classes of torch.distributed.tensor.parallel -> words
_CLASSES = {
    "ColwiseParallel": "colwise",
    "RowwiseParallel": "rowwise",
    "SequenceParallel": "replicate",
    "PrepareModuleInput": "",
    "PrepareModuleOutput": "",
    "PrepareModuleInputOutput": "",
}
MOST_CHUNKS = 64  # pieces of a product: more than the ranks of a node are of no use
_TORCH = "torch.distributed.tensor.parallel"


class Hints(Mapping[str, str]):
    """Patterns of module paths -> one of WORDS, sorted: immutable and hashable; see [Note: hints].

    Args:
        words: pattern -> word.
    """

    __slots__ = ("_words",)

    def __init__(self, words: Mapping[str, str]) -> None:
        self._words = dict(sorted(words.items()))

    def __getitem__(self, pattern: str) -> str:
        return self._words[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._words)

    def __len__(self) -> int:
        return len(self._words)

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        return f"Hints({self._words!r})"


def tp_hints(where: str, value: Any) -> str | Hints:
    """Hints of what a plan was given; "auto" where they say nothing.

    Raises:
        PlanError: naming `where` and the pattern.
    """
    if isinstance(value, Hints) or (isinstance(value, str) and value == "auto"):
        return value
    if not isinstance(value, Mapping) or not all(isinstance(pattern, str) for pattern in value):
        is_size = isinstance(value, int) and not isinstance(value, bool)
        fix = f"axes go into the mesh: mesh={{'tp': {value}}}" if is_size else "write {'layers.*.up_proj': 'colwise'}"
        raise PlanError.of(where, expected="'auto', or patterns of module paths with words", got=show(value), fix=fix)
    words: dict[str, str] = {}
    for pattern, given in value.items():
        at = f"{where}[{pattern!r}]"
        if not pattern.isprintable():
            fix = "write a pattern as for file names, such as 'layers.*.up_proj'"
            raise PlanError.of(where, expected="a pattern of module paths", got=show(pattern), fix=fix)
        word = _word(at, given)
        if word:
            words[pattern] = word
        else:
            log.info("%s: %s says nothing about parameters, and is left out", at, _shown(given))
    return Hints(words) if words else "auto"


def check_chunks(plan: Any) -> None:
    """Check that a plan which cuts products into pieces has an axis over which values lie in parts, if of one rank.

    Raises:
        PlanError: if its mesh has neither tp nor sp.
    """
    if plan.tp_chunks == 1 or not {"tp", "sp"}.isdisjoint(plan.mesh or {}):
        return
    got = f"{plan.tp_chunks!r} with mesh {dict(plan.mesh or {})}"
    fix = "give the mesh a tp, such as {'tp': 8}, or leave tp_chunks out"
    raise PlanError.of("Plan.tp_chunks", expected="1, or a mesh with tp or sp", got=got, fix=fix)


def _word(where: str, given: Any) -> str:
    """The word that a value means; "" where it says nothing about parameters."""
    if not isinstance(given, str):
        word = _word_of_class(given)
        if word is None:
            in_toml = isinstance(given, Mapping)
            fix = "put the pattern into quotes: \"layers.*.up\" = 'colwise'" if in_toml else f"write one of {WORDS}"
            raise PlanError.of(where, expected="a word or a style of torch", got=show(given), fix=fix)
        return word
    if given in _OF_EXPERTS:
        fix = "it splits experts, not tensors: take base_model_tp_plan, not base_model_ep_plan, or leave it out"
        raise PlanError.of(where, expected=f"one of {WORDS}", got=show(given), fix=fix)
    if given not in _STYLES:
        raise PlanError.of(where, expected=f"one of {WORDS}", got=show(given), fix=nearest(given, WORDS))
    return _STYLES[given]


def _word_of_class(given: Any) -> str | None:
    """The word of a style of torch, which is known by name: so torch's own module is not imported for it."""
    cls = given if isinstance(given, type) else type(given)
    names = [base.__name__ for base in cls.__mro__ if base.__module__.startswith(_TORCH)]
    return next((_CLASSES[name] for name in names if name in _CLASSES), None)


def _shown(given: Any) -> str:
    return repr(given) if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)
