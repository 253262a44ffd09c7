"""Readers: an MVTec-style folder, plain class folders, a CSV file or the ELPV package become one Dataset.

Readers look at names only and decode nothing, so one bad image never stops a data set from being opened.
"""

from __future__ import annotations

import csv
import importlib.util
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from meliad_edge.data.dataset import GOOD, Dataset, Sample, Subset
from meliad_edge.data.images import IMAGE_SUFFIXES, walk_images
from meliad_edge.errors import DataError, MissingExtraError

ELPV = "elpv"

# Compared in lower case, with "_" for "-" and blanks.
NORMAL_NAMES = frozenset(
    {
        GOOD,
        "normal",
        "normals",
        "ok",
        "pass",
        "free",
        "healthy",
        "negative",
        "no_defect",
        "non_defective",
        "nondefective",
        "defect_free",
        "anomaly_free",
    }
)

_LAYOUTS = (
    "expected train/good + test/good + test/<defect>, or good + one folder per defect, or a CSV file path,label[,split]"
)
# Folders that have a meaning in the MVTec layout, so in a plain set they are a mistake and never a defect class.
_RESERVED_NAMES = frozenset({"train", "test", "ground_truth", "mask", "masks"})
_CSV_REQUIRED = ("path", "label")
_CSV_COLUMNS = (*_CSV_REQUIRED, "split", "mask")
_CSV_LABELS = {"0": GOOD, "1": "defect"}
_CSV_SUBSETS: dict[str, Subset] = {"train": "train", "test": "test"}
_NAMES_SHOWN = 5

_log = logging.getLogger(__name__)


def open_dataset(data: str) -> Dataset:
    """Read the names and labels of a data set.

    Args:
        data: ``elpv`` (the installed package elpv-dataset; a folder of that name is ``./elpv``), or a path:

            * a folder with ``train/good``, ``test/good``, ``test/<defect>`` and, where there are any,
              ``train/<defect>`` and ``ground_truth/<defect>/<stem>_mask.png`` or ``<stem>.png``;
              a mask belongs to the test image of that name before the training image;
            * a folder with one folder of normal images, called as in ``NORMAL_NAMES``, and one folder per
              defect beside it;
            * a CSV file with the columns ``path,label[,split][,mask]``: paths relative to the file, label
              ``good`` (or as in ``NORMAL_NAMES``, or ``0``) or the name of a defect (or ``1``), split
              ``train`` or ``test``.

    Returns:
        Samples with absolute paths, sorted by POSIX path. Their subset is ``"any"`` where the set has no
        split of its own.

    Raises:
        DataError: Nothing is there, the layout is unknown, files are missing or named twice, or there is no
            normal image to train on.
        MissingExtraError: ``elpv`` without the package elpv-dataset.
    """
    path = Path(data).absolute()
    if data == ELPV:
        dataset = _read_elpv()
    elif path.is_dir():
        is_mvtec = (path / "train").is_dir()
        samples = _read_mvtec_folder(path) if is_mvtec else _read_class_folders(path)
        dataset = Dataset(path.resolve().name, _sorted_samples(samples))
    elif path.is_file() and path.suffix.lower() == ".csv":
        dataset = Dataset(path.stem, _sorted_samples(_read_csv(path)))
    elif path.exists():
        raise DataError(f"cannot read data set {data}: it is no folder and no .csv file; {_LAYOUTS}")
    else:
        raise DataError(f"data set {data} does not exist; give a folder, a CSV file or the name {ELPV}")
    if not any(not sample.is_anomaly and sample.subset != "test" for sample in dataset.samples):
        raise DataError(
            f"no normal images to train on in {data} ({len(dataset.samples)} images in all, of the kinds "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}); {_LAYOUTS}"
        )
    return dataset


def _read_mvtec_folder(root: Path) -> list[Sample]:
    masks = {folder.name: _masks_by_stem(folder) for folder in _class_folders(root / "ground_truth")}
    mask_count = sum(map(len, masks.values()))
    samples: list[Sample] = []
    # Test first: a mask is given away once, and ground_truth is about the test set.
    subsets: tuple[Subset, ...] = ("test", "train")
    for subset in subsets:
        for folder in _class_folders(root / subset):
            defect = _defect_name(folder.name)
            class_masks = {} if defect == GOOD else masks.get(folder.name, {})
            for path in walk_images(folder):
                stem = path.relative_to(folder).with_suffix("").as_posix()
                mask_path = class_masks.pop(f"{stem}_mask", None) or class_masks.pop(stem, None)
                samples.append(Sample(path, defect, subset, mask_path))
    if mask_count and not any(sample.mask_path for sample in samples):
        _log.warning(
            "none of the %d masks in %s has the name of an image; expected <defect>/<stem>_mask.png",
            mask_count,
            root / "ground_truth",
        )
    return samples


def _read_class_folders(root: Path) -> list[Sample]:
    folders = _class_folders(root)
    names = [folder.name for folder in folders]
    if not names or not _RESERVED_NAMES.isdisjoint(names):
        found = f"the folders {_shown(names)}" if names else "no folders"
        raise DataError(f"unknown layout of data set {root}: it holds {found}; {_LAYOUTS}")
    if not any(_defect_name(name) == GOOD for name in names):
        raise DataError(
            f"cannot tell which folder of {root} holds the normal images: it has {_shown(names)}; rename it to good"
        )
    return [Sample(path, _defect_name(folder.name), "any") for folder in folders for path in walk_images(folder)]


def _read_csv(csv_path: Path) -> list[Sample]:
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front.
        with csv_path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            columns = tuple(reader.fieldnames or ())
            if not set(_CSV_REQUIRED) <= set(columns) <= set(_CSV_COLUMNS) or len(set(columns)) < len(columns):
                raise DataError(
                    f"cannot read {csv_path}: its header is {','.join(columns)!r}; "
                    "expected path,label[,split][,mask] with commas"
                )
            lines: dict[str, int] = {}
            samples = []
            for row in reader:
                sample = _csv_sample(row, csv_path, reader.line_num)
                first_line = lines.setdefault(os.path.realpath(sample.path), reader.line_num)
                if first_line != reader.line_num:
                    raise DataError(
                        f"cannot read {csv_path}: line {reader.line_num} names {row['path']!r} again, "
                        f"as line {first_line} did; remove one"
                    )
                samples.append(sample)
        named = [path for sample in samples for path in (sample.path, sample.mask_path) if path]
        missing = [path for path in named if not path.is_file()]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {csv_path}: {error}; save it as comma-separated UTF-8 text") from error
    except OSError as error:
        raise DataError(f"cannot read {csv_path}: {error.strerror}; check its permissions") from error
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(named)} files named in {csv_path} do not exist, first {missing[0]}; "
            "write paths relative to the CSV file"
        )
    return samples


def _csv_sample(row: dict[str, str], csv_path: Path, line: int) -> Sample:
    # DictReader puts surplus fields under the key None and fills missing ones with None.
    if None in row or None in row.values():
        raise DataError(f"cannot read {csv_path}: line {line} has more or fewer fields than the header; quote commas")
    fields = {column: value.strip() for column, value in row.items()}
    if not fields["path"] or not fields["label"]:
        raise DataError(f"cannot read {csv_path}: line {line} has an empty path or label; fill it in")
    split = fields.get("split")
    subset = "any" if split is None else _CSV_SUBSETS.get(split.lower())
    if subset is None:
        raise DataError(
            f"cannot read {csv_path}: line {line} has split {split!r}; write train or test, or drop the column"
        )
    return Sample(
        path=csv_path.parent / fields["path"],
        defect=_defect_name(_CSV_LABELS.get(fields["label"], fields["label"])),
        subset=subset,
        mask_path=csv_path.parent / fields["mask"] if fields.get("mask") else None,
    )


def _read_elpv() -> Dataset:
    # Found, not imported: the package imports Pillow, which the runtime does not need.
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("elpv-dataset", "demo")
    root = Path(spec.submodule_search_locations[0]).absolute() / "data"
    defects: dict[tuple[str, str], str] = {("0.0", "mono"): GOOD, ("0.0", "poly"): GOOD}
    defects |= {("1.0", cell_type): cell_type for cell_type in ("mono", "poly")}
    try:
        rows = [line.split() for line in (root / "labels.csv").read_text(encoding="ascii").splitlines()]
        samples = [
            Sample(root / path, defects[probability, cell_type], "any")
            for path, probability, cell_type in rows
            if (probability, cell_type) in defects
        ]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {root / 'labels.csv'}: {error}; reinstall elpv-dataset") from error
    return Dataset(ELPV, _sorted_samples(samples), licence="CC BY-NC-SA 4.0")


def _class_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot list folder {root}: {error.strerror}; check its permissions") from error


def _masks_by_stem(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in walk_images(folder)}


def _defect_name(label: str) -> str:
    is_normal = label.lower().replace("-", "_").replace(" ", "_") in NORMAL_NAMES
    return GOOD if is_normal else label


def _sorted_samples(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    return tuple(sorted(samples, key=lambda sample: sample.path.as_posix()))


def _shown(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
