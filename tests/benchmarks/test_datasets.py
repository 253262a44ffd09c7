from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from meliad_edge.benchmarks.datasets import KNOWN_SETS, locate_set
from meliad_edge.data.dataset import Dataset
from meliad_edge.data.images import read_mask
from meliad_edge.data.readers import open_dataset
from meliad_edge.data.split import few_shot_split
from meliad_edge.errors import DataError

SIZE_HW = (20, 30)


def write_picture(path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), rng.integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8))


def write_grey_mask(path: Path, level: int) -> None:
    """A square of that level and, as in the real set, pixels below the threshold around it."""
    mask = np.zeros(SIZE_HW, np.uint8)
    if level:
        mask[3:11, 4:12] = 100
        mask[4:10, 5:11] = level
    cv2.imwrite(str(path), mask)


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """Both sets in their own layouts, small; a comma and a blank in the path, which CSV files must survive."""
    rng = np.random.default_rng(11)
    root = tmp_path / "sets, all of them"
    for name, count, level in (("Free", 8, 0), ("Blowhole", 3, 255), ("Crack", 3, 176)):
        for index in range(count):
            image = root / "magnetic_tile" / f"MT_{name}" / "Imgs" / f"exp{index}_num_{index}.jpg"
            write_picture(image, rng)
            write_grey_mask(image.with_suffix(".png"), level)
    uneven = root / "magnetic_tile" / "MT_Uneven" / "Imgs" / "exp1_num_5.jpg"
    write_picture(uneven, rng)
    write_grey_mask(uneven.with_suffix(".png"), 0)
    (root / "magnetic_tile" / "README.md").write_text("not an image")

    files = root / "aws_cookies" / "cookie-dataset" / "dataset-files"
    (files / "mask-images").mkdir(parents=True)
    for index in range(1, 5):
        write_picture(files / "training-images" / f"normal-{index}.jpg", rng)
        write_picture(files / "training-images" / f"anomaly-{index}.jpg", rng)
        mask = np.zeros((*SIZE_HW, 4), np.uint8)
        mask[5:9, 6:16] = (54, 164, 35, 255)
        mask[4, 6:16] = (54, 164, 35, 90)  # the soft rim of the real masks
        cv2.imwrite(str(files / "mask-images" / f"anomaly-{index}.png"), mask)
        write_picture(files.parent / "test-images" / f"test-normal-{index}.jpg", rng)
    write_picture(files.parent / "test-images" / "test-anomaly-1.jpg", rng)
    return root


def read_set(name: str, data_folder: Path, cache: Path) -> Dataset:
    data = locate_set(name, data_folder, cache)
    assert data is not None
    return open_dataset(data)


def defective_pixels(dataset: Dataset) -> dict[Path, int]:
    masks = {sample.path: sample.mask_path for sample in dataset.samples}
    return {path: int(read_mask(mask, SIZE_HW).sum()) for path, mask in masks.items() if mask is not None}


def test_magnetic_tile(data_folder: Path, tmp_path: Path) -> None:
    dataset = read_set("magnetic_tile", data_folder, tmp_path / "cache")
    assert dataset.name == "magnetic_tile"
    defects = [sample.defect for sample in dataset.samples]
    assert {name: defects.count(name) for name in defects} == {"good": 8, "blowhole": 3, "crack": 3, "uneven": 1}
    with_mask = {sample.path for sample in dataset.samples if sample.mask_path is not None}
    assert with_mask == {sample.path for sample in dataset.samples if sample.defect in ("blowhole", "crack")}, (
        "an empty mask is no mask"
    )
    assert set(defective_pixels(dataset).values()) == {36}, "above 127"
    assert all(sample.mask_path in (None, sample.path.with_suffix(".png")) for sample in dataset.samples)


def test_cookies_are_one_pool(data_folder: Path, tmp_path: Path) -> None:
    dataset = read_set("cookies", data_folder, tmp_path / "cache")
    names = {sample.path.name for sample in dataset.samples if not sample.is_anomaly}
    assert names == {f"{kind}-{index}.jpg" for kind in ("normal", "test-normal") for index in range(1, 5)}
    anomalies = {sample.path.name for sample in dataset.samples if sample.is_anomaly}
    assert anomalies == {"test-anomaly-1.jpg", *(f"anomaly-{index}.jpg" for index in range(1, 5))}
    opaque = {path.name: pixels for path, pixels in defective_pixels(dataset).items()}
    assert opaque == {f"anomaly-{index}.jpg": 40 for index in range(1, 5)}
    split = few_shot_split(dataset, shots=1, seed=0)
    assert len(split.train_normal) + len(split.calibration) == 6


def test_sets_are_read_where_they_are_and_written_once(data_folder: Path, tmp_path: Path) -> None:
    first = locate_set("cookies", data_folder, tmp_path / "cache")
    assert first is not None
    written = Path(first).stat().st_mtime_ns
    assert locate_set("cookies", data_folder, tmp_path / "cache") == first
    assert Path(first).stat().st_mtime_ns == written
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["cookies.csv"]
    next(data_folder.rglob("test-normal-4.jpg")).unlink()
    assert len(read_set("cookies", data_folder, tmp_path / "cache").samples) == 12


def test_absent_sets_and_other_data(tmp_path: Path) -> None:
    assert [locate_set(name, tmp_path, tmp_path) for name in KNOWN_SETS] == ["elpv", None, None]
    assert locate_set("parts/metal", tmp_path, tmp_path) == "parts/metal", "as fit takes it"


@pytest.mark.parametrize(("name", "folder"), [("magnetic_tile", "magnetic_tile"), ("cookies", "aws_cookies")])
def test_another_layout_is_refused(name: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / folder / "MT_Crack" / "Imgs").mkdir(parents=True)
    with pytest.raises(DataError, match="copy the set again"):
        locate_set(name, tmp_path, tmp_path / "cache")
