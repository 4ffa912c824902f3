"""Norms, gates and rotary embeddings of models of `transformers` by kernels: all that there are, the same numbers."""

from __future__ import annotations

import pytest

from fxzero import StepGraph
from fxzero.graph.parse import from_text
from fxzero.graph.text import to_text
from fxzero.graph.verify import verify
from fxzero.passes.fuse_gates import fuse_gates
from fxzero.passes.fuse_norms import fuse_norms
from fxzero.passes.fuse_rotary import fuse_rotary
from tests.passes.kernel_steps import fused_difference, hf_step

RTOL = 1e-5
# model -> RMS norms, layer norms, gates and rotary embeddings; each has as many gradients
FOUND = {
    "llama_partly_frozen": (5, 0, 2, 4),
    "qwen3": (9, 0, 2, 4),
    "gemma2": (9, 0, 2, 4),
    "t5": (12, 0, 0, 0),
    "mixtral": (5, 0, 2, 4),
    "mamba2": (5, 0, 2, 0),
    "bert": (0, 6, 0, 0),
    "gpt2_checkpointed": (0, 9, 0, 0),
}
EDITED = ("rms_norm", "layer_norm", "gated_activation", "rotary")
NAMES = ("norms", "norms", "gates", "embeddings")


@pytest.mark.parametrize(("name", "counts"), FOUND.items())
def test_what_is_found_and_computed(name: str, counts: tuple[int, ...]) -> None:
    step = hf_step(name)
    error, fused = fused_difference(step, fuse_all)
    told = "; ".join(fused.remarks[p.name] for p in (fuse_norms, fuse_gates, fuse_rotary))
    for kernel, what, count in zip(EDITED, NAMES, counts, strict=True):
        assert (f"{kernel}: {count} of {count} {what}" if count else f"{kernel}: none found") in told
    assert "rotary backward" not in told or f"rotary backward: {counts[3]} of {counts[3]} gradients" in told
    assert error < RTOL
    verify(fused)
    modules = {name: node.meta["module"] for name, node in step.gradients().items()}
    assert {name: node.meta["module"] for name, node in fused.gradients().items()} == modules
    assert to_text(from_text(to_text(fused))) == to_text(fused)


def fuse_all(step: StepGraph) -> None:
    for fuse in (fuse_norms, fuse_gates, fuse_rotary):
        fuse.run(step)
