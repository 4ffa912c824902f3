"""Reads and writes descriptions of machines as TOML, and says what is missing or cannot be, with units."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fxzero.cost.hardware import CollectiveRate, Hardware, Link, MatrixRate, OpRate
from fxzero.cost.op_classes import MATRIX_CLASSES, MEMORY_CLASSES
from fxzero.errors import HardwareError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BYTES, BYTES_S, FLOPS_S, SECONDS, PART = (
    "bytes",
    "bytes a second",
    "floating point operations a second",
    "seconds",
    "a part of the peak, above 0 and at most 1",
)
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv")
DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2", "int8")
LANES = ("net", "d2h", "h2d", "nvme", "host")  # the host: its thread is held, so nothing hinders it


@dataclass(frozen=True)
class Key:
    """One number of the file.

    Args:
        path: table and key, "memory.bytes_s".
        field: of Hardware; "node_link.bytes_s" is that of its link.
        unit: what the number counts.
        optional: may be left out.
        zero: may be 0.
    """

    path: str
    field: str
    unit: str
    optional: bool = False
    zero: bool = False


KEYS = (
    Key("memory.capacity_bytes", "memory_bytes", BYTES),
    Key("memory.bytes_s", "memory_bytes_s", BYTES_S),
    Key("memory.fresh_bytes_s", "fresh_bytes_s", BYTES_S, optional=True),
    Key("memory.fresh_above_bytes", "fresh_above_bytes", BYTES, optional=True, zero=True),
    Key("vector.flops_s", "vector_flops", FLOPS_S),
    Key("vector.op_overhead_s", "op_overhead_s", SECONDS, zero=True),
    Key("vector.view_overhead_s", "view_overhead_s", SECONDS, optional=True, zero=True),
    Key("host.bytes_s", "host_bytes_s", BYTES_S),
    Key("host.latency_s", "host_latency_s", SECONDS, zero=True),
    Key("host.memory_bytes_s", "host_memory_bytes_s", BYTES_S),
    Key("host.copy_engines", "copy_engines", "engines, a whole number"),
    Key("disk.bytes_s", "disk_bytes_s", BYTES_S),
    Key("disk.latency_s", "disk_latency_s", SECONDS, zero=True),
    Key("node.ranks", "ranks_per_node", "ranks, a whole number"),
    Key("node.latency_s", "node_link.latency_s", SECONDS, zero=True),
    Key("node.bytes_s", "node_link.bytes_s", BYTES_S),
    Key("network.latency_s", "network_link.latency_s", SECONDS, zero=True),
    Key("network.bytes_s", "network_link.bytes_s", BYTES_S),
    Key("launch.seconds", "launch_s", SECONDS, zero=True),
    Key("launch.bytes_s", "launch_bytes_s", BYTES_S, optional=True),
)
WHOLE = ("host.copy_engines", "node.ranks")
FACTORS = ("contention", "beside_compute")  # of lanes; they may be left out
TABLES = ("matrix.flops_s", "matrix.classes", "ops", "collectives", *FACTORS, "origin")
SECTIONS = ("name", "device", *dict.fromkeys(key.path.split(".")[0] for key in KEYS), "matrix", *TABLES[2:])
HINT = "`fxzero calibrate -o machine.toml` writes a whole one, docs/hardware.md lists all keys"


def machine_names() -> list[str]:
    """The names of the descriptions that fxzero brings."""
    folder = resources.files("fxzero.cost") / "machines"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load(path_or_name: str | Path) -> Hardware:
    """As `Hardware.load`."""
    name = str(path_or_name)
    if name in machine_names():
        text = (resources.files("fxzero.cost") / "machines" / f"{name}.toml").read_text(encoding="utf-8")
        return parse(text, file=f"{name}.toml")
    path = Path(name)
    if not path.is_file():
        raise HardwareError.of(
            name,
            expected=f"a TOML file that is there, or one of {', '.join(machine_names())}",
            got="neither",
            fix=_nearest(name, machine_names()) + HINT,
        )
    return parse(path.read_text(encoding="utf-8"), file=name)


def parse(text: str, *, file: str) -> Hardware:
    """The description in a text.

    Args:
        text: TOML.
        file: what errors name.

    Raises:
        HardwareError: where it is not TOML, a key is missing, unknown or no such number, or figures contradict.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise HardwareError.of(file, expected="TOML", got=str(error), fix="mend that line") from error
    return _Reader(data, file).hardware()


class _Reader:
    """Takes the tables of one file apart."""

    def __init__(self, data: dict[str, Any], file: str) -> None:
        self.data = data
        self.file = file

    def hardware(self) -> Hardware:
        self._check_names("", self.data, SECTIONS)
        fields: dict[str, Any] = {key.field: value for key in KEYS if (value := self._number(key)) is not None}
        for link in ("node_link", "network_link"):
            fields[link] = Link(fields.pop(f"{link}.latency_s"), fields.pop(f"{link}.bytes_s"))
        for section in dict.fromkeys(key.path.split(".")[0] for key in KEYS):
            known = [key.path.split(".")[1] for key in KEYS if key.path.startswith(f"{section}.")]
            self._check_names(f"{section}.", self._table(section), known)
        self._check_names("matrix.", self._table("matrix"), ("flops_s", "classes"))
        found = Hardware(
            name=self._text("name"),
            device=self._text("device"),
            matrix_flops=self._matrix_flops(),
            matrix_rates=self._rates("matrix.classes", MATRIX_CLASSES, self._matrix_rate),
            ops=self._rates("ops", MEMORY_CLASSES, self._op_rate),
            collectives=self._rates("collectives", COLLECTIVES, self._collective_rate),
            contention=self._rates("contention", (*LANES, "ranks"), self._slowdown),
            beside_compute=self._rates("beside_compute", LANES[:-1], self._hindrance),
            origin={key: str(value) for key, value in self._table("origin", optional=True).items()},
            **fields,
        )
        self._check_whole(found)
        return found

    def _table(self, path: str, *, optional: bool = False) -> dict[str, Any]:
        table: Any = self.data
        for part in path.split("."):
            table = table.get(part, {}) if isinstance(table, dict) else {}
        if not isinstance(table, dict):
            raise self._error(path, expected="a table", got=repr(table), fix=f"write it as [{path}]")
        if not table and not optional:
            raise self._error(path, expected="this table", got="none", fix=HINT)
        return table

    def _number(self, key: Key) -> float | None:
        section, name = key.path.split(".")
        table = self._table(section, optional=True)
        if name not in table:
            if key.optional:
                return None
            self._check_names(f"{section}.", table, [k.path.split(".")[1] for k in KEYS if k.path.startswith(section)])
            raise self._error(key.path, expected=f"a number, in {key.unit}", got="none", fix=HINT)
        value = self._positive(key.path, table[name], key.unit, zero=key.zero)
        if key.path in WHOLE and value != int(value):
            raise self._error(key.path, expected=key.unit, got=repr(value), fix="write a whole number")
        return int(value) if key.path in WHOLE else value

    def _positive(self, path: str, value: Any, unit: str, *, zero: bool = False) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value < 0 or (value == 0 and not zero):
            least = "a number of at least 0" if zero else "a number above 0"
            raise self._error(path, expected=f"{least}, in {unit}", got=repr(value), fix="correct it")
        return float(value)

    def _part(self, path: str, table: Mapping[str, Any]) -> float:
        value = self._positive(path, table.get("efficiency"), PART)
        if value > 1:
            fix = "raise the peak that it is a part of, or lower it"
            raise self._error(path, expected=PART, got=repr(value), fix=fix)
        return value

    def _text(self, name: str) -> str:
        value = self.data.get(name)
        if not isinstance(value, str) or not value or (name == "device" and value not in ("cuda", "cpu")):
            expected = '"cuda" or "cpu"' if name == "device" else "a text"
            raise self._error(name, expected=expected, got="none" if value is None else repr(value), fix=HINT)
        return value

    def _matrix_flops(self) -> dict[torch.dtype, float]:
        table = self._table("matrix.flops_s")
        self._check_names("matrix.flops_s.", table, DTYPES)
        if "float32" not in table:
            fix = "add it: it stands for all dtypes that are not named"
            raise self._error("matrix.flops_s.float32", expected=f"a number, in {FLOPS_S}", got="none", fix=fix)
        return {getattr(torch, k): self._positive(f"matrix.flops_s.{k}", v, FLOPS_S) for k, v in table.items()}

    def _rates(self, path: str, names: Sequence[str], read: Callable[[str, Any], Any]) -> dict[str, Any]:
        table = self._table(path, optional=path in FACTORS)
        self._check_names(f"{path}.", table, names)
        if path not in FACTORS:
            for name in {"matrix.classes": ("matmul",), "ops": ("pointwise",), "collectives": COLLECTIVES}[path]:
                if name not in table:
                    raise self._error(f"{path}.{name}", expected="this table", got="none", fix=HINT)
        for name, value in table.items():
            if path not in FACTORS and not isinstance(value, dict):
                fix = f"write it as [{path}.{name}]"
                raise self._error(f"{path}.{name}", expected="a table", got=repr(value), fix=fix)
        return {name: read(f"{path}.{name}", value) for name, value in table.items()}

    def _matrix_rate(self, path: str, table: dict[str, Any]) -> MatrixRate:
        self._check_names(f"{path}.", table, ("efficiency", "half_dim"))
        half = self._positive(f"{path}.half_dim", table.get("half_dim", 0.0), "elements of the smallest dim", zero=True)
        return MatrixRate(self._part(f"{path}.efficiency", table), half)

    def _op_rate(self, path: str, table: dict[str, Any]) -> OpRate:
        self._check_names(f"{path}.", table, ("overhead_s", "traffic_bytes", "bytes_s"))
        sizes, rates = self._curve(path, table, "traffic_bytes", "bytes_s", BYTES_S)
        return OpRate(self._overhead(path, table), sizes, rates)

    def _collective_rate(self, path: str, table: dict[str, Any]) -> CollectiveRate:
        self._check_names(f"{path}.", table, ("overhead_s", "message_bytes", "efficiency"))
        sizes, parts = self._curve(path, table, "message_bytes", "efficiency", PART)
        for value in parts:
            self._part(f"{path}.efficiency", {"efficiency": value})
        return CollectiveRate(self._overhead(path, table), sizes, parts)

    def _overhead(self, path: str, table: dict[str, Any]) -> float:
        return self._positive(f"{path}.overhead_s", table.get("overhead_s"), SECONDS, zero=True)

    def _curve(
        self, path: str, table: dict[str, Any], sizes: str, values: str, unit: str
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Two lists of the same length, the first ascending."""
        columns = []
        for name, what in ((sizes, BYTES), (values, unit)):
            column = table.get(name)
            if not isinstance(column, list) or not column:
                got = "none" if column is None else repr(column)
                raise self._error(f"{path}.{name}", expected=f"a list of numbers, in {what}", got=got, fix=HINT)
            columns.append(tuple(self._positive(f"{path}.{name}", value, what) for value in column))
        first, second = columns
        if len(first) != len(second) or list(first) != sorted(set(first)):
            expected = f"ascending sizes, as many as in {path}.{values} ({len(second)})"
            raise self._error(f"{path}.{sizes}", expected=expected, got=repr(list(first)), fix="correct them")
        return first, second

    def _slowdown(self, path: str, value: Any) -> float:
        when = "on one of several ranks" if path.endswith(".ranks") else "while this lane is busy"
        return self._factor(path, value, "compute alone", f"compute takes {when}")

    def _hindrance(self, path: str, value: Any) -> float:
        return self._factor(path, value, "a transfer alone", "what this lane does takes while compute runs")

    def _factor(self, path: str, value: Any, alone: str, meaning: str) -> float:
        number = self._positive(path, value, f"times the duration of {alone}")
        if number < 1:
            fix = f"write how many times as long {meaning}"
            raise self._error(path, expected="a factor of at least 1", got=repr(value), fix=fix)
        return number

    def _check_whole(self, found: Hardware) -> None:
        """Figures that contradict each other."""
        memory = found.memory_bytes_s
        for path, rate in (("node.bytes_s", found.node_link.bytes_s), ("host.bytes_s", found.host_bytes_s)):
            if rate > memory:
                expected = f"at most memory.bytes_s = {memory:g} (bytes a second)"
                fix = "a link carries no more than the memory that it reads; check the units: bytes, not bits"
                raise self._error(path, expected=expected, got=f"{rate:g}", fix=fix)
        if found.network_link.bytes_s > found.node_link.bytes_s:
            expected = f"at most node.bytes_s = {found.node_link.bytes_s:g} (bytes a second, of one rank)"
            fix = "give one rank's part of the network, and check the units: bytes, not bits"
            raise self._error("network.bytes_s", expected=expected, got=f"{found.network_link.bytes_s:g}", fix=fix)

    def _check_names(self, prefix: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
        for name in table:
            if name not in known:
                fix = _nearest(name, known) + f"choose from: {', '.join(known)}"
                raise self._error(f"{prefix}{name}", expected="a known key", got=repr(name), fix=fix)

    def _error(self, key: str, *, expected: str, got: str, fix: str) -> HardwareError:
        return HardwareError.of(f"{self.file}: {key}", expected=expected, got=got, fix=fix)


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def to_toml(hardware: Hardware) -> str:
    """As `Hardware.to_toml`."""
    lines = [f'name = "{hardware.name}"', f'device = "{hardware.device}"']
    for section in dict.fromkeys(key.path.split(".")[0] for key in KEYS):
        lines += ["", f"[{section}]"]
        for key in (key for key in KEYS if key.path.startswith(f"{section}.")):
            value: Any = hardware
            for part in key.field.split("."):
                value = getattr(value, part)
            if value or not key.optional:
                lines.append(f"{key.path.split('.')[1]} = {_written(value)}")
    rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in hardware.matrix_flops.items()}
    lines += ["", "[matrix.flops_s]", *(f"{name} = {_written(rate)}" for name, rate in rates.items())]
    tables: dict[str, Mapping[str, Any]] = {
        "matrix.classes": hardware.matrix_rates,
        "ops": hardware.ops,
        "collectives": hardware.collectives,
    }
    for path, table in tables.items():
        for name, rate in table.items():
            lines += ["", f"[{path}.{name}]", *(f"{key} = {_written(value)}" for key, value in vars(rate).items())]
    for path in (*FACTORS, "origin"):
        pairs = getattr(hardware, path)
        if pairs:
            lines += ["", f"[{path}]", *(f"{key} = {_written(value)}" for key, value in pairs.items())]
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    whole = float(value).is_integer() and abs(value) < 1e9
    return str(int(value)) if whole else f"{value:.6g}"
