"""Events on an MQTT broker, in topics laid out as Frigate's, with the cameras announced to Home Assistant.

MQTT 5, because in 3.1.1 a broker acknowledges even what it does not allow, and such an event would be lost unseen.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client, DisconnectFlags, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from meliad_edge import __version__, strict_json
from meliad_edge.event_store import Change
from meliad_edge.sinks.delivery import DeliveryError, RejectedError
from meliad_edge.sinks.destinations import MqttAddress

_logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
# A device without power is offline for the broker after one and a half times this.
_KEEP_ALIVE_S = 30
_LARGEST_SNAPSHOT_BYTES = 2 * 2**20
# What a packet holds besides topic and payload, at most: type, lengths, number, no properties.
_HEAD_BYTES = 16
_LARGEST_PACKET_BYTES = 2**28
_DISCOVERY_PREFIX = "homeassistant"
_NOT_ALLOWED = 0x87
# Topic name invalid, packet too large, payload format invalid: the same message has no better chance later.
_HOPELESS = frozenset({0x90, 0x95, 0x99})
# By last level of the topic: Home Assistant's component, and what its configuration adds.
_ENTITIES: dict[str, tuple[str, dict[str, str]]] = {
    "anomaly": ("binary_sensor", {"name": "Anomaly", "device_class": "problem"}),
    "condition": ("sensor", {"name": "Condition", "entity_category": "diagnostic"}),
    "drift": ("sensor", {"name": "Drift", "entity_category": "diagnostic"}),
    "score": ("sensor", {"name": "Peak score", "state_class": "measurement"}),
    "snapshot": ("image", {"name": "Latest anomaly", "content_type": "image/jpeg"}),
}


class MqttDestination:
    """Publishes every state change, and for each camera how it stands, retained.

    ========================  ========================================================================
    ``available``             ``online``, or ``offline`` by the last will
    ``events``                JSON ``{"type": "new|update|end", "before": ..., "after": ...}``
    ``<camera>/anomaly``      ``ON`` while an anomaly is open, else ``OFF``
    ``<camera>/condition``    ``ok``, or what is wrong with the camera
    ``<camera>/drift``        ``ok``, or what is wrong with its scores
    ``<camera>/score``        highest raw score of the latest anomaly
    ``<camera>/snapshot``     its picture, JPEG
    ========================  ========================================================================

    All but ``events`` are retained, all have QoS 1, and each waits for the acknowledgement of the one before. On every
    new connection the cameras are announced to Home Assistant and what is retained is published again.

    Args:
        address: The broker and the first levels of the topics.
        cameras: Names of what is watched.
        timeout_s: Longest wait for an answer of the broker.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        address: MqttAddress,
        cameras: Sequence[str],
        *,
        timeout_s: float = _TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = address.name
        self._address = address
        self._topics = _CameraTopics(address.prefix, cameras)
        self._announced = list(cameras)
        self._cameras = {camera: _CameraState() for camera in cameras}
        self._timeout_s = timeout_s
        self._clock = clock
        self._link: _Link | None = None
        self._published: dict[str, str] = {}  # Retained values by topic, over this link.
        self._may_announce = True

    def keep_up(self) -> None:
        """Connect, or answer for the connection.

        Raises:
            DeliveryError, OSError: There is no connection now.
        """
        with self._dropping_a_failed_link():
            self._connected().turn()

    def deliver(self, change: Change) -> None:
        """Publish one state change and what it means for its camera.

        Raises:
            DeliveryError, OSError: The broker cannot be reached, or does not allow it.
            RejectedError: The broker will never take it.
        """
        record = change.record
        camera = self._cameras.setdefault(record["camera"], _CameraState())
        with self._dropping_a_failed_link():
            link = self._connected()
            camera.take(change)
            message = {"type": record["state"], "before": change.before, "after": record}
            link.publish(f"{self._address.prefix}/events", strict_json.dumps(message).encode(), retain=False)
            has_new_picture = record["kind"] == "anomaly" and record["state"] != "update"
            self._publish_state(link, record["camera"], has_new_picture=has_new_picture)

    def close(self) -> None:
        """Say ``offline`` and disconnect."""
        if self._link is not None:
            with contextlib.suppress(DeliveryError, RejectedError, OSError):
                self._link.publish(self._available, b"offline", retain=True)
                self._link.disconnect()
            self._drop_link()

    @property
    def _available(self) -> str:
        return f"{self._address.prefix}/available"

    def _connected(self) -> _Link:
        if self._link is None:
            link = _Link(self._address, self._client_id(), self._available, self._timeout_s, self._clock)
            try:
                link.connect()
                self._published.clear()
                self._announce(link)
                for camera in self._cameras:
                    self._publish_state(link, camera, has_new_picture=True)
                link.publish(self._available, b"online", retain=True)
            except RejectedError as error:  # Of how the cameras stand; no event must be given up for it.
                link.close()
                raise DeliveryError(str(error)) from error
            except BaseException:
                link.close()
                raise
            self._link = link
        return self._link

    def _client_id(self) -> str:
        """The same after every start: a broker that still believes in the connection before ends that one first.

        Else the last will of the old one would come after the ``online`` of the new one.
        """
        parts = (socket.gethostname(), self._address.prefix, *self._announced)
        return f"meliad{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"

    @contextlib.contextmanager
    def _dropping_a_failed_link(self) -> Iterator[None]:
        try:
            yield
        except (DeliveryError, OSError):
            self._drop_link()
            raise

    def _drop_link(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _announce(self, link: _Link) -> None:
        """Home Assistant's MQTT discovery; a broker that reserves it for others does not keep events from coming."""
        if not self._may_announce:
            return
        try:
            for camera in self._announced:
                for topic, config in self._topics.discovery(camera, self._available):
                    link.publish(topic, strict_json.dumps(config).encode(), retain=True)
        except (_NotAllowedError, RejectedError) as error:
            self._may_announce = False
            _logger.warning("%s: cameras are not announced to Home Assistant: %s", self.name, error)

    def _publish_state(self, link: _Link, camera: str, *, has_new_picture: bool) -> None:
        state = self._cameras[camera]
        if has_new_picture and (snapshot := state.read_snapshot()) is not None:
            with contextlib.suppress(RejectedError):  # A picture too large must not keep a lamp from going on.
                link.publish(self._topics.topic(camera, "snapshot"), snapshot, retain=True)
        for level, value in state.values().items():
            topic = self._topics.topic(camera, level)
            if self._published.get(topic) != value:
                link.publish(topic, value.encode(), retain=True)
                self._published[topic] = value


@dataclass(slots=True)
class _CameraState:
    """How a camera stands, as far as it was delivered.

    Attributes:
        open_events: By kind, the condition of every event that has not ended.
        score: Of the latest anomaly, as text; None before the first.
        snapshot: Its picture.
    """

    open_events: dict[str, dict[str, str]] = field(default_factory=dict)
    score: str | None = None
    snapshot: Path | None = None

    def take(self, change: Change) -> None:
        """Take in a change; twice is the same as once."""
        record = change.record
        events = self.open_events.setdefault(record["kind"], {})
        if record["state"] == "end":
            events.pop(change.event, None)
        else:
            events[change.event] = record["condition"]
        if record["kind"] == "anomaly":
            score = record["score"]
            self.score = "None" if score is None else f"{score:.6g}"  # Home Assistant takes "None" for not known.
            if picture := record.get("picture"):
                self.snapshot = change.folder / Path(picture).name

    def values(self) -> dict[str, str]:
        """Payloads by last level of the topic."""
        values = {
            "anomaly": "ON" if self.open_events.get("anomaly") else "OFF",
            "condition": self._latest_condition("camera"),
            "drift": self._latest_condition("drift"),
        }
        return values if self.score is None else {"score": self.score, **values}

    def read_snapshot(self) -> bytes | None:
        """The picture, or None where there is none, not any more, or it is too large to be sent around."""
        if self.snapshot is None:
            return None
        try:
            if self.snapshot.stat().st_size > _LARGEST_SNAPSHOT_BYTES:
                return None
            return self.snapshot.read_bytes()
        except OSError:  # Pruned meanwhile; what the broker does must not be mixed up with it.
            return None

    def _latest_condition(self, kind: str) -> str:
        return next(reversed(self.open_events.get(kind, {}).values()), "ok")


class _CameraTopics:
    """Names of topics and of Home Assistant's entities; no two cameras share any.

    Args:
        prefix: First levels of every topic.
        cameras: Names that get theirs first.
    """

    def __init__(self, prefix: str, cameras: Sequence[str]) -> None:
        self._prefix = prefix
        self._node_prefix = _as_level(prefix)
        if self._node_prefix != prefix:
            self._node_prefix += f"-{_digest(prefix)}"
        self._levels: dict[str, str] = {}
        # Whoever needs no change keeps the name, whatever the order.
        for camera in sorted(cameras, key=lambda name: (_as_level(name) != name, name)):
            self._level(camera)

    def topic(self, camera: str, last_level: str) -> str:
        """The topic of one value of a camera."""
        return f"{self._prefix}/{self._level(camera)}/{last_level}"

    def discovery(self, camera: str, available: str) -> list[tuple[str, dict[str, Any]]]:
        """Topics and payloads that announce a camera to Home Assistant."""
        node = f"{self._node_prefix}_{self._level(camera)}"
        device = {
            "identifiers": [node],
            "name": camera,
            "manufacturer": "meliad-edge",
            "model": "Watched camera",
            "sw_version": __version__,
        }
        return [
            (
                f"{_DISCOVERY_PREFIX}/{component}/{node}/{level}/config",
                {
                    **details,
                    "unique_id": f"{node}_{level}",
                    "image_topic" if component == "image" else "state_topic": self.topic(camera, level),
                    "availability_topic": available,
                    "device": device,
                    "origin": {"name": "meliad-edge", "sw_version": __version__},
                },
            )
            for level, (component, details) in _ENTITIES.items()
        ]

    def _level(self, camera: str) -> str:
        if camera not in self._levels:
            level = _as_level(camera)
            if level in self._levels.values():
                level += f"-{_digest(camera)}"
            self._levels[camera] = level
        return self._levels[camera]


def _as_level(name: str) -> str:
    """A name as one level of a topic that Home Assistant accepts too."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:6]


class _NotAllowedError(DeliveryError):
    """The broker does not allow this user to publish there."""


class _Link:
    """One connection to a broker, driven by the thread that calls it; never used again once it failed.

    Args:
        address: The broker.
        client_id: What it knows us by.
        available: Topic of the last will.
        timeout_s: Longest wait for an answer.
        clock: Monotonic seconds.

    Attributes:
        largest_packet_bytes: Largest packet that the broker takes.
    """

    def __init__(
        self, address: MqttAddress, client_id: str, available: str, timeout_s: float, clock: Callable[[], float]
    ) -> None:
        self.largest_packet_bytes = _LARGEST_PACKET_BYTES
        self._address = address
        self._timeout_s = timeout_s
        self._clock = clock
        self._is_welcome = False
        self._end = "the connection to the broker is lost"
        self._answers: dict[int, ReasonCode] = {}
        self._client = Client(
            CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTv5, reconnect_on_failure=False
        )
        self._client.connect_timeout = timeout_s
        self._client.will_set(available, b"offline", qos=1, retain=True)
        if address.credentials is not None:
            self._client.username_pw_set(address.credentials.user, address.credentials.password or None)
        if address.is_encrypted:
            self._client.tls_set_context(ssl.create_default_context())
        self._client.on_connect = self._on_connect
        self._client.on_publish = self._on_publish
        self._client.on_disconnect = self._on_disconnect

    def connect(self) -> None:
        """Connect and wait for the welcome.

        Raises:
            DeliveryError, OSError: The broker cannot be reached, or refuses us.
        """
        self._client.connect(self._address.host, self._address.port, keepalive=_KEEP_ALIVE_S)
        self._turn_until(lambda: self._is_welcome)

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Publish with QoS 1 and wait for the acknowledgement.

        Raises:
            DeliveryError: It does not come, or says no.
            RejectedError: It says that it always will.
        """
        if len(topic.encode()) + len(payload) + _HEAD_BYTES > self.largest_packet_bytes:
            msg = f"{len(payload)} bytes for {topic}, and the broker takes {self.largest_packet_bytes} in all"
            raise RejectedError(msg)
        message = self._client.publish(topic, payload, qos=1, retain=retain)
        self._turn_until(lambda: message.mid in self._answers)
        answer = self._answers.pop(message.mid)
        if answer.is_failure:
            msg = f"the broker does not take {topic} ({answer})"
            if answer.value in _HOPELESS:
                raise RejectedError(msg)
            raise (_NotAllowedError if answer.value == _NOT_ALLOWED else DeliveryError)(msg)

    def turn(self, *, longest_s: float = 0.0) -> None:
        """Read and write what can be, and keep the connection alive.

        Raises:
            DeliveryError: It is lost.
        """
        # A goodbye of the broker leaves no socket and is no error.
        if self._client.loop(longest_s) != MQTTErrorCode.MQTT_ERR_SUCCESS or self._client.socket() is None:
            raise DeliveryError(self._end)

    def disconnect(self) -> None:
        """Tell the broker not to publish the last will."""
        self._client.disconnect()

    def close(self) -> None:
        """Close the socket as it is."""
        # They refer to us and we to the client: a circle, in which sockets would be left to the garbage collector.
        self._client.on_connect = self._client.on_publish = self._client.on_disconnect = None
        opened = self._client.socket()
        if opened is not None:
            opened.close()

    def _turn_until(self, condition: Callable[[], bool]) -> None:
        until_s = self._clock() + self._timeout_s
        while not condition():
            left_s = until_s - self._clock()
            if left_s <= 0.0:
                msg = f"the broker does not answer within {self._timeout_s:g} s"
                raise DeliveryError(msg)
            self.turn(longest_s=min(left_s, 1.0))

    def _on_connect(
        self, client: Client, userdata: Any, flags: Any, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._end = f"the broker refuses the connection ({reason})"
            return
        self._is_welcome = True
        self.largest_packet_bytes = getattr(properties, "MaximumPacketSize", _LARGEST_PACKET_BYTES)

    def _on_publish(self, client: Client, userdata: Any, mid: int, reason: ReasonCode, properties: Any) -> None:
        self._answers[mid] = reason

    def _on_disconnect(
        self, client: Client, userdata: Any, flags: DisconnectFlags, reason: ReasonCode, properties: Any
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._end = f"the broker ended the connection ({reason})"
