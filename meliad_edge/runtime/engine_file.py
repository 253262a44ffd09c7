"""TensorRT engines beside their bundle, each with a side file that says what it was built from and for.

For ``line3.meliad`` in FP16 these are ``line3.fp16.engine`` and ``line3.fp16.engine.json``. An engine is code for one
GPU under one TensorRT, so nothing of it is handed to TensorRT before every line of the side file holds on this machine.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meliad_edge import __version__
from meliad_edge.errors import EngineError
from meliad_edge.precision import Precision

_MAX_SIDE_FILE_BYTES = 64 * 1024

_Sha256 = Field(pattern=r"^[0-9a-f]{64}$")


class EngineKey(BaseModel):
    """What an engine depends on; if any of it changes, it is built again.

    Attributes:
        model_sha256: Digest of the graph inside the bundle.
        precision: Which of the bundle's graphs.
        tensorrt: Version of TensorRT.
        cuda: Version of CUDA that the driver supports.
        driver: Version of the driver.
        gpu: Name of the device.
        compute_capability: Of the device, for example ``"8.7"``.
        plugin_sha256: Digest of the library with the scoring kernel.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_sha256: str = _Sha256
    precision: Precision
    tensorrt: str = Field(max_length=64)
    cuda: str = Field(max_length=64)
    driver: str = Field(max_length=200)
    gpu: str = Field(max_length=200)
    compute_capability: str = Field(max_length=64)
    plugin_sha256: str = _Sha256


class SideFile(BaseModel):
    """The content of ``<engine>.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["meliad-engine"] = "meliad-engine"
    schema_version: Literal[1] = 1
    key: EngineKey
    engine_sha256: str = _Sha256
    max_batch: int = Field(ge=1)
    created_by: str = Field(max_length=64)


def engine_path(bundle: Path, precision: Precision) -> Path:
    """Where the engine of a bundle is kept."""
    return bundle.with_suffix(f".{precision}.engine")


def side_path(engine: Path) -> Path:
    """Where what is known of an engine is kept."""
    return engine.with_name(engine.name + ".json")


def write_engine(path: Path, engine: bytes, key: EngineKey, *, max_batch: int) -> None:
    """Write an engine and its side file, each under its name only when it is complete.

    An interruption between the two leaves an engine whose digest is not the one in the side file: it is refused.
    """
    side = SideFile(
        key=key,
        engine_sha256=hashlib.sha256(engine).hexdigest(),
        max_batch=max_batch,
        created_by=f"meliad-edge {__version__}",
    )
    write_atomically(path, engine)
    write_atomically(side_path(path), side.model_dump_json(indent=1).encode())


def read_engine(bundle: Path, key: EngineKey) -> bytes:
    """Read the engine beside a bundle, if it belongs to this machine and this model.

    Args:
        bundle: The ``.meliad`` file.
        key: What an engine that is built now would depend on.

    Raises:
        EngineError: There is none, it was built from or for something else, or it is damaged.
    """
    path = engine_path(bundle, key.precision)
    rebuild = f"run: meliad-edge build {bundle} --precision {key.precision}"
    try:
        engine = path.read_bytes()
        with side_path(path).open("rb") as file:
            side = SideFile.model_validate_json(file.read(_MAX_SIDE_FILE_BYTES))
    except FileNotFoundError as error:
        msg = f"{error.filename}: no such file; {rebuild}"
        raise EngineError(msg) from error
    except (OSError, ValidationError) as error:
        msg = f"{side_path(path)}: cannot be read ({_first_line(error)}); {rebuild}"
        raise EngineError(msg) from error
    for name, here in key:  # each field with its value
        there = getattr(side.key, name)
        if there != here:
            msg = f"{path}: built for {name} {_short(there)}, here it is {_short(here)}; {rebuild}"
            raise EngineError(msg)
    if hashlib.sha256(engine).hexdigest() != side.engine_sha256:
        msg = f"{path}: does not match its SHA-256 in {side_path(path).name}, it is damaged or was changed; {rebuild}"
        raise EngineError(msg)
    return engine


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that appears under its name only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def _short(value: str) -> str:
    """A digest cut to what a person compares, anything else whole."""
    return value[:12] if len(value) == 64 else value


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"
    return str(getattr(error, "strerror", None) or error)
