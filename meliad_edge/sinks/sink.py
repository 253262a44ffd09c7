"""What a sink is, and the queue that every sink stands behind."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

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
        self._waiting: queue.Queue[Message | None] = queue.Queue(capacity)
        self._lossless = lossless
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
        return self._waiting.qsize()

    def publish(self, message: Message) -> None:
        """Queue one message; never raises, and never waits unless it is lossless."""
        self.published += 1
        try:
            self._waiting.put(message, block=self._lossless)
        except queue.Full:
            self.overflowed += 1

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Deliver what is waiting and close the sink, or give up after the time; ``published - delivered`` is lost."""
        until_s = time.monotonic() + timeout_s
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            self._giving_up.set()
            return
        self._worker.join(max(0.0, until_s - time.monotonic()))
        self._giving_up.set()

    def _deliver(self) -> None:
        while (message := self._waiting.get()) is not None:
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
