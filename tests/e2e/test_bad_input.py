"""Every bad input gets one line and its exit code; one bad file never loses the rest."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

DATA, MODEL, BUNDLE, SOURCE, PARTIAL = 3, 4, 5, 7, 9


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _giant(path: Path) -> None:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(bytes(1000))) + _chunk(b"IEND", b""))


@pytest.fixture
def stain(texture_set: Path) -> Path:
    return texture_set / "test" / "stain" / "000.png"


@pytest.fixture
def own_run(small_run: Path, own_set: Path, tmp_path: Path) -> Path:
    """A run on that copy."""
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    split = json.loads((run / "split.json").read_text())
    (run / "split.json").write_text(json.dumps(split | {"root": str(own_set)}))
    return run


@pytest.fixture
def own_set(texture_set: Path, tmp_path: Path) -> Path:
    """A copy of the pictures that a test may spoil."""
    shutil.copytree(texture_set, tmp_path / "metal")
    return tmp_path / "metal"


def _to_16_bit(picture: Image.Image, path: Path) -> None:
    cv2.imwrite(str(path), np.asarray(picture)[..., ::-1].astype(np.uint16) * 257)


def _rotated(picture: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # To be shown turned by 90 degrees clockwise.
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


@pytest.mark.parametrize(
    ("name", "write", "tolerance"),
    [
        ("deep.png", _to_16_bit, 1e-4),
        ("alpha.png", lambda picture, path: picture.convert("RGBA").save(path), 1e-4),
        ("turned.png", _rotated, 1e-4),
        ("ink.tiff", lambda picture, path: picture.convert("CMYK").save(path), 0.1),
        ("grey.png", lambda picture, path: picture.convert("L").save(path), 0.5),
    ],
)
def test_unusual_pictures_are_decided_as_the_plain_one(
    invoke: Any, bundle_file: Path, stain: Path, tmp_path: Path, name: str, write: Callable[..., None], tolerance: float
) -> None:
    write(Image.open(stain), tmp_path / name)
    outcome = invoke("predict", bundle_file, stain, tmp_path / name, "--json")
    assert outcome.code == 0, outcome.err
    plain, unusual = outcome.json["predictions"]
    assert unusual["decision"] == "anomaly"
    assert unusual["score"] == pytest.approx(plain["score"], rel=tolerance)


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("missing.png", lambda path, data: None, "missing.png"),
        ("zero.png", lambda path, data: path.write_bytes(b""), "0 bytes"),
        ("cut.png", lambda path, data: path.write_bytes(data[: len(data) // 2]), "cut short"),
        ("text.png", lambda path, data: path.write_bytes(b"this is no picture\n" * 9), "text.png"),
        ("giant.png", lambda path, data: _giant(path), "60000"),
        ("folder.png", lambda path, data: path.mkdir(), "folder.png"),
    ],
)
def test_a_bad_picture_is_reported_and_the_rest_is_decided(
    invoke: Any, bundle_file: Path, stain: Path, tmp_path: Path, name: str, write: Callable[..., Any], says: str
) -> None:
    bad = tmp_path / name
    write(bad, stain.read_bytes())
    both = invoke("predict", bundle_file, bad, stain, "--json")
    assert both.code == PARTIAL
    assert both.error_line.startswith("1 of 2 inputs failed")
    (error,) = both.json["errors"]
    assert error["image"] == str(bad)
    assert says in error["error"].replace(",", "").replace("60 000", "60000")
    assert "\n" not in error["error"]
    assert [prediction["image"] for prediction in both.json["predictions"]] == [str(stain)]

    alone = invoke("predict", bundle_file, bad)
    assert alone.code == DATA
    assert name in alone.error_line


def test_a_folder_without_normals(invoke: Any, tmp_path: Path, stain: Path) -> None:
    (tmp_path / "set" / "train" / "good").mkdir(parents=True)
    (tmp_path / "set" / "test" / "stain").mkdir(parents=True)
    shutil.copy(stain, tmp_path / "set" / "test" / "stain")
    outcome = invoke("fit", tmp_path / "set", "--out", tmp_path / "run")
    assert outcome.code == DATA
    assert "no normal images to train on" in outcome.error_line
    assert not (tmp_path / "run").exists()


def test_fewer_anomalies_than_shots(invoke: Any, texture_set: Path, tmp_path: Path) -> None:
    outcome = invoke("fit", texture_set, "--shots", 17, "--out", tmp_path / "run")
    assert outcome.code == DATA
    assert "17 shots were asked for" in outcome.error_line
    assert "16 anomalies" in outcome.error_line
    assert "--shots 8, which keeps some for the test" in outcome.error_line


def test_bad_training_pictures_are_skipped_and_named(invoke: Any, own_set: Path, tmp_path: Path) -> None:
    (own_set / "train" / "good" / "003.png").write_bytes(b"")
    (own_set / "train" / "good" / "007.png").write_bytes(b"no picture")
    (own_set / "train" / "good" / "011.png").write_bytes((own_set / "train" / "good" / "011.png").read_bytes()[:900])
    outcome = invoke("fit", own_set, "--shots", 2, "--image-size", 64, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    skipped = [line for line in outcome.err.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 3
    assert all(name in "".join(skipped) for name in ("003.png", "007.png", "011.png"))


def test_bad_test_pictures_are_counted(invoke: Any, own_set: Path, own_run: Path) -> None:
    (own_set / "test" / "good" / "000.png").write_bytes(b"")
    outcome = invoke("evaluate", own_run, "--json")
    assert outcome.json["unreadable_images"] == 1
    assert outcome.json["test_normals"] == 7
    assert "000.png" in outcome.err


def test_all_normal_test_pictures_bad(invoke: Any, own_set: Path, own_run: Path) -> None:
    for path in (own_set / "test" / "good").iterdir():
        path.write_bytes(b"")
    outcome = invoke("evaluate", own_run, "--json")
    assert outcome.code == DATA
    assert outcome.error_line


def test_a_defect_among_the_normal_pictures_for_the_threshold_is_named(
    invoke: Any, own_set: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    for path in sorted((own_set / "train" / "good").iterdir()):
        image = cv2.imread(str(path)).astype(np.int16)
        noisy = np.clip(image + rng.integers(-8, 9, image.shape), 0, 255).astype(np.uint8)
        cv2.imwrite(str(path.with_stem(f"{path.stem}-again")), noisy)
    arguments = ("fit", own_set, "--shots", 2, "--image-size", 64, "--out", tmp_path / "run")
    outcome = invoke(*arguments)
    assert "warning" not in outcome.err
    assert "2 of 2 reach the threshold" in outcome.err
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    wrong = Path(split["root"], split["calibration"][2]["path"])
    cv2.imwrite(str(wrong), rng.integers(0, 256, (128, 128, 3)).astype(np.uint8))
    outcome = invoke(*arguments)
    (warning,) = (line for line in outcome.err.splitlines() if line.startswith("warning"))
    assert f"{wrong} scores" in warning
    assert "far above all other normal images" in warning


def test_without_defects_the_fit_says_that_nothing_can_be_tested(invoke: Any, own_set: Path, tmp_path: Path) -> None:
    for defect in ("stain", "scratch"):
        shutil.rmtree(own_set / "test" / defect, ignore_errors=True)
    outcome = invoke("fit", own_set, "--shots", 0, "--image-size", 64, "--out", tmp_path / "run")
    assert outcome.code == 0
    assert "no defect is left for the test" in outcome.err
    outcome = invoke("evaluate", tmp_path / "run")
    assert outcome.code == DATA
    assert "it needs both: add some, or fit again with fewer --shots" in outcome.error_line


def test_a_mask_that_shows_no_defect_is_no_mask(invoke: Any, own_set: Path, own_run: Path) -> None:
    masks = sorted((own_set / "ground_truth" / "stain").iterdir())
    cv2.imwrite(str(masks[-1]), np.zeros((128, 128), np.uint8))
    outcome = invoke("evaluate", own_run, "--json")
    assert outcome.json["unusable_masks"] == 1
    assert f"mask {masks[-1]}" in outcome.err
    assert "has no defective pixel; draw the defect" in outcome.err


def test_a_defect_between_the_pixels_of_the_model_keeps_its_mask(invoke: Any, own_set: Path, own_run: Path) -> None:
    assert json.loads((own_run / "run.json").read_text())["input_hw"] == [64, 64]
    masks = sorted((own_set / "ground_truth" / "stain").iterdir())
    speck = np.zeros((128, 128), np.uint8)
    speck[33, 41] = 255  # Every second row and column is looked at.
    for mask in masks:
        cv2.imwrite(str(mask), speck)
    before = invoke("evaluate", own_run, "--json").json
    assert (before["unusable_masks"], before["test_masks"]) == (0, before["test_anomalies"])


def test_a_mask_of_another_size(invoke: Any, own_set: Path, own_run: Path) -> None:
    for mask in (own_set / "ground_truth" / "stain").iterdir():
        cv2.imwrite(str(mask), np.full((64, 128), 255, np.uint8))
    outcome = invoke("evaluate", own_run, "--json")
    assert outcome.code == 0
    assert outcome.json["unusable_masks"] == outcome.err.count("is 128x64 pixels") > 0
    assert outcome.json["pixel_auroc"] > 0.5  # from the other class
    assert "is 128x64 pixels, its image 128x128" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("evaluate", "nowhere"), MODEL, "not a run folder"),
        (("calibrate", "nowhere"), MODEL, "not a run folder"),
        (("export", "nowhere"), MODEL, "not a run folder"),
        (("fit", "nowhere"), DATA, "does not exist"),
        (("fit",), 2, "data is not given"),
        (("fit", "elpv", "--detector", "magic"), 2, "devnet, flos, meliad, meliad-reconstruction"),
        (("fit", "elpv", "--backbone", "alexnet"), MODEL, "choose one of tf_efficientnet_lite0"),
        (("fit", "elpv", "--weights", "none.pth"), MODEL, "does not exist"),
        (("fit", "elpv", "--image-size", "100"), 2, "image_size = 100"),
        (("fit", "elpv", "--shots", "-1"), 2, "shots = -1"),
        (("fit", "--config", "none.toml"), 2, "cannot be read"),
        (("predict", "none.meliad", "x.png"), BUNDLE, "no such bundle"),
        (("watch", "none.meliad", "x.avi"), BUNDLE, "no such bundle"),
        (("check", "none.meliad"), BUNDLE, "no such bundle"),
        (("bench", "none.meliad"), BUNDLE, "no such bundle"),
    ],
)
def test_what_is_not_there_is_one_line(
    invoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = invoke(*arguments)
    assert outcome.code == code
    assert says in outcome.error_line
    assert outcome.out == ""


def test_an_unknown_key_of_the_project_file(invoke: Any, tmp_path: Path) -> None:
    project = tmp_path / "line.toml"
    project.write_text('data = "elpv"\nshoots = 3\n')
    outcome = invoke("fit", "--config", project)
    assert outcome.code == 2
    assert "unknown key 'shoots'" in outcome.error_line


@pytest.mark.parametrize("rate", [1.5, 0])
def test_a_false_alarm_rate_outside_its_range(invoke: Any, run_folder: Path, rate: float) -> None:
    outcome = invoke("calibrate", run_folder, "--false-alarm-rate", rate)
    assert outcome.code == 2
    assert "between 0 and 1" in outcome.error_line


@pytest.mark.parametrize("verb", ["predict", "watch", "check", "bench"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 3],
        lambda data: b"PK\x03\x04 this only begins like an archive",
        lambda data: data[:50_000] + bytes([data[50_000] ^ 1]) + data[50_001:],
    ],
    ids=["empty", "truncated", "foreign", "bit flipped"],
)
def test_a_damaged_bundle(
    invoke: Any, bundle_file: Path, stain: Path, tmp_path: Path, verb: str, spoil: Callable[[bytes], bytes]
) -> None:
    bad = tmp_path / "bad.meliad"
    bad.write_bytes(spoil(bundle_file.read_bytes()))
    outcome = invoke(verb, bad, *((stain,) if verb in {"predict", "watch"} else ()))
    assert outcome.code == BUNDLE
    assert "bad.meliad" in outcome.error_line


def test_a_foreign_bundle(invoke: Any, texture_set: Path, stain: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "foreign"), "zip", texture_set)
    outcome = invoke("predict", archive, stain)
    assert outcome.code == BUNDLE
    assert "not a bundle of ours" in outcome.error_line


@pytest.mark.parametrize(
    "spoilt", ["network.safetensors", "split.json", "calibration.json", "exemplars.png", "run.json"]
)
@pytest.mark.parametrize("how", ["missing", "cut", "empty"])
def test_a_damaged_run_folder(invoke: Any, run_folder: Path, tmp_path: Path, spoilt: str, how: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    data = (run / spoilt).read_bytes()
    (run / spoilt).unlink()
    if how != "missing":
        (run / spoilt).write_bytes(data[: len(data) // 2] if how == "cut" else b"")
    outcome = invoke("export", run, "--out", tmp_path / "x.meliad")
    assert outcome.code == MODEL
    assert str(run) in outcome.error_line
    assert not (tmp_path / "x.meliad").exists()


def test_a_video_that_never_opens(invoke: Any, bundle_file: Path, tmp_path: Path) -> None:
    (tmp_path / "no.avi").write_bytes(b"this is no video" * 100)
    for source in ("no.avi", "missing.avi"):
        outcome = invoke("watch", bundle_file, tmp_path / source)
        assert outcome.code == SOURCE
        assert source in outcome.error_line


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", "{data}", "--shots", "1", "--image-size", "64", "--out", "{file}"),
        ("export", "{run}", "--out", "{folder}"),
        ("evaluate", "{run}", "--report", "{folder}"),
        ("evaluate", "{run}", "--report", "{file}/report.html"),
        ("predict", "{bundle}", "{data}/test/stain", "--save", "{file}"),
    ],
    ids=["fit", "export onto a folder", "report onto a folder", "report below a file", "save"],
)
def test_a_place_that_cannot_be_written_is_one_line(
    invoke: Any, texture_set: Path, run_folder: Path, bundle_file: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    places = {
        "data": texture_set,
        "run": run_folder,
        "bundle": bundle_file,
        "file": tmp_path / "file",
        "folder": tmp_path / "folder",
    }
    outcome = invoke(*(argument.format(**places) for argument in arguments))
    assert outcome.code == 1
    assert str(tmp_path) in outcome.error_line


def test_without_a_network_there_are_no_random_weights(texture_set: Path, tmp_path: Path) -> None:
    """In a process of its own, whose hub client is offline and has an empty cache."""
    command = "from meliad_edge.cli import main; main()"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            command,
            "fit",
            texture_set,
            "--shots",
            "1",
            "--backbone",
            "resnet18",
            "--out",
            tmp_path / "run",
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == MODEL, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "no ImageNet weights for resnet18" in last
    assert "--weights" in last
    assert "tf_efficientnet_lite0" in last
    assert not (tmp_path / "run").exists()


def test_constant_normals_are_one_line_or_a_usable_run(invoke: Any, own_set: Path, tmp_path: Path) -> None:
    """A camera with its cap on: nothing can be learned from pictures without a single difference."""
    for path in (own_set / "train" / "good").iterdir():
        cv2.imwrite(str(path), np.full((128, 128, 3), 90, np.uint8))
    outcome = invoke("fit", own_set, "--shots", 2, "--image-size", 64, "--out", tmp_path / "run")
    if outcome.code == 0:
        assert invoke("evaluate", tmp_path / "run", "--json").json["image_auroc"] >= 0.0
    else:
        assert outcome.error_line


def test_the_smallest_set_can_be_exported(invoke: Any, own_set: Path, tmp_path: Path) -> None:
    """Three normals: two to learn from and one for the threshold."""
    for path in sorted((own_set / "train" / "good").iterdir())[3:]:
        path.unlink()
    assert invoke("fit", own_set, "--shots", 1, "--image-size", 64, "--out", tmp_path / "run").code == 0
    outcome = invoke("export", tmp_path / "run", "--out", tmp_path / "x.meliad")
    assert outcome.code == 0, outcome.err


def test_a_bundle_without_golden_frames(invoke: Any, bundle_file: Path, tmp_path: Path) -> None:
    from meliad_edge.bundle import open_bundle, write_bundle

    whole = open_bundle(bundle_file)
    bare = tmp_path / "bare.meliad"
    write_bundle(bare, whole.manifest, whole.models, whole.calibration, [], whole.exemplars)
    for verb in ("check", "bench"):
        outcome = invoke(verb, bare)
        assert outcome.code == BUNDLE
        assert "carries no golden frames" in outcome.error_line
