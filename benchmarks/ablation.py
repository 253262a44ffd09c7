"""What each part of a method contributes: the same method with one of its parts switched off."""

from __future__ import annotations

from meliad_edge.benchmarks.job import Variant

_DEFAULT = "meliad"
_RECONSTRUCTION = "meliad-reconstruction"

SEEDS = 3
ABLATIONS = (
    Variant("reconstruction, all parts", _RECONSTRUCTION),
    Variant("without channel entropy (phi = 0)", _RECONSTRUCTION, {"channel_entropy": False}),
    Variant("without patch entropy (kappa = 0)", _RECONSTRUCTION, {"patch_entropy": False}),
    Variant(
        "without any entropy (phi = kappa = lambda_H = 0)",
        _RECONSTRUCTION,
        {"channel_entropy": False, "patch_entropy": False, "entropy_weight": 0.0},
    ),
    Variant("without margin loss (lambda_m = 0)", _RECONSTRUCTION, {"margin_weight": 0.0}),
    Variant("default, all parts", _DEFAULT),
    Variant("default, places not evened out", _DEFAULT, {"even_places": False}),
    Variant("default without Gaussians of places", _DEFAULT, {"place_weight": 0.0}),
    Variant("default without anomaly prototypes", _DEFAULT, {"anomaly_weight": 0.0}),
    Variant("default without difference of means", _DEFAULT, {"direction_weight": 0.0}),
    Variant("default without training of the direction", _DEFAULT, {"steps": 0}),
    Variant("default without entropy (kappa = 0)", _DEFAULT, {"kappa": 0.0}),
)
