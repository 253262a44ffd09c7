"""The file of a watch: its cameras and where events go; one schema, unknown keys refused, the command line wins."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from meliad_edge.data.images import read_image
from meliad_edge.errors import UsageError
from meliad_edge.event_retention import Retention
from meliad_edge.events import Window
from meliad_edge.monitor.token import read_token
from meliad_edge.runtime.view import WHOLE, Box, View
from meliad_edge.sinks.destinations import (
    MQTT_PASSWORD,
    MQTT_USER,
    WEBHOOK_SECRET,
    MqttAddress,
    WebhookAddress,
    in_file,
    parse_destination,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_WINDOW = "3/5"
_LARGEST_PORT = 65_535


class CameraConfig(BaseModel):
    """One ``[[camera]]``.

    Attributes:
        source: As on the command line.
        name: What it is called in events, topics and on the page; None takes it from the source.
        window: Anomalous frames that make an event, ``"N/M"``.
        max_fps: Most frames per second that are judged; None judges what the machine can.
        latency_budget_ms: From capture to decision; a frame that cannot keep it gives way to the next.
        region: x, y, width, height in pixels of the part of the picture that is judged.
        tiles: Rows and columns into which that is cut, each scored on its own.
        mask: Image of the picture's size; what is not black in it does not count.
        follow: Of a folder or glob: go on with the pictures that arrive.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    name: str | None = Field(default=None, min_length=1, max_length=100)
    window: str = DEFAULT_WINDOW
    max_fps: float | None = Field(default=None, gt=0.0, le=1000.0)
    latency_budget_ms: float | None = Field(default=None, gt=0.0, le=3_600_000.0)
    region: tuple[int, int, int, int] | None = None
    tiles: tuple[int, int] = (1, 1)
    mask: Path | None = None
    follow: bool = False

    @field_validator("window")
    @classmethod
    def _check_window(cls, text: str) -> str:
        parse_window(text)
        return text

    @field_validator("tiles")
    @classmethod
    def _check_tiles(cls, tiles: tuple[int, int]) -> tuple[int, int]:
        if not (1 <= tiles[0] <= 16 and 1 <= tiles[1] <= 16):
            msg = "rows and columns must lie between 1 and 16"
            raise ValueError(msg)
        return tiles

    @field_validator("region")
    @classmethod
    def _check_region(cls, region: tuple[int, int, int, int] | None) -> tuple[int, int, int, int] | None:
        if region is not None and (min(region[:2]) < 0 or min(region[2:]) < 1):
            msg = "x and y must not be negative, width and height be at least 1"
            raise ValueError(msg)
        return region

    def to_window(self) -> Window:
        """When an anomaly becomes an event."""
        return parse_window(self.window)

    def to_view(self) -> View:
        """What of a frame is judged.

        Raises:
            ImageError: The mask cannot be read.
        """
        if self.region is None and self.tiles == (1, 1) and self.mask is None:
            return WHOLE
        ignored = None
        if self.mask is not None:
            ignored = np.asarray(cv2.cvtColor(read_image(self.mask), cv2.COLOR_RGB2GRAY), dtype=np.uint8)
        return View(None if self.region is None else Box(*self.region), self.tiles, ignored)


@dataclass(frozen=True, slots=True)
class PageAddress:
    """Where the page of a watch is served.

    Attributes:
        host: Name or address of this machine; what others can reach needs a token.
        port: 0 takes a free one.
        token: What whoever looks must know; None lets in everybody on this machine.
        certificate: PEM file; with it HTTPS is served.
        key: PEM file with its private key; None when that is in the same file.
    """

    host: str
    port: int
    token: str | None = field(default=None, repr=False)
    certificate: Path | None = None
    key: Path | None = None


class WatchConfig(BaseModel):
    """The file; its keys are those of the command line.

    Attributes:
        camera: What is watched; keys of :class:`CameraConfig`.
        camera_secrets: File with user and password per camera.
        out: Folder that keeps the events, and where they are delivered from there.
        keep_days: Events nobody judged are removed when they are older.
        keep_gb: The oldest beyond so many gigabytes are removed.
        mqtt_user: Of the broker, where its address names none.
        mqtt_password_file: Holds the password of that user.
        webhook_secret_file: Holds what requests are signed with.
        serve: ``"[HOST:]PORT"`` of the page; None serves none.
        token_file: Holds the token that opens the page to other machines.
        tls_cert: PEM certificate of the page.
        tls_key: Its private key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    camera: tuple[CameraConfig, ...] = ()
    camera_secrets: Path | None = None
    out: tuple[str, ...] = ()
    keep_days: float = Field(default=30.0, ge=0.0, allow_inf_nan=False)
    keep_gb: float = Field(default=10.0, ge=0.0, allow_inf_nan=False)
    mqtt_user: str | None = None
    mqtt_password_file: Path | None = None
    webhook_secret_file: Path | None = None
    serve: str | None = None
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def page(self) -> PageAddress | None:
        """Where the page is served; None where it is not.

        Raises:
            UsageError: The address is no address, or the token cannot be used.
        """
        if self.serve is None:
            return None
        host, _, port = self.serve.rpartition(":")
        if not (port.isdecimal() and int(port) <= _LARGEST_PORT):
            msg = f"--serve {self.serve}: expected [HOST:]PORT as in 8080 or 0.0.0.0:8080"
            raise UsageError(msg)
        token = None if self.token_file is None else read_token(self.token_file)
        return PageAddress(host.strip("[]") or "127.0.0.1", int(port), token, self.tls_cert, self.tls_key)

    def outputs(
        self, environment: Mapping[str, str] = os.environ
    ) -> tuple[Path | None, list[WebhookAddress | MqttAddress]]:
        """The folder that keeps the events, and where they are delivered from there; nothing is opened.

        Args:
            environment: Where secrets may be too; they win over the files that are named here.

        Raises:
            UsageError: An address or a secret cannot be used, there are two folders, or none beside destinations.
        """
        own = {
            MQTT_USER: self.mqtt_user,
            in_file(MQTT_PASSWORD): self.mqtt_password_file,
            in_file(WEBHOOK_SECRET): self.webhook_secret_file,
        }
        variables = {name: str(value) for name, value in own.items() if value is not None} | dict(environment)
        outputs = [parse_destination(text, environment=variables) for text in self.out]
        folders = [output for output in outputs if isinstance(output, Path)]
        destinations = [output for output in outputs if not isinstance(output, Path)]
        if len(folders) > 1:
            msg = f"--out {folders[0]} and {folders[1]}: events are kept in one folder; name one"
            raise UsageError(msg)
        if destinations and not folders:
            msg = "--out: what cannot be delivered must be kept; name a folder beside it, --out events"
            raise UsageError(msg)
        return (folders[0] if folders else None), destinations

    def retention(self) -> Retention:
        """How much the folder keeps."""
        return Retention(max_bytes=round(1e9 * self.keep_gb), max_age_s=86_400.0 * self.keep_days)

    def map_files(self, change: Callable[[Path], Path]) -> WatchConfig:
        """The same with every file it names, masks too, replaced by another."""
        own = {name: change(value) for name, value in self if isinstance(value, Path)}
        cameras = (
            camera if camera.mask is None else camera.model_copy(update={"mask": change(camera.mask)})
            for camera in self.camera
        )
        return self.model_copy(update={**own, "camera": tuple(cameras)})


def read_watch_config(file: Path) -> WatchConfig:
    """Read the file of a watch, TOML or JSON; names of files in it count from its folder.

    Raises:
        UsageError: It is missing or cannot be parsed, or a key or value is not allowed.
    """
    parse = json.loads if file.suffix == ".json" else tomllib.loads
    try:
        values = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"--config {file} cannot be read ({error}); it must be a TOML file with [[camera]] tables"
        raise UsageError(msg) from error
    try:
        config = WatchConfig.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"]) or "the file"
        if problem["type"] == "extra_forbidden":
            kind = "a [[camera]]" if key.startswith("camera.") else "the file"
            known = ", ".join((CameraConfig if key.startswith("camera.") else WatchConfig).model_fields)
            msg = f"{file}: unknown key {key!r}; {kind} has {known}"
        else:
            shown = "" if key.endswith("source") or key.startswith("out") else f" = {problem['input']!r}"
            msg = f"{file}: {key}{shown} is not allowed: {problem['msg'].removeprefix('Value error, ').lower()}"
        raise UsageError(msg) from None  # pydantic's own text would quote addresses with their credentials.
    return config.map_files(lambda named: file.parent / named)


def command_line_cameras(sources: Sequence[str], *, window: str, follow: bool) -> tuple[CameraConfig, ...]:
    """Cameras as the command line names them.

    Raises:
        UsageError: The window is not N/M.
    """
    parse_window(window)
    return tuple(CameraConfig(source=source, window=window, follow=follow) for source in sources)


def parse_window(text: str) -> Window:
    """Read ``N/M``.

    Raises:
        UsageError: It is something else, or impossible.
    """
    needed, slash, size = text.partition("/")
    if not (slash and needed.isdecimal() and size.isdecimal()):
        msg = f"window {text}: expected N/M as in {DEFAULT_WINDOW}"
        raise UsageError(msg)
    return Window(int(needed), int(size))
