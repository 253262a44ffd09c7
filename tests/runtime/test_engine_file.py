from __future__ import annotations

import json
from pathlib import Path

import pytest

from meliad_edge.errors import EngineError
from meliad_edge.runtime.engine_file import EngineKey, engine_path, read_engine, side_path, write_engine

ENGINE = bytes(range(256)) * 4
KEY = EngineKey(
    model_sha256="a" * 64,
    precision="fp16",
    tensorrt="10.3.0",
    cuda="12.6",
    driver="540.4.0",
    gpu="Orin",
    compute_capability="8.7",
    plugin_sha256="b" * 64,
)
OTHER = {
    "model_sha256": "c" * 64,
    "tensorrt": "10.7.0",
    "cuda": "13.0",
    "driver": "580.0",
    "gpu": "Orin NX",
    "compute_capability": "8.6",
    "plugin_sha256": "d" * 64,
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Where a bundle would be, with an engine beside it."""
    bundle = tmp_path / "line.3.meliad"
    write_engine(engine_path(bundle, "fp16"), ENGINE, KEY, max_batch=4)
    return bundle


def refused(bundle: Path, key: EngineKey = KEY) -> str:
    with pytest.raises(EngineError) as caught:
        read_engine(bundle, key)
    line = str(caught.value)
    assert "\n" not in line
    assert line.endswith(f"; run: meliad-edge build {bundle} --precision fp16")
    return line


def test_what_is_written_is_read_and_lies_beside_the_bundle(bundle: Path) -> None:
    assert read_engine(bundle, KEY) == ENGINE
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["line.3.fp16.engine", "line.3.fp16.engine.json"]
    side = json.loads((bundle.parent / "line.3.fp16.engine.json").read_text())
    assert side["key"] == KEY.model_dump()
    assert (side["max_batch"], side["created_by"].split()[0]) == (4, "meliad-edge")


def test_another_precision_has_an_engine_of_its_own(bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"line\.3\.int8\.engine: no such file; run: meliad-edge build .* int8$"):
        read_engine(bundle, KEY.model_copy(update={"precision": "int8"}))


@pytest.mark.parametrize("field", sorted(set(EngineKey.model_fields) - {"precision"}))
def test_an_engine_of_anything_else_is_refused(field: str, bundle: Path) -> None:
    line = refused(bundle, KEY.model_copy(update={field: OTHER[field]}))
    assert f"built for {field} {getattr(KEY, field)[:12]}, here it is {OTHER[field][:12]};" in line


def test_an_engine_under_the_name_of_another_precision_is_refused(bundle: Path) -> None:
    for path in (engine_path(bundle, "fp16"), side_path(engine_path(bundle, "fp16"))):
        path.rename(path.with_name(path.name.replace("fp16", "fp32")))
    with pytest.raises(EngineError, match="built for precision fp16, here it is fp32"):
        read_engine(bundle, KEY.model_copy(update={"precision": "fp32"}))


def test_a_changed_engine_is_refused(bundle: Path) -> None:
    path = engine_path(bundle, "fp16")
    path.write_bytes(ENGINE[:-1] + b"x")
    assert "does not match its SHA-256 in line.3.fp16.engine.json" in refused(bundle)
    path.unlink()
    assert "line.3.fp16.engine: no such file" in refused(bundle)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "content: Invalid JSON"),
        (b"\xff\xfe{}", "content: Invalid JSON"),
        (b"[]", "content: Input should be an object"),
        (b"{}", "key: Field required"),
        (b"[" * 100_000, "content: Invalid JSON"),
    ],
)
def test_a_damaged_side_file_is_refused(content: bytes, reason: str, bundle: Path) -> None:
    side_path(engine_path(bundle, "fp16")).write_bytes(content)
    assert f"line.3.fp16.engine.json: cannot be read ({reason}" in refused(bundle)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"format": "other"}, "format: Input should be 'meliad-engine'"),
        ({"engine_sha256": "short"}, "engine_sha256: String should match pattern"),
        ({"max_batch": 0}, "max_batch: Input should be greater"),
        ({"surplus": 1}, "surplus: Extra inputs are not permitted"),
    ],
)
def test_a_side_file_of_another_kind_is_refused(change: dict[str, object], reason: str, bundle: Path) -> None:
    path = side_path(engine_path(bundle, "fp16"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert f"cannot be read ({reason}" in refused(bundle)


def test_a_missing_side_file_is_refused(bundle: Path) -> None:
    side_path(engine_path(bundle, "fp16")).unlink()
    assert "line.3.fp16.engine.json: no such file" in refused(bundle)


def test_an_interrupted_write_leaves_no_engine_that_is_used(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace
    path = engine_path(bundle, "fp16")

    def interrupted_at(name: str) -> None:
        def stop(self: Path, target: Path) -> Path:
            if Path(target).name == name:
                raise KeyboardInterrupt
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write_engine(path, b"new" + ENGINE, KEY, max_batch=4)

    interrupted_at(path.name)
    assert read_engine(bundle, KEY) == ENGINE
    interrupted_at(side_path(path).name)
    assert "does not match its SHA-256" in refused(bundle)
    monkeypatch.undo()
    write_engine(path, b"new" + ENGINE, KEY, max_batch=4)
    assert read_engine(bundle, KEY) == b"new" + ENGINE
    assert not list(bundle.parent.glob("*.partial"))
