from __future__ import annotations

import hashlib
import io
import json
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meliad_edge.bundle import Bundle, GoldenFrame, Manifest, open_bundle, write_bundle
from meliad_edge.calibrate import calibrate
from meliad_edge.errors import BundleError
from meliad_edge.exemplars import Exemplar
from meliad_edge.precision import DEFAULT_LIMITS

Parts = dict[str, bytes]

MANIFEST = Manifest(
    name="test", detector="meliad", backbone="tf_efficientnet_lite0", input_hw=(32, 48), grid_hw=(2, 3), top_cells=1,
    precisions={"fp32": DEFAULT_LIMITS["fp32"]},
    created_by="tests", dataset="none", licence="none", train_normals=3, shots=2,
)  # fmt: skip
MODEL = b"\x3a\x00" * 1024  # 1,024 empty graphs, one after the other


def golden_frames(count: int = 3) -> list[GoldenFrame]:
    random = np.random.default_rng(1)
    return [
        GoldenFrame(
            name=f"{index}.png",
            defect="good" if index else "crack",
            frame=random.integers(0, 256, (32, 48, 3), np.uint8),
            score=float(np.float32(random.normal())),
            map=random.normal(size=(2, 3)).astype(np.float32),
        )
        for index in range(count)
    ]


def exemplars(count: int = 40) -> list[Exemplar]:
    random = np.random.default_rng(2)
    return [
        Exemplar("crack", f"{index}.png", index, 2, 24, 24, random.integers(0, 256, (48, 48, 3), np.uint8))
        for index in range(count)
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small valid bundle in a folder of its own."""
    (tmp_path / "bundle").mkdir()
    path = tmp_path / "bundle" / "test.meliad"
    write_bundle(path, MANIFEST, {"fp32": MODEL}, calibrate([0.5, 1.25, 0.75]), golden_frames(), exemplars())
    return path


def read_parts(path: Path) -> Parts:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_parts(path: Path, parts: Parts, *, sign: bool = True, compression: int = zipfile.ZIP_STORED) -> None:
    """An archive of any parts; with a manifest that lists them truly, as a forger who is no fool would make it."""
    if sign:
        manifest = json.loads(parts["manifest.json"])
        manifest["parts"] = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in parts.items()
            if name != "manifest.json"
        }
        parts = {**parts, "manifest.json": json.dumps(manifest).encode()}
    with zipfile.ZipFile(path, "w", compression=compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


def refused(path: Path) -> str:
    """The one line with which a bundle is refused; nothing may be written meanwhile."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    assert sorted(path.parent.rglob("*")) == before
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    assert path.name in line
    return line


def assert_equal(first: Bundle, second: Bundle) -> None:
    assert first.manifest == second.manifest
    assert first.models == second.models
    assert first.calibration == second.calibration
    for ours, theirs in zip(first.golden, second.golden, strict=True):
        assert (ours.name, ours.defect, ours.score) == (theirs.name, theirs.defect, theirs.score)
        np.testing.assert_array_equal(ours.frame, theirs.frame)
        np.testing.assert_array_equal(ours.map, theirs.map)
    for mine, other in zip(first.exemplars, second.exemplars, strict=True):
        assert replace(mine, patch=other.patch) == other
        np.testing.assert_array_equal(mine.patch, other.patch)


def test_what_is_written_is_read(path: Path) -> None:
    bundle = open_bundle(path)
    manifest = bundle.manifest
    assert manifest.model_copy(update={"parts": {}}) == MANIFEST
    frames, patches = tuple(golden_frames()), tuple(exemplars())
    calibration = calibrate([0.5, 1.25, 0.75])
    assert_equal(bundle, Bundle(path, manifest, {"fp32": MODEL}, calibration, frames, patches, bundle.signed))
    assert bundle.signed.signature is None
    assert bundle.signed.manifest == read_parts(path)["manifest.json"]
    assert bundle.model_sha256("fp32") == hashlib.sha256(MODEL).hexdigest() == manifest.parts["model.fp32.onnx"].sha256
    assert [entry.name for entry in path.parent.iterdir()] == ["test.meliad"]


def test_a_bundle_may_be_without_golden_frames_and_exemplars(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bare.meliad", MANIFEST, {"fp32": MODEL}, calibrate([1.0]), [], [])
    bundle = open_bundle(tmp_path / "bare.meliad")
    assert (bundle.golden, bundle.exemplars) == ((), ())


def test_equal_contents_are_equal_files(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "deep" / "folder" / "again.meliad"
    write_bundle(other, MANIFEST, {"fp32": MODEL}, calibrate([0.5, 1.25, 0.75]), golden_frames(), exemplars())
    assert other.read_bytes() == path.read_bytes()


def test_opens_on_any_zip_reader(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "manifest.json"
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


def test_nothing_there_names_the_command(tmp_path: Path) -> None:
    assert "meliad-edge export RUN --out none.meliad" in refused(tmp_path / "none.meliad")


@pytest.mark.parametrize("data", [b"", b"PK", b"no archive at all", bytes(1000), b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    refused(path)


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.meliad").mkdir()
    refused(tmp_path / "folder.meliad")


@pytest.mark.parametrize("tenth", range(10))
def test_cut_short(path: Path, tenth: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * tenth // 10])
    refused(path)


@pytest.mark.parametrize(
    "name",
    [
        "../escaped.png",
        "/etc/passwd",
        "golden/../../x.png",
        "golden\\000.png",
        "golden/0000.png",
        "golden/00a.png",
        "MODEL.ONNX",
        "model.fp32.onnx\n",
        "golden/",
        "notes.txt",
        "golden/٠٠٠.png",
        "a" * 5000,
    ],
)
def test_other_names_are_refused(path: Path, name: str) -> None:
    write_parts(path, read_parts(path) | {name: b"x"})
    assert "not a bundle of ours" in refused(path)


def test_a_second_part_of_one_name(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("model.fp32.onnx", b"another model")
    assert "unexpected part 'model.fp32.onnx'" in refused(path)


def test_a_link_is_never_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    parts = read_parts(path)
    del parts["model.fp32.onnx"]
    write_parts(path, parts, sign=False)
    entry = zipfile.ZipInfo("model.fp32.onnx")
    entry.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry, "../secret")
    assert "does not match its SHA-256" in refused(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_parts_are_refused_before_they_are_unpacked(path: Path, compression: int) -> None:
    write_parts(path, read_parts(path) | {"model.fp32.onnx": bytes(50_000_000)}, compression=compression)
    tracemalloc.start()
    try:
        assert "is compressed" in refused(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [10_000_000, 600_000_000, 2**32 - 2])
def test_a_size_that_is_not_there_is_not_believed(path: Path, size: int) -> None:
    data = bytearray(path.read_bytes())
    # Uncompressed size, and for the smallest also the compressed one, in the central directory.
    at = data.rindex(b"model.fp32.onnx") - 46
    assert data[at : at + 4] == b"PK\x01\x02"
    data[at + 24 : at + 28] = struct.pack("<I", size)
    if size == 10_000_000:
        data[at + 20 : at + 24] = struct.pack("<I", size)
    path.write_bytes(data)
    tracemalloc.start()
    try:
        refused(path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_too_many_parts(path: Path) -> None:
    write_parts(path, read_parts(path) | {f"golden/{index:03d}.png": b"" for index in range(3, 999)})
    assert "at most 256 are allowed" in refused(path)


def test_an_encrypted_part(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.rindex(b"model.fp32.onnx") - 46
    data[at + 8] |= 1
    path.write_bytes(data)
    refused(path)


@pytest.mark.parametrize(
    "part", ["model.fp32.onnx", "calibration.json", "golden.json", "golden/001.png", "exemplars.png"]
)
def test_a_part_that_was_changed(path: Path, part: str) -> None:
    parts = read_parts(path)
    write_parts(path, parts | {part: parts[part][:-1] + b"?"}, sign=False)
    assert f"part {part} does not match its SHA-256" in refused(path)


@pytest.mark.parametrize(
    "part",
    [
        "model.fp32.onnx",
        "calibration.json",
        "golden.json",
        "golden/001.png",
        "golden/maps.npy",
        "exemplars.json",
        "exemplars.png",
    ],
)
@pytest.mark.parametrize("sign", [False, True])
def test_a_part_that_is_missing(path: Path, part: str, sign: bool) -> None:
    parts = read_parts(path)
    del parts[part]
    write_parts(path, parts, sign=sign)
    refused(path)


def test_without_a_manifest(path: Path) -> None:
    parts = read_parts(path)
    del parts["manifest.json"]
    write_parts(path, parts, sign=False)
    assert "no manifest.json" in refused(path)


def test_a_part_the_manifest_does_not_know(path: Path) -> None:
    write_parts(path, read_parts(path) | {"golden/003.png": b"x"}, sign=False)
    assert "'golden/003.png' is missing or not in the manifest" in refused(path)


@pytest.mark.parametrize("version", [0, 1, 3, "1", None, 1.5, [1]])
def test_another_schema_version(path: Path, version: object) -> None:
    parts = read_parts(path)
    manifest = json.loads(parts["manifest.json"]) | {"schema_version": version}
    write_parts(path, parts | {"manifest.json": json.dumps(manifest).encode()})
    assert f"bundle schema version {version}" in refused(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"not json",
        b"[]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 100_000,
        b'{"schema_version": 1}',
        b'{"schema_version": ' + b"1" * 10_000 + b"}",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_a_manifest_that_is_none(path: Path, data: bytes) -> None:
    write_parts(path, read_parts(path) | {"manifest.json": data}, sign=False)
    refused(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "zip"),
        ("name", "x" * 201),
        ("name", 7),
        ("input_hw", [32]),
        ("input_hw", [-32, 48]),
        ("input_hw", [100_000, 100_000]),
        ("grid_hw", ["two", 3]),
        ("top_cells", 0),
        ("train_normals", -1),
        ("precision", "fp4"),
        ("run_this", "rm"),
    ],
)
def test_a_manifest_with_a_wrong_value(path: Path, key: str, value: object) -> None:
    parts = read_parts(path)
    manifest = json.loads(parts["manifest.json"]) | {key: value}
    write_parts(path, parts | {"manifest.json": json.dumps(manifest).encode()})
    assert key in refused(path)


def _without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda fields: {name: value for name, value in fields.items() if name != key}


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: [],
        lambda fields: None,
        lambda fields: fields | {"threshold": float("nan")},
        lambda fields: fields | {"threshold": float("-inf")},
        lambda fields: fields | {"threshold": "1.0"},
        lambda fields: fields | {"threshold": None},
        lambda fields: fields | {"threshold": 10**400},
        lambda fields: fields | {"scores": [0.5, float("nan")]},
        lambda fields: fields | {"scores": []},
        lambda fields: fields | {"scores": ["a"]},
        lambda fields: fields | {"scores": 3},
        lambda fields: fields | {"score_offset": float("inf")},
        lambda fields: fields | {"n": -1},
        _without("threshold"),
        _without("scores"),
    ],
)
def test_a_calibration_that_cannot_decide(path: Path, change: Callable[[Any], object]) -> None:
    parts = read_parts(path)
    fields = change(json.loads(parts["calibration.json"]))
    write_parts(path, parts | {"calibration.json": json.dumps(fields).encode()})
    refused(path)


@pytest.mark.parametrize("part", ["calibration.json", "golden.json", "exemplars.json"])
@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"{", b"7", b"true", b'"text"', b'{"a": 1}', b"[1]", b"[" * 100_000, b"1" * 100_000, b"[{}]"]
)
def test_json_of_another_shape(path: Path, part: str, data: bytes) -> None:
    write_parts(path, read_parts(path) | {part: data})
    refused(path)


def _npy(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


class _Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/tmp/meliad-edge-was-here"),)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        _npy(np.array([_Exploit()], dtype=object), allow_pickle=True),
        _npy(np.zeros((3, 3, 2), np.float32)),
        _npy(np.zeros((2, 2, 3), np.float32)),
        _npy(np.zeros((3, 2, 3), np.float64)),
        _npy(np.zeros((3, 2, 3), np.complex64)),
        _npy(np.zeros((3, 2, 3), np.float32)).replace(b"(3, 2, 3), ", b"(9999999999999,),"[:11].ljust(11)),
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000000,), }".ljust(117)
        + b"\n",
    ],
    ids=lambda data: repr(data[:40]),
)
def test_golden_maps_of_another_kind(path: Path, data: bytes) -> None:
    write_parts(path, read_parts(path) | {"golden/maps.npy": data})
    refused(path)
    assert not Path("/tmp/meliad-edge-was-here").exists()


def test_golden_maps_that_numpy_warns_of(path: Path) -> None:
    data = _npy(np.zeros((3, 2, 3), np.float32)).replace(b"(3, 2, 3), } ", b"(3L, 2, 3), }")
    write_parts(path, read_parts(path) | {"golden/maps.npy": data})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        refused(path)
    assert not said


def _png(width: int, height: int, rows: int = 1) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes((3 * width + 1) * rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("part", ["exemplars.png", "golden/000.png"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0 jpeg",
        b"GIF89a",
        _png(60_000, 60_000),
        _png(2**31 - 1, 1),
        _png(0, 0),
        _png(31, 31, 31),
    ],
    ids=["empty", "signature", "jpeg", "gif", "giant", "long", "no size", "small"],
)
def test_pictures_that_are_none(path: Path, part: str, data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    write_parts(path, read_parts(path) | {part: data})
    refused(path)
    assert capfd.readouterr() == ("", "")


def test_many_large_golden_frames_are_refused_from_their_headers(path: Path) -> None:
    parts = read_parts(path)
    bomb = _png(8000, 8000, 8000)
    assert len(bomb) < 300_000
    fields = [{"name": "x", "defect": "good", "score": 0.0}] * 200
    parts |= {f"golden/{index:03d}.png": bomb for index in range(200)}
    parts |= {"golden.json": json.dumps(fields).encode(), "golden/maps.npy": _npy(np.zeros((200, 2, 3), np.float32))}
    write_parts(path, parts)
    assert "not a PNG file of at most 1536 pixels" in refused(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("x", "left"), ("x", None), ("defect", 7), ("source", ["a"]), ("width", 1.5), ("patch", "no"), ("z", 1)],
)
def test_exemplars_of_another_kind(path: Path, key: str, value: object) -> None:
    parts = read_parts(path)
    fields = json.loads(parts["exemplars.json"])
    fields[3][key] = value
    write_parts(path, parts | {"exemplars.json": json.dumps(fields).encode()})
    refused(path)


def test_more_exemplars_than_the_sheet_has(path: Path) -> None:
    parts = read_parts(path)
    fields = json.loads(parts["exemplars.json"])
    write_parts(path, parts | {"exemplars.json": json.dumps(fields * 2).encode()})
    assert "too small for 80 exemplars" in refused(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_refused_or_change_nothing(path: Path, data: st.DataObject) -> None:
    original = path.with_name("original")
    if not original.exists():
        original.write_bytes(path.read_bytes())
    content = bytearray(original.read_bytes())
    # Half of the damage in the directory at the end, where the structure is.
    size = len(content)
    places = st.integers(0, size - 1) | st.integers(size - 1200, size - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=6)):
        content[place] = value
    path.write_bytes(content)
    try:
        opened = open_bundle(path)
    except BundleError as error:
        assert "\n" not in str(error)
    else:
        assert_equal(opened, open_bundle(original))
