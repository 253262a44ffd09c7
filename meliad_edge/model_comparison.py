"""Two runs on images that neither was fitted on or calibrated with, and a rule for which of them to use [ours].

The events of a watch are not a fair sample: the model that watched alarms on all of them, so on those held out it has
every false alarm and finds every defect by construction, and any other model has fewer of both. What counts there is
whether the new model lets go of the false alarms rather than of the defects. The test images were not chosen by an
alarm: they are the fair sample, of the parts that the data set shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meliad_edge.data.dataset import Sample
from meliad_edge.data.frames import load_frames
from meliad_edge.metrics import Interval, auroc_difference, image_metrics
from meliad_edge.rates import Rate, chance_of_loss
from meliad_edge.run import Run
from meliad_edge.runtime.engine import RawScores, infer_all
from meliad_edge.runtime.torch_engine import TorchEngine

RULE = (
    "offered if, each model at its own threshold, (1) the share of held-out false alarms that end is more than twice "
    "the share of held-out confirmed defects that are lost or, where none of these events changes sides, the test "
    "images are ranked clearly better; and (2) on the test images neither ranking nor false alarms nor defects found "
    "are clearly worse (95 %)"
)
# A defect that is lost weighs as much as so many false alarms that end.
_LOSS_WEIGHT = 2.0
_SIGNIFICANCE = 0.05
# With fewer held-out events of a kind the interval of a rate may span half of all rates.
_FEW = 12


@dataclass(frozen=True, slots=True)
class ComparedSet:
    """Images of one kind, decided by both models.

    Attributes:
        name: What they are.
        is_anomaly: Whether an alarm is right.
        before, after: Alarms of the running and of the new model.
        mended: Images that only the new model decides rightly.
        broken: Images that only the running model decides rightly.
    """

    name: str
    is_anomaly: bool
    before: Rate
    after: Rate
    mended: int
    broken: int

    @property
    def is_clearly_worse(self) -> bool:
        """Whether the new model errs more often than chance explains."""
        return self.broken > self.mended and chance_of_loss(self.mended, self.broken) < _SIGNIFICANCE

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "images": self.name,
            "counted": "defects found" if self.is_anomaly else "false alarms",
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "mended": self.mended,
            "broken": self.broken,
        }


@dataclass(frozen=True, slots=True)
class RankingChange:
    """Image AUROC of both models on the test images.

    Attributes:
        before, after: In [0, 1].
        difference: Its change.
        interval: 95 % bootstrap interval of the change.
    """

    before: float
    after: float
    difference: float
    interval: Interval

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "before": self.before,
            "after": self.after,
            "difference": self.difference,
            "interval": list(self.interval),
        }


@dataclass(frozen=True, slots=True)
class Decided:
    """Every compared image with what both models make of it.

    Attributes:
        frames: uint8 RGB [n, H, W, 3], at model size.
        samples: Where they came from.
        is_held_out: Whether it is a held-out event, else a test image, [n].
        is_anomaly: What a person said it is, [n].
        before, after: Raw scores and maps of the running and of the new model.
        alarms_before, alarms_after: Decisions, [n].
        errors: One message for each image that could not be read.
    """

    frames: NDArray[np.uint8]
    samples: tuple[Sample, ...]
    is_held_out: NDArray[np.bool_]
    is_anomaly: NDArray[np.bool_]
    before: RawScores
    after: RawScores
    alarms_before: NDArray[np.bool_]
    alarms_after: NDArray[np.bool_]
    errors: tuple[str, ...]

    @property
    def changed(self) -> NDArray[np.intp]:
        """Images on which the models disagree, events before test images, lost ones before mended ones."""
        changed = np.flatnonzero(self.alarms_before != self.alarms_after)
        is_broken = self.alarms_after[changed] != self.is_anomaly[changed]
        return changed[np.lexsort((~is_broken, ~self.is_held_out[changed]))]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the comparison found.

    Attributes:
        rejected, confirmed: Held-out events.
        test_normal, test_anomalous: Test images.
        ranking: Of the test images; None where they lack a kind.
        reasons: Why the new model is not offered; empty when it is.
        cautions: What the comparison cannot tell.
        decided: The images.
    """

    rejected: ComparedSet
    confirmed: ComparedSet
    test_normal: ComparedSet
    test_anomalous: ComparedSet
    ranking: RankingChange | None
    reasons: tuple[str, ...]
    cautions: tuple[str, ...]
    decided: Decided

    @property
    def is_offered(self) -> bool:
        """Whether the rule speaks for the new model."""
        return not self.reasons

    @property
    def verdict(self) -> str:
        """``"offered"``, or why not."""
        return "offered" if self.is_offered else f"not offered: {'; '.join(self.reasons)}"

    @property
    def sets(self) -> tuple[ComparedSet, ...]:
        """What was counted, in the order shown."""
        return self.rejected, self.confirmed, self.test_normal, self.test_anomalous

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "rule": RULE,
            "is_offered": self.is_offered,
            "verdict": self.verdict,
            "sets": [compared.to_dict() for compared in self.sets],
            "test_image_auroc": None if self.ranking is None else self.ranking.to_dict(),
            "cautions": list(self.cautions),
            "unreadable_images": len(self.decided.errors),
        }


def compare_runs(before: Run, after: Run, held_out: Sequence[Sample], *, threshold_before: float) -> Comparison:
    """Let two runs decide held-out events and the test images, and apply :data:`RULE`.

    Args:
        before: The running model; its test images are used.
        after: The new one, fitted on none of them.
        held_out: Events that neither has seen, confirmed and rejected ones.
        threshold_before: What the running model decides at.

    Raises:
        DataError: Not one image can be read.
    """
    decided = _decide(before, after, held_out, threshold_before)
    rejected, confirmed, test_normal, test_anomalous = (
        _count(name, decided, is_held_out=is_held_out, is_anomaly=is_anomaly)
        for name, is_held_out, is_anomaly in (
            ("rejected events, held out", True, False),
            ("confirmed events, held out", True, True),
            ("normal test images", False, False),
            ("defective test images", False, True),
        )
    )
    ranking = _compare_ranking(decided)
    return Comparison(
        rejected,
        confirmed,
        test_normal,
        test_anomalous,
        ranking,
        reasons=_objections(rejected, confirmed, test_normal, test_anomalous, ranking),
        cautions=_cautions(rejected, confirmed, test_normal, ranking),
        decided=decided,
    )


def _decide(before: Run, after: Run, held_out: Sequence[Sample], threshold_before: float) -> Decided:
    loaded = load_frames((*held_out, *before.split.test), after.network.input_hw, "reading held-out images")
    raw_before, raw_after = (
        infer_all(TorchEngine(run.network, run.config.feature_cache, use_kernel=True), loaded.frames, description)
        for run, description in ((before, "running model"), (after, "new model"))
    )
    events = set(held_out)
    return Decided(
        frames=loaded.frames,
        samples=loaded.samples,
        is_held_out=np.array([sample in events for sample in loaded.samples]),
        is_anomaly=np.array([sample.is_anomaly for sample in loaded.samples]),
        before=raw_before,
        after=raw_after,
        alarms_before=raw_before.score >= threshold_before,
        alarms_after=raw_after.score >= after.calibration.threshold,
        errors=loaded.errors,
    )


def _count(name: str, decided: Decided, *, is_held_out: bool, is_anomaly: bool) -> ComparedSet:
    chosen = (decided.is_held_out == is_held_out) & (decided.is_anomaly == is_anomaly)
    before, after = decided.alarms_before[chosen], decided.alarms_after[chosen]
    total = len(before)
    return ComparedSet(
        name,
        is_anomaly,
        Rate(int(before.sum()), total),
        Rate(int(after.sum()), total),
        mended=int(np.count_nonzero((before != is_anomaly) & (after == is_anomaly))),
        broken=int(np.count_nonzero((before == is_anomaly) & (after != is_anomaly))),
    )


def _compare_ranking(decided: Decided) -> RankingChange | None:
    test = ~decided.is_held_out
    labels = decided.is_anomaly[test]
    if not labels.any() or labels.all():
        return None
    before, after = decided.before.score[test], decided.after.score[test]
    difference, interval = auroc_difference(before, after, labels)
    auroc_before, auroc_after = (image_metrics(s, labels, resamples=1).image_auroc for s in (before, after))
    return RankingChange(auroc_before, auroc_after, difference, interval)


def _objections(
    rejected: ComparedSet,
    confirmed: ComparedSet,
    test_normal: ComparedSet,
    test_anomalous: ComparedSet,
    ranking: RankingChange | None,
) -> tuple[str, ...]:
    objections = []
    ended, lost = _net_share(rejected), -_net_share(confirmed)
    if all(compared.mended == compared.broken == 0 for compared in (rejected, confirmed)):
        if ranking is None or ranking.interval[0] <= 0.0:
            objections.append("no held-out event changes sides, and the test images are not ranked clearly better")
    elif ended <= _LOSS_WEIGHT * lost:
        objections.append(
            f"of the held-out events {_net(rejected)} false alarms of {rejected.before.total} end and "
            f"{-_net(confirmed)} confirmed defects of {confirmed.before.total} are lost"
        )
    if ranking is not None and ranking.interval[1] < 0.0:
        objections.append(f"the test images are ranked worse, AUROC {ranking.before:.3f} and now {ranking.after:.3f}")
    for compared, counted in ((test_normal, "false alarms on"), (test_anomalous, "defects found in")):
        if compared.is_clearly_worse:
            now, was, total = compared.after.count, compared.before.count, compared.after.total
            objections.append(f"{now} instead of {was} {counted} {total} test images")
    return tuple(objections)


def _net(compared: ComparedSet) -> int:
    return compared.mended - compared.broken


def _net_share(compared: ComparedSet) -> float:
    """Images decided rightly that were not before, less those the other way round, as a share; 0 of no images."""
    return _net(compared) / compared.before.total if compared.before.total else 0.0


def _cautions(
    rejected: ComparedSet, confirmed: ComparedSet, test_normal: ComparedSet, ranking: RankingChange | None
) -> tuple[str, ...]:
    cautions = []
    for compared, kind, unknown in (
        (rejected, "rejected", "whether the new model alarms on the normal parts that this watch sees is not known"),
        (confirmed, "confirmed", "whether the new model finds the defects that this watch sees is not known"),
    ):
        total = compared.after.total
        if total == 0:
            cautions.append(f"no {kind} event is held out: {unknown}")
        elif total < _FEW:
            cautions.append(
                f"{total} {kind} event{'s' if total > 1 else ''} held out: a hint, no rate; see the interval"
            )
    if test_normal.after.total == 0:
        cautions.append("no normal test image: how often the new model alarms on normal parts at large is not known")
    if ranking is None:
        cautions.append("the test images are not of both kinds: how the models rank them cannot be compared")
    return tuple(cautions)
