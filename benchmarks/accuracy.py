"""Accuracy under the frozen few-shot protocol: several seeds, mean and spread, beside published figures."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.config import FitConfig
from meliad_edge.evaluate import evaluate
from meliad_edge.train import fit

# Image AUROC with 10 / 1 labelled anomalies on ELPV, as published (tables of the AHL and DPDL papers).
PUBLISHED_ELPV = {
    "DevNet": (0.846, 0.514),
    "FLOS": (0.818, 0.457),
    "DRA": (0.845, 0.675),
    "AHL": (0.850, 0.828),
    "DPDL": (0.937, None),
}
_METRICS = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro_30", "aupro_05")


def run(data: str = "elpv", shots: int = 10, seeds: int = 5, detector: str = "meliad") -> dict[str, Any]:
    """Fit and evaluate once per seed.

    Args:
        data: Data set, as ``fit`` takes it.
        shots: Labelled anomalies.
        seeds: Number of seeds, 0 upwards; each draws its own split.
        detector: Name in the detector registry.

    Returns:
        JSON values: per seed and mean with standard deviation of every metric that the data set allows.
    """
    per_seed = []
    for seed in range(seeds):
        config = FitConfig(data=data, shots=shots, seed=seed, detector=detector)
        with tempfile.TemporaryDirectory(prefix="meliad-accuracy-") as folder:
            result = evaluate(fit(config, Path(folder), lambda topic, text: None)).to_dict()
        per_seed.append({"seed": seed, **result})
    measured = [metric for metric in _METRICS if per_seed[0].get(metric) is not None]
    return {
        "benchmark": "accuracy",
        "data": data,
        "detector": detector,
        "shots": shots,
        "seeds": seeds,
        "mean": {metric: float(np.mean([r[metric] for r in per_seed])) for metric in measured},
        "std": {metric: float(np.std([r[metric] for r in per_seed])) for metric in measured},
        "per_seed": per_seed,
        "published_image_auroc": PUBLISHED_ELPV if data == "elpv" else {},
        "environment": describe_environment(),
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as lines for people."""
    lines = [
        (result["detector"], f"{metric} {mean:.4f} +- {result['std'][metric]:.4f}")
        for metric, mean in result["mean"].items()
    ]
    for name, (ten, one) in result["published_image_auroc"].items():
        lines.append(
            (name, f"image_auroc {ten:.3f} with 10 shots, {'-' if one is None else f'{one:.3f}'} with 1, published")
        )
    return lines
