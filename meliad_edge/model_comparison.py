"""Two runs on images that neither was fitted on or calibrated with, and a rule for which of them to use [ours].

The events of a watch are not a fair sample: the model that watched alarms on all of them, so on those held out it has
every false alarm and finds every defect by construction, any other model has fewer of both, and what the running model
passed makes no event. So the rule asks whether the new model lets go of false alarms rather than of defects, and more
so than a higher threshold would. The test images were not chosen by an alarm: they are the fair sample, of the parts
that the data set shows.
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

BoolArray = NDArray[np.bool_]

RULE = (
    "offered if (1) it finds clearly more defects at as many false alarms, or has clearly fewer false alarms at as "
    "many defects found, than the running model would with its threshold moved, or ranks the test images clearly "
    "better; (2) of the held-out events alone, the share of false alarms that end is at least twice the share of "
    "defects that are lost; and (3) on the test images it does not err clearly more often, on normal or on defective "
    "ones, nor rank clearly worse. But for (1) each model decides at its own threshold; clearly means at 95 %"
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
        return chance_of_loss(self.mended, self.broken) < _SIGNIFICANCE

    @property
    def is_clearly_better(self) -> bool:
        """Whether the new model errs less often than chance explains."""
        return chance_of_loss(self.broken, self.mended) < _SIGNIFICANCE

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
    is_held_out: BoolArray
    is_anomaly: BoolArray
    before: RawScores
    after: RawScores
    alarms_before: BoolArray
    alarms_after: BoolArray
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
        matched: All normal images with the running model moved to find as many defects as the new one, and all
            defects with it moved to have as many false alarms; fewer where a kind of image is missing.
        ranking: Of the test images; None where they lack a kind.
        reasons: Why the new model is not offered; empty when it is.
        cautions: What the comparison cannot tell.
        decided: The images.
    """

    rejected: ComparedSet
    confirmed: ComparedSet
    test_normal: ComparedSet
    test_anomalous: ComparedSet
    matched: tuple[ComparedSet, ...]
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
        return self.rejected, self.confirmed, self.test_normal, self.test_anomalous, *self.matched

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
        _count(
            name,
            (decided.is_held_out == is_held_out) & (decided.is_anomaly == is_anomaly),
            decided.alarms_before,
            decided.alarms_after,
            is_anomaly=is_anomaly,
        )
        for name, is_held_out, is_anomaly in (
            ("rejected events, held out", True, False),
            ("confirmed events, held out", True, True),
            ("normal test images", False, False),
            ("defective test images", False, True),
        )
    )
    matched = _match(decided)
    ranking = _compare_ranking(decided)
    return Comparison(
        rejected,
        confirmed,
        test_normal,
        test_anomalous,
        matched,
        ranking,
        reasons=apply_rule(rejected, confirmed, test_normal, test_anomalous, matched, ranking),
        cautions=_cautions(rejected, confirmed, test_normal, ranking),
        decided=decided,
    )


def apply_rule(
    rejected: ComparedSet,
    confirmed: ComparedSet,
    test_normal: ComparedSet,
    test_anomalous: ComparedSet,
    matched: Sequence[ComparedSet],
    ranking: RankingChange | None,
) -> tuple[str, ...]:
    """Apply :data:`RULE`; returns what speaks against the new model, nothing if it is to be offered.

    Args:
        rejected: Held-out events.
        confirmed: Held-out events.
        test_normal: Test images.
        test_anomalous: Test images.
        matched: Images of a kind, the running model moved to decide alike often on the other kind.
        ranking: Of the test images, if they are of both kinds.
    """
    objections = []
    ranks_better = ranking is not None and ranking.interval[0] > 0.0
    if not ranks_better and not any(compared.is_clearly_better for compared in matched):
        found = "; ".join(
            f"{compared.after.count} of {compared.after.total} "
            + ("defects found" if compared.is_anomaly else "false alarms")
            + f", the running model {compared.before.count} with its threshold moved"
            for compared in matched
        )
        objections.append(f"no clear gain ({found or 'the images are all of one kind'})")
    if _gain(rejected) < -_LOSS_WEIGHT * _gain(confirmed):
        objections.append(
            f"of the held-out events {-_net(confirmed)} of {confirmed.before.total} defects are lost, and only "
            f"{_net(rejected)} of {rejected.before.total} false alarms end"
        )
    for compared, counted in ((test_normal, "false alarms on"), (test_anomalous, "defects found in")):
        if compared.is_clearly_worse:
            now, was, total = compared.after.count, compared.before.count, compared.after.total
            objections.append(f"{now} instead of {was} {counted} {total} test images")
    if ranking is not None and ranking.interval[1] < 0.0:
        objections.append(
            f"the test images are ranked worse, AUROC {ranking.after:.3f} instead of {ranking.before:.3f}"
        )
    return tuple(objections)


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


def _count(name: str, chosen: BoolArray, before: BoolArray, after: BoolArray, *, is_anomaly: bool) -> ComparedSet:
    """Count the alarms of both models on the chosen images, all of one kind."""
    before, after = before[chosen], after[chosen]
    return ComparedSet(
        name,
        is_anomaly,
        Rate(int(before.sum()), len(before)),
        Rate(int(after.sum()), len(after)),
        mended=int(np.count_nonzero((before != is_anomaly) & (after == is_anomaly))),
        broken=int(np.count_nonzero((before == is_anomaly) & (after != is_anomaly))),
    )


def _match(decided: Decided) -> tuple[ComparedSet, ...]:
    """What both decide alike often on one kind, counted on the other: moving a threshold is free, so it is no gain."""
    matched = []
    for name, is_anomaly in (
        ("all normal images, running model moved to find as many defects", False),
        ("all defects, running model moved to as many false alarms", True),
    ):
        counted = decided.is_anomaly == is_anomaly
        if counted.any() and not counted.all():
            scores = np.sort(decided.before.score[~counted])
            quiet = int(np.count_nonzero(~decided.alarms_after[~counted]))
            moved = decided.before.score > (scores[quiet - 1] if quiet else -np.inf)
            matched.append(_count(name, counted, moved, decided.alarms_after, is_anomaly=is_anomaly))
    return tuple(matched)


def _compare_ranking(decided: Decided) -> RankingChange | None:
    test = ~decided.is_held_out
    labels = decided.is_anomaly[test]
    if not labels.any() or labels.all():
        return None
    before, after = decided.before.score[test], decided.after.score[test]
    difference, interval = auroc_difference(before, after, labels)
    auroc_before, auroc_after = (image_metrics(s, labels, resamples=1).image_auroc for s in (before, after))
    return RankingChange(auroc_before, auroc_after, difference, interval)


def _net(compared: ComparedSet) -> int:
    """Images that are decided rightly now, less those that no longer are."""
    return compared.mended - compared.broken


def _gain(compared: ComparedSet) -> float:
    """The same as a share; 0 of no images."""
    return _net(compared) / compared.before.total if compared.before.total else 0.0


def _cautions(
    rejected: ComparedSet, confirmed: ComparedSet, test_normal: ComparedSet, ranking: RankingChange | None
) -> tuple[str, ...]:
    cautions = [
        "a part that the running model passes makes no event: watch ordinary parts with the new model before it "
        "replaces the running one"
    ]
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
