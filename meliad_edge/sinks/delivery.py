"""Delivery over the network: what the event store holds goes to a destination in order, for as long as that takes."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from meliad_edge.event_store import Change, EventStore
from meliad_edge.stream.backoff import Backoff
from meliad_edge.stream.uri import redact

_logger = logging.getLogger(__name__)

_CHECK_INTERVAL_S = 1.0
_BATCH = 100
_LONGEST_DELAY_S = 30.0
# A destination may ask for more patience than a failure costs, within reason.
_LONGEST_RETRY_AFTER_S = 600.0
# For a thread that was told to give up, to close its connections.
_LAST_TRY_S = 1.0
_FAREWELL_S = 2.0


class DeliveryError(Exception):
    """A destination cannot take a change now; it is offered again.

    Args:
        message: What failed.
        retry_after_s: How long the destination wants to be left alone; None leaves it to us.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RejectedError(Exception):
    """A destination will never take this change; the next one may be better."""


class Destination(Protocol):
    """A place on the network that takes state changes; all calls come from one thread."""

    @property
    def name(self) -> str:
        """Its address without credentials, the same after every start: the store counts under it."""
        ...

    def keep_up(self) -> None:
        """See to the connection, if one is held; called about every second while no change is waiting.

        Raises:
            DeliveryError, OSError: It cannot be reached now.
        """
        ...

    def deliver(self, change: Change) -> None:
        """Hand over one state change; returns once the destination has taken it.

        Raises:
            DeliveryError, OSError: Not now.
            RejectedError: Never.
        """
        ...

    def close(self) -> None:
        """Say goodbye and release the connection; never raises."""
        ...


@dataclass(frozen=True, slots=True)
class DeliveryStatus:
    """How a destination does.

    Attributes:
        name: Its address without credentials.
        is_up: Whether the latest attempt to reach it succeeded.
        delivered: State changes it took since the start.
        rejected: State changes it refused for good since the start.
        failed_attempts: Attempts since the start that failed and were, or will be, repeated.
        pending: State changes in the store that it has yet to take.
        lost: State changes that were pruned before it could take them, ever.
        last_error: The latest failure without credentials; ``""`` when there was none.
    """

    name: str
    is_up: bool
    delivered: int
    rejected: int
    failed_attempts: int
    pending: int
    lost: int
    last_error: str


class Delivery:
    """Delivers to one destination from a thread of its own, each state change at least once and in order.

    What cannot be delivered now is tried again with capped back-off and jitter; what was not delivered at the end
    stays in the store for the next start.

    Args:
        store: Where the changes come from.
        destination: Where they go; closed by the thread.
        random_source: Where the jitter comes from; None seeds one.
        wait: Waits until an event is set or the seconds are over. The default waits in real time.
    """

    def __init__(
        self,
        store: EventStore,
        destination: Destination,
        *,
        random_source: random.Random | None = None,
        wait: Callable[[threading.Event, float], object] = threading.Event.wait,
    ) -> None:
        self.name = destination.name
        self._store = store
        self._destination = destination
        self._backoff = Backoff(random_source or random.Random(), cap_s=_LONGEST_DELAY_S)
        self._wait = wait
        self._is_up = True
        self._delivered = self._rejected = self._failed_attempts = 0
        self._last_error = ""
        self._closing = threading.Event()
        self._giving_up = threading.Event()
        store.undelivered(self.name)  # What is written from now on is meant for it, not from when the thread runs.
        # A daemon, so that a destination that hangs cannot keep the process alive; close() waits for it first.
        self._thread = threading.Thread(target=self._run, name=f"delivery {self.name}", daemon=True)
        self._thread.start()

    @property
    def status(self) -> DeliveryStatus:
        """How it does now; asks the store, from the calling thread."""
        return DeliveryStatus(
            name=self.name,
            is_up=self._is_up,
            delivered=self._delivered,
            rejected=self._rejected,
            failed_attempts=self._failed_attempts,
            pending=self._store.pending(self.name),
            lost=self._store.lost(self.name),
            last_error=self._last_error,
        )

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Deliver what is waiting, or give up after the time, sooner on a destination that cannot be reached.

        What is left stays in the store for the next start.
        """
        self._closing.set()
        self._store.wake()
        self._thread.join(min(_LAST_TRY_S, timeout_s))
        if self._is_up:
            self._thread.join(max(0.0, timeout_s - _LAST_TRY_S))
        self._giving_up.set()
        self._thread.join(_FAREWELL_S)

    def _run(self) -> None:
        try:
            while not self._giving_up.is_set():
                # Before looking: what was written until close() is still delivered, and what comes in is not missed.
                is_closing, revision = self._closing.is_set(), self._store.revision
                try:
                    is_idle = not self._deliver_waiting()
                    if is_idle and not is_closing:
                        self._destination.keep_up()
                        self._note_success()
                except Exception as error:  # Whatever a destination does, the watch and the next attempt go on.
                    self._note_failure(error)
                    continue
                if is_idle and is_closing:
                    return
                if is_idle:
                    self._store.wait(_CHECK_INTERVAL_S, since=revision)
        finally:
            self._destination.close()
            self._store.close()

    def _deliver_waiting(self) -> bool:
        """Deliver the next changes; False when there are none."""
        changes = self._store.undelivered(self.name, limit=_BATCH)
        for change in changes:
            if self._giving_up.is_set():
                break
            rejection = self._deliver(change)
            self._store.set_delivered(self.name, change.sequence)
            if rejection is None:
                self._delivered += 1
            else:
                self._note_rejection(rejection)
            self._note_success()
        return bool(changes)

    def _deliver(self, change: Change) -> Exception | None:
        """Hand over one change; returns why it will never be taken."""
        try:
            self._destination.deliver(change)
        except (DeliveryError, OSError):
            raise
        except Exception as error:  # Rejected; or a defect in the making of the message, which would stop all others.
            return error
        return None

    def _note_success(self) -> None:
        self._backoff.reset()
        if not self._is_up:
            self._is_up = True
            _logger.info("%s: reached again", self.name)

    def _note_rejection(self, error: Exception) -> None:
        self._last_error = _describe(error)
        if self._rejected == 0:
            _logger.warning("%s: refuses a message for good: %s", self.name, self._last_error)
        self._rejected += 1

    def _note_failure(self, error: Exception) -> None:
        self._last_error = _describe(error)
        self._failed_attempts += 1
        if self._is_up:
            self._is_up = False
            _logger.warning("%s: %s; trying again until it succeeds", self.name, self._last_error)
        delay_s = self._backoff.next_delay_s()
        if isinstance(error, DeliveryError) and error.retry_after_s is not None:
            delay_s = max(delay_s, min(error.retry_after_s, _LONGEST_RETRY_AFTER_S))
        # At the end there is one more attempt at once, then as many as the time allows.
        self._wait(self._giving_up if self._closing.is_set() else self._closing, delay_s)


def _describe(error: Exception) -> str:
    """One line without credentials; the type where the text alone says little."""
    if isinstance(error, OSError):
        text = str(error.strerror or error or type(error).__name__)
    elif isinstance(error, (DeliveryError, RejectedError)):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    return redact(" ".join(text.split()))
