"""MQTT with a real broker, Mosquitto, on this machine."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("paho.mqtt.enums", reason="needs the extra monitor")

from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from meliad_edge.event_store import Change, EventStore
from meliad_edge.events import EventKind, EventState
from meliad_edge.sinks.delivery import Delivery, DeliveryError, RejectedError
from meliad_edge.sinks.destinations import MqttAddress
from meliad_edge.sinks.mqtt import MqttDestination
from meliad_edge.stream.credentials import Credentials

WriteChange = Callable[..., dict[str, Any]]
Finish = Callable[[Delivery], None]
WaitUntil = Callable[..., None]
MakeCertificate = Callable[[str], tuple[Path, Path]]

MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin")
pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="needs the broker mosquitto")

CAMERA = "line 3/belt.mp4"
BELT = "meliad/line_3_belt_mp4"


@dataclass
class Broker:
    """A Mosquitto that keeps nothing on disk: what was retained is gone when it is killed."""

    folder: Path
    settings: tuple[str, ...] = ("allow_anonymous true",)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if not self.port:
            with socket.create_server(("127.0.0.1", 0)) as reserved:
                self.port = reserved.getsockname()[1]
        config = self.folder / "mosquitto.conf"
        config.write_text("\n".join(["user root", f"listener {self.port} 127.0.0.1", *self.settings]) + "\n")
        with (self.folder / "mosquitto.log").open("ab") as log:
            self.process = subprocess.Popen([str(MOSQUITTO), "-c", str(config)], stdout=log, stderr=log)
        deadline = time.monotonic() + 60.0
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
            except OSError:
                assert self.process.poll() is None, (self.folder / "mosquitto.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def address(self, user: str | None = None, password: str = "", **changes: Any) -> MqttAddress:
        credentials = None if user is None else Credentials(user, password)
        return MqttAddress(
            **{"host": "127.0.0.1", "port": self.port, "is_encrypted": False, "prefix": "meliad", **changes},
            credentials=credentials,
        )


@dataclass
class Listener:
    """A subscriber to everything; it is there once it was created."""

    broker: Broker
    user: str | None = None
    password: str = ""
    messages: list[tuple[str, bytes]] = field(default_factory=list)
    retained: dict[str, bytes] = field(default_factory=dict)
    _subscribed: threading.Event = field(default_factory=threading.Event)
    _asked: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        if self.user is not None:
            self._client.username_pw_set(self.user, self.password)
        self._client.on_connect = lambda client, *_: client.subscribe("#", qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._take
        self._client.connect("127.0.0.1", self.broker.port)
        self._client.loop_start()
        assert self._subscribed.wait(60.0)

    def _take(self, client: Client, userdata: Any, message: Any) -> None:
        if message.topic == "asked":
            self._asked.set()
        elif message.retain:
            self.retained[message.topic] = message.payload
        else:
            self.messages.append((message.topic, message.payload))

    def catch_up(self) -> None:
        """Wait for what the broker has for us now: it answers in order."""
        self._asked.clear()
        self._client.publish("asked", b"", qos=1)
        assert self._asked.wait(60.0)

    def payloads(self, topic: str) -> list[bytes]:
        return [payload for found, payload in self.messages if found == topic]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(payload) for payload in self.payloads("meliad/events")]

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def make_broker(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    brokers = []

    def make(*settings: str) -> Broker:
        folder = tmp_path / f"broker{len(brokers)}"
        folder.mkdir()
        brokers.append(Broker(folder, settings) if settings else Broker(folder))
        brokers[-1].start()
        return brokers[-1]

    yield make
    for broker in brokers:
        broker.kill()


@pytest.fixture
def broker(make_broker: Callable[..., Broker]) -> Broker:
    return make_broker()


@pytest.fixture
def listen(broker: Broker) -> Iterator[Callable[..., Listener]]:
    """Subscribe to a broker, by default to the one of the test."""
    listeners = []

    def start(at: Broker = broker, **options: Any) -> Listener:
        listeners.append(Listener(at, **options))
        listeners[-1].catch_up()
        return listeners[-1]

    yield start
    for listener in listeners:
        listener.close()


Listen = Callable[..., Listener]


@pytest.fixture
def connect(broker: Broker) -> Iterator[Callable[..., MqttDestination]]:
    """A destination at a broker, by default at the one of the test."""
    destinations = []

    def make(address: MqttAddress | None = None, *cameras: str, timeout_s: float = 60.0) -> MqttDestination:
        destinations.append(MqttDestination(address or broker.address(), cameras or (CAMERA,), timeout_s=timeout_s))
        return destinations[-1]

    yield make
    for destination in destinations:
        destination.close()


Connect = Callable[..., MqttDestination]


@pytest.fixture
def deliver_all(store: EventStore) -> Callable[[MqttDestination], None]:
    """Deliver what is in the store, in the thread of the test."""
    store.undelivered("test")

    def deliver(destination: MqttDestination) -> None:
        for change in store.undelivered("test", limit=10_000):
            destination.deliver(change)
            store.set_delivered("test", change.sequence)

    return deliver


DeliverAll = Callable[[MqttDestination], None]


def test_an_event_from_its_beginning_to_its_end(
    connect: Connect, listen: Listen, write_change: WriteChange, deliver_all: DeliverAll
) -> None:
    listener = listen()
    destination = connect()
    records = [
        write_change(files={"picture.jpg": b"first picture"}),
        write_change(EventState.UPDATE, score=2.5),
        write_change(EventState.END, score=2.5, files={"picture.jpg": b"last picture"}),
    ]
    deliver_all(destination)
    listener.catch_up()
    assert listener.events == [
        {"type": "new", "before": None, "after": records[0]},
        {"type": "update", "before": records[0], "after": records[1]},
        {"type": "end", "before": records[1], "after": records[2]},
    ]
    assert listener.payloads(f"{BELT}/anomaly") == [b"OFF", b"ON", b"OFF"]
    assert listener.payloads(f"{BELT}/score") == [b"1.92", b"2.5"]
    # The store holds the last picture by now; a prompt delivery would have found the first one first.
    assert listener.payloads(f"{BELT}/snapshot") == [b"last picture", b"last picture"]
    assert listener.payloads("meliad/available") == [b"online"]
    late = listen()
    assert late.messages == []  # Events are not retained.
    assert {topic: payload for topic, payload in late.retained.items() if topic.startswith("meliad/")} == {
        "meliad/available": b"online",
        f"{BELT}/anomaly": b"OFF",
        f"{BELT}/condition": b"ok",
        f"{BELT}/drift": b"ok",
        f"{BELT}/score": b"2.5",
        f"{BELT}/snapshot": b"last picture",
    }


def test_a_camera_is_on_until_its_last_anomaly_ends(
    connect: Connect, listen: Listen, write_change: WriteChange, deliver_all: DeliverAll
) -> None:
    listener = listen()
    destination = connect(None, "belt", "lid")
    seen = []
    for state, number, camera in (
        (EventState.NEW, 1, "belt"),
        (EventState.NEW, 2, "belt"),
        (EventState.NEW, 3, "lid"),
        (EventState.END, 1, "belt"),
        (EventState.UPDATE, 2, "belt"),
        (EventState.END, 2, "belt"),
    ):
        write_change(state, number=number, camera=camera)
        deliver_all(destination)
        listener.catch_up()
        seen.append((listener.payloads("meliad/belt/anomaly")[-1], listener.payloads("meliad/lid/anomaly")[-1]))
    on, off = b"ON", b"OFF"
    assert seen == [(on, off), (on, off), (on, on), (on, on), (on, on), (off, on)]


def test_the_condition_of_a_camera_and_of_its_scores(
    connect: Connect, listen: Listen, write_change: WriteChange, deliver_all: DeliverAll
) -> None:
    listener = listen()
    destination = connect(None, "belt")
    camera, drift = EventKind.CAMERA, EventKind.DRIFT
    for state, number, kind, condition in (
        (EventState.NEW, 1, camera, "frozen"),
        (EventState.NEW, 2, drift, "shifted"),
        (EventState.END, 1, camera, "frozen"),
        (EventState.NEW, 3, camera, "black"),
        (EventState.END, 2, drift, "shifted"),
    ):
        write_change(state, number=number, camera="belt", kind=kind, condition=condition, files={"picture.jpg": b"x"})
    deliver_all(destination)
    listener.catch_up()
    assert listener.payloads("meliad/belt/condition") == [b"ok", b"frozen", b"ok", b"black"]
    assert listener.payloads("meliad/belt/drift") == [b"ok", b"shifted", b"ok"]
    assert listener.payloads("meliad/belt/anomaly") == [b"OFF"]
    assert listener.payloads("meliad/belt/snapshot") == []  # It shows the latest anomaly.
    assert [event["after"]["condition"] for event in listener.events][:2] == ["frozen", "shifted"]


def test_home_assistant_finds_every_camera(connect: Connect, listen: Listen) -> None:
    cameras = (CAMERA, "Décor", "lid")
    connect(None, *cameras).keep_up()
    retained = listen().retained
    configs = {topic: json.loads(payload) for topic, payload in retained.items() if topic.startswith("homeassistant/")}
    assert len(configs) == 15
    for topic, config in configs.items():
        _, component, node, level, last = topic.split("/")
        assert last == "config"
        assert set(node) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
        assert config["unique_id"] == f"{node}_{level}"
        assert config["availability_topic"] == "meliad/available"
        assert config["device"]["identifiers"] == [node]
        assert config["origin"]["name"] == "meliad-edge"
        value_topic = config["image_topic" if component == "image" else "state_topic"]
        assert value_topic.startswith("meliad/")
        # What it says now; score and picture come with the first anomaly.
        assert (value_topic in retained) == (level not in ("score", "snapshot"))
    assert len({config["unique_id"] for config in configs.values()}) == 15
    assert {config["device"]["name"] for config in configs.values()} == set(cameras)
    kinds = {(topic.split("/")[1], topic.split("/")[3]) for topic in configs}
    assert kinds == {
        ("binary_sensor", "anomaly"), ("sensor", "condition"), ("sensor", "drift"), ("sensor", "score"),
        ("image", "snapshot"),
    }  # fmt: skip
    anomaly = configs["homeassistant/binary_sensor/meliad_lid/anomaly/config"]
    assert (anomaly["device_class"], anomaly["state_topic"]) == ("problem", "meliad/lid/anomaly")


def test_no_two_cameras_share_a_topic_and_no_name_reaches_beyond_its_own(
    connect: Connect, listen: Listen, write_change: WriteChange, deliver_all: DeliverAll
) -> None:
    cameras = ["a/b", "a+b", "a#b", "a_b", "a b", "é", "è", "$SYS", "#", "+", "../available", "A_b"]
    destination = connect(None, *cameras)
    for number, camera in enumerate(cameras):
        write_change(number=number, camera=camera, score=float(number))
    deliver_all(destination)
    retained = listen().retained
    scores = {topic: float(payload) for topic, payload in retained.items() if topic.endswith("/score")}
    assert sorted(scores.values()) == [float(number) for number in range(len(cameras))]
    assert all(len(topic.split("/")) == 3 for topic in scores)
    assert scores["meliad/a_b/score"] == cameras.index("a_b")  # The one whose name needs no change keeps it.
    by_device = {}
    for topic, payload in retained.items():
        if topic.startswith("homeassistant/sensor/") and topic.endswith("/score/config"):
            config = json.loads(payload)
            by_device[config["device"]["name"]] = config["state_topic"]
    assert {name: scores[topic] for name, topic in by_device.items()} == {
        name: float(number) for number, name in enumerate(cameras)
    }
    again = connect(None, *reversed(cameras))  # The order on the command line does not matter.
    again.keep_up()
    assert {topic for topic in listen().retained if topic.startswith("homeassistant/")} == {
        topic for topic in retained if topic.startswith("homeassistant/")
    }


def test_prefixes_do_not_share_devices(connect: Connect, listen: Listen, broker: Broker) -> None:
    for prefix in ("plant/a", "plant_a", "plant/b"):
        connect(broker.address(prefix=prefix), "belt").keep_up()
    retained = listen().retained
    configs = [json.loads(payload) for topic, payload in retained.items() if topic.startswith("homeassistant/")]
    assert len(configs) == 15
    assert len({config["device"]["identifiers"][0] for config in configs}) == 3
    assert retained["plant/a/available"] == retained["plant/b/available"] == b"online"


def test_a_goodbye_is_said_once(connect: Connect, listen: Listen) -> None:
    listener = listen()
    destination = connect()
    destination.keep_up()
    destination.close()
    listener.catch_up()
    assert listener.payloads("meliad/available") == [b"online", b"offline"]
    assert listen().retained["meliad/available"] == b"offline"


def test_a_killed_watch_is_offline(broker: Broker, listen: Listen, wait_until: WaitUntil) -> None:
    script = (
        "import sys, time; from meliad_edge.sinks.destinations import MqttAddress; "
        "from meliad_edge.sinks.mqtt import MqttDestination; "
        "MqttDestination(MqttAddress('127.0.0.1', int(sys.argv[1]), False, 'meliad'), ['belt']).keep_up(); "
        "time.sleep(600)"
    )
    listener = listen()
    with subprocess.Popen([sys.executable, "-c", script, str(broker.port)]) as watch:
        try:
            wait_until(lambda: listener.payloads("meliad/available") == [b"online"])
        finally:
            watch.kill()
    wait_until(lambda: listener.payloads("meliad/available") == [b"online", b"offline"])
    assert listen().retained["meliad/available"] == b"offline"


def test_the_last_will_of_a_connection_that_was_replaced_does_not_win(connect: Connect, listen: Listen) -> None:
    """As after a power cut: the broker still believes in the old connection when the device is back."""
    listener = listen()
    old, new = connect(), connect()
    old.keep_up()
    new.keep_up()
    listener.catch_up()
    assert listener.payloads("meliad/available") == [b"online", b"offline", b"online"]
    with pytest.raises(DeliveryError, match="the connection to the broker is lost"):
        keep_up_until_it_fails(old)


def keep_up_until_it_fails(destination: MqttDestination) -> None:
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        destination.keep_up()
        time.sleep(0.01)


def test_a_broker_that_says_why_it_goes_is_quoted(broker: Broker, connect: Connect) -> None:
    """Mosquitto 2.0 says nothing; others do."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def welcome_and_leave() -> None:
            device, _ = server.accept()
            device.recv(4096)
            device.sendall(b"\x20\x03\x00\x00\x00" + b"\xe0\x01\x8b")  # CONNACK, DISCONNECT "server shutting down".
            device.recv(1)
            device.close()

        threading.Thread(target=welcome_and_leave, daemon=True).start()
        with pytest.raises(DeliveryError, match=r"the broker ended the connection \(Server shutting down\)"):
            connect(broker.address(port=server.getsockname()[1])).keep_up()


def test_everything_retained_comes_back_after_a_restart_of_the_broker(
    broker: Broker,
    store: EventStore,
    connect: Connect,
    listen: Listen,
    write_change: WriteChange,
    wait_until: WaitUntil,
    finish: Finish,
) -> None:
    delivery = Delivery(store, connect(None, "belt", "lid"))
    write_change(camera="belt", files={"picture.jpg": b"picture"})
    wait_until(lambda: delivery.status.delivered == 1)
    retained = listen().retained
    assert retained["meliad/belt/snapshot"] == b"picture"
    broker.kill()
    wait_until(lambda: not delivery.status.is_up)  # Without an event.
    broker.start()
    wait_until(lambda: delivery.status.is_up)
    again = listen().retained
    assert again == retained
    assert len(again) == 1 + 2 * 3 + 2 + 10
    finish(delivery)


def test_nothing_is_lost_or_overtakes_when_the_broker_is_killed(
    broker: Broker,
    store: EventStore,
    connect: Connect,
    listen: Listen,
    write_change: WriteChange,
    wait_until: WaitUntil,
    finish: Finish,
) -> None:
    may_return = threading.Event()
    is_waiting = threading.Event()

    def wait(event: threading.Event, delay_s: float) -> None:
        is_waiting.set()
        may_return.wait(60.0)

    delivery = Delivery(store, connect(), wait=wait)
    received: list[str] = []
    for kill in range(3):
        listener = listen()  # Before the first event: what comes without a listener is nobody's.
        may_return.set()
        for number in range(10):
            write_change(number=100 * kill + number)
        wait_until(lambda kill=kill: store.pending(delivery.name) == 0)
        listener.catch_up()
        received += [event["after"]["event"] for event in listener.events]
        may_return.clear()
        is_waiting.clear()
        listener.close()
        broker.kill()
        for number in range(10, 20):
            write_change(number=100 * kill + number)
        wait_until(is_waiting.is_set)
        broker.start()
    listener = listen()
    may_return.set()
    finish(delivery)
    listener.catch_up()
    received += [event["after"]["event"] for event in listener.events]
    written = [f"20260921T141320.000Z-{100 * kill + number:06x}" for kill in range(3) for number in range(20)]
    assert received == written
    assert (delivery.status.delivered, delivery.status.pending) == (60, 0)


class BadLine:
    """A TCP line to a broker that breaks after so many bytes to it, once per number; then it holds."""

    def __init__(self, port: int, breaks: list[int]) -> None:
        self._target = port
        self._breaks = breaks
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.broken = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        # close() alone would leave accept() waiting.
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                device, _ = self._server.accept()
            except OSError:
                return
            broker = socket.create_connection(("127.0.0.1", self._target))
            budget = self._breaks.pop(0) if self._breaks else None
            threading.Thread(target=self._pump, args=(broker, device, None), daemon=True).start()
            threading.Thread(target=self._pump, args=(device, broker, budget), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, budget: int | None) -> None:
        try:
            while data := source.recv(4096):
                target.sendall(data if budget is None else data[:budget])
                if budget is not None:
                    budget -= len(data)
                    if budget <= 0:
                        self.broken += 1
                        break
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def test_nothing_is_lost_or_overtakes_on_a_line_that_breaks_in_the_middle_of_messages(
    broker: Broker, store: EventStore, connect: Connect, listen: Listen, write_change: WriteChange, finish: Finish
) -> None:
    random_source = random.Random(0)
    line = BadLine(broker.port, [random_source.randint(1, 9000) for _ in range(25)])
    listener = listen()
    destination = connect(broker.address(port=line.port), "belt")
    delivery = Delivery(store, destination, wait=lambda event, delay_s: None)
    written = [write_change(number=number, camera="belt") for number in range(150)]
    finish(delivery)
    listener.catch_up()
    received = [event["after"] for event in listener.events]
    assert line.broken == 25
    assert delivery.status.delivered == 150
    # At least once: what was taken without our seeing the acknowledgement comes again, right behind itself.
    once = [record for record, before in zip(received, [None, *received], strict=False) if record != before]
    assert once == written
    line.close()


def test_a_wrong_password_is_said_without_it_and_tried_again(
    make_broker: Callable[..., Broker],
    tmp_path: Path,
    store: EventStore,
    connect: Connect,
    write_change: WriteChange,
    wait_until: WaitUntil,
    caplog: pytest.LogCaptureFixture,
    finish: Finish,
) -> None:
    passwords = tmp_path / "passwords"
    passwords.write_text("watch:right\n")
    subprocess.run(["mosquitto_passwd", "-U", passwords], check=True)
    broker = make_broker("allow_anonymous false", f"password_file {passwords}")
    for address in (broker.address("watch", "S3CR3T"), broker.address()):
        destination = connect(address)
        delivery = Delivery(store, destination)
        write_change()
        wait_until(lambda delivery=delivery: delivery.status.failed_attempts > 0)
        delivery.close(timeout_s=0.0)
        assert delivery.status.last_error == "the broker refuses the connection (Not authorized)"
    assert "S3CR3T" not in caplog.text
    assert caplog.text.count("trying again until it succeeds") == 2
    assert destination.name == f"mqtt://127.0.0.1:{broker.port}/meliad"
    delivery = Delivery(store, connect(broker.address("watch", "right")))
    finish(delivery)
    assert (delivery.status.delivered, delivery.status.pending) == (2, 0)


def test_what_the_broker_does_not_allow_is_not_taken_for_delivered(
    make_broker: Callable[..., Broker],
    tmp_path: Path,
    connect: Connect,
    listen: Listen,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rules = tmp_path / "rules"
    rules.write_text("user watch\ntopic readwrite meliad/#\nuser guest\ntopic readwrite meliad/belt/#\n")
    rules.write_text(rules.read_text() + "topic readwrite meliad/available\nuser all\ntopic readwrite #\n")
    broker = make_broker("allow_anonymous true", f"acl_file {rules}")
    listener = listen(broker, user="all")
    change = make_change("belt")
    destination = connect(broker.address("watch"), "belt")
    destination.deliver(change)  # Without Home Assistant's topics.
    listener.catch_up()
    assert len(listener.events) == 1
    destination.close()
    destination.keep_up()
    assert caplog.text.count("cameras are not announced to Home Assistant: the broker does not take homeass") == 1
    with pytest.raises(DeliveryError, match=r"the broker does not take meliad/events \(Not authorized\)"):
        connect(broker.address("guest"), "belt").deliver(change)


def make_change(camera: str, *, folder: Path = Path("/nowhere"), **changes: Any) -> Change:
    event = "20260921T141320.000Z-000001"
    record = {"event": event, "kind": "anomaly", "state": "new", "camera": camera, "score": 1.5, "condition": ""}
    return Change(1, event, None, {**record, **changes}, folder)


def test_pictures_that_are_too_large_or_gone_are_left_out(
    make_broker: Callable[..., Broker], connect: Connect, listen: Listen, tmp_path: Path
) -> None:
    broker = make_broker("allow_anonymous true", "max_packet_size 20000")
    destination = connect(broker.address(), "belt")
    picture = tmp_path / "picture.jpg"
    for size in (19_000, 60_000, 3_000_000, None):
        if size is None:
            picture.unlink()
        else:
            picture.write_bytes(bytes(size))
        destination.deliver(make_change("belt", folder=tmp_path, picture="event/picture.jpg"))
    retained = listen(broker).retained
    assert len(retained["meliad/belt/snapshot"]) == 19_000
    with pytest.raises(RejectedError, match="bytes for meliad/events, and the broker takes 20000 in all"):
        destination.deliver(make_change("belt", detail="x" * 30_000))
    destination.deliver(make_change("belt", state="end"))  # The connection has survived it.
    assert listen(broker).retained["meliad/belt/anomaly"] == b"OFF"


def test_a_broker_that_takes_next_to_nothing_loses_no_event(
    make_broker: Callable[..., Broker], connect: Connect, store: EventStore, write_change: WriteChange
) -> None:
    long_name = "b" * 100
    destination = connect(make_broker("allow_anonymous true", "max_packet_size 120").address(), long_name)
    delivery = Delivery(store, destination, wait=lambda event, delay_s: event.wait(0.01))
    write_change(camera=long_name)
    delivery.close(timeout_s=0.2)
    assert (delivery.status.rejected, delivery.status.pending, delivery.status.is_up) == (0, 1, False)
    assert delivery.status.last_error == f"3 bytes for meliad/{long_name}/anomaly, and the broker takes 120 in all"


def test_a_score_that_is_no_number_is_not_the_one_before(connect: Connect, listen: Listen) -> None:
    destination = connect(None, "belt")
    destination.deliver(make_change("belt"))
    destination.deliver(make_change("belt", score=None))
    assert listen().retained["meliad/belt/score"] == b"None"


# paho-mqtt leaves the socket of a handshake that failed to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("host", "is_taken"), [("localhost", True), ("other.example", False)])
def test_the_certificate_of_the_broker_is_verified(
    make_broker: Callable[..., Broker],
    make_certificate: MakeCertificate,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    is_taken: bool,
) -> None:
    certificate, key = make_certificate(host)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    broker = make_broker("allow_anonymous true", f"certfile {certificate}", f"keyfile {key}")
    destination = connect(broker.address(host="localhost", is_encrypted=True), "belt")
    if is_taken:
        destination.deliver(make_change("belt"))
    else:
        with pytest.raises(OSError, match="certificate verify failed"):
            destination.deliver(make_change("belt"))


def test_a_broker_that_hangs_is_given_up(connect: Connect, broker: Broker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = broker.address(port=silent.getsockname()[1])
        with pytest.raises(DeliveryError, match=r"the broker does not answer within 0\.2 s"):
            connect(address, timeout_s=0.2).keep_up()


def test_a_broker_that_stops_answering_is_given_up_and_told_nothing_twice(
    broker: Broker, connect: Connect, listen: Listen
) -> None:
    listener = listen()
    destination = connect(None, "belt", timeout_s=2.0)
    destination.keep_up()
    assert broker.process is not None
    broker.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(DeliveryError, match="does not answer within"):
            destination.deliver(make_change("belt"))
    finally:
        broker.process.send_signal(signal.SIGCONT)
    destination.deliver(make_change("belt"))
    listener.catch_up()
    assert 1 <= len(listener.events) <= 2
    assert listen().retained["meliad/available"] == b"online"


def test_nobody_there(broker: Broker, connect: Connect) -> None:
    broker.kill()
    destination = connect()
    for act in (destination.keep_up, lambda: destination.deliver(make_change("belt"))):
        with pytest.raises(OSError, match="Connection refused"):
            act()
