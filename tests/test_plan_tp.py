"""The plan's hints for tensor parallelism: words, styles of torch and transformers, files, and what is refused."""

import copy
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from fxzero.errors import PlanError
from fxzero.plan import Plan
from fxzero.plan_tp import WORDS, Hints

SOME = {"up": "colwise", "layers.*.down": "rowwise", "norm": "replicate"}


def message(tp: Any) -> str:
    with pytest.raises(PlanError) as caught:
        Plan(tp=tp)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_hints_are_sorted_immutable_and_hashable() -> None:
    given = dict(SOME)
    plan = Plan(tp=given)
    given["up"] = "rowwise"
    assert isinstance(plan.tp, Hints) and isinstance(plan.tp, Mapping)
    assert list(plan.tp.items()) == sorted(SOME.items())
    assert plan == Plan(tp=dict(reversed(SOME.items()))) and hash(plan) == hash(Plan(tp=dict(reversed(SOME.items()))))
    assert plan.fingerprint() == Plan(tp=dict(reversed(SOME.items()))).fingerprint() != Plan().fingerprint()
    assert plan.replace(zero=1).tp == plan.tp and copy.deepcopy(plan) == pickle.loads(pickle.dumps(plan)) == plan
    with pytest.raises(TypeError):
        plan.tp["up"] = "rowwise"  # type: ignore[index]


def test_hints_read_back_from_toml_and_json() -> None:
    plan = Plan(tp=SOME | {'a "b" \\ [!x]\u00fc': "packed_colwise", "": "replicate"}, mesh={"dp": 2})
    assert Plan.from_toml(plan.to_toml()) == Plan.from_json(plan.to_json()) == Plan.from_dict(plan.to_dict()) == plan
    assert plan.to_toml().endswith('"layers.*.down" = "rowwise"\nnorm = "replicate"\nup = "colwise"\n')
    assert "[tp]\n" in plan.to_toml() and json.loads(plan.to_json())["tp"]["up"] == "colwise"
    assert Plan.from_toml('[tp]\n"layers.*.up" = "colwise_rep"').tp == {"layers.*.up": "colwise"}
    assert 'tp = "auto"\n' in Plan().to_toml()


def test_styles_of_torch_are_words_or_left_out(caplog: pytest.LogCaptureFixture) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as styles

    class Own(styles.RowwiseParallel):
        pass

    given = {
        "a": styles.ColwiseParallel(output_layouts=Replicate()),
        "b": styles.RowwiseParallel,
        "c": Own(),
        "d": styles.SequenceParallel(),
        "e": styles.PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate()),
        "f": styles.PrepareModuleOutput(output_layouts=Shard(0), desired_output_layouts=Replicate()),
        "g": styles.PrepareModuleInputOutput,
    }
    with caplog.at_level(logging.INFO, logger="fxzero"):
        plan = Plan(tp=given)
    assert plan.tp == {"a": "colwise", "b": "rowwise", "c": "rowwise", "d": "replicate"}
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "Plan.tp['e']: PrepareModuleInput says nothing about parameters, and is left out"
    assert [line.split()[1] for line in lines] == [
        "PrepareModuleInput",
        "PrepareModuleOutput",
        "PrepareModuleInputOutput",
    ]


def test_torchs_styles_are_not_imported_to_be_known() -> None:
    code = "import sys; from fxzero.plan import Plan; Plan(tp={'a': 'colwise'})"
    code += "; assert 'torch.distributed.tensor.parallel' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_style_of_transformers_is_known() -> None:
    styles = pytest.importorskip("transformers.distributed.tensor_parallel").ALL_PARALLEL_STYLES
    pytest.importorskip("transformers.distributed.expert_parallel")
    assert len(list(styles)) > 10
    for style in styles:
        if style in ("grouped_gemm", "ep_dispatch_experts"):
            assert message({"a": style}).startswith("Plan.tp['a']: expected one of ")
        else:
            assert Plan(tp={"a": style}).tp == "auto" or Plan(tp={"a": style}).tp["a"] in WORDS


def test_plans_of_transformers_are_taken_as_they_are() -> None:
    transformers = pytest.importorskip("transformers")
    for config, some in (
        (transformers.LlamaConfig, {"layers.*.mlp.down_proj": "rowwise"}),
        (transformers.MixtralConfig, {"layers.*.mlp.experts.gate_up_proj": "packed_colwise"}),
        (transformers.Gemma3TextConfig, {"layers.*.self_attn.q_norm": "replicate"}),
        (transformers.DeepseekV3Config, {"layers.*.mlp.experts.down_proj": "rowwise"}),
    ):
        given = config().base_model_tp_plan
        hints = Plan(tp=given).tp
        assert some.items() <= hints.items() and "layers.*.mlp.experts" not in hints and len(hints) >= len(given) - 3


def test_hints_that_say_nothing_are_none() -> None:
    assert Plan(tp={}).tp == Plan(tp={"a": "moe_tp_experts"}).tp == "auto"


@pytest.mark.parametrize(
    ("tp", "parts"),
    [
        (2, ["Plan.tp: expected 'auto', or patterns", "got 2; axes go into the mesh: mesh={'tp': 2}"]),
        (True, ["Plan.tp: expected 'auto', or patterns", "got True; write {"]),
        (None, ["Plan.tp:", "got None;"]),
        ("megatron", ["Plan.tp:", "got 'megatron';"]),
        (["up"], ["Plan.tp:", "got ['up'];"]),
        ({1: "colwise"}, ["Plan.tp:", "got {1: 'colwise'};"]),
        ({"a\nb": "colwise"}, ["Plan.tp: expected a pattern of module paths, got 'a\\nb';"]),
        ({"up": "colwize"}, ["Plan.tp['up']: expected one of", "got 'colwize'; did you mean 'colwise'?"]),
        ({"up": "isolated"}, ["Plan.tp['up']: expected one of", "got 'isolated'; choose from: colwise"]),
        ({"up": "grouped_gemm"}, ["Plan.tp['up']:", "got 'grouped_gemm'; it splits experts", "base_model_tp_plan"]),
        ({"up": "ep_router"}, ["Plan.tp['up']:", "got 'ep_router'; it splits experts"]),
        ({"up": 1}, ["Plan.tp['up']: expected a word or a style of torch, got 1; write one of"]),
        ({"up": int}, ["Plan.tp['up']:", "got <class 'int'>"]),
        ({"layers": {"up": "colwise"}}, ["Plan.tp['layers']:", "put the pattern into quotes"]),
    ],
    ids=repr,
)
def test_a_bad_hint_is_refused(tp: Any, parts: list[str]) -> None:
    text = message(tp)
    assert all(part in text for part in parts), text


def test_a_bad_hint_in_a_file_is_named_with_the_file() -> None:
    with pytest.raises(PlanError, match=r"TOML text: Plan\.tp\['layers'\]: .* put the pattern into quotes"):
        Plan.from_toml('[tp]\nlayers.up = "colwise"')


def test_strict_is_yes_or_no() -> None:
    assert Plan(tp_strict=True).tp_strict
    with pytest.raises(PlanError, match=r"Plan\.tp_strict: expected True or False, got 1"):
        Plan(tp_strict=1)  # type: ignore[arg-type]


def test_pieces_are_a_number_or_auto_where_an_axis_is_split() -> None:
    for chunks in (1, 2, 64, "auto"):
        assert Plan(tp_chunks=chunks, mesh={"tp": 2}).tp_chunks == chunks
        assert Plan(tp_chunks=chunks, mesh={"dp": 2, "sp": 1}).resolve(2).tp_chunks == chunks
    assert Plan(tp_chunks=1).resolve(4).tp_chunks == 1
    for bad, got in ((0, "0"), (65, "65"), (True, "True"), (2.0, "2.0"), ("2", "'2'"), (None, "None")):
        with pytest.raises(
            PlanError, match=rf"Plan\.tp_chunks: expected an integer from 1 to 64, or 'auto', got {got}; "
        ):
            Plan(tp_chunks=bad, mesh={"tp": 2})  # type: ignore[arg-type]
    for mesh, got in ((None, r"\{\}"), ({"dp": 4}, r"\{'dp': 4\}")):
        with pytest.raises(PlanError, match=rf"expected 1, or a mesh with tp or sp, got 'auto' with mesh {got}; give"):
            Plan(tp_chunks="auto", mesh=mesh)
