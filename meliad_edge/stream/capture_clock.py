"""When a picture of a network stream was captured: from its timestamp, because what waited on the way looks new.

A decoder hands over what the network and the opening of the stream have piled up as fast as it can: at that moment a
picture may be seconds old. RTP timestamps tell how far apart pictures were captured; what is not known is how long the
quickest of them was under way. All others are placed behind it on its time line.
"""

from __future__ import annotations

_JUMP_S = 10.0
# Clocks of cameras and of computers differ by less.
_DRIFT = 2e-4
# A picture for which the decoder had to wait that share of the time since the one before was not lying about.
_WAITED_SHARE = 0.5
# Pictures that come live, one after the other, and so much too late for so long: the camera's time line has moved.
_LATE_S, _LATE_FOR_S = 0.2, 3.0
# A decoder that never has to wait is no sign of a backlog for ever: it may just keep up.
_LONGEST_BACKLOG_S = 5.0


class CaptureClock:
    """Capture times of one connection, monotonic clock, without the constant time that every picture is under way."""

    def __init__(self) -> None:
        self._offset_s: float | None = None  # Arrival minus timestamp of the quickest picture.
        self._last_stream_s: float | None = None
        self._first_arrival_s = 0.0
        self._late_since_s: float | None = None

    def captured_s(self, arrived_s: float, waited_s: float, stream_s: float) -> float | None:
        """When a picture was captured; None while what was piled up before the connection comes in.

        Args:
            arrived_s: When the decoder had it, monotonic clock.
            waited_s: How long it was waited for.
            stream_s: Its timestamp, on a time line of the camera.
        """
        last_stream_s, self._last_stream_s = self._last_stream_s, stream_s
        if last_stream_s is None or not 0.0 <= stream_s - last_stream_s <= _JUMP_S:
            self._first_arrival_s = arrived_s
            self._offset_s = self._late_since_s = None
            return None
        gap_s = stream_s - last_stream_s
        is_live = gap_s > 0.0 and waited_s >= _WAITED_SHARE * gap_s
        if self._offset_s is None:
            if not is_live and arrived_s - self._first_arrival_s < _LONGEST_BACKLOG_S:
                return None
            self._offset_s = arrived_s - stream_s
            return arrived_s
        late_s = arrived_s - stream_s - self._offset_s
        if late_s <= 0.0 or self._has_moved(stream_s, late_s, is_live):
            self._offset_s = arrived_s - stream_s
            return arrived_s
        self._offset_s += min(late_s, _DRIFT * gap_s)
        return arrived_s - late_s

    def _has_moved(self, stream_s: float, late_s: float, is_live: bool) -> bool:
        """Whether pictures come live and late for so long that their time line, not the network, has changed.

        By the time line itself: a decoder that waits in vain gives the two pictures it held back seconds apart.
        """
        if late_s < _LATE_S:
            self._late_since_s = None
            return False
        if self._late_since_s is None or not is_live:
            self._late_since_s = stream_s
        if stream_s - self._late_since_s < _LATE_FOR_S:
            return False
        self._late_since_s = None
        return True
