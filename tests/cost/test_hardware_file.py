"""Descriptions of machines: each known one reads and writes back; whatever is wrong is named with key and unit."""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from fxzero.cost.hardware import Hardware, OpRate
from fxzero.cost.hardware_file import COLLECTIVES, KEYS, LANES, machine_names, parse
from fxzero.cost.op_classes import MATRIX_CLASSES, MEMORY_CLASSES
from fxzero.errors import HardwareError

H100 = (resources.files("fxzero.cost") / "machines" / "h100.toml").read_text(encoding="utf-8")


def fault(text: str) -> HardwareError:
    with pytest.raises(HardwareError) as info:
        parse(text, file="mine.toml")
    return info.value


def without(key: str) -> str:
    """The file less the first line of a table that sets a key."""
    section, name = key.split(".")
    return re.sub(rf"(?ms)(^\[{section}\].*?)^{name} = [^\n]*\n", r"\1", H100, count=1)


def test_the_known_machines_are_there() -> None:
    assert machine_names() == ["a100", "cpu", "h100", "h100_ethernet", "h200"]


@pytest.mark.parametrize("name", machine_names())
def test_a_description_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    hardware = Hardware.load(name)
    path = tmp_path / "machine.toml"
    path.write_text(hardware.to_toml(), encoding="utf-8")
    assert Hardware.load(path) == hardware
    assert Hardware.load(str(path)) == hardware


def test_a_changed_figure_is_not_read_as_the_same() -> None:  # the twin of the test above
    hardware = Hardware.load("h100")
    text = hardware.to_toml()
    assert text.count("bytes_s = 3.35e+12") == 1
    assert parse(text.replace("bytes_s = 3.35e+12", "bytes_s = 3.36e+12"), file="mine.toml") != hardware


def test_figures_are_those_of_the_file() -> None:
    hardware = parse(H100, file="mine.toml")
    assert hardware.memory_bytes_s == 3.35e12 and hardware.memory_bytes == 80e9
    assert hardware.matrix_rate(torch.bfloat16) == 989e12
    assert hardware.ranks_per_node == 8 and hardware.network_link.bytes_s == 5e10
    assert hardware.slowdown("net:dp") == 1.05 and hardware.slowdown("host") == hardware.slowdown("") == 1.0
    beside = parse(H100 + "\n[beside_compute]\nnet = 2.5\n", file="mine.toml")
    assert beside.hindrance("net:dp") == 2.5 and beside.hindrance("d2h") == hardware.hindrance("net:dp") == 1.0
    assert parse(beside.to_toml(), file="mine.toml") == beside
    assert beside.undisturbed().hindrance("net:dp") == beside.undisturbed().slowdown("net:dp") == 1.0


@pytest.mark.parametrize("key", [key for key in KEYS if not key.optional], ids=lambda key: key.path)
def test_a_figure_that_is_missing_is_named_with_its_unit(key: Any) -> None:
    assert without(key.path) != H100
    error = fault(without(key.path))
    assert error.where == f"mine.toml: {key.path}"
    assert key.unit in str(error.expected) and error.got == "none"


@pytest.mark.parametrize(
    ("old", "new", "where", "words"),
    [
        ("bytes_s = 3.35e12", "bytes_s = -3.35e12", "memory.bytes_s", "above 0, in bytes a second"),
        ("bytes_s = 3.35e12", 'bytes_s = "3.35 TB/s"', "memory.bytes_s", "in bytes a second"),
        ("bytes_s = 3.35e12", "bytes_s = nan", "memory.bytes_s", "a number above 0"),
        ("bytes_s = 3.35e12", "byte_s = 3.35e12", "memory.byte_s", "did you mean 'bytes_s'"),
        ("[memory]", "[memroy]", "memroy", "did you mean 'memory'"),
        ("bytes_s = 4.5e11", "bytes_s = 4.5e12", "node.bytes_s", "at most memory.bytes_s"),
        ("bytes_s = 6.3e10", "bytes_s = 6.3e13", "host.bytes_s", "at most memory.bytes_s"),
        ("bytes_s = 5e10", "bytes_s = 5e11", "network.bytes_s", "bytes, not bits"),
        ("ranks = 8", "ranks = 8.5", "node.ranks", "whole number"),
        ("efficiency = 0.75", "efficiency = 1.2", "matrix.classes.matmul.efficiency", "at most 1"),
        ("efficiency = 0.75", "", "matrix.classes.matmul.efficiency", "in a part of the peak"),
        ("half_dim = 256", "half_dim = -1", "matrix.classes.matmul.half_dim", "at least 0"),
        ("float32 = 67e12", "", "matrix.flops_s.float32", "floating point operations a second"),
        ("bfloat16 = 989e12", "bf16 = 989e12", "matrix.flops_s.bf16", "choose from"),
        ("[ops.pointwise]", "[ops.pointwize]", "ops.pointwize", "did you mean 'pointwise'"),
        ("traffic_bytes = [1e6]", "traffic_bytes = [2e6, 1e6]", "ops.pointwise.traffic_bytes", "ascending"),
        ("traffic_bytes = [1e6]", "traffic_bytes = 1e6", "ops.pointwise.traffic_bytes", "a list of numbers, in bytes"),
        ("efficiency = [0.8]", "efficiency = [1.8]", "collectives.all_gather.efficiency", "at most 1"),
        ("efficiency = [0.8]", "efficiency = 0.8", "collectives.all_gather.efficiency", "a list of numbers"),
        ("[collectives.all_reduce]", "[collectives.allreduce]", "collectives.allreduce", "did you mean 'all_reduce'"),
        ("net = 1.05", "net = 0.9", "contention.net", "at least 1"),
        ("[contention]", "[beside_compute]\nnet = 0.9\n\n[contention]", "beside_compute.net", "while compute runs"),
        ("[contention]", "[beside_compute]\nhost = 2\n\n[contention]", "beside_compute.host", "choose from: net, d2h"),
        ("net = 1.05", "ranks = 0.9", "contention.ranks", "on one of several ranks"),
        ("net = 1.05", "nett = 1.05", "contention.nett", "did you mean 'net'"),
        ('device = "cuda"', 'device = "tpu"', "device", '"cuda" or "cpu"'),
        ('name = "H100"', "", "name", "a text"),
        ("[launch]\nseconds = 2e-6", "[[launch]]\nseconds = 2e-6", "launch", "a table"),
    ],
)
def test_what_cannot_be_is_named(old: str, new: str, where: str, words: str) -> None:
    assert old in H100
    error = fault(H100.replace(old, new, 1))
    assert error.where == f"mine.toml: {where}"
    assert words in str(error)


def test_a_text_that_is_no_toml_and_a_file_that_there_is_not() -> None:
    assert "TOML" in str(fault("name = "))
    with pytest.raises(HardwareError, match=r"h1000: expected .* got neither; did you mean 'h100'\?"):
        Hardware.load("h1000")


def test_a_rate_is_interpolated_between_sizes_and_flat_beyond() -> None:
    rate = OpRate(0.0, (100.0, 10000.0), (1.0, 4.0))
    assert rate.seconds(10) == 10.0
    assert rate.seconds(1000) == pytest.approx(1000 / 2.0)
    assert rate.seconds(1e6) == 1e6 / 4


def test_the_doc_lists_every_key_and_class() -> None:
    doc = (Path(__file__).resolve().parents[2] / "docs" / "hardware.md").read_text(encoding="utf-8")
    for key in KEYS:
        assert f"`{key.path}`" in doc, key.path
    for name in (*MEMORY_CLASSES, *MATRIX_CLASSES, *COLLECTIVES, *LANES, *machine_names()):
        assert name in doc, name
