"""The precisions a model can be exported in, and how far each may stray from the network that was trained."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


class ParityLimits(BaseModel):
    """Largest differences that pass as the same model; a changed decision never does.

    Attributes:
        score: Largest difference of a score, as a fraction of the distance from the typical normal score to the
            threshold.
        map: Largest difference of a map cell, in the same unit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    score: float = Field(gt=0.0, le=1.0)
    map: float = Field(gt=0.0, le=10.0)


DEFAULT_LIMITS: dict[Precision, ParityLimits] = {
    "fp32": ParityLimits(score=0.01, map=0.02),
    "fp16": ParityLimits(score=0.05, map=0.2),
    "int8": ParityLimits(score=0.5, map=2.0),
}
