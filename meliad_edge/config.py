"""The project file: one TOML schema, unknown keys refused, the command line wins."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meliad_edge.errors import UsageError
from meliad_edge.precision import DEFAULT_LIMITS, ParityLimits, Precision

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class FitConfig(BaseModel):
    """What ``fit`` needs to know; the keys of the project file and the options of the command line.

    Attributes:
        data: Folder, CSV file, or ``"elpv"``.
        out: Run folder to write.
        detector: Name in the detector registry.
        options: Values for options of the detector, by name.
        shots: Labelled anomalies to learn from.
        seed: Seed of the split and of training.
        shot_class: Draw every shot from this defect class and leave the class out of the test set.
        backbone: timm name.
        weights: Local file with the backbone's weights.
        image_size: Height and width of the model's input in pixels, a multiple of 32; None chooses them from
            the images.
        budget: Largest area of the input that may be chosen, before its sides are rounded, in areas of 256 x 256
            pixels; the time of a frame grows with it.
        false_alarm_rate: Accepted rate of alarms on normal images.
        feature_cache: Folder that keeps backbone features from one fit to the next.
        licence: Of the images, for the bundle, which contains some; None says what the data set is known to have.
        notes: What whoever gets the bundle should know of the data: the part, the line, the camera, the lens.
        limits: Largest differences that an exported graph of a precision may show; others keep their defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    out: Path = Path("runs/fit")
    detector: str = "meliad"
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    shots: int = Field(default=10, ge=0, le=1000)
    seed: int = Field(default=0, ge=0)
    shot_class: str | None = None
    backbone: str = "tf_efficientnet_lite0"
    weights: Path | None = None
    image_size: int | None = Field(default=None, ge=64, le=1024, multiple_of=32)
    budget: float = Field(default=2.0, ge=1.0, le=16.0)
    false_alarm_rate: float = Field(default=0.01, gt=0.0, lt=1.0)
    feature_cache: Path | None = None
    licence: str | None = Field(default=None, max_length=200)
    notes: str = Field(default="", max_length=2000)
    limits: dict[Precision, ParityLimits] = Field(default_factory=dict)

    def limits_of(self, precision: Precision) -> ParityLimits:
        """What an exported graph of that precision must keep to."""
        return self.limits.get(precision, DEFAULT_LIMITS[precision])


def load_fit_config(file: Path | None, overrides: dict[str, Any]) -> FitConfig:
    """Read the project file, if any, and lay the command line over it.

    Args:
        file: TOML file with the keys of :class:`FitConfig`.
        overrides: Options of the command line; None means not given.

    Raises:
        UsageError: The file is missing or not TOML, or a key or value is not allowed.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            msg = f"project file {file} cannot be read ({error}); it must be a TOML file"
            raise UsageError(msg) from error
    values |= {key: value for key, value in overrides.items() if value is not None}
    try:
        return FitConfig.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        known = ", ".join(FitConfig.model_fields)
        if problem["type"] == "missing":
            msg = f"{key} is not given; name it on the command line or in the project file"
        elif problem["type"] == "extra_forbidden":
            msg = f"{file}: unknown key {key!r}; the keys are {known}"
        else:
            msg = f"{key} = {problem['input']!r} is not allowed: {problem['msg'].lower()}"
        raise UsageError(msg) from error
