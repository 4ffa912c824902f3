"""fxzero fit: every answer is compared with what direct captures of whole models predict."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from fxzero import Plan
from fxzero.capture import Inventory, capture_step
from fxzero.capture.options import CaptureOptions
from fxzero.capture.rehearsal import rehearse
from fxzero.cli import fit, main
from fxzero.cli.progress import Progress
from fxzero.cli.target import keywords_of, load_target
from fxzero.cli.what_if import CapturedTarget, Sizes, WhatIf, largest
from fxzero.cost.memory import memory_profile
from fxzero.cost.memory_course import Course, memory_course
from fxzero.decide import decide
from fxzero.decide.uniform import UniformAnswers
from fxzero.graph import StepGraph
from fxzero.graph.text import size_text
from fxzero.recipe import Decided, captured_as, recipe
from fxzero.simulate import memory_picture
from fxzero.simulate.memory_picture import Areas

TARGETS = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, layers, width):
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 64)

    def forward(self, x):
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), x.flatten())


def step(layers=12, width=32, batch=4, seq=16):
    with torch.device("meta"):
        model, x = Model(layers, width), torch.zeros(batch, seq, dtype=torch.int64)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), (x,)


def shallow():
    return step(layers=2)


def single():
    model, optimizer, _ = step(layers=2)
    return model, optimizer, (), lambda model: model(torch.zeros(2, 8, dtype=torch.int64))


def unsized(layers):
    return step(layers)
"""


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("fit") / "targets.py"
    path.write_text(TARGETS)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def _captured_once() -> Iterator[None]:
    """Questions about one function and one kind of capture go on from what was captured for earlier ones."""
    known: dict[tuple[Any, ...], CapturedTarget] = {}
    capture = WhatIf._target

    def target(question: WhatIf, depth: int | None) -> CapturedTarget:
        own = (question.text, str(question.keywords), question.depth_key, depth)
        key = (*own, captured_as(question.plan), question.plan.accumulate)
        if key not in known:
            known[key] = capture(question, depth)
        return known[key]

    with mock.patch.object(WhatIf, "_target", target):
        yield
    _captured.cache_clear()


@pytest.fixture
def asked_once() -> Iterator[None]:
    """A question that is asked again, for the other form of its answer, rewrites no step again."""
    course = WhatIf._course
    known: dict[tuple[Any, ...], Course] = {}

    def again(question: WhatIf, depth: int | None, sizes: Sizes, plan: Plan, answer: int = 0) -> Course:
        own = (question.text, str(question.keywords), question.depth_key, question.plan, question.backend)
        key = (*own, depth, tuple(sorted(sizes.items())), plan, answer)
        if key not in known:
            known[key] = course(question, depth, sizes, plan, answer)
        return known[key]

    with mock.patch.object(WhatIf, "_course", again):
        yield


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["fit", *argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def answer(call: Call) -> Callable[..., Any]:
    def run(*argv: str) -> Any:
        code, out, err = call(*argv, "--quiet", "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return run


def captured(text: str, plan: Plan, **keywords: Any) -> StepGraph:
    """A capture of the whole model."""
    step = _captured(text, captured_as(plan), tuple(sorted(keywords.items())))
    step.mesh = dict(plan.axes)
    return step


@functools.cache
def _captured(text: str, options: CaptureOptions, keywords: tuple[tuple[str, Any], ...]) -> StepGraph:
    target = load_target(text, **dict(keywords))
    inventory, fresh = rehearse(Inventory.of(target.model, target.optimizer))
    return capture_step(inventory, target.loss, target.args, target.kwargs, fresh=fresh, options=options).step


def direct_peak(text: str, plan: Plan, **keywords: Any) -> int:
    """The peak by a capture of the whole model, verified after each pass where it is the target as it is."""
    step = captured(text, plan, **keywords)
    return memory_profile(recipe(plan, backend="nccl").run(step, check=not keywords)).peak_bytes


def test_every_answer_is_that_of_a_direct_capture(answer, targets) -> None:
    keys: dict[str, Any] = {"recompute": "blocks", "bucket_bytes": 0}
    text = f"{targets}:step"
    plan = Plan(zero=3, **keys).resolve(4)
    limit = direct_peak(text, plan, layers=6) + 100_000
    options = [f"--{key.replace('_', '-')}={value}" for key, value in keys.items()]
    found = answer(text, "--world", "4", "--set", "layers=6", "--device-memory", str(limit), *options)
    assert found["fits"] and found["notes"] == []
    assert found["peak_bytes"] == limit - 100_000
    assert found["setting"] == {"layers": 6, "batch": 4, "sequence": 16}
    assert sum(found["peak_bytes_by_kind"].values()) == found["peak_bytes"]
    for keyword in ("batch", "layers"):
        best = found["largest"][keyword]
        assert best["peak_bytes"] == direct_peak(text, plan, **{"layers": 6, keyword: best["value"]}) <= limit
        assert best["next_peak_bytes"] == direct_peak(text, plan, **{"layers": 6, keyword: best["value"] + 1}) > limit


@pytest.mark.usefixtures("asked_once")
def test_a_step_that_does_not_fit_is_an_answer_with_advice(call, answer, targets) -> None:
    text = f"{targets}:shallow"
    needed = direct_peak(text, Plan(zero=3, recompute="blocks", bucket_bytes=0).resolve(4))
    keys = (text, "--world", "4", "--zero", "0", "--bucket-bytes", "0", "--device-memory", str(needed))
    code, out, err = call(*keys, "--quiet")
    assert (code, err) == (0, "")
    assert out.startswith("does not fit: predicted peak ")
    assert "\nit fits with zero=3, recompute=blocks: " in out and "\nthe smallest peak of what was tried is " in out
    found = answer(*keys)
    tried = {json.dumps(item["changes"]): item["peak_bytes"] for item in found["tried"]}
    assert tried[json.dumps({"zero": 3, "recompute": "blocks"})] == needed
    assert found["tried"][0]["peak_bytes"] == min(tried.values())
    assert found["tried"][0]["changes"].get("batch") == 1


@pytest.mark.usefixtures("asked_once")
def test_what_is_off_the_device_is_told(call, answer, targets) -> None:
    keys = (f"{targets}:step", "--world", "4", "--bucket-bytes", "0", "--device-memory", "1MB", "--offload-below", "0")
    keys += ("--offload-optimizer", "host")
    found = answer(*keys)
    assert found["host_bytes"] == found["swapped_bytes"]["host in"] == found["swapped_bytes"]["host out"] > 0
    assert found["peak_bytes_by_kind"]["optimizer state"] < found["host_bytes"] and found["notes"] == []
    out = call(*keys, "--quiet")[1]
    assert "\nand up to 102.46 kB in tier host\n" in out and "\na step swaps 102.46 kB out to tier host\n" in out


def test_offload_is_tried_where_a_step_does_not_fit(answer, targets) -> None:
    keys = (f"{targets}:step", "--world", "4", "--bucket-bytes", "0", "--set", "width=64", "--device-memory", "10kB")
    tried = {json.dumps(item["changes"]): item["peak_bytes"] for item in answer(*keys)["tried"]}
    on_host = {"offload_optimizer": "host"}
    everything = {**on_host, "offload_parameters": "host", "offload_activations": "host"}
    for before, after in (({}, on_host), (on_host, everything)):
        for keys in ({"recompute": "blocks"}, {"recompute": "blocks", "batch": 1}):
            plan, size = ({k: v for k, v in keys.items() if (k == "batch") is batch} for batch in (False, True))
            assert tried[json.dumps({**plan, **after, **size})] < tried[json.dumps({**plan, **before, **size})]


def test_without_a_keyword_for_depth_the_whole_is_captured(answer, targets) -> None:
    plan = Plan(zero=3).resolve(4)
    limit = direct_peak(f"{targets}:shallow", plan)
    found = answer(f"{targets}:shallow", "--world", "4", "--device-memory", str(limit))
    assert found["fits"] and found["peak_bytes"] == limit
    assert found["largest"].keys() == {"batch"} and found["largest"]["batch"]["value"] == 4
    assert "no keyword for depth" in found["notes"][0]


def test_microbatches_and_a_batch_without_tensors(answer, targets, capsys) -> None:
    found = answer(f"{targets}:shallow", "--world", "2", "--accumulate", "3", "--device-memory", "1MB")
    assert found["fits"] and found["largest"]["batch"]["value"] > 4
    keys = (f"{targets}:shallow", "--world", "2", "--accumulate", "5", "--backend", "gloo")
    assert main(["memory", *keys, "--quiet", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["peak_bytes"]
    assert answer(*keys, "--device-memory", "1MB")["peak_bytes"] == expected, "the batch of all five rests"
    found = answer(f"{targets}:single", "--world", "2", "--device-memory", "1MB")
    assert found["largest"] == {} and "nothing to vary" in found["notes"][0]


def test_nothing_fits_into_nothing(call, targets) -> None:
    code, out, _ = call(f"{targets}:shallow", "--world", "2", "--device-memory", "1kB", "--quiet")
    assert code == 0 and out.startswith("does not fit") and "none" in out and "it fits with" not in out


def test_memory_that_is_not_linear_in_depth_is_captured_whole(answer, targets) -> None:
    """Buckets that span blocks: the lines do not hold, and the answers are still right."""
    text, plan = f"{targets}:step", Plan(zero=3, bucket_bytes="40 kB").resolve(4)
    peak = direct_peak(text, plan, layers=8)
    keys = ("--set", "layers=8", "--bucket-bytes", "40 kB", "--device-memory", str(peak))
    found = answer(text, "--world", "4", *keys)
    assert found["peak_bytes"] == peak
    assert found["largest"]["layers"]["value"] == 8 and found["largest"]["batch"]["value"] == 4
    assert "layers is not extrapolated" in found["notes"][0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ("step", "--set", "layer=3"),
            "--set: expected a keyword of the function, got 'layer'; did you mean 'layers'?",
        ),
        (("step", "--set", "layers"), "--set: expected each KEY=VALUE once, got 'layers'"),
        (("step", "--depth", "deep"), "--depth: expected a keyword of the function, got 'deep'"),
        (("step", "--set", "layers=0"), "--depth: expected a number of blocks as the function's layers, got 0"),
        (("unsized",), "--depth: expected a number of blocks as the function's layers, got no default"),
        (("step", "--set", "width='x'"), "expected a function that returns"),
        (("shallow", "--set", "layers=3"), "--set: expected a keyword of the function, got 'layers'; leave it out"),
        (("nothing",), "got none of that name"),
        (
            ("step", "--offload-optimizer", "auto", "--memory-budget", "1GB"),
            "--offload-optimizer: expected 'none', 'host' or 'nvme' for fit, got 'auto'",
        ),
    ],
)
def test_what_is_refused(call, targets, argv, said) -> None:
    name, *rest = argv
    code, out, err = call(f"{targets}:{name}", "--world", "4", "--device-memory", "1GB", "--quiet", *rest)
    assert (code, out) == (2, "") and said in err


def test_device_memory_is_checked(call, targets) -> None:
    assert call(f"{targets}:step", "--world", "4")[0] == 2
    code, _, err = call(f"{targets}:step", "--world", "4", "--device-memory", "80GiBi", "--quiet")
    assert code == 2 and "--device-memory: expected a number of bytes, got '80GiBi'" in err


@pytest.mark.parametrize("start", [1, 7, 300])
@pytest.mark.parametrize(("slope", "base", "limit"), [(10, 5, 100), (10, 5, 4), (3, 0, 3), (7, 1, 10**5), (0, 1, 2)])
def test_largest_is_the_last_that_fits(start, slope, base, limit) -> None:
    asked: list[int] = []

    def peak(number: int) -> int:
        asked.append(number)
        return max(base + slope * number, base + 2 * slope * (number - 40))  # steeper from 80 on

    expected = max((n for n in range(1, 20001) if peak(n) <= limit), default=0) if slope else 2**20
    asked.clear()
    assert largest(peak, limit, start=start, most=2**20) == expected
    assert len(asked) <= 30


SAME_COURSE: list[dict[str, Any]] = [
    {"zero": 3, "bucket_bytes": 0},
    {"zero": 3, "bucket_bytes": 0, "recompute": "blocks", "precision": "bf16", "prefetch": 2},
    {"zero": 1, "bucket_bytes": 0, "clip_grad_norm": 1.0, "accumulate": 3},
    {"zero": 3, "bucket_bytes": 0, "offload_optimizer": "nvme", "offload_parameters": "host", "offload_below": 0},
]


@pytest.mark.parametrize("keys", SAME_COURSE, ids=str)
def test_the_drawn_course_is_that_of_a_direct_capture(keys, targets) -> None:
    plan = Plan(**keys).resolve(4)
    text = f"{targets}:step"
    drawn = WhatIf(text, {}, plan, "nccl", Progress(None), "layers", 6)
    found, answer = drawn.course(), drawn.predict()
    direct = WhatIf(text, {"layers": 6}, plan, "nccl", Progress(None), None, None).course()
    assert drawn.notes == [] and found.places == direct.places
    for kind, line in direct.by_kind.items():
        assert (found.by_kind[kind] == line).all(), kind
    assert (found.state_bytes, found.elsewhere, found.swapped) == (direct.state_bytes, direct.elsewhere, direct.swapped)
    assert (answer.peak_bytes, answer.kinds) == (direct.totals.max(), direct.peak_kinds)
    assert bool(found.swapped) == ("offload_optimizer" in keys)


def test_the_picture_is_of_the_whole_depth(call, targets, tmp_path, monkeypatch) -> None:
    drawn: list[Areas] = []
    draw = memory_picture.draw_memory
    monkeypatch.setattr(fit, "draw_memory", lambda areas, *a, **k: (drawn.append(areas), draw(areas, *a, **k)))
    path = tmp_path / "fit.svg"
    keys = ("--world", "4", "--bucket-bytes", "0", "--device-memory", "1MB", "--png", str(path))
    code, _, err = call(f"{targets}:step", *keys)
    assert code == 0 and f"draw {path}" in err and "layers=12" not in err
    text = path.read_text()
    assert text.startswith("<?xml") and "budget" in text
    plan = Plan(zero=3, bucket_bytes=0).resolve(4)
    assert drawn[0].total.max() == direct_peak(f"{targets}:step", plan)
    assert call("no_file.py:step", "--world", "4", "--device-memory", "1MB", "--png", "fit.tiff0")[0] == 2


def peak_by_answer(text: str, plan: Plan, answer: int, **keywords: Any) -> int:
    step = captured(text, plan, **keywords)
    decided = Decided(recomputed=UniformAnswers(step, plan, backend="nccl").names(answer))
    return memory_profile(recipe(plan, backend="nccl", decided=decided).run(step, check=False)).peak_bytes


def test_what_auto_recomputes_is_decided_for_the_whole_depth(answer, call, targets) -> None:
    layers = 5
    text = f"{targets}:step"
    keys = {"bucket_bytes": 0, "recompute": "auto"}
    anything = Plan(**keys, memory_budget=1).resolve(4)
    step = captured(text, anything, layers=layers)
    count = UniformAnswers(step, anything, backend="nccl").count
    peaks = [peak_by_answer(text, anything, number, layers=layers) for number in range(count)]
    assert count > 1 and peaks[0] > peaks[-1]
    limit = (peaks[0] + peaks[-1]) // 2
    argv = (text, "--world", "4", "--set", f"layers={layers}", "--bucket-bytes", "0", "--recompute", "auto")
    found = answer(*argv, "--device-memory", str(limit))
    assert found["fits"] and found["notes"] == [] and found["peak_bytes"] in peaks
    assert found["peak_bytes"] == next(peak for peak in peaks if peak <= limit)
    plan = anything.replace(memory_budget=limit)
    assert decide(step, plan=plan, backend="nccl").peak_bytes <= limit, "what fits is not refused by a compile"
    assert f"recomputed in {layers} of {layers} blocks" in found["decision"]
    assert f"predicted peak {size_text(found['peak_bytes'])}, {size_text(peaks[0])} with" in found["decision"]
    for key in ("batch", "layers"):
        best = found["largest"][key]
        for value, fits in ((best["value"], True), (best["value"] + 1, False)):
            least = peak_by_answer(text, plan, count - 1, **{"layers": layers, key: value})
            assert (least <= limit) is fits
    out = call(*argv, "--device-memory", "1GB", "--quiet")[1]
    assert out.startswith("fits") and "with everything kept; so everything is" in out
    refused = call(*argv, "--device-memory", str(peaks[-1] - 1), "--quiet")[1]
    assert refused.startswith("does not fit") and "offload_optimizer=host" in refused


def test_a_course_peaks_where_the_profile_does(targets) -> None:
    plan = Plan(zero=3).resolve(4)
    step = recipe(plan, backend="nccl").run(captured(f"{targets}:shallow", plan))
    found, profile = memory_course([step]), memory_profile(step)
    assert found.totals[found.peak] == profile.peak_bytes == sum(found.peak_kinds.values())
    assert found.state_bytes == profile.state_bytes
    assert set(keywords_of(f"{targets}:step")) == {"layers", "width", "batch", "seq"}
