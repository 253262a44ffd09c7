"""What a sink is, and the queue that every sink stands behind."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from typing import Protocol

from meliad_edge.events import Event

_logger = logging.getLogger(__name__)

_CAPACITY = 64


class Sink(Protocol):
    """A place where events go. Publishing may take its time and may fail: it happens in a thread of its own."""

    @property
    def name(self) -> str:
        """What it is called in reports, without credentials."""
        ...

    def publish(self, event: Event) -> None:
        """Deliver one state change of an event."""
        ...

    def close(self) -> None:
        """Finish what was begun and release files and connections."""
        ...


class QueuedSink:
    """Delivers events to a sink from one worker thread, so that publishing never waits.

    Args:
        sink: Where the events go.
        capacity: Most events waiting; with more, the newest is given up and counted.

    Attributes:
        published: State changes given to it.
        delivered: State changes that the sink took.
        overflowed: State changes given up because the sink was too slow.
        failed: State changes that the sink refused.
    """

    def __init__(self, sink: Sink, *, capacity: int = _CAPACITY) -> None:
        self._sink = sink
        self._waiting: queue.Queue[Event | None] = queue.Queue(capacity)
        self.published = self.delivered = self.overflowed = self.failed = 0
        # A daemon, so that a sink that hangs cannot keep the process alive; close() waits for it first.
        self._worker = threading.Thread(target=self._deliver, name=f"sink {sink.name}", daemon=True)
        self._worker.start()

    @property
    def name(self) -> str:
        """Name of the sink behind."""
        return self._sink.name

    def publish(self, event: Event) -> None:
        """Queue one state change; never waits and never raises."""
        self.published += 1
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self.overflowed += 1

    def close(self, *, timeout_s: float = 10.0) -> None:
        """Deliver what is waiting and close the sink, or give up after the time; ``published - delivered`` is lost."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=timeout_s)
            self._worker.join(timeout_s)

    def _deliver(self) -> None:
        while (event := self._waiting.get()) is not None:
            try:
                self._sink.publish(event)
                self.delivered += 1
            except Exception as error:  # Whatever a sink does, the watch goes on and the loss is counted.
                if self.failed == 0:
                    _logger.warning("sink %s: %s: %s", self.name, type(error).__name__, error)
                self.failed += 1
        self._sink.close()
