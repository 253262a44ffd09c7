from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from meliad_edge.data.dataset import FewShotSplit, Sample
from meliad_edge.data.doubts import doubts_about


def write_samples(folder: Path, defect: str, count: int, *, deepest: int | None = None) -> tuple[Sample, ...]:
    """Images of noise, of 8 bits or of 16 with nothing above a value."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(abs(hash(folder)))
    samples = []
    for index in range(count):
        path = folder / f"{defect}{index}.png"
        if deepest is None:
            pixels = rng.integers(0, 256, (24, 24, 3)).astype(np.uint8)
        else:
            pixels = rng.integers(0, deepest + 1, (24, 24)).astype(np.uint16)
        cv2.imwrite(str(path), pixels)
        samples.append(Sample(path, defect, "any"))
    return tuple(samples)


def split_in(folder: Path, *, defects: int = 3, normals: int = 4, deepest: int | None = None) -> FewShotSplit:
    return FewShotSplit(
        train_normal=write_samples(folder / "train", "good", 5, deepest=deepest),
        shots=write_samples(folder / "shots", "hole", 2),
        calibration=write_samples(folder / "calibration", "good", 3),
        test=write_samples(folder / "test", "good", normals) + write_samples(folder / "test", "hole", defects),
    )


def test_a_sound_split_raises_no_doubt(tmp_path: Path) -> None:
    assert list(doubts_about(split_in(tmp_path))) == []


def test_a_test_set_that_lacks_a_class_is_no_test(tmp_path: Path) -> None:
    (doubt,) = doubts_about(split_in(tmp_path / "a", defects=0))
    assert doubt.startswith("no defect is left for the test")
    (doubt,) = doubts_about(split_in(tmp_path / "b", normals=0))
    assert doubt.startswith("no normal image is left for the test")


def test_a_picture_in_two_sets_is_named_once_however_often_it_is_there(tmp_path: Path) -> None:
    split = split_in(tmp_path)
    trained, again = split.train_normal[0].path, split.train_normal[1].path
    again.write_bytes(trained.read_bytes())  # Twice in one set is no harm.
    assert list(doubts_about(split)) == []
    for copy in (split.calibration[0].path, split.test[0].path):
        copy.write_bytes(trained.read_bytes())
    (doubt,) = doubts_about(split)
    assert doubt.startswith("1 picture is in two sets")
    assert f"{trained} for training" in doubt
    assert f"{split.calibration[0].path} for calibration" in doubt


def test_pictures_that_differ_in_the_middle_of_the_file_alone_are_no_copies(tmp_path: Path) -> None:
    split = split_in(tmp_path)
    content = bytearray(300_000)
    split.train_normal[0].path.write_bytes(content)
    content[150_000] = 1
    split.test[0].path.write_bytes(content)
    assert list(doubts_about(split)) == []


def test_files_that_cannot_be_read_are_left_to_those_who_use_them(tmp_path: Path) -> None:
    split = split_in(tmp_path)
    split.train_normal[0].path.unlink()
    split.train_normal[1].path.write_bytes(b"no picture")
    assert list(doubts_about(split)) == []


def test_twelve_bits_in_sixteen_are_noticed(tmp_path: Path) -> None:
    (doubt,) = doubts_about(split_in(tmp_path / "dark", deepest=4095))
    assert "of 65,535: their upper bits are empty" in doubt
    assert "sees 16 levels of grey" in doubt
    assert list(doubts_about(split_in(tmp_path / "full", deepest=65535))) == []
