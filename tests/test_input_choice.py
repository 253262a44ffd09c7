from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("torch")

from meliad_edge.config import FitConfig
from meliad_edge.data.readers import open_dataset
from meliad_edge.data.split import few_shot_split
from meliad_edge.input_choice import FEWEST_NORMALS, FEWEST_SHOTS, MARGIN, InputSize, choose_input_size
from meliad_edge.models import create_detector
from meliad_edge.models.backbone import STRIDES, load_backbone
from meliad_edge.models.features import FeatureExtractor

pytestmark = pytest.mark.workshop

SHOTS = 8
SPECK = 2


def write_speck_set(root: Path, size_hw: tuple[int, int], brighter: float, normals: int = 32) -> Path:
    """Smooth shading and noise; defects are twenty specks of 2 x 2 pixels, brighter by so many grey levels."""
    rng = np.random.default_rng(0)
    height, width = size_hw
    for folder, count in (("train/good", normals), ("test/good", 2), ("test/specks", SHOTS + 2)):
        (root / folder).mkdir(parents=True)
        for index in range(count):
            shading = cv2.resize(rng.normal(0, 10, (6, 6)), (width, height), interpolation=cv2.INTER_CUBIC)
            grey = 120 + shading + rng.normal(0, 3, size_hw)
            if folder == "test/specks":
                for y, x in rng.integers(0, (height - SPECK, width - SPECK), (20, 2)):
                    grey[y : y + SPECK, x : x + SPECK] += brighter
            cv2.imwrite(str(root / folder / f"{index:02d}.png"), np.clip(grey, 0, 255).astype(np.uint8))
    return root


@pytest.fixture(scope="module")
def faint_specks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speck_set(tmp_path_factory.mktemp("faint"), (768, 768), 20.0)


@pytest.fixture(scope="module")
def bright_specks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speck_set(tmp_path_factory.mktemp("bright"), (512, 640), 60.0, normals=16)


def choose(data: Path, **settings: Any) -> InputSize:
    config = FitConfig(data=str(data), **{"shots": SHOTS, **settings})
    split = few_shot_split(open_dataset(config.data), shots=config.shots, seed=config.seed)
    detector = create_detector(config.detector)
    backbone = load_backbone(config.backbone, None, detector.strides or STRIDES, even_light=detector.even_light)
    return choose_input_size(config, split, detector, FeatureExtractor(backbone))


def aurocs(chosen: InputSize) -> list[float]:
    return [float(value) for value in re.findall(r"[01]\.\d{3}", chosen.reason)]


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Path]]:
    """The files that are read while the test runs; Python's own are among them."""
    seen: set[Path] = set()
    read_bytes = Path.read_bytes

    def record(path: Path) -> bytes:
        seen.add(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", record)
    return seen


def test_larger_input_where_only_it_shows_the_defects(faint_specks: Path, files_read: set[Path]) -> None:
    chosen = choose(faint_specks)
    assert chosen.size_hw == (352, 352)
    larger, smaller = aurocs(chosen)
    assert larger > smaller + MARGIN
    assert str(chosen).startswith("352 x 352 pixels, close to the images' aspect ratio; AUROC on left-out shots ")
    assert str(chosen).endswith(" at 256 x 256")
    split = few_shot_split(open_dataset(str(faint_specks)), shots=SHOTS, seed=0)
    of_the_set = {path for path in files_read if path.is_relative_to(faint_specks)}
    assert of_the_set == {sample.path for sample in (*split.train_normal, *split.shots)}


def test_smaller_input_where_it_shows_them_as_well(bright_specks: Path) -> None:
    # Neither the threshold's images nor the held-out ones are needed.
    split = few_shot_split(open_dataset(str(bright_specks)), shots=SHOTS, seed=0)
    for sample in (*split.calibration, *split.test):
        sample.path.write_bytes(b"unreadable")
    chosen = choose(bright_specks)
    assert chosen.size_hw == (224, 288)
    smaller, larger = aurocs(chosen)
    assert larger <= smaller + MARGIN
    assert str(chosen).endswith(" at 416 x 320")


@pytest.mark.parametrize(
    ("settings", "size_hw", "says"),
    [
        ({"image_size": 96}, (96, 96), "96 x 96 pixels, as set"),
        ({"budget": 1.0}, (256, 256), "256 x 256 pixels, close to the images' aspect ratio"),
        ({"detector": "padim"}, (256, 256), "256 x 256 pixels, close to the images' aspect ratio"),
        ({"shots": 0}, (256, 256), "; too few labelled defects to compare it with 352 x 352"),
        ({"shots": FEWEST_SHOTS - 1}, (256, 256), "; too few labelled defects to compare it with 352 x 352"),
    ],
)
def test_nothing_to_compare(faint_specks: Path, settings: dict[str, Any], size_hw: tuple[int, int], says: str) -> None:
    chosen = choose(faint_specks, **settings)
    assert chosen.size_hw == size_hw
    assert str(chosen).endswith(says)


def test_images_that_cannot_be_read_do_not_count(tmp_path: Path) -> None:
    data = write_speck_set(tmp_path / "set", (768, 768), 20.0, normals=16)
    split = few_shot_split(open_dataset(str(data)), shots=SHOTS, seed=0)
    assert len(split.train_normal) == FEWEST_NORMALS
    split.train_normal[0].path.write_bytes(b"unreadable")
    assert choose(data).reason.endswith("; too few images that can be read to compare it with 352 x 352")


def test_rectangular_input_reaches_every_verb(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    data = write_speck_set(tmp_path / "set", (120, 160), 60.0, normals=8)
    run, model = tmp_path / "run", tmp_path / "specks.meliad"
    fitted = invoke("fit", data, "--shots", 2, "--out", run, "--json")
    assert fitted.code == 0, fitted.err
    assert fitted.json["facts"]["input_hw"] == [224, 288]
    assert "288 x 224 pixels, close to the images' aspect ratio" in fitted.err
    page = tmp_path / "report.html"
    for command in (
        ("evaluate", run, "--report", page),
        ("export", run, "--out", model),
        ("check", model, "--against", run),
        ("predict", model, data / "test" / "specks"),
    ):
        outcome = invoke(*command)
        assert outcome.code == 0, outcome.err
    assert "seed 0, 288 x 224 pixels" in page.read_text(encoding="utf-8")
