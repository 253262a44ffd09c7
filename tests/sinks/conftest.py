from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from meliad_edge.event_store import EventStore
from meliad_edge.events import Event, EventKind, EventState, Moment
from meliad_edge.exemplars import Exemplar
from meliad_edge.runtime.predictor import Prediction, Region, StageTimes
from meliad_edge.sinks.delivery import Delivery
from meliad_edge.sinks.record import event_record
from meliad_edge.stream.frames import Frame

BEGUN_S = 1_790_000_000.0
CRACK = Exemplar("crack", "exp3_num_77744.jpg", 0, 0, 8, 8, np.zeros((48, 48, 3), np.uint8))

MakeEvent = Callable[..., Event]
WriteChange = Callable[..., dict[str, Any]]


@pytest.fixture
def make_event() -> MakeEvent:
    """A state change; number, camera, peak frame, score, kind and condition as wanted."""

    def make(
        state: EventState = EventState.NEW,
        *,
        number: int = 1,
        camera: str = "line 3/belt.mp4",
        peak_frame: int = 12,
        score: float = 1.92,
        kind: EventKind = EventKind.ANOMALY,
        condition: str = "",
        picture: bool = True,
    ) -> Event:
        regions = (Region(412, 233, 58, 40, 1.92, resembles=CRACK), Region(3, 4, 5, 6, 1.0))
        frame = Frame(camera, peak_frame, 12.0, np.full((360, 640, 3), peak_frame, np.uint8), 0.001, BEGUN_S)
        prediction = Prediction(score, 0.83, np.zeros((4, 4), np.float32), regions, StageTimes(0, 0, 0))
        return Event(
            id=f"20260921T141320.000Z-{number:06x}",
            kind=kind,
            state=state,
            camera=camera,
            source=camera,
            started=Moment(10.0, BEGUN_S + number),
            last_seen=Moment(12.0, BEGUN_S + number + 2.0),
            first_frame=10,
            last_frame=peak_frame,
            frame=frame if picture else None,
            prediction=prediction if kind is EventKind.ANOMALY else None,
            condition=condition,
        )

    return make


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    store = EventStore(tmp_path / "events", clock=lambda: BEGUN_S)
    yield store
    store.close()


@pytest.fixture
def write_change(store: EventStore, make_event: MakeEvent) -> WriteChange:
    """Write a state change into the store and return its record."""

    def write(*arguments: Any, files: dict[str, bytes] | None = None, **options: Any) -> dict[str, Any]:
        record = event_record(make_event(*arguments, **options))
        if files:
            record["picture"] = f"{record['event']}/picture.jpg"
        store.write(record, files or {})
        return record

    return write


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """Wait for what another thread or process does; the time is for a busy machine, not for the test."""

    def wait(condition: Callable[[], Any], *, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s in vain"
            time.sleep(0.01)

    return wait


@pytest.fixture
def make_certificate(tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """A certificate for a host that signs itself, and its key."""

    def make(host: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        now = datetime.now(tz=timezone.utc)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        certificate_file, key_file = tmp_path / f"{host}.crt", tmp_path / f"{host}.key"
        pem = serialization.Encoding.PEM
        certificate_file.write_bytes(certificate.public_bytes(pem))
        key_file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        return certificate_file, key_file

    return make


@pytest.fixture
def finish(wait_until: Callable[..., None]) -> Callable[[Delivery], None]:
    """Close a delivery when nothing is waiting any more, however often that takes another attempt."""

    def finish_delivery(delivery: Delivery) -> None:
        wait_until(lambda: delivery.status.pending == 0)
        delivery.close(timeout_s=60.0)

    return finish_delivery
