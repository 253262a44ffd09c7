"""``meliad-edge feedback``: judged events of a watch to a new run, compared with the one that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meliad_edge import strict_json
from meliad_edge.cli.options import Json, RunFolder
from meliad_edge.cli.output import describe_calibration, print_json, print_table, require_extra, say
from meliad_edge.errors import UsageError

if TYPE_CHECKING:
    from meliad_edge.bundle import Bundle
    from meliad_edge.feedback import Feedback
    from meliad_edge.run import Run

COMPARISON = "comparison.json"


def command(
    run: RunFolder,
    events: Annotated[Path, typer.Argument(metavar="EVENTS", help="Folder given to watch --out.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Run folder to write, which must not exist.  [default: RUN-2, RUN-3 ...]")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL.meliad",
            help="The bundle of RUN that watches: compare at the threshold it decides at, the device's own included.",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write the comparison with pictures of what changed sides.")
    ] = None,
    json: Json = False,
) -> None:
    """Fit a run again with confirmed and rejected events, and compare the new model with the running one.

    Nothing is replaced: the new run is offered, or it is said why not.
    """
    require_extra("torch", "train")
    from meliad_edge.feedback import Role, gather_feedback, next_run_folder, refit
    from meliad_edge.feedback_report import comparison_table, feedback_report
    from meliad_edge.model_comparison import RULE, compare_runs
    from meliad_edge.run import load_run

    before = load_run(run)
    watching = None if bundle is None else _open_watching(bundle, before, run)
    running = before.calibration if watching is None else watching.calibration
    gathered = gather_feedback(before, run, events)
    say("events", _describe(gathered))
    for event, reason in gathered.manifest.left_out.items():
        say("left out", f"{event}: {reason}")
    say("rule", RULE)
    target = out or next_run_folder(run)
    after, used = refit(before, gathered, target, false_alarm_rate=running.target_false_alarm_rate, report=say)
    say("threshold", describe_calibration(after.calibration))
    say("saved", str(target))
    held_out = [picture.sample(target) for picture in used.manifest.pictures if picture.role is Role.HELD_OUT]
    comparison = compare_runs(before, after, held_out, threshold_before=running.threshold)
    for error in comparison.decided.errors:
        say("skipped", error)
    follow = _export_command(target, bundle, watching) if comparison.is_offered else None
    result = {
        "run": str(target),
        "before": str(run),
        "events": used.counts,
        "left_out": used.manifest.left_out,
        "threshold_before": running.threshold,
        "threshold": after.calibration.threshold,
        **comparison.to_dict(),
        "next": follow,
    }
    (target / COMPARISON).write_text(strict_json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if report is not None:
        from meliad_edge.report import write_report

        write_report(report, feedback_report(running, after, used, comparison))
        say("report", str(report))
    if json:
        print_json(result)
    else:
        table = comparison_table(comparison)
        print_table(table.columns, [[str(cell) for cell in row] for row in table.rows], caption=table.caption)
    for caution in comparison.cautions:
        say("caution", caution)
    say("verdict", comparison.verdict)
    if follow is not None:
        say("next", follow)


def _open_watching(file: Path, run: Run, run_folder: Path) -> Bundle:
    from meliad_edge.bundle import open_bundle
    from meliad_edge.device_threshold import with_device_threshold

    bundle = open_bundle(file)
    if bundle.calibration.scores != run.calibration.scores:
        msg = f"--bundle {file}: was not exported from {run_folder}; name the run it came from"
        raise UsageError(msg)
    return with_device_threshold(bundle, file)


def _describe(feedback: Feedback) -> str:
    confirmed, rejected = feedback.counts["confirmed"], feedback.counts["rejected"]
    sentence = (
        f"{confirmed['learn']} confirmed and {rejected['learn']} rejected to learn from, {rejected['calibrate']} "
        f"rejected for the threshold, {confirmed['held out']} confirmed and {rejected['held out']} rejected held out; "
        f"{len(feedback.added)} of them new"
    )
    if feedback.withdrawn:
        sentence += f"; {len(feedback.withdrawn)} taken back"
    if feedback.manifest.left_out:
        sentence += f"; {len(feedback.manifest.left_out)} left out"
    return sentence


def _export_command(run_folder: Path, file: Path | None, bundle: Bundle | None) -> str:
    """What makes a bundle of the new run, in the precisions of the one that watches and with the next version."""
    words = ["meliad-edge", "export", str(run_folder)]
    if file is not None and bundle is not None:
        words += ["--out", str(run_folder / file.name)]
        for precision in bundle.models:
            words += ["--precision", precision] if precision != "fp32" else []
        words += ["--model-version", str(bundle.manifest.version + 1)]
        words += ["--sign", "NAME"] if bundle.signed.signature is not None else []
    return " ".join(words)
