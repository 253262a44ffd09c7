"""What the HTML report shows of a model that was fitted again with feedback."""

from __future__ import annotations

from meliad_edge import __version__
from meliad_edge.calibrate import Calibration
from meliad_edge.explain import overlay
from meliad_edge.feedback import Feedback
from meliad_edge.model_comparison import RULE, Comparison
from meliad_edge.report import ChangedImage, ReportData, Table
from meliad_edge.run import Run

_SHOWN = 24
_OUTCOMES = {
    (False, False): "false alarm ends",
    (False, True): "new false alarm",
    (True, False): "defect lost",
    (True, True): "defect found now",
}


def feedback_report(running: Calibration, run: Run, feedback: Feedback, comparison: Comparison) -> ReportData:
    """Collect the verdict, its figures and the images that changed sides.

    Args:
        running: What the running model decides by.
        run: The new model.
        feedback: What it was fitted with.
        comparison: Of the two.
    """
    shown = comparison.decided.changed[:_SHOWN]
    return ReportData(
        title=f"{run.config.detector} on {run.dataset}, with feedback",
        subtitle=comparison.verdict,
        comparison=comparison_table(comparison),
        changed=tuple(_changed(running, run.calibration, comparison, index) for index in shown),
        provenance=_provenance(run, feedback),
    )


def comparison_table(comparison: Comparison) -> Table:
    """The counts of both models with their intervals, and what they do and do not mean."""
    rows = [
        (
            f"{compared.name}: {'found' if compared.is_anomaly else 'false alarms'}",
            f"{compared.before.count} of {compared.before.total}",
            _per_cent(compared.before.interval),
            f"{compared.after.count} of {compared.after.total}",
            _per_cent(compared.after.interval),
            f"{compared.mended} better, {compared.broken} worse",
        )
        for compared in comparison.sets
        if compared.before.total
    ]
    if (ranking := comparison.ranking) is not None:
        low, high = ranking.interval
        change = f"{ranking.difference:+.3f} ({low:+.3f} to {high:+.3f})"
        rows.append(
            ("test images: AUROC (regression check)", f"{ranking.before:.3f}", "", f"{ranking.after:.3f}", "", change)
        )
    notes = (
        f"Rule, fixed before looking: {RULE}.",
        "The running model alarms on all events by construction, so the events tell what the new model lets go of, "
        "not which model errs more often; the test images do.",
        *(f"{caution[0].upper()}{caution[1:]}." for caution in comparison.cautions),
        f"{len(comparison.decided.changed)} images changed sides; at most {_SHOWN} are shown.",
    )
    return Table(
        "Neither model was fitted on or calibrated with any of these images; each decides at its own threshold, but "
        "where it is said to be moved; 95 % Clopper-Pearson intervals",
        ("images", "running", "interval", "new", "interval", "change"),
        tuple(rows),
        " ".join(notes),
    )


def _changed(running: Calibration, new: Calibration, comparison: Comparison, index: int) -> ChangedImage:
    decided = comparison.decided
    sample, frame = decided.samples[index], decided.frames[index]
    is_anomaly, alarms = bool(decided.is_anomaly[index]), bool(decided.alarms_after[index])
    before, after = (
        (
            f"score {raw.score[index]:.2f} (threshold {calibration.threshold:.2f})",
            overlay(frame, raw.map[index], calibration.colour_range),
        )
        for raw, calibration in ((decided.before, running), (decided.after, new))
    )
    return ChangedImage(
        name=sample.path.name,
        defect=sample.defect,
        outcome=_OUTCOMES[is_anomaly, alarms],
        is_right=is_anomaly == alarms,
        image=frame,
        before=before,
        after=after,
    )


def _per_cent(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.0%} to {interval[1]:.0%}"


def _provenance(run: Run, feedback: Feedback) -> tuple[tuple[str, str], ...]:
    counts = ", ".join(
        f"{count} {verdict} {role}" for verdict, roles in feedback.counts.items() for role, count in roles.items()
    )
    return (
        ("made by", f"meliad-edge {__version__}"),
        ("running model", feedback.manifest.run),
        ("events", f"{feedback.manifest.events}: {counts}"),
        ("left out", f"{len(feedback.manifest.left_out)} events"),
        ("data set", f"{run.dataset}; licence: {run.licence}"),
        ("settings", f"detector {run.config.detector}, seed {run.config.seed}, as the running model"),
    )
