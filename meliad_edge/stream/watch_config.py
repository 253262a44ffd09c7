"""The camera file of ``watch``: one TOML schema, unknown keys refused, the command line wins."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from meliad_edge.data.images import read_image
from meliad_edge.errors import UsageError
from meliad_edge.events import Window
from meliad_edge.runtime.view import WHOLE, Box, View

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_WINDOW = "3/5"


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


class WatchConfig(BaseModel):
    """The file.

    Attributes:
        camera: What is watched; keys of :class:`CameraConfig`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    camera: tuple[CameraConfig, ...] = Field(min_length=1)


def read_watch_config(file: Path) -> WatchConfig:
    """Read a camera file; paths in it count from its folder.

    Raises:
        UsageError: It is missing or not TOML, or a key or value is not allowed.
    """
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        msg = f"camera file {file} cannot be read ({error}); it must be a TOML file with [[camera]] tables"
        raise UsageError(msg) from error
    try:
        config = WatchConfig.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"]) or "the file"
        if problem["type"] == "extra_forbidden":
            known = ", ".join(CameraConfig.model_fields)
            msg = f"{file}: unknown key {key!r}; a [[camera]] has {known}"
        else:
            shown = "" if key.endswith("source") else f" = {problem['input']!r}"
            msg = f"{file}: {key}{shown} is not allowed: {problem['msg'].removeprefix('Value error, ').lower()}"
        raise UsageError(msg) from None  # pydantic's own text would quote addresses with their credentials.
    return config.model_copy(
        update={
            "camera": tuple(
                camera.model_copy(update={"mask": None if camera.mask is None else file.parent / camera.mask})
                for camera in config.camera
            )
        }
    )


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
