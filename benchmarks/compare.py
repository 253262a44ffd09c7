"""Two reports of ``bench``: which stages became slower, and whether the difference is more than chance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meliad_edge.errors import RegressionError, UsageError

_RESAMPLES = 4000
# Share of the total from which on a stage counts: shorter ones are mostly noise.
_LEAST_SHARE = 0.05
# Parts that a report divides the time of its engine into, by one profile: how that varies from run to run is not in
# their samples, so the engine is judged as a whole.
_DIVIDED = ("infer", "score")
_ENGINE = "engine"
_MAX_BYTES = 64 * 1024 * 1024

Verdict = Literal["slower", "slower, within the tolerance", "faster", "no difference seen"]
_Seconds = Field(gt=0.0, allow_inf_nan=False)


class StageRecord(BaseModel):
    """One stage of a report, of all it says what is compared."""

    model_config = ConfigDict(frozen=True)

    p50_s: float = _Seconds


class LatencyRecord(BaseModel):
    """What ``bench --json`` printed, as far as it is compared."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    schema_version: Literal[1]
    model_sha256: str
    engine: str
    precision: str
    threads: int | None
    frame_hw: tuple[int, int]
    stages: dict[str, StageRecord] = Field(min_length=1)
    block_p50_s: dict[str, list[float]]
    is_stable: bool
    environment: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StageComparison:
    """One stage before and after.

    Attributes:
        stage: Its name.
        before_s, after_s: Medians in seconds.
        ratio: After over before.
        low, high: Interval of the ratio, 95 %, a bootstrap over blocks of consecutive frames.
        counts: Whether it takes enough of the total for a regression to matter.
        verdict: In words.
    """

    stage: str
    before_s: float
    after_s: float
    ratio: float
    low: float
    high: float
    counts: bool
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two reports.

    Attributes:
        stages: Those that both have.
        tolerance: How much slower still passes, as a fraction.
        differences: What else differs, or speaks against one of them.
    """

    stages: tuple[StageComparison, ...]
    tolerance: float
    differences: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether no stage that counts became slower by more than the tolerance."""
        return not self.regressions

    @property
    def regressions(self) -> tuple[StageComparison, ...]:
        """Those that did."""
        return tuple(stage for stage in self.stages if stage.counts and stage.verdict == "slower")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "passed": self.passed}


def read_report(path: Path) -> LatencyRecord:
    """Read what ``bench --json`` printed.

    Raises:
        UsageError: The file cannot be read, or is something else.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            msg = f"{path}: {path.stat().st_size} bytes are no report of bench; give what bench MODEL --json printed"
            raise UsageError(msg)
        record = LatencyRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give what bench MODEL --json printed") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        msg = f"{path}: no report of bench ({place}: {first['msg'].lower()}); give what bench MODEL --json printed"
        raise UsageError(msg) from error
    if "total" not in record.stages:
        raise UsageError(f"{path}: no report of bench (it has no total); give what bench MODEL --json printed")
    for stage in record.stages:
        blocks = record.block_p50_s.get(stage, [])
        if len(blocks) < 2 or not all(np.isfinite(blocks)) or min(blocks) <= 0.0:
            msg = f"{path}: {stage} has {len(blocks)} usable blocks of frames; measure again with more --frames"
            raise UsageError(msg)
    return record


def compare_reports(before: LatencyRecord, after: LatencyRecord, tolerance: float) -> Comparison:
    """Compare the medians of the stages that two reports share.

    Args:
        before: The report that is to be held.
        after: The other.
        tolerance: How much slower still passes, as a fraction.
    """
    random = np.random.default_rng(0)
    before, after = _with_engine(before), _with_engine(after)
    stages = []
    for stage in before.stages:
        if stage not in after.stages:
            continue
        low, high = _ratio_interval(before.block_p50_s[stage], after.block_p50_s[stage], random)
        before_s, after_s = before.stages[stage].p50_s, after.stages[stage].p50_s
        share = max(before_s / before.stages["total"].p50_s, after_s / after.stages["total"].p50_s)
        counts = share >= _LEAST_SHARE and not (_ENGINE in before.stages and stage in _DIVIDED)
        verdict = _verdict(low, high, tolerance)
        stages.append(StageComparison(stage, before_s, after_s, after_s / before_s, low, high, counts, verdict))
    return Comparison(tuple(stages), tolerance, tuple(_differences(before, after)))


def _with_engine(record: LatencyRecord) -> LatencyRecord:
    """With the engine's own time, before the parts that it is divided into, where a report divides it."""
    if "score" not in record.stages:
        return record
    engine = StageRecord(p50_s=sum(record.stages[stage].p50_s for stage in _DIVIDED))
    blocks = [sum(parts) for parts in zip(*(record.block_p50_s[stage] for stage in _DIVIDED), strict=True)]
    stages: dict[str, StageRecord] = {}
    for stage, figures in record.stages.items():
        if stage == _DIVIDED[0]:
            stages[_ENGINE] = engine
        stages[stage] = figures
    return record.model_copy(update={"stages": stages, "block_p50_s": {_ENGINE: blocks, **record.block_p50_s}})


def require_no_regression(comparison: Comparison) -> None:
    """Refuse a stage that became slower.

    Raises:
        RegressionError: By more than the tolerance, the interval says.
    """
    slower = comparison.regressions
    if slower:
        worst = max(slower, key=lambda stage: stage.ratio)
        msg = (
            f"{', '.join(stage.stage for stage in slower)} became slower by more than {comparison.tolerance:.0%}: "
            f"{worst.stage} {1e3 * worst.before_s:.3f} ms, now {1e3 * worst.after_s:.3f} ms, ratio {worst.ratio:.3f} "
            f"({worst.low:.3f} to {worst.high:.3f}); measure both again side by side before you believe it"
        )
        raise RegressionError(msg)


def _ratio_interval(before: list[float], after: list[float], random: np.random.Generator) -> tuple[float, float]:
    """95 % of what the ratio of medians is when the blocks of both are drawn again with replacement."""
    ratios = _medians(after, random) / _medians(before, random)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def _medians(blocks: list[float], random: np.random.Generator) -> NDArray[np.float64]:
    drawn = random.choice(np.asarray(blocks), (_RESAMPLES, len(blocks)))
    return np.asarray(np.median(drawn, axis=1))


def _verdict(low: float, high: float, tolerance: float) -> Verdict:
    if low > 1.0 + tolerance:
        return "slower"
    if low > 1.0:
        return "slower, within the tolerance"
    return "faster" if high < 1.0 else "no difference seen"


def _differences(before: LatencyRecord, after: LatencyRecord) -> list[str]:
    found = []
    for name in ("engine", "precision", "threads", "frame_hw"):
        first, second = getattr(before, name), getattr(after, name)
        if first != second:
            found.append(f"{name.replace('_', ' ')} differs: {first}, then {second}")
    for name in ("cpu", "cores"):
        first, second = before.environment.get(name), after.environment.get(name)
        if first != second:
            found.append(f"another machine: {name} was {first}, then {second}; the difference is not the model's alone")
    if before.model_sha256 != after.model_sha256:
        found.append("the models differ")
    found += [
        f"the report {name} says of itself that it should not be quoted"
        for name, report in (("before", before), ("after", after))
        if not report.is_stable
    ]
    return found
