"""``meliad-edge evaluate``: figures with intervals on the images a run never saw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meliad_edge.cli.options import Json, RunFolder
from meliad_edge.cli.output import print_json, print_table, require_extra, say

if TYPE_CHECKING:
    from meliad_edge.evaluate import Evaluation

_METRICS = (
    *("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro_30", "aupro_05"),
    *("pointing_accuracy", "pointing_chance", "region_iou", "region_iou_best", "masks_touched"),
    *("deletion_auc", "deletion_auc_random", "insertion_auc", "insertion_auc_random", "randomised_correlation"),
)


def command(
    run: RunFolder,
    json: Json = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write the same for people.")] = None,
    interpretability: Annotated[
        bool, typer.Option("--interpretability", help="Also measure how well the maps explain: a minute or more.")
    ] = False,
) -> None:
    """Measure a trained run on its held-out test images."""
    require_extra("torch", "train")
    from meliad_edge.evaluate import evaluate
    from meliad_edge.run import load_run

    fitted = load_run(run)
    evaluation = evaluate(fitted, interpretability=interpretability)
    for error in (*evaluation.images.errors, *evaluation.mask_errors):
        say("skipped", error)
    result = {"run": str(run), "dataset": fitted.dataset, "detector": fitted.config.detector, **evaluation.to_dict()}
    if report is not None:
        from meliad_edge.evaluation_report import evaluation_report
        from meliad_edge.report import write_report

        write_report(report, evaluation_report(fitted, evaluation))
        say("report", str(report))
    if json:
        print_json(result)
    else:
        print_table(("metric", "value", "95 % interval"), _rows(result))
        say("decisions", _describe_decisions(evaluation))


def _rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for name in _METRICS:
        if result.get(name) is not None:
            interval = result.get(f"{name}_ci")
            rows.append((name, f"{result[name]:.4f}", f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""))
    return rows


def _describe_decisions(evaluation: Evaluation) -> str:
    normals = int((~evaluation.is_anomaly).sum())
    anomalies = int(evaluation.is_anomaly.sum())
    return (
        f"{evaluation.false_alarms} false alarms on {normals} normal images, "
        f"{evaluation.misses} misses on {anomalies} defects at the calibrated threshold"
    )
