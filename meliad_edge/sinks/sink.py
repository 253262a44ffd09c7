"""What a sink is, and the queue that every sink stands behind."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from meliad_edge.events import Event, EventState

_logger = logging.getLogger(__name__)

_CAPACITY = 64
_RETRY_S = 1.0
Message = TypeVar("Message")
Taken = TypeVar("Taken", contravariant=True)


class UnavailableError(Exception):
    """A sink cannot take a message now, for example because the disk is full; it is offered again."""


class Sink(Protocol[Taken]):
    """A place where messages go, most of them state changes of events.

    Publishing may take its time and may fail: it happens in a thread of its own.
    """

    @property
    def name(self) -> str:
        """What it is called in reports, without credentials."""
        ...

    def publish(self, message: Taken, /) -> None:
        """Deliver one message.

        Raises:
            UnavailableError: Not now; it is offered again until it is taken.
        """
        ...

    def close(self) -> None:
        """Finish what was begun and release files and connections."""
        ...


class QueuedSink(Generic[Message]):
    """Delivers messages to a sink from one worker thread, so that publishing never waits.

    Args:
        sink: Where the messages go.
        capacity: Most messages waiting; with more, the newest is given up and counted.
        lossless: With more, let the publisher wait instead: where it reads files, nothing is missed meanwhile.
        wait: Waits before a message is offered again; returns whether to give up. None waits in real time.

    Attributes:
        published: Messages given to it.
        delivered: Messages that the sink took.
        overflowed: Messages given up because the sink was too slow.
        failed: Messages that the sink refused.
    """

    def __init__(
        self,
        sink: Sink[Message],
        *,
        capacity: int = _CAPACITY,
        lossless: bool = False,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._sink = sink
        self._capacity = capacity
        self._lossless = lossless
        self._waiting: deque[Message] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._giving_up = threading.Event()
        self._wait = wait or self._giving_up.wait
        self.published = self.delivered = self.overflowed = self.failed = 0
        # A daemon, so that a sink that hangs cannot keep the process alive; close() waits for it first.
        self._worker = threading.Thread(target=self._deliver, name=f"sink {sink.name}", daemon=True)
        self._worker.start()

    @property
    def name(self) -> str:
        """Name of the sink behind."""
        return self._sink.name

    @property
    def pending(self) -> int:
        """Messages that wait."""
        return len(self._waiting)

    def publish(self, message: Message) -> None:
        """Queue one message; never raises, and never waits unless it is lossless."""
        with self._changed:
            self.published += 1
            if self._lossless:
                self._changed.wait_for(self._has_room)
            if self._takes(message):
                self._waiting.append(message)
                self._changed.notify_all()
            else:
                self.overflowed += 1

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Deliver what is waiting and close the sink, or give up after the time; ``published - delivered`` is lost."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._worker.join(timeout_s)
        self._giving_up.set()

    def _has_room(self) -> bool:
        return len(self._waiting) < self._capacity

    def _takes(self, message: Message) -> bool:
        """Whether a message is queued; called with the lock held."""
        return self._has_room()

    def _deliver(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if not self._waiting:
                    break
                message = self._waiting.popleft()
                self._changed.notify_all()
            try:
                self._offer(message)
                self.delivered += 1
            except Exception as error:  # Whatever a sink does, the watch goes on and the loss is counted.
                if self.failed == 0:
                    _logger.warning("sink %s: %s: %s", self.name, type(error).__name__, error)
                self.failed += 1
        self._sink.close()

    def _offer(self, message: Message) -> None:
        """Publish, again and again while the sink is not available."""
        is_told = False
        while True:
            try:
                return self._sink.publish(message)
            except UnavailableError as error:
                if not is_told:
                    _logger.warning("sink %s: %s; trying again", self.name, error)
                    is_told = True
                if self._wait(_RETRY_S):
                    raise


class EventQueue(QueuedSink[Event]):
    """A queue in which an event that the sink knows of never stays open: its end is not given up.

    With more waiting than may, an update gives way first, for what comes later says more. Without one a new event is
    given up, and nothing but ends is queued, each of an event that was taken before: about as many again at most.

    Args:
        sink: Where the events go.
        capacity, lossless: As in :class:`QueuedSink`.
    """

    def __init__(self, sink: Sink[Event], *, capacity: int = _CAPACITY, lossless: bool = False) -> None:
        self._open: set[str] = set()  # Events of which the sink gets something and the end is yet to come.
        super().__init__(sink, capacity=capacity, lossless=lossless)

    def _takes(self, event: Event) -> bool:
        is_end = event.state is EventState.END
        is_taken = self._has_room() or self._drop_update() or (is_end and event.id in self._open)
        if is_end:
            self._open.discard(event.id)
        elif is_taken:
            self._open.add(event.id)
        return is_taken

    def _drop_update(self) -> bool:
        update = next((n for n, event in enumerate(self._waiting) if event.state is EventState.UPDATE), None)
        if update is None:
            return False
        del self._waiting[update]
        self.overflowed += 1
        return True
