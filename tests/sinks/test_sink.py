from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from meliad_edge.events import Event, EventState
from meliad_edge.sinks.sink import EventQueue, QueuedSink, UnavailableError

NEW, UPDATE, END = EventState


class MemorySink:
    """Keeps numbers; refuses 13, and is not there for 5 as often as is said."""

    name = "memory"

    def __init__(self, *, absences: int = 0) -> None:
        self.taken: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.absences = absences
        self.is_closed = False

    def publish(self, message: int) -> None:
        self.gate.wait(10)
        if message == 13:
            msg = "no such number"
            raise ValueError(msg)
        if message == 5 and self.absences > 0:
            self.absences -= 1
            msg = "disk full"
            raise UnavailableError(msg)
        self.taken.append(message)

    def close(self) -> None:
        self.is_closed = True


def test_everything_is_delivered_in_order_before_it_closes() -> None:
    sink = MemorySink()
    queued = QueuedSink(sink)
    for number in range(1, 11):
        queued.publish(number)
    queued.close()
    assert sink.taken == list(range(1, 11))
    assert sink.is_closed
    assert (queued.published, queued.delivered, queued.overflowed, queued.failed) == (10, 10, 0, 0)


def test_a_stuck_sink_never_holds_up_the_publisher_and_the_loss_is_counted() -> None:
    sink = MemorySink()
    sink.gate.clear()
    queued = QueuedSink(sink, capacity=4)
    for number in range(20, 40):
        queued.publish(number)  # Would never come back if it waited.
    assert queued.overflowed >= 15
    sink.gate.set()
    queued.close()
    assert queued.delivered + queued.overflowed == queued.published == 20


def test_closing_gives_up_on_a_sink_that_hangs() -> None:
    sink = MemorySink()
    sink.gate.clear()
    queued = QueuedSink(sink, capacity=1)
    for number in range(20, 23):
        queued.publish(number)
    queued.close(timeout_s=0.05)
    assert queued.delivered == 0
    sink.gate.set()


def test_a_failing_sink_goes_on_with_the_next_message(caplog: pytest.LogCaptureFixture) -> None:
    sink = MemorySink()
    queued = QueuedSink(sink)
    for number in (12, 13, 14):
        queued.publish(number)
    queued.close()
    assert sink.taken == [12, 14]
    assert queued.failed == 1
    assert "sink memory: ValueError: no such number" in caplog.text


def test_what_cannot_be_taken_now_is_offered_again_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    sink = MemorySink(absences=3)
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return False

    queued = QueuedSink(sink, wait=wait)
    for number in (4, 5, 6):
        queued.publish(number)
    queued.close()
    assert sink.taken == [4, 5, 6]
    assert len(waits) == 3
    assert (queued.delivered, queued.failed) == (3, 0)
    assert caplog.text.count("disk full") == 1


def test_a_lossless_queue_lets_whoever_reads_files_wait() -> None:
    sink = MemorySink()
    sink.gate.clear()
    queued = QueuedSink(sink, capacity=4, lossless=True)
    publisher = threading.Thread(target=lambda: [queued.publish(number) for number in range(20, 60)])
    publisher.start()
    publisher.join(0.1)
    assert publisher.is_alive()
    sink.gate.set()
    publisher.join(10)
    queued.close()
    assert sink.taken == list(range(20, 60))
    assert (queued.delivered, queued.overflowed) == (40, 0)


class StuckSink:
    """Takes the first event at once, and the others when the gate is opened."""

    name = "stuck"

    def __init__(self) -> None:
        self.taken: list[tuple[int, EventState]] = []
        self.has_begun = threading.Event()
        self.gate = threading.Event()

    def publish(self, event: Event) -> None:
        self.has_begun.set()
        self.gate.wait(10)
        self.taken.append((int(event.id[-6:], 16), event.state))

    def close(self) -> None:
        pass


class Backlog:
    """Events that are published while the sink is stuck with the beginning of event 1."""

    def __init__(self, make_event: Callable[..., Event], *, capacity: int) -> None:
        self._make_event = make_event
        self._sink = StuckSink()
        self.gate = self._sink.gate
        self.queue = EventQueue(self._sink, capacity=capacity)
        self.publish((1, NEW))
        self._sink.has_begun.wait(10)

    def publish(self, *changes: tuple[int, EventState]) -> None:
        for number, state in changes:
            self.queue.publish(self._make_event(state, number=number, picture=False))

    def taken(self) -> list[tuple[int, EventState]]:
        self.gate.set()
        self.queue.close()
        assert self.queue.delivered + self.queue.overflowed == self.queue.published
        return self._sink.taken


def test_the_end_of_an_event_whose_beginning_was_taken_is_not_given_up(make_event: Callable[..., Event]) -> None:
    backlog = Backlog(make_event, capacity=2)
    backlog.publish((2, NEW), (3, NEW), (2, END), (1, UPDATE), (1, END), (3, END))
    assert backlog.taken() == [(1, NEW), (2, NEW), (3, NEW), (2, END), (1, END), (3, END)]
    assert backlog.queue.overflowed == 1


def test_updates_give_way_first(make_event: Callable[..., Event]) -> None:
    backlog = Backlog(make_event, capacity=3)
    backlog.publish(*[(1, UPDATE)] * 9, (2, NEW), (2, UPDATE), (1, END), (2, END))
    assert backlog.taken() == [(1, NEW), (2, NEW), (1, END), (2, END)]


def test_a_queue_that_is_full_does_not_grow_with_every_event(make_event: Callable[..., Event]) -> None:
    backlog = Backlog(make_event, capacity=4)
    for number in range(2, 100):
        backlog.publish((number, NEW), (number, UPDATE), (number, END))
        assert backlog.queue.pending <= 8
    began, ended = ({number for number, state in backlog.taken() if state is wanted} for wanted in (NEW, END))
    assert (began, ended) == ({1, 2, 3}, {2, 3})


def test_the_end_stands_for_an_event_that_began_while_the_queue_was_full(make_event: Callable[..., Event]) -> None:
    backlog = Backlog(make_event, capacity=1)
    backlog.publish((2, NEW), (3, NEW))
    assert backlog.queue.overflowed == 1
    backlog.gate.set()
    while backlog.queue.pending:
        time.sleep(0.001)
    backlog.publish((3, END))
    assert backlog.taken() == [(1, NEW), (2, NEW), (3, END)]
