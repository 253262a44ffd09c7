"""The data sets of the accuracy table: folders of other layouts become CSV files that ``fit`` reads like any other.

Nothing is copied or downloaded. A set whose folder is absent is left out of the table.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from meliad_edge.data.dataset import GOOD
from meliad_edge.data.images import read_image, read_mask
from meliad_edge.data.readers import ELPV
from meliad_edge.errors import DataError

_Row = tuple[Path, str, Path | None]

_TILE_PREFIX = "MT_"
_TILE_NORMAL = "free"
_COOKIE_DEFECT = "defect"


def locate_set(name: str, data_folder: Path, cache: Path) -> str | None:
    """What ``fit`` takes as DATA for one set of the table.

    Args:
        name: ``elpv``, ``magnetic_tile``, ``cookies``, or anything ``fit`` takes: a folder or a CSV file.
        data_folder: Where the folders ``magnetic_tile`` and ``aws_cookies`` are.
        cache: Folder for the CSV files.

    Returns:
        The argument, or None where the folder of a known set is absent.

    Raises:
        DataError: The folder is there, but has another layout.
    """
    if name not in _FOLDERS:
        return name
    folder_name, rows = _FOLDERS[name]
    folder = (data_folder / folder_name).resolve()
    if not folder.is_dir():
        return None
    file = cache.resolve() / f"{name}.csv"
    _write_csv(file, list(rows(folder)))
    return str(file)


def folder_of(name: str) -> str:
    """Name of the folder that holds a known set."""
    return _FOLDERS[name][0]


def _magnetic_tile_rows(folder: Path) -> Iterator[_Row]:
    """``MT_<class>/Imgs/<stem>.jpg`` with a mask ``<stem>.png`` beside it, grey with a threshold at 127.

    Normal tiles come with empty masks, and so do four uneven ones; an empty mask is no mask. An anomaly without one
    counts for the image metrics alone.
    """
    classes = sorted(path for path in folder.glob(f"{_TILE_PREFIX}*/Imgs") if path.is_dir())
    if not any(_tile_class(path) == GOOD for path in classes):
        found = ", ".join(path.parent.name for path in classes) or "no MT_<class>/Imgs"
        msg = f"{folder}: no normal tiles in MT_Free/Imgs, found {found}; copy the set again"
        raise DataError(msg)
    for path in classes:
        defect = _tile_class(path)
        for image in sorted(path.glob("*.jpg")):
            yield image, defect, _filled_mask(image, image.with_suffix(".png")) if defect != GOOD else None


def _tile_class(images: Path) -> str:
    name = images.parent.name.removeprefix(_TILE_PREFIX).lower()
    return GOOD if name == _TILE_NORMAL else name


def _cookie_rows(folder: Path) -> Iterator[_Row]:
    """Labels are in the file names: ``normal-*`` and ``anomaly-*`` with masks, ``test-normal-*``, ``test-anomaly-*``.

    All of them are one pool for the split of the protocol [ours]: 31 normal training images are too few to hold some
    out for the threshold and to measure 0, 1 and 10 shots on one test set besides. The provider's test images have no
    masks, so their anomalies count for the image metrics alone. The masks are coloured on transparent ground.
    """
    root = folder / "cookie-dataset"
    training = root / "dataset-files" / "training-images"
    images = sorted([*training.glob("*.jpg"), *(root / "test-images").glob("*.jpg")])
    if not images:
        msg = f"{folder}: no images in {training.relative_to(folder)} or cookie-dataset/test-images; copy the set again"
        raise DataError(msg)
    for image in images:
        if image.stem.removeprefix("test-").startswith("normal-"):
            yield image, GOOD, None
        else:
            yield (
                image,
                _COOKIE_DEFECT,
                _filled_mask(image, root / "dataset-files" / "mask-images" / f"{image.stem}.png"),
            )


_FOLDERS: dict[str, tuple[str, Callable[[Path], Iterator[_Row]]]] = {
    "magnetic_tile": ("magnetic_tile", _magnetic_tile_rows),
    "cookies": ("aws_cookies", _cookie_rows),
}
KNOWN_SETS = (ELPV, *_FOLDERS)


def _filled_mask(image: Path, mask: Path) -> Path | None:
    if not mask.is_file():
        return None
    return mask if np.any(read_mask(mask, read_image(image).shape[:2])) else None


def _write_csv(file: Path, rows: list[_Row]) -> None:
    """Absolute paths; the file is left alone when it already says this."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "mask"])
    writer.writerows([image, defect, mask or ""] for image, defect, mask in rows)
    if file.is_file() and file.read_text(encoding="utf-8") == text.getvalue():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text.getvalue(), encoding="utf-8")
    partial.replace(file)
