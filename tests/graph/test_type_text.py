"""How values lie over mesh axes, in the text: what types and comments say, and that they read back."""

import copy
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxzero.errors import RewriteError
from fxzero.graph import Sharding, StepGraph
from fxzero.graph.axis_placement import REPLICATED, Placement, partial, routed, shard
from fxzero.graph.export import to_dot, to_json
from fxzero.graph.parse import from_text
from fxzero.graph.text import to_text
from fxzero.graph.type_text import placement_text, read_placement, read_type, type_text
from tests.graph.split_by_hand import split_step
from tests.graph.test_text import blank, end, seen

aten = torch.ops.aten
MESH = {"dp": 4, "sp": 2, "tp": 2}


def without_replicated(step: StepGraph) -> StepGraph:
    """The graph with placements of what is whole left out, which mean the same."""
    step = step.copy()
    for node in step.graph.nodes:
        said = {axis: found for axis, found in node.meta.pop("placements", {}).items() if not is_replicated(found)}
        node.meta |= {"placements": said} if said else {}
    return step


def is_replicated(placement: object) -> bool:
    return all(map(is_replicated, placement)) if isinstance(placement, tuple) else placement == REPLICATED


def check_round_trip(step: StepGraph) -> str:
    text = to_text(step)
    back = from_text(text)
    assert to_text(back) == text
    assert seen(back) == seen(without_replicated(step))
    return text


def one_value(val: torch.Tensor, **meta: object) -> StepGraph:
    """A graph with an input and a call of these shape, strides and meta."""
    at = blank(x=val)
    at.step.mesh = dict(MESH)
    (x,) = at.step.placeholders
    with at.before(at.step.output):
        y = at.call(aten.detach.default, x, name="y")
    for node in (x, y):
        node.meta |= {key: copy.copy(found) for key, found in meta.items()}
    return end(at, y=y)


TYPES = {
    "a shard": (torch.ones(8, 6), {"tp": shard(1)}, None, "f32[8, 12/tp]"),
    "rows": (torch.ones(8, 6), {"tp": shard(0)}, None, "f32[16/tp, 6]"),
    "rows of experts": (torch.ones(8, 6), {"sp": routed(0, room=8, rows=10)}, None, "f32[10/8~sp, 6]"),
    "columns so": (torch.ones(8, 6), {"sp": routed(1, room=6, rows=9), "tp": shard(0)}, None, "f32[16/tp, 9/6~sp]"),
    "rows, and ZeRO's": (torch.ones(8, 6), {"tp": shard(0)}, Sharding("dp", 4, 31), "f32[62/tp/dp, 6]"),
    "columns, and ZeRO's rows": (torch.ones(8, 6), {"tp": shard(1)}, Sharding("dp", 4, 31), "f32[31/dp, 12/tp]"),
    "rows on two ranks only": (torch.ones(8, 6), {"tp": shard(0)}, Sharding("dp", 2, 16), "f32[32/tp/dp:2, 6]"),
    "ZeRO's rows over tp": (torch.ones(8, 6), {}, Sharding("tp", 2, 15), "f32[15/tp:2, 6]"),
    "blocks": (torch.ones(8, 6), {"tp": shard(1, 2)}, None, "f32[8, 12/2*tp]"),
    "blocks of rows": (torch.ones(8, 6), {"tp": shard(0, 4)}, Sharding("dp", 4, 32), "f32[64/4*tp/dp, 6]"),
    "two axes": (torch.ones(8, 6), {"tp": shard(0), "sp": shard(1)}, None, "f32[16/tp, 12/sp]"),
    "two of one dim": (torch.ones(8, 6), {"tp": shard(1), "sp": shard(1)}, None, "f32[8, 24/sp/tp]"),
    "three of one dim": (
        torch.ones(8, 6),
        {"tp": shard(0, 2), "sp": shard(0)},
        Sharding("dp", 4, 31),
        "f32[124/sp/2*tp/dp, 6]",
    ),
    "summands": (torch.ones(8, 6), {"tp": partial()}, None, "f32[8, 6]+tp"),
    "maxima": (torch.ones(8, 6), {"tp": partial("max")}, None, "f32[8, 6]+max:tp"),
    "norms": (torch.ones(()), {"tp": partial("norm2")}, None, "f32[]+norm2:tp"),
    "summands of two axes": (torch.ones(8), {"tp": partial(), "sp": partial("max")}, None, "f32[8]+max:sp+tp"),
    "a part of summands": (torch.ones(8, 6), {"tp": partial(), "sp": shard(1)}, None, "f32[8, 12/sp]+tp"),
    "strides": (torch.ones(6, 8).t(), {"tp": shard(0)}, None, "f32[16/tp, 6]{1,8}"),
    "strides of summands": (torch.ones(6, 8).t(), {"tp": partial()}, None, "f32[8, 6]{1,8}+tp"),
    "nothing in it": (torch.ones(0, 6), {"tp": shard(0)}, None, "f32[0/tp, 6]"),
    "said to be whole": (torch.ones(8, 6), {"tp": REPLICATED}, None, "f32[8, 6]"),
}


@pytest.mark.parametrize("name", TYPES)
def test_a_type_says_how_a_value_lies_and_reads_back(name: str) -> None:
    val, placements, sharding, expected = TYPES[name]
    meta: dict[str, object] = {"placements": placements} if placements else {}
    step = one_value(val, **meta, **({"sharding": sharding} if sharding else {}))
    text = check_round_trip(step)
    shown = re.findall(r"%[xy] +(f32\S.*?)  ", text)
    assert shown == [expected, expected]
    assert "lies" not in text
    is_part = "/" in expected and val.numel() > 0
    assert ("# whole [8, 6]" in text) == is_part  # the entry of `blank` has the shape of the part


def test_summands_on_another_device_read_back() -> None:
    at = blank(w=torch.ones(2), x=torch.ones(8, 6, device="meta"))
    at.step.placeholders[1].meta["placements"] = {"tp": partial()}
    assert "f32[8, 6]+tp@meta" in check_round_trip(end(at))


UNSHOWN = {
    "an axis of ZeRO's": ({"dp": shard(0)}, "lies S(0) over dp"),
    "an axis that no mesh has": ({"ep": shard(1)}, "lies S(1) over ep"),
    "a name that needs quotes": ({"t p": partial("max")}, "lies P(max) over 't p'"),
    "a dim that is not there": ({"tp": shard(2)}, "lies S(2) over tp"),
    "blocks of it": ({"tp": shard(2, 3)}, "lies S(2, 3) over tp"),
    "a tuple for one value": ({"tp": (shard(0), REPLICATED, shard(1, 2))}, "lies (S(0), R, S(1, 2)) over tp"),
}


@pytest.mark.parametrize("name", UNSHOWN)
def test_what_a_type_cannot_show_is_in_the_comment(name: str) -> None:
    placements, expected = UNSHOWN[name]
    text = check_round_trip(one_value(torch.ones(8, 6), placements=placements))
    assert text.count(expected) == 2 and text.count(" f32[8, 6] ") == 2


def test_parts_of_a_number_are_in_the_comment() -> None:
    step = split_step({"dp": 2, "tp": 2})
    (number,) = (node for node in step.calls() if node.name == "neg")
    number.meta["placements"] = {"tp": shard(0), "dp": partial()}
    assert re.search(r"%neg +float +py.neg ", check_round_trip(step))
    assert "  # lies S(0) over tp; lies P(sum) over dp\n" in to_text(step)


def test_the_whole_of_an_input_that_is_in_parts_need_not_be_said() -> None:
    text = check_round_trip(split_step({"dp": 2, "tp": 2}))
    assert "f32[16/tp, 8]     parameter         up.weight\n" in text and "whole [" not in text
    assert from_text(text).input("parameter", "down.weight").meta["entry"].shape == (8, 16)


def test_golden_split_step(golden) -> None:
    golden("graph/split_step", check_round_trip(split_step({"dp": 2, "tp": 2})))


def test_several_values_of_one_node() -> None:
    at = blank(x=torch.ones(4, 6))
    with at.before(at.step.output):
        parts = at.call(aten.split.Tensor, at.step.placeholders[0], 1)
        pair = at.call(aten.var_mean.correction, at.step.placeholders[0], [0])
        none = at.call(aten.split.Tensor, at.step.placeholders[0], 2)
    parts.meta["placements"] = {"tp": (shard(1), shard(1), partial(), REPLICATED)}
    pair.meta["placements"] = {"tp": (partial(), shard(0, 2)), "dp": (REPLICATED, REPLICATED)}
    none.meta["placements"] = {"tp": (shard(1),)}
    text = check_round_trip(end(at, a=parts, b=pair, c=none))
    assert "(f32[1, 12/tp] x2, f32[1, 6]+tp, f32[1, 6])" in text
    assert "(f32[6]+tp, f32[12/2*tp])" in text
    assert re.search(r"\(f32\[2, 6\] x2\) +split.Tensor ", text) and "# lies (S(1)) over tp" in text


def test_values_within_values_are_told_apart() -> None:
    step = StepGraph(torch.fx.Graph(), dict(MESH))
    one = torch.ones(2, 3)
    shown = type_text(
        (one, [one, None], one.t()), step, device="cpu", placements={"tp": (shard(1), REPLICATED, shard(0))}
    )
    assert shown == "(f32[2, 6/tp], (f32[2, 3], None), f32[6/tp, 2]{1,3})"
    assert read_type(shown, MESH.__getitem__).placements == {"tp": (shard(1), REPLICATED, shard(0))}


@pytest.mark.parametrize(
    "reason", ["mm needs all of dim 1", "softmax", "'all', of it; or # not", "two  spaces", "", "a\nb", "region 3"]
)
def test_why_a_conversion_is_there_reads_back(reason: str) -> None:
    step = one_value(torch.ones(8, 6), because=reason)
    step.calls()[0].meta["module"] = "a"
    text = check_round_trip(step)
    assert ("# a; because mm needs all of dim 1\n" in text) == (reason == "mm needs all of dim 1")


PLACEMENTS = st.sampled_from([REPLICATED, *(shard(dim, blocks) for dim in range(4) for blocks in (1, 2, 3))])
PLACEMENTS |= st.sampled_from([partial(), partial("max"), partial("norm2")])
PLACEMENTS |= st.builds(routed, st.integers(0, 2), room=st.integers(1, 7), rows=st.integers(1, 9))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 7), max_size=3),
    st.dictionaries(st.sampled_from(["dp", "sp", "tp", "ep"]), PLACEMENTS, max_size=3),
    st.sampled_from([None, Sharding("dp", 4, 9), Sharding("dp", 4, 8), Sharding("tp", 2, 5), Sharding("dp", 3, 7)]),
    st.booleans(),
)
def test_any_placements_read_back(shape, placements, sharding, turned) -> None:
    assume(sharding is None or not any(lies.is_routed for lies in placements.values()))  # the verifier refuses both
    val = torch.ones(shape)
    meta: dict[str, object] = {"placements": placements} | ({"sharding": sharding} if sharding else {})
    check_round_trip(one_value(val.permute(tuple(reversed(range(val.dim())))) if turned else val, **meta))


@given(st.lists(PLACEMENTS, min_size=1, max_size=4), st.booleans())
def test_placements_read_back(placements: list[Placement], several: bool) -> None:
    found = tuple(placements) if several else placements[0]
    assert read_placement(placement_text(found)) == found


def test_exports_say_how_a_value_lies() -> None:
    step = one_value(torch.ones(8, 6), placements={"tp": shard(1)})
    assert [node["type"] for node in to_json(step)["nodes"]] == ["f32[8, 12/tp]"] * 2
    assert to_dot(step).count("f32[8, 12/tp]") == 2


SPLIT = """\
# by hand | mesh dp=4 tp=2 | cpu
inputs
  %w  f32[12/tp/dp, 8]  parameter  a.w
forward
  %s  f32[6/dp, 8]+tp     neg  %w  # lies S(1) over dp
results
  %s  -> metric  s
"""


def faulty(old: str, new: str) -> str:
    assert SPLIT.count(old) == 1
    return SPLIT.replace(old, new)


def test_a_split_text_by_hand_has_no_fault() -> None:
    step = from_text(SPLIT)
    assert to_text(step).split()[-22:] == SPLIT.split()[-22:]
    assert step.calls()[0].meta["placements"] == {"tp": partial(), "dp": shard(1)}
    weight = step.input("parameter", "a.w")
    assert weight.meta["sharding"] == Sharding("dp", 4, 6) and weight.meta["placements"] == {"tp": shard(0)}
    assert weight.meta["entry"].shape == (12, 8) and tuple(weight.meta["val"].shape) == (2, 8)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("%w  f32[12/tp", "%w  f32[12/ep", r"line 3 .*: mesh: expected an axis of the header's \(dp, tp\), got 'ep'"),
        ("%w  f32[12/tp", "%w  f32[11/tp", r"line 3 .*: type: expected f32\[10/tp/dp, 8\], which the line yields"),
        ("%w  f32[12/tp", "%w  f32[12/0x*tp", "line 3 .*: type: expected one such as"),
        ("8]+tp", "8/2*tp]", r"line 5 .*: type: expected f32\[6/dp, 16/2\*tp\], which the line yields"),
        ("8]+tp", "8]+min:tp", "line 5 .*: type: expected f32"),
        ("8]+tp", "8]+ep", "line 5 .*: mesh: expected an axis"),
        ("8]+tp", "8]+dp", r"line 5 .*: type: expected f32\[6/dp, 8\], which the line yields"),
        ("S(1) over dp", "S[1] over dp", r"line 5 .*: comment: expected R, S\(0\), .* got 'S\[1\]'; correct it"),
        ("S(1) over dp", "(S(1), T) over dp", r"line 5 .*: comment: expected R, S\(0\), .*T\)'; correct it"),
        ("lies S(1)", "lays S(1)", "line 5 .*: comment: expected a module, .*, lies, .* because, "),
    ],
)
def test_a_fault_in_a_type_is_named_with_its_line(old: str, new: str, message: str) -> None:
    with pytest.raises(RewriteError, match=message):
        from_text(faulty(old, new))
