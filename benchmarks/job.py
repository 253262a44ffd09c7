"""One fit and evaluation of the accuracy table, and the name under which its result is kept."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from meliad_edge.benchmarks.sources import source_digest
from meliad_edge.config import load_fit_config
from meliad_edge.data.readers import open_dataset
from meliad_edge.evaluate import evaluate
from meliad_edge.models import create_detector
from meliad_edge.models.network import Detector
from meliad_edge.train import fit

# Detectors of this prefix are other people's; benchmarks/peer_detectors.py registers them.
PEER_PREFIX = "anomalib-"
_PEERS = "meliad_edge.benchmarks.peer_detectors"
_PACKAGES = ("anomalib", "numpy", "opencv-python-headless", "scikit-learn", "timm", "torch")


@dataclass(frozen=True, slots=True)
class Variant:
    """One detector with options: a row of the table.

    Attributes:
        label: First cell of the row.
        detector: Name in the detector registry.
        options: Values for options of the detector.
    """

    label: str
    detector: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """What determines one result.

    Attributes:
        set_name: Name of the data set in the table.
        data: The data set, as ``fit`` takes it.
        detector: Name in the detector registry.
        shots: Labelled anomalies.
        seed: Seed of the split and of training.
        shot_class: The one class the shots come from, which the test lacks; None for shots of every class.
        image_size: Height and width of the model's input in pixels; None lets ``fit`` choose them.
        options: Values for options of the detector.
        interpretability: Whether to measure how well the maps explain, too; it takes a minute or two.
    """

    set_name: str
    data: str
    detector: str
    shots: int
    seed: int
    shot_class: str | None = None
    image_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    interpretability: bool = False

    def file_name(self) -> str:
        """Name of the file that keeps the result.

        It ends with a digest of the job, of the names, labels and sizes of the images, of the sources of the detector,
        of ``fit`` and of ``evaluate``, and of the versions of libraries: when one of them changes, so does the name.

        Raises:
            DataError: The data set cannot be opened.
            UsageError: There is no such detector or option.
        """
        known = {
            **asdict(self),
            "data": _data_digest(self.data),
            "sources": source_digest(__name__, type(self.create_detector()).__module__),
            "packages": _versions(self.detector),
        }
        digest = hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=8).hexdigest()
        words = [self.set_name, f"{self.shots}-shot", self.shot_class, self.detector, f"seed{self.seed}", digest]
        return re.sub(r"[^\w.-]+", "_", "_".join(word for word in words if word is not None)) + ".json"

    def create_detector(self) -> Detector:
        """The detector with its options.

        Raises:
            UsageError: There is no such detector or option.
        """
        if self.detector.startswith(PEER_PREFIX):
            importlib.import_module(_PEERS)
        return create_detector(self.detector, self.options)

    def execute(self, feature_cache: Path | None) -> dict[str, Any]:
        """Fit, evaluate, and forget the run.

        Args:
            feature_cache: Folder that keeps backbone features from one job to the next.

        Returns:
            JSON values: what ``evaluate`` measured, ``fit_s`` from the files to the run folder and ``evaluate_s`` in
            seconds, and ``facts``, what fitting chose by itself.

        Raises:
            MeliadError: The detector cannot be fitted on this data with these settings.
        """
        self.create_detector()
        config = load_fit_config(
            None,
            {
                "data": self.data,
                "detector": self.detector,
                "options": self.options,
                "shots": self.shots,
                "seed": self.seed,
                "shot_class": self.shot_class,
                "image_size": self.image_size,
                "feature_cache": feature_cache,
            },
        )
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="meliad-accuracy-") as folder:
            run = fit(config, Path(folder), lambda topic, text: None)
        fitted = time.perf_counter()
        measured = evaluate(run, interpretability=self.interpretability).to_dict()
        times = {"fit_s": fitted - start, "evaluate_s": time.perf_counter() - fitted}
        return {**measured, **times, "facts": run.facts}


@functools.cache
def _data_digest(data: str) -> str:
    """Digest of the relative names, labels and sizes of the files of a data set; their content is not read."""
    samples = open_dataset(data).samples
    root = os.path.commonpath([sample.path.parent for sample in samples])
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        files = [path for path in (sample.path, sample.mask_path) if path is not None]
        described = [(os.path.relpath(path, root), path.stat().st_size) for path in files]
        digest.update(f"{described} {sample.defect} {sample.subset}\n".encode())
    return digest.hexdigest()


def _versions(detector: str) -> dict[str, str]:
    installed = {}
    for package in _PACKAGES:
        if package == "anomalib" and not detector.startswith(PEER_PREFIX):
            continue
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
