"""The ``.meliad`` file: everything a device needs to decide and to explain, in one deterministic archive.

A stored ZIP with these parts, each listed with size and SHA-256 in ``manifest.json``:

    manifest.json       what the model is, where it came from, its parts
    manifest.sig        Ed25519 signature of manifest.json, 64 bytes; where it was signed
    model.fp32.onnx     uint8 frames in, raw scores, maps and nearest prototypes out; model.fp16.onnx and
                        model.int8.onnx are the same model in lower precision, where exported
    calibration.json    threshold and the calibration scores behind it
    golden.json         file names, labels and expected scores of the golden frames
    golden/NNN.png      golden frames at model size
    golden/maps.npy     expected maps, float32 [n, h, w]
    exemplars.json      class, source image and place of the training patch behind each prototype
    exemplars.png       those patches, one contact sheet

Opening trusts nothing: names, counts and sizes are limited before a byte is unpacked, and nothing is
written to disk.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meliad_edge import calibrate
from meliad_edge.calibrate import Calibration
from meliad_edge.data.images import decode_image
from meliad_edge.errors import BundleError, ImageError
from meliad_edge.exemplars import Exemplar, from_fields, to_contact_sheet, to_fields
from meliad_edge.graph_guard import check_graph
from meliad_edge.precision import PRECISIONS, ParityLimits, Precision

SCHEMA_VERSION = 2

_MAX_PARTS = 256
_MAX_PART_BYTES = 512 * 1024 * 1024
_MAX_TOTAL_BYTES = 1024 * 1024 * 1024
_MAX_SHEET_PIXELS = 64 * 1024 * 1024
_MAX_INPUT_SIDE = 1024
_PART_NAME = re.compile(
    r"manifest\.(json|sig)|model\.(fp32|fp16|int8)\.onnx|calibration\.json|golden\.json|golden/[0-9]{3}\.png|golden/maps\.npy|exemplars\.(json|png)"
)


_Side = Annotated[int, Field(ge=1, le=_MAX_INPUT_SIDE)]


class Part(BaseModel):
    """Size and digest of one part of the archive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, le=_MAX_PART_BYTES)


class Manifest(BaseModel):
    """What a bundle says about itself.

    Attributes:
        precisions: Those it carries a graph in, with the differences that pass as the same model; ``"fp32"`` is
            always one of them.
        licence: Of the images it contains, as far as known.
        notes: What whoever trained the model says of its data.
        version: Grows with every release of the model; flashing refuses a lower one than the device has.
        latency_budget_ms: Largest 95th percentile from a frame in memory to the decision that a device may need; None
            accepts any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    format: Literal["meliad-bundle"] = "meliad-bundle"
    schema_version: int = SCHEMA_VERSION
    name: str = Field(max_length=200)
    detector: str = Field(max_length=64)
    backbone: str = Field(max_length=64)
    precisions: dict[Precision, ParityLimits]
    input_hw: tuple[_Side, _Side]
    grid_hw: tuple[_Side, _Side]
    top_cells: int | None = Field(ge=1)
    created_by: str = Field(max_length=64)
    dataset: str = Field(max_length=200)
    licence: str = Field(max_length=200)
    notes: str = Field(default="", max_length=2000)
    version: int = Field(default=0, ge=0)
    latency_budget_ms: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    train_normals: int = Field(ge=0)
    shots: int = Field(ge=0)
    parts: dict[str, Part] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GoldenFrame:
    """A frame that travels with the model and the result it must give everywhere.

    Attributes:
        name: File name it came from.
        defect: ``"good"`` or its defect class.
        frame: uint8 [H, W, 3], RGB, at model size.
        score: Expected raw score.
        map: Expected map, float32 [h, w].
    """

    name: str
    defect: str
    frame: NDArray[np.uint8]
    score: float
    map: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Signed:
    """What a signature is checked against.

    Attributes:
        manifest: The bytes of ``manifest.json``, which lists the SHA-256 of every other part.
        signature: 64 bytes, or None in a bundle that is not signed.
    """

    manifest: bytes
    signature: bytes | None


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened and verified ``.meliad`` file, in memory.

    Attributes:
        path: The file; what is built from it on a device lies beside it.
    """

    path: Path
    manifest: Manifest
    models: Mapping[Precision, bytes]
    calibration: Calibration
    golden: tuple[GoldenFrame, ...]
    exemplars: tuple[Exemplar, ...]
    signed: Signed

    @property
    def default_precision(self) -> Precision:
        """What a processor runs when nothing else is asked for: INT8 where it was exported, else FP32."""
        return "int8" if "int8" in self.models else "fp32"

    def model_sha256(self, precision: Precision) -> str:
        """Digest of the ONNX graph in a precision it carries; identifies the model in logs, events and caches."""
        return self.manifest.parts[part_of_model(precision)].sha256


def write_bundle(
    path: Path,
    manifest: Manifest,
    models: Mapping[Precision, bytes],
    calibration: Calibration,
    golden: Sequence[GoldenFrame],
    exemplars: Sequence[Exemplar],
    *,
    sign: Callable[[bytes], bytes] | None = None,
) -> Manifest:
    """Write a bundle; the same inputs give the same bytes.

    The file appears under its name only when it is complete.

    Args:
        path: File to write.
        manifest: What it says about itself; its list of parts is made here.
        models: Serialised graphs, FP32 among them.
        calibration: Threshold and the scores behind it.
        golden: Frames with the results they must give.
        exemplars: The training patch behind each prototype.
        sign: Gives the signature of the manifest; None leaves the bundle unsigned.

    Returns:
        The manifest as written, with its list of parts.
    """
    contents: dict[str, bytes] = {
        **{part_of_model(precision): model for precision, model in models.items()},
        "calibration.json": _to_json(asdict(calibration)),
        "golden.json": _to_json([{"name": g.name, "defect": g.defect, "score": g.score} for g in golden]),
        "exemplars.json": _to_json(to_fields(exemplars)),
    }
    for index, frame in enumerate(golden):
        contents[f"golden/{index:03d}.png"] = _encode_png(frame.frame)
    if golden:
        contents["golden/maps.npy"] = _encode_npy(np.stack([g.map for g in golden]).astype("<f4"))
    if exemplars:
        contents["exemplars.png"] = _encode_png(to_contact_sheet(exemplars))
    manifest = manifest.model_copy(
        update={
            "parts": {
                name: Part(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
                for name, data in sorted(contents.items())
            }
        }
    )
    described = _to_json(manifest.model_dump(mode="json"))
    pack(path, Signed(described, None if sign is None else sign(described)), contents)
    return manifest


def release(
    path: Path,
    *,
    version: int | None = None,
    latency_budget_ms: float | None = None,
    sign: Callable[[bytes], bytes] | None = None,
) -> Manifest:
    """Give a bundle its version and its budget, and sign it.

    Args:
        path: The bundle, which is replaced.
        version: Of the model; None keeps what it has.
        latency_budget_ms: Of the model; None keeps what it has.
        sign: Gives the signature of the new manifest; None leaves the bundle unsigned.

    Raises:
        BundleError: It cannot be opened.
    """
    manifest, _, parts = read_parts(path)
    changes = {"version": version, "latency_budget_ms": latency_budget_ms}
    fields = manifest.model_dump() | {key: value for key, value in changes.items() if value is not None}
    manifest = Manifest.model_validate(fields)
    described = _to_json(manifest.model_dump(mode="json"))
    pack(path, Signed(described, None if sign is None else sign(described)), parts)
    return manifest


def pack(path: Path, signed: Signed, parts: Mapping[str, bytes]) -> None:
    """Put the file together; the same parts give the same bytes, and it appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with zipfile.ZipFile(partial, "w", compression=zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("manifest.json"), signed.manifest)
        if signed.signature is not None:
            archive.writestr(_entry("manifest.sig"), signed.signature)
        for name, data in sorted(parts.items()):
            archive.writestr(_entry(name), data)
    partial.replace(path)


def open_bundle(path: Path) -> Bundle:
    """Read and verify a bundle without writing anything.

    Raises:
        BundleError: The file is missing, not a bundle, of an unknown version, damaged, or unsafe.
    """
    manifest, signed, parts = read_parts(path)
    try:
        return _assemble(path, manifest, signed, parts)
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError, ImageError) as error:
        msg = f"{path}: bundle is inconsistent ({type(error).__name__}: {_printable(error)}); export it again"
        raise BundleError(msg) from error


def read_parts(path: Path) -> tuple[Manifest, Signed, dict[str, bytes]]:
    """Read a bundle as its parts, each of which matches its digest; what they hold is not looked at.

    Returns:
        The manifest, its bytes with their signature, and every other part by name.

    Raises:
        BundleError: The file is missing, not a bundle, of an unknown version, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            contents = _read_archive(archive, path)
    except FileNotFoundError as error:
        msg = f"{path}: no such bundle; make one with: meliad-edge export RUN --out {path.name}"
        raise BundleError(msg) from error
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, struct.error, RuntimeError) as error:
        msg = f"{path}: not a readable .meliad bundle ({_printable(error)}); copy it again or export it again"
        raise BundleError(msg) from error
    manifest = _verify(contents, path)
    signed = Signed(contents.pop("manifest.json"), contents.pop("manifest.sig", None))
    return manifest, signed, contents


def require_golden(bundle: Bundle) -> tuple[GoldenFrame, ...]:
    """The golden frames of a bundle.

    Raises:
        BundleError: It has none.
    """
    if not bundle.golden:
        msg = f"bundle {bundle.manifest.name!r} carries no golden frames to replay; export it again"
        raise BundleError(msg)
    return bundle.golden


def _read_archive(archive: zipfile.ZipFile, path: Path) -> dict[str, bytes]:
    entries = archive.infolist()
    if len(entries) > _MAX_PARTS:
        msg = f"{path}: {len(entries)} parts, at most {_MAX_PARTS} are allowed; this is not a bundle of ours"
        raise BundleError(msg)
    if sum(entry.file_size for entry in entries) > _MAX_TOTAL_BYTES:
        msg = f"{path}: unpacks to more than {_MAX_TOTAL_BYTES >> 20} MiB; refused"
        raise BundleError(msg)
    contents: dict[str, bytes] = {}
    for entry in entries:
        if not _PART_NAME.fullmatch(entry.filename) or entry.filename in contents:
            msg = f"{path}: unexpected part {entry.filename[:80]!r}; this is not a bundle of ours"
            raise BundleError(msg)
        # What is stored cannot unpack to more than the file holds.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > entry.compress_size:
            msg = f"{path}: part {entry.filename} is compressed, parts of a bundle never are; export it again"
            raise BundleError(msg)
        with archive.open(entry) as part:
            data = part.read(entry.file_size + 1)
        if len(data) != entry.file_size:
            msg = f"{path}: part {entry.filename} has {len(data)} bytes, {entry.file_size} announced; copy it again"
            raise BundleError(msg)
        contents[entry.filename] = data
    return contents


def _verify(contents: Mapping[str, bytes], path: Path) -> Manifest:
    if "manifest.json" not in contents:
        msg = f"{path}: no manifest.json inside; this is not a .meliad bundle"
        raise BundleError(msg)
    try:
        fields = json.loads(contents["manifest.json"])
        version = fields.get("schema_version") if isinstance(fields, dict) else None
        if version != SCHEMA_VERSION:
            msg = (
                f"{path}: bundle schema version {_printable(version)}, this meliad-edge reads {SCHEMA_VERSION}; "
                "update one of them"
            )
            raise BundleError(msg)
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        reason = _printable(f"{'.'.join(map(str, first['loc']))[:80]}: {first['msg']}")
        msg = f"{path}: manifest.json is not valid ({reason}); export the bundle again"
        raise BundleError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"{path}: manifest.json is not JSON ({_printable(error)}); export the bundle again"
        raise BundleError(msg) from error
    parts = set(contents) - {"manifest.json", "manifest.sig"}
    if set(manifest.parts) != parts:
        odd = sorted(set(manifest.parts) ^ parts)[0]
        msg = f"{path}: part {odd!r} is missing or not in the manifest; copy the bundle again"
        raise BundleError(msg)
    for name, part in manifest.parts.items():
        if hashlib.sha256(contents[name]).hexdigest() != part.sha256:
            msg = f"{path}: part {name} does not match its SHA-256; the file is damaged or was changed, copy it again"
            raise BundleError(msg)
    return manifest


def _assemble(path: Path, manifest: Manifest, signed: Signed, contents: Mapping[str, bytes]) -> Bundle:
    calibration = calibrate.from_fields(json.loads(contents["calibration.json"]))
    golden_fields = json.loads(contents["golden.json"])
    maps = _decode_maps(contents["golden/maps.npy"], (len(golden_fields), *manifest.grid_hw)) if golden_fields else ()
    golden = tuple(
        GoldenFrame(
            name=str(fields["name"]),
            defect=str(fields["defect"]),
            frame=_decode_golden(contents[f"golden/{index:03d}.png"], manifest.input_hw),
            score=float(fields["score"]),
            map=evidence,
        )
        for index, (fields, evidence) in enumerate(zip(golden_fields, maps, strict=True))
    )
    exemplar_fields = json.loads(contents["exemplars.json"])
    exemplars: tuple[Exemplar, ...] = ()
    if exemplar_fields:
        exemplars = from_fields(exemplar_fields, _decode_png(contents["exemplars.png"], _MAX_SHEET_PIXELS))
    return Bundle(path, manifest, _read_models(manifest, contents), calibration, golden, exemplars, signed)


def _read_models(manifest: Manifest, contents: Mapping[str, bytes]) -> dict[Precision, bytes]:
    models = {p: contents[part_of_model(p)] for p in PRECISIONS if part_of_model(p) in contents}
    if set(models) != set(manifest.precisions) or "fp32" not in models:
        msg = f"the manifest names the precisions {sorted(manifest.precisions)}, the graphs are {sorted(models)}"
        raise ValueError(msg)
    for model in models.values():
        check_graph(model)
    return models


def part_of_model(precision: Precision) -> str:
    """Name of the part that holds the graph of a precision."""
    return f"model.{precision}.onnx"


def _printable(reason: object) -> str:
    """What came out of a foreign file, for the one line of an error: short, and nothing a terminal would obey."""
    text = " ".join(str(reason).split())
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200])


def _entry(name: str) -> zipfile.ZipInfo:
    """A ZIP entry without the clock, so that equal contents give equal files."""
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))


def _to_json(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()


def _encode_npy(array: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _encode_png(image: NDArray[np.uint8]) -> bytes:
    _, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return data.tobytes()


def _decode_maps(data: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what NumPy only reads with a warning we have not written
            maps = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # NumPy reads the header as Python source and lets through what that raises
        msg = f"golden maps cannot be read ({type(error).__name__})"
        raise ValueError(msg) from error
    if maps.dtype != np.dtype("<f4") or maps.shape != shape:
        msg = f"golden maps are {maps.dtype} {list(maps.shape)}, not float32 {list(shape)}"
        raise ValueError(msg)
    return np.asarray(maps, dtype=np.float32)


def _decode_golden(data: bytes, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    frame = _decode_png(data, size_hw[0] * size_hw[1])
    if frame.shape[:2] != size_hw:
        msg = "a golden frame has another size than the model takes"
        raise ValueError(msg)
    return frame


def _decode_png(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    if not data.startswith(b"\x89PNG") or width * height > max_pixels:
        msg = f"a picture is not a PNG file of at most {max_pixels} pixels"
        raise ValueError(msg)
    return decode_image(data, "picture")
