"""Few-shot splits without leaks: who trains, who calibrates, who is tested, decided by one seed.

The protocol for sets without a split of their own is the one DevNet, DRA and AHL share: three quarters of the
normal images train, the rest and the anomalies are the test, less ten anomalies that are always kept back for the
shots, so that every number of shots up to ten is measured on the same test images.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meliad_edge.data.dataset import Dataset, FewShotSplit, Sample, Subset
from meliad_edge.errors import DataError, ModelError, UsageError

RESERVED_SHOTS = 10

_MIN_TRAIN_NORMALS = 2


def few_shot_split(
    dataset: Dataset,
    *,
    shots: int,
    seed: int,
    calibration_fraction: float = 0.25,
    shot_class: str | None = None,
) -> FewShotSplit:
    """Draw one few-shot experiment from a data set.

    Fewer shots with the same seed are the first ones of more shots, and the normal images do not depend on
    the shots at all. A set with its own split keeps it: shots come from the training anomalies where there
    are any (the rest of them is not used), else from the test anomalies, and then only they leave the test
    set. In a set without one the test is a quarter of the normal images and all anomalies but the shots, or but
    ``max(10, shots)`` where there are at least 20.

    Args:
        dataset: The samples; their order does not matter.
        shots: Number of labelled anomalies, 0 or more.
        seed: Seed of NumPy's default generator.
        calibration_fraction: Share of the training normals held out for the threshold, in (0, 1); at least
            one image is held out and at least one is left.
        shot_class: The "hard" setting: all shots come from this defect class, and the test has none of it.

    Returns:
        Four disjoint sets, each sorted by path except the shots, which are in the order they were drawn.
        The test may be without normals or without anomalies when the data set is too small.

    Raises:
        DataError: Two samples are one file, there are too few normal images or anomalies, or no such class.
        UsageError: An argument is out of its range.
    """
    if shots < 0:
        raise UsageError(f"the number of shots is {shots}; give 0 or more")
    if not 0 < calibration_fraction < 1:
        raise UsageError(f"the calibration fraction is {calibration_fraction}; give a value between 0 and 1")
    _refuse_duplicates(dataset.samples)
    rng = np.random.default_rng(seed)
    has_own_split = _has_own_split(dataset)

    normals = _shuffled((sample for sample in dataset.samples if not sample.is_anomaly), rng)
    if has_own_split:
        train_normals = [sample for sample in normals if sample.subset == "train"]
        test_normals = [sample for sample in normals if sample.subset == "test"]
    else:
        train_count = len(normals) - len(normals) // 4
        train_normals, test_normals = normals[:train_count], normals[train_count:]
    if len(train_normals) < _MIN_TRAIN_NORMALS:
        raise DataError(
            f"{dataset.name} has {len(train_normals)} normal training images, at least {_MIN_TRAIN_NORMALS} are needed "
            "(one to fit, one to calibrate); add more"
        )
    calibration_count = min(max(round(calibration_fraction * len(train_normals)), 1), len(train_normals) - 1)

    anomalies = _shuffled((sample for sample in dataset.samples if sample.is_anomaly), rng)
    pool = [sample for sample in anomalies if sample.subset == "train"] or anomalies
    if shot_class is not None:
        pool = _of_class(pool, shot_class, dataset.name)
    if shots > len(pool):
        of_class = f" of class {shot_class}" if shot_class is not None else ""
        # Without anomalies of the training set's own the test gets what is left.
        possible = len(pool) if pool[:1] and pool[0].subset == "train" else len(pool) // 2
        raise DataError(
            f"{shots} shots were asked for, but {dataset.name} has {len(pool)} anomalies{of_class} to draw them from; "
            f"use --shots {possible}{'' if possible == len(pool) else ', which keeps some for the test,'} or label more"
        )
    # Results for 1 and for 10 shots are comparable only on one test set; a small set cannot afford that.
    reserves = not has_own_split and len(pool) >= 2 * RESERVED_SHOTS
    kept_back = {sample.path for sample in pool[: max(shots, RESERVED_SHOTS) if reserves else shots]}
    test_anomalies = [
        sample
        for sample in anomalies
        if sample.subset != "train" and sample.path not in kept_back and sample.defect != shot_class
    ]
    return FewShotSplit(
        train_normal=_sorted_by_path(train_normals[calibration_count:]),
        shots=tuple(pool[:shots]),
        calibration=_sorted_by_path(train_normals[:calibration_count]),
        test=_sorted_by_path([*test_normals, *test_anomalies]),
    )


class _SampleRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1)
    defect: str = Field(min_length=1)
    subset: Subset
    mask: str | None = None


class _SplitRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    root: str
    train_normal: tuple[_SampleRecord, ...]
    shots: tuple[_SampleRecord, ...]
    calibration: tuple[_SampleRecord, ...]
    test: tuple[_SampleRecord, ...]


def split_to_json(split: FewShotSplit) -> dict[str, Any]:
    """Turn a split into what a run folder stores.

    Args:
        split: The split; at least one of its sets is not empty.

    Returns:
        An object for ``json.dump``: ``root``, the folder that all files have in common, and the four sets
        as lists of ``path`` and ``mask`` relative to it, ``defect`` and ``subset``.
    """
    parts = {name: getattr(split, name) for name in FewShotSplit.__dataclass_fields__}
    root = os.path.commonpath([path.parent for samples in parts.values() for path in _files(samples)])
    records = {
        name: tuple(
            _SampleRecord(
                path=sample.path.relative_to(root).as_posix(),
                defect=sample.defect,
                subset=sample.subset,
                mask=sample.mask_path.relative_to(root).as_posix() if sample.mask_path else None,
            )
            for sample in samples
        )
        for name, samples in parts.items()
    }
    return _SplitRecord(root=root, **records).model_dump(mode="json")


def split_from_json(document: object) -> FewShotSplit:
    """Rebuild a split from what :func:`split_to_json` made; the files are not looked at.

    Args:
        document: The parsed JSON. Paths are taken relative to its ``root``; absolute ones stay as they are.

    Returns:
        The same split.

    Raises:
        ModelError: The document is not a stored split.
    """
    try:
        record = _SplitRecord.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        raise ModelError(f"the stored split is damaged: {place}: {first['msg']}; fit again") from error
    root = Path(record.root)

    def samples(records: tuple[_SampleRecord, ...]) -> tuple[Sample, ...]:
        return tuple(
            Sample(root / record.path, record.defect, record.subset, root / record.mask if record.mask else None)
            for record in records
        )

    return FewShotSplit(
        train_normal=samples(record.train_normal),
        shots=samples(record.shots),
        calibration=samples(record.calibration),
        test=samples(record.test),
    )


def _has_own_split(dataset: Dataset) -> bool:
    undecided = sum(sample.subset == "any" for sample in dataset.samples)
    if 0 < undecided < len(dataset.samples):
        raise DataError(
            f"{undecided} of the {len(dataset.samples)} images of {dataset.name} are in neither train nor test; "
            "assign all of them or none"
        )
    return undecided == 0


def _refuse_duplicates(samples: Iterable[Sample]) -> None:
    seen: dict[str, Path] = {}
    for sample in samples:
        real_path = os.path.realpath(sample.path)
        if real_path in seen:
            raise DataError(f"{seen[real_path]} and {sample.path} are the same file; remove one to keep the test clean")
        seen[real_path] = sample.path


def _of_class(pool: Sequence[Sample], shot_class: str, dataset_name: str) -> list[Sample]:
    chosen = [sample for sample in pool if sample.defect == shot_class]
    if not chosen:
        known = ", ".join(sorted({sample.defect for sample in pool})) or "none"
        raise DataError(f"{dataset_name} has no defect class {shot_class!r} to draw shots from; it has {known}")
    return chosen


def _shuffled(samples: Iterable[Sample], rng: np.random.Generator) -> list[Sample]:
    ordered = _sorted_by_path(samples)
    return [ordered[i] for i in rng.permutation(len(ordered))]


def _sorted_by_path(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    # Below one root the order of full POSIX paths is the order of relative ones, so it is the same on every machine.
    return tuple(sorted(samples, key=lambda sample: sample.path.as_posix()))


def _files(samples: Iterable[Sample]) -> Iterable[Path]:
    for sample in samples:
        yield sample.path
        if sample.mask_path:
            yield sample.mask_path
