"""Results of several seeds to a mean, a spread, and two intervals of the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meliad_edge.metrics import CONFIDENCE

RESAMPLES = 10_000
INTERVALS = {
    "ci_images": "95 % interval of the mean over other test images: the mean of the bounds of each seed's bootstrap "
    "over its test images; as wide as for one seed, so rather too wide, since seeds share only part of their images",
    "ci_seeds": "95 % interval of the mean over other seeds, that is other splits and shots of the same images: "
    "percentile bootstrap over the seeds; too narrow where there are few",
}


def summarise(seeds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Mean, spread and intervals of every figure that all results have.

    Args:
        seeds: For each seed its results: one, or one per class in the hard setting, whose mean then is the figure of
            that seed.

    Returns:
        JSON values, each an object by the name of the figure: ``mean``; ``std``, of the sample (n - 1), absent for a
        single seed; ``ci_images``, where results have an interval ``<name>_ci``; ``ci_seeds``, absent for a single
        seed. See ``INTERVALS``.
    """
    results = [result for of_seed in seeds for result in of_seed]
    names = [name for name in results[0] if all(_is_number(result.get(name)) for result in results)]
    values = {name: np.array([np.mean([result[name] for result in of_seed]) for of_seed in seeds]) for name in names}
    bounds: dict[str, list[Any]] = {name: [result.get(f"{name}_ci") for result in results] for name in names}
    several = len(seeds) > 1
    return {
        "mean": {name: float(values[name].mean()) for name in names},
        "std": {name: float(values[name].std(ddof=1)) for name in names} if several else {},
        "ci_images": {name: np.mean(of_name, axis=0).tolist() for name, of_name in bounds.items() if all(of_name)},
        "ci_seeds": {name: _bootstrap_mean(values[name]) for name in names} if several else {},
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _bootstrap_mean(values: NDArray[np.float64]) -> list[float]:
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    tails = [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0]
    return [float(bound) for bound in np.quantile(values[drawn].mean(axis=1), tails)]
