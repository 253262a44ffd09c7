"""What a data set is once it is read: samples with labels, and the few-shot split drawn from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GOOD = "good"

Subset = Literal["train", "test", "any"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image.

    Attributes:
        path: The image file.
        defect: ``"good"`` for a normal image, else the name of the defect class.
        subset: Where the data set puts it: ``"train"``, ``"test"``, or ``"any"`` when it has no split of its own.
        mask_path: Ground-truth mask (non-zero, or above 127 when grey, is defective), if there is one.
    """

    path: Path
    defect: str
    subset: Subset
    mask_path: Path | None = None

    @property
    def is_anomaly(self) -> bool:
        """Whether the sample shows a defect."""
        return self.defect != GOOD


@dataclass(frozen=True, slots=True)
class Dataset:
    """All samples of a data set, sorted by path, before any split.

    Attributes:
        name: Short name for reports (folder name, or ``"elpv"``).
        samples: Every sample, sorted by path.
        licence: Licence of the images when the reader knows it; goes into the bundle's manifest.
    """

    name: str
    samples: tuple[Sample, ...]
    licence: str = "unknown"


@dataclass(frozen=True, slots=True)
class FewShotSplit:
    """The four disjoint sets one few-shot experiment works with.

    Attributes:
        train_normal: Normal images the detector is fitted on.
        shots: The few labelled anomalies the detector may see.
        calibration: Normal images held out of fitting, for the threshold only.
        test: Normal and anomalous images never seen before evaluation.
    """

    train_normal: tuple[Sample, ...]
    shots: tuple[Sample, ...]
    calibration: tuple[Sample, ...]
    test: tuple[Sample, ...]
