from __future__ import annotations

import logging
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from meliad_edge.event_store import Change, EventStore
from meliad_edge.sinks.delivery import Delivery, DeliveryError, RejectedError

WriteChange = Callable[..., dict[str, Any]]
Finish = Callable[[Delivery], None]
WaitUntil = Callable[..., None]


class Receiver:
    """A destination that takes what it is given; the errors of coming attempts can be laid out for it."""

    name = "https://lamp.example"

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)
        self.attempts: list[int] = []
        self.taken: list[int] = []
        self.up_errors: list[Exception] = []
        self.kept_up = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.is_closed = False

    def keep_up(self) -> None:
        if self.up_errors:
            raise self.up_errors.pop(0)
        self.kept_up.set()

    def deliver(self, change: Change) -> None:
        self.gate.wait(60.0)
        self.attempts.append(change.sequence)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        self.taken.append(change.sequence)

    def close(self) -> None:
        self.is_closed = True


class Patience:
    """Stands in for waiting in real time, and keeps how long it would have been."""

    def __init__(self) -> None:
        self.delays_s: list[float] = []

    def __call__(self, event: threading.Event, delay_s: float) -> bool:
        self.delays_s.append(delay_s)
        return event.is_set()


@pytest.fixture
def patience() -> Patience:
    return Patience()


Start = Callable[[Receiver], Delivery]


@pytest.fixture
def start(store: EventStore, patience: Patience) -> Iterator[Start]:
    started = []

    def start_delivery(receiver: Receiver) -> Delivery:
        started.append(Delivery(store, receiver, random_source=random.Random(0), wait=patience))
        return started[-1]

    yield start_delivery
    for delivery in started:
        delivery.close()


def test_everything_is_delivered_in_order_before_it_closes(write_change: WriteChange, start: Start) -> None:
    receiver = Receiver()
    delivery = start(receiver)
    for number in range(1, 251):  # More than one batch.
        write_change(number=number)
    delivery.close(timeout_s=60.0)
    assert receiver.taken == list(range(1, 251))
    assert receiver.is_closed
    status = delivery.status
    assert (status.delivered, status.rejected, status.failed_attempts, status.pending) == (250, 0, 0, 0)
    assert (status.is_up, status.last_error, status.lost) == (True, "", 0)


def test_what_is_written_right_after_the_start_is_meant_for_it(
    write_change: WriteChange, start: Start, finish: Finish
) -> None:
    write_change(number=1)
    receiver = Receiver()
    receiver.gate.clear()
    delivery = start(receiver)
    write_change(number=2)
    receiver.gate.set()
    finish(delivery)
    assert receiver.taken == [2]


def test_what_cannot_be_delivered_is_tried_again_and_nothing_overtakes_it(
    write_change: WriteChange, start: Start, patience: Patience, caplog: pytest.LogCaptureFixture, finish: Finish
) -> None:
    caplog.set_level(logging.INFO, logger="meliad_edge.sinks.delivery")
    receiver = Receiver(None, *[DeliveryError("answered 503"), OSError("unreachable")] * 6)
    delivery = start(receiver)
    for number in (1, 2, 3):
        write_change(number=number)
    finish(delivery)
    assert receiver.taken == [1, 2, 3]
    assert receiver.attempts == [1, *[2] * 13, 3]
    assert delivery.status.failed_attempts == 12
    assert delivery.status.is_up
    assert delivery.status.last_error == "unreachable"
    ceilings = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, *[30.0] * 6]
    assert all(ceiling / 2 <= delay_s <= ceiling for delay_s, ceiling in zip(patience.delays_s, ceilings, strict=True))
    assert len(set(patience.delays_s)) == 12  # Jitter.
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "https://lamp.example: answered 503; trying again until it succeeds"),
        ("INFO", "https://lamp.example: reached again"),
    ]


def test_the_delay_begins_anew_after_a_success(
    write_change: WriteChange, start: Start, patience: Patience, finish: Finish
) -> None:
    failures = [DeliveryError("no")] * 5
    receiver = Receiver(*failures, None, *failures)
    delivery = start(receiver)
    for number in (1, 2):
        write_change(number=number)
    finish(delivery)
    assert receiver.taken == [1, 2]
    assert patience.delays_s[4] >= 4.0
    assert patience.delays_s[5] <= 0.5


def test_a_destination_may_ask_for_more_patience_within_reason(
    write_change: WriteChange, start: Start, patience: Patience, finish: Finish
) -> None:
    asked = (120.0, 0.0, 1e9)
    receiver = Receiver(*(DeliveryError("answered 429", retry_after_s=seconds) for seconds in asked))
    delivery = start(receiver)
    write_change(number=1)
    finish(delivery)
    first, second, third = patience.delays_s
    assert first == 120.0
    assert 0.25 <= second <= 1.0
    assert third == 600.0


def test_what_is_rejected_is_counted_and_passed_over(
    write_change: WriteChange, start: Start, caplog: pytest.LogCaptureFixture, finish: Finish
) -> None:
    receiver = Receiver(None, RejectedError("answered 400"), None, KeyError("camera"), RejectedError("answered 400"))
    delivery = start(receiver)
    for number in range(1, 7):
        write_change(number=number)
    finish(delivery)
    assert receiver.taken == [1, 3, 6]
    assert receiver.attempts == [1, 2, 3, 4, 5, 6]
    status = delivery.status
    assert (status.delivered, status.rejected, status.failed_attempts, status.pending) == (3, 3, 0, 0)
    assert (status.is_up, status.last_error) == (True, "answered 400")
    assert caplog.text.count("refuses a message for good: answered 400") == 1  # No flood.


def test_what_was_not_delivered_is_delivered_after_the_next_start(
    store: EventStore, write_change: WriteChange, start: Start
) -> None:
    down = Receiver(*[DeliveryError("no route")] * 1_000_000)
    delivery = start(down)
    write_change(number=1)
    write_change(number=2)
    delivery.close(timeout_s=0.05)
    assert down.is_closed
    assert down.taken == []
    assert not delivery.status.is_up
    assert delivery.status.pending == 2
    write_change(number=3)
    up = Receiver()
    start(up).close(timeout_s=60.0)
    assert up.taken == [1, 2, 3]


def test_closing_does_not_wait_for_one_that_hangs(write_change: WriteChange, start: Start) -> None:
    receiver = Receiver()
    receiver.gate.clear()
    delivery = start(receiver)
    write_change(number=1)
    write_change(number=2)
    delivery.close(timeout_s=0.05)
    assert delivery.status.pending == 2
    receiver.gate.set()
    delivery.close(timeout_s=60.0)
    assert receiver.taken == [1]  # Once told to give up it does not begin another.
    assert receiver.is_closed


def test_closing_gives_up_soon_on_one_that_cannot_be_reached(
    write_change: WriteChange, start: Start, wait_until: WaitUntil
) -> None:
    delivery = start(Receiver(*[DeliveryError("no route")] * 1_000_000))
    write_change(number=1)
    wait_until(lambda: not delivery.status.is_up)
    begun_s = time.monotonic()
    delivery.close(timeout_s=600.0)
    assert time.monotonic() - begun_s < 300.0
    assert delivery.status.pending == 1


def test_the_end_interrupts_a_long_delay(store: EventStore, write_change: WriteChange, wait_until: WaitUntil) -> None:
    receiver = Receiver(DeliveryError("answered 429", retry_after_s=500.0))
    delivery = Delivery(store, receiver)  # Waits in real time.
    write_change(number=1)
    wait_until(lambda: receiver.attempts)
    delivery.close(timeout_s=60.0)
    assert receiver.is_closed


def test_a_lost_connection_is_noticed_without_an_event(
    start: Start, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="meliad_edge.sinks.delivery")
    receiver = Receiver()
    delivery = start(receiver)
    wait_until(receiver.kept_up.is_set)
    receiver.up_errors = [ConnectionResetError("reset by peer"), ValueError("surprise")]
    receiver.kept_up.clear()
    wait_until(receiver.kept_up.is_set)
    wait_until(lambda: delivery.status.is_up)
    assert delivery.status.failed_attempts == 2
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert caplog.records[0].getMessage() == f"{receiver.name}: reset by peer; trying again until it succeeds"


def test_a_change_whose_delivery_cannot_be_noted_is_delivered_again(
    store: EventStore, write_change: WriteChange, start: Start, monkeypatch: pytest.MonkeyPatch, finish: Finish
) -> None:
    errors: list[Exception] = [sqlite3.OperationalError("database or disk is full")]
    really = store.set_delivered

    def set_delivered(destination: str, sequence: int) -> None:
        if errors:
            raise errors.pop()
        really(destination, sequence)

    monkeypatch.setattr(store, "set_delivered", set_delivered)
    receiver = Receiver()
    delivery = start(receiver)
    write_change(number=1)
    finish(delivery)
    assert receiver.taken == [1, 1]
    assert (delivery.status.delivered, delivery.status.failed_attempts) == (1, 1)
    assert delivery.status.last_error == "OperationalError: database or disk is full"


def test_credentials_in_an_error_are_not_seen(
    write_change: WriteChange, start: Start, caplog: pytest.LogCaptureFixture, finish: Finish
) -> None:
    receiver = Receiver(DeliveryError("https://me:S3CR3T@lamp.example\nsays no to token=S3CR3T"))
    delivery = start(receiver)
    write_change(number=1)
    finish(delivery)
    assert delivery.status.last_error == "https://lamp.example says no to token=***"
    assert "S3CR3T" not in caplog.text


def test_the_thread_closes_its_connection_to_the_store(
    store: EventStore, write_change: WriteChange, start: Start, monkeypatch: pytest.MonkeyPatch, finish: Finish
) -> None:
    closed_by: list[str] = []
    really = store.close

    def close() -> None:
        closed_by.append(threading.current_thread().name)
        really()

    monkeypatch.setattr(store, "close", close)
    delivery = start(Receiver())
    write_change(number=1)
    finish(delivery)
    assert closed_by == ["delivery https://lamp.example"]


def test_one_destination_does_not_hold_up_another(store: EventStore, write_change: WriteChange, start: Start) -> None:
    stuck, lively = Receiver(), Receiver()
    stuck.gate.clear()
    lively.name = "mqtt://bell.example"
    first, second = start(stuck), start(lively)
    for number in (1, 2):
        write_change(number=number)
    second.close(timeout_s=60.0)
    assert lively.taken == [1, 2]
    assert (first.status.pending, second.status.pending) == (2, 0)
    stuck.gate.set()
