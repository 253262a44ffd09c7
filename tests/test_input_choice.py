from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("torch")

from meliad_edge.config import FitConfig
from meliad_edge.data.readers import open_dataset
from meliad_edge.data.split import few_shot_split
from meliad_edge.input_choice import InputSize, choose_input_size

pytestmark = pytest.mark.workshop

SPECK = 2


def write_speck_set(root: Path, size_hw: tuple[int, int], normals: int = 32) -> Path:
    """Smooth shading and noise; defects are twenty specks of 2 x 2 pixels, brighter by 60 grey levels."""
    rng = np.random.default_rng(0)
    height, width = size_hw
    for folder, count in (("train/good", normals), ("test/good", 8), ("test/specks", 10)):
        (root / folder).mkdir(parents=True)
        for index in range(count):
            shading = cv2.resize(rng.normal(0, 10, (6, 6)), (width, height), interpolation=cv2.INTER_CUBIC)
            grey = 120 + shading + rng.normal(0, 3, size_hw)
            if folder == "test/specks":
                for y, x in rng.integers(0, (height - SPECK, width - SPECK), (20, 2)):
                    grey[y : y + SPECK, x : x + SPECK] += 60
            cv2.imwrite(str(root / folder / f"{index:02d}.png"), np.clip(grey, 0, 255).astype(np.uint8))
    return root


@pytest.fixture(scope="module")
def large_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speck_set(tmp_path_factory.mktemp("large"), (768, 768))


def choose(data: Path, **settings: Any) -> InputSize:
    config = FitConfig(data=str(data), **settings)
    split = few_shot_split(open_dataset(config.data), shots=config.shots, seed=config.seed)
    return choose_input_size(config, split.train_normal)


@pytest.mark.parametrize(
    ("settings", "size_hw", "says"),
    [
        (
            {},
            (352, 352),
            "352 x 352 pixels, close to the images' aspect ratio; 2 times the usual area, which the images fill and "
            "--budget allows",
        ),
        ({"budget": 1.9}, (256, 256), "256 x 256 pixels, close to the images' aspect ratio"),
        ({"image_size": 96}, (96, 96), "96 x 96 pixels, as set"),
    ],
)
def test_the_size_comes_from_images_and_budget(
    large_images: Path, settings: dict[str, Any], size_hw: tuple[int, int], says: str
) -> None:
    chosen = choose(large_images, **settings)
    assert chosen.size_hw == size_hw
    assert str(chosen) == says


def test_images_of_many_shapes_get_a_square(tmp_path: Path) -> None:
    data = write_speck_set(tmp_path / "set", (480, 640), normals=24)
    for index, path in enumerate(sorted((data / "train/good").iterdir())):
        cv2.imwrite(str(path), np.zeros((480, 400 + 40 * index), np.uint8))
    chosen = choose(data, shots=2)
    assert chosen.size_hw == (352, 352)
    assert chosen.reason.startswith("square, the images differ in aspect ratio; 2 times")


def test_only_training_normals_that_can_be_read_count(tmp_path: Path) -> None:
    data = write_speck_set(tmp_path / "set", (480, 640), normals=8)
    split = few_shot_split(open_dataset(str(data)), shots=2, seed=0)
    for sample in (*split.calibration, *split.shots, *split.test, split.train_normal[0]):
        sample.path.write_bytes(b"unreadable")
    assert choose(data, shots=2).size_hw == (320, 416)


def test_rectangular_input_reaches_every_verb(tmp_path: Path, invoke: Callable[..., Any]) -> None:
    data = write_speck_set(tmp_path / "set", (120, 160), normals=8)
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
