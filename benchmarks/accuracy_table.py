"""An accuracy result as Markdown: figures with their spread, intervals, published rows, and where it was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from meliad_edge.benchmarks.pool import NOT_RUN

METRICS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro_30": "AUPRO .30",
    "aupro_05": "AUPRO .05",
    "pointing_accuracy": "pointing accuracy",
    "pointing_chance": "its chance",
    "region_iou": "region IoU",
    "deletion_auc": "deletion",
    "deletion_auc_random": "random deletion",
    "insertion_auc": "insertion",
    "insertion_auc_random": "random insertion",
    "randomised_correlation": "random weights",
}
PUBLISHED_MARK = "published, not run by us"
_ABSENT = "–"
_CAPTION = "Mean ± standard deviation over seeds; fit: median time, features cached or not, processes side by side."


def to_markdown(result: dict[str, Any]) -> str:
    """Tables for people, one group of them per data set.

    Args:
        result: What :func:`~meliad_edge.benchmarks.accuracy.run` returned, with or without ``command``.
    """
    sections = [f"# {result['benchmark'].capitalize()}", f"Protocol: {result['protocol']}."]
    for name in dict.fromkeys(row["set"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["set"] == name]
        metrics = [metric for metric in METRICS if any(metric in row.get("mean", {}) for row in rows)]
        published = [figure for figure in result["published"] if figure["data"] == name]
        sections += [f"## {name}", _CAPTION, _figures(rows, published, metrics)]
        sections += _titled("95 % intervals of the mean: over images / over seeds.", _intervals(rows, metrics))
        sections += _titled("Hard setting by the class of the shots.", _classes(rows, metrics))
    sections += [f"{name}: {meaning}." for name, meaning in result["intervals"].items()]
    if result["left_out"]:
        sections.append("\n".join(["Left out:", "", *(f"* {line}" for line in result["left_out"])]))
    return "\n\n".join([*sections, _provenance(result)]) + "\n"


def _figures(rows: Sequence[dict[str, Any]], published: Sequence[dict[str, Any]], metrics: Sequence[str]) -> str:
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        for row in rows:
            if row["setting"] == setting:
                lines.append([setting, row["label"], *_measured_cells(row, metrics)])
        for figure in published:
            if figure["setting"] == setting:
                cells = [_number(figure["image_auroc"]) if name == "image_auroc" else _ABSENT for name in metrics]
                source = f"{PUBLISHED_MARK}: {figure['source']}; {figure['network']}"
                lines.append([setting, figure["method"], *cells, _ABSENT, _ABSENT, source])
    return _table(["setting", "detector", *(METRICS[name] for name in metrics), "fit, s", "seeds", "source"], lines)


def _measured_cells(row: dict[str, Any], metrics: Sequence[str]) -> list[str]:
    if NOT_RUN in row:
        return [*(_ABSENT for _ in metrics), _ABSENT, _ABSENT, f"not run: {row[NOT_RUN]}"]
    figures = [_spread(row["mean"].get(name), row["std"].get(name)) for name in metrics]
    # The first seeds fill the feature cache for the others: the median is what a fit usually takes.
    fit_s = f"{statistics.median(run['fit_s'] for run in row['runs']):.1f}"
    return [*figures, fit_s, str(row["seeds"]), "run by us"]


def _intervals(rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> str:
    lines = [
        [
            row["setting"],
            row["label"],
            *(f"{_interval(row, 'ci_images', m)} / {_interval(row, 'ci_seeds', m)}" for m in metrics),
        ]
        for row in rows
        if NOT_RUN not in row
    ]
    return _table(["setting", "detector", *(METRICS[name] for name in metrics)], lines)


def _classes(rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> str:
    lines = [
        [
            row["setting"],
            row["label"],
            name,
            *(_spread(of_class["mean"].get(m), of_class["std"].get(m)) for m in metrics),
        ]
        for row in rows
        for name, of_class in row.get("classes", {}).items()
    ]
    return _table(["setting", "detector", "shots of", *(METRICS[name] for name in metrics)], lines)


def _provenance(result: dict[str, Any]) -> str:
    environment = result["environment"]
    runs = [run["environment"] for row in result["rows"] for run in row.get("runs", [])]
    measured = ", ".join(f"{date} at commit {commit}" for date, commit in sorted({_when(run) for run in runs}))
    lines = [
        f"Command: `{result['command']}`" if "command" in result else "",
        f"Measured: {measured}." if measured else "",
        f"Machine: {environment['cpu']}, {environment['cores']} cores, {environment['system']}, "
        f"Python {environment['python']}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in environment["packages"].items()) + ".",
    ]
    return "\n".join(line for line in lines if line)


def _when(environment: dict[str, Any]) -> tuple[str, str]:
    return environment["date"].partition("T")[0], str(environment["commit"])


def _titled(title: str, table: str) -> list[str]:
    return [title, table] if table else []


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned, so that it can be read as it is; empty without lines."""
    if not lines:
        return ""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in [header, *lines]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def joined(line: Iterable[str]) -> str:
        return f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"

    return "\n".join([joined(cells[0]), joined("-" * width for width in widths), *map(joined, cells[1:])])


def _number(value: float) -> str:
    """Three decimals in the field's way: .931."""
    return f"{value:.3f}".removeprefix("0")


def _spread(mean: float | None, std: float | None) -> str:
    if mean is None:
        return _ABSENT
    return _number(mean) + (f" ± {_number(std)}" if std is not None else "")


def _interval(row: dict[str, Any], kind: str, metric: str) -> str:
    bounds = row[kind].get(metric)
    return _ABSENT if bounds is None else "–".join(map(_number, bounds))
