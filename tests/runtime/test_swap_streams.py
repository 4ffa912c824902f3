"""Transfers on streams of a GPU, without one: streams are queues whose heads run in any order that events allow.

Here a copy that does not wait for what it must is not a matter of luck: all orders are possible, and many are tried.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest
import torch

from fxzero.errors import OffloadError
from fxzero.runtime.swap import Swapper, carriers, swapper
from fxzero.runtime.swap.device_copies import CudaCopies
from fxzero.runtime.swap.places import Place

CPU = torch.device("cpu")


class Event:
    """Done once its stream has come to it."""

    def __init__(self, streams: SimulatedStreams) -> None:
        self.streams = streams
        self.done = False

    def set(self) -> None:
        self.done = True

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        while not self.done:
            self.streams.run_one()


class Stream:
    """Functions that run in order, each once the events before it are done."""

    def __init__(self, streams: SimulatedStreams) -> None:
        self.streams = streams
        self.queue: list[tuple[list[Event], Callable[[], object]]] = []

    def launch(self, function: Callable[[], object], after: Iterable[Event] = ()) -> Event:
        event = Event(self.streams)
        self.queue.append((list(after), lambda: (function(), event.set())))
        return event

    def synchronize(self) -> None:
        while self.queue:
            self.streams.run_one()


class SimulatedStreams(CudaCopies):
    """CudaCopies of which nothing runs until the host must wait, and then what a random generator picks."""

    pin = False

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.host_memory: set[int] = set()
        self.computing, self.to_host, self.to_device = (Stream(self) for _ in range(3))  # type: ignore[assignment]

    def run_one(self) -> None:
        streams = [self.computing, self.to_host, self.to_device]
        ready = [each for each in streams if each.queue and all(event.done for event in each.queue[0][0])]
        self.random.choice(ready).queue.pop(0)[1]()

    def fences(self):
        return (self.computing.launch(lambda: None),)

    def launch(self, destination, source, after):
        stream = self.to_host if self.is_to_host(destination) else self.to_device
        return stream.launch(lambda: destination.copy_(source), after)

    def is_to_host(self, destination: torch.Tensor) -> bool:
        return destination.untyped_storage().data_ptr() in self.host_memory

    def wait(self, event):
        self.computing.launch(lambda: None, [event])


@pytest.fixture
def make_streams(monkeypatch):
    def make(seed: int) -> tuple[Swapper, SimulatedStreams]:
        streams = SimulatedStreams(seed)
        monkeypatch.setattr(swapper, "copies_for", lambda device: streams)
        made = Swapper(CPU)
        make_place = made._places._make

        def noted(*args, **kwargs):
            place = make_place(*args, **kwargs)
            if place.memory is not None:
                streams.host_memory.add(place.memory.bytes.untyped_storage().data_ptr())
            return place

        monkeypatch.setattr(made._places, "_make", noted)
        return made, streams

    return make


def faults_of_a_run(made: Swapper, streams: SimulatedStreams) -> int:
    """How many tensors come back wrong, of steps with a home and slots used again, and of transfers without waits."""
    right: list[bool] = []
    compute = streams.computing.launch
    home = made.home("p", (100,), torch.int64, "host")
    for step in range(6):
        values = [torch.zeros(100, dtype=torch.int64) for _ in range(3)]
        for i, value in enumerate(values):
            compute(lambda value=value, number=10 * step + i: value.fill_(number))
        writes = [made.write(value, "x", "host") for value in values]
        at_home = made.write(values[0], "p", "host", into=home)
        stored = [made.written(write) for write in writes]
        made.written(at_home)
        for value in values:
            compute(lambda value=value: value.fill_(-1))  # the memory is used again
        reads = [made.read(each) for each in stored] + [made.read("p")]
        for each in stored:
            made.drop(each)
        for read, number in zip(reads, [10 * step + i for i in (0, 1, 2, 0)], strict=True):
            back = made.loaded(read)
            compute(lambda back=back, number=number: right.append(bool((back == number).all())))
    values = [torch.full((100,), i) for i in range(6)]
    transfers = [(made.write(value, "p", "host", into=home), made.read("p"), made.read("p")) for value in values]
    for number, (write, *reads) in enumerate(transfers):  # all of them were under way at once
        made.written(write)
        for back in map(made.loaded, reads):
            compute(lambda back=back, number=number: right.append(bool((back == number).all())))
    streams.computing.synchronize()
    made.settle()
    right.append(bool((home == 5).all()))
    assert len(right) == 6 * 4 + 6 * 2 + 1
    return right.count(False)


def test_every_order_that_events_allow_gives_the_same(make_streams):
    for seed in range(30):
        assert faults_of_a_run(*make_streams(seed)) == 0


@pytest.mark.parametrize("fault", ["before_read", "before_write", "fences", "wait"])
def test_an_event_that_is_not_waited_for_is_seen(make_streams, monkeypatch, fault):
    """The planted faults of the test above."""
    if fault.startswith("before"):
        monkeypatch.setattr(Place, fault, lambda place: [])
    else:
        monkeypatch.setattr(SimulatedStreams, fault, lambda *_: ())
    assert sum(faults_of_a_run(*make_streams(seed)) for seed in range(30)) > 0


def test_the_host_waits_only_where_it_settles(make_streams):
    made, streams = make_streams(0)
    value = torch.ones(5)
    read = made.read(made.written(made.write(value, "x", "host")))
    back = made.loaded(read)
    assert [len(each.queue) for each in (streams.to_host, streams.to_device)] == [1, 1]
    assert made.traffic().written["host"] == made.traffic().read["host"] == 20
    made.settle()
    assert torch.equal(back, value)
    assert [len(each.queue) for each in (streams.to_host, streams.to_device)] == [0, 0]


def test_an_empty_tensor_has_no_memory_to_copy(make_streams):
    made, _ = make_streams(0)
    stored = made.written(made.write(torch.ones(0, 3), "x", "host"))
    assert made.loaded(made.read(stored)).shape == (0, 3)


def test_only_slots_of_living_values_are_read(make_streams):
    made, _ = make_streams(0)
    stored = made.written(made.write(torch.ones(3), "x", "host"))
    made.abandon()
    with pytest.raises(OffloadError, match="dropped"):
        made.read(stored)
    assert isinstance(made._carriers["host"], carriers.StreamCarrier)
