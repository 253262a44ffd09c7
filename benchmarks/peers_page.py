"""The comparison with anomalib as Markdown tables and as a plot of accuracy against latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meliad_edge.benchmarks.peers import OURS, REFERENCES, THEIRS
from meliad_edge.benchmarks.pool import NOT_RUN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ABSENT = "–"
_ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "openvino-f32": "OpenVINO in FP32"}
_MARKERS = {"onnxruntime": "o", "openvino": "D", "openvino-f32": "s"}
_COLOURS = {OURS: "#0b6e4f", THEIRS: "#9a4a00"}
_ACCURACY = ("image_auroc", "image_ap")
_LINE_INCHES = 0.24
_NAME_HEIGHT = 0.05  # of the axes


def to_markdown(result: dict[str, Any]) -> str:
    """A table for each number of threads, what every model of anomalib is, and where it was measured.

    Args:
        result: What :func:`~meliad_edge.benchmarks.peers.run` returned, with or without ``command``.
    """
    rows = [row for row in result["rows"] if NOT_RUN not in row]
    sections = ["# Peers", _caption(result)]
    for count in map(str, result["threads"]):
        sections += [f"## {_threads(count).capitalize()}", _table(rows, count)]
    notes = [f"* {row['model']}: {_note(row)}." for row in result["rows"] if row["maker"] == THEIRS]
    sections.append("\n".join(["## What anomalib's models are", "", *notes]))
    return "\n\n".join([*sections, _provenance(result)]) + "\n"


def fastest(row: dict[str, Any], threads: str) -> str | None:
    """The engine that takes the least time for a model; None where none was timed."""
    times_ms = _times_ms(row, threads)
    return min(times_ms, key=times_ms.__getitem__, default=None)


def plot(result: dict[str, Any], file: Path) -> None:
    """Accuracy against latency; models without a measured accuracy have a strip of their own below, one line each.

    Args:
        result: What :func:`~meliad_edge.benchmarks.peers.run` returned; times of its first number of threads.
        file: PNG, SVG or PDF.
    """
    from matplotlib.figure import Figure

    threads = str(result["threads"][0])
    rows = [row for row in result["rows"] if _times_ms(row, threads)]
    known = [row for row in rows if _has_accuracy(row)]
    unknown = sorted((row for row in rows if row not in known), key=lambda row: min(_times_ms(row, threads).values()))
    strip = _LINE_INCHES * (len(unknown) + 1)
    figure = Figure(figsize=(8.4, 4.4 + strip), layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, strip))
    for row in known:
        _draw_points(above, row, threads)
    for line, row in enumerate(unknown):
        _draw_line(below, row, threads, line)
    height, width = result["input_hw"]
    above.set_title(f"Frame in memory to score and map, {width} x {height} pixels, {_threads(threads)}", fontsize=11)
    above.set_ylabel(f"image AUROC, {result['data']}")
    above.margins(y=0.2)
    _draw_names(above, known, threads)
    _draw_legend(above, result["openvino_arithmetic"])
    below.set_title("accuracy not measured: no trained weights", fontsize=9, loc="left")
    below.set_yticks([])
    below.set_ylim(len(unknown) - 0.4, -0.6)
    below.set_xscale("log")
    below.set_xlabel("milliseconds per frame")
    below.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in (above, below):
        axes.grid(alpha=0.3, which="both", axis="x")
    above.grid(alpha=0.3, axis="y")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _draw_legend(axes: Axes, openvino_arithmetic: str) -> None:
    for engine, marker in _MARKERS.items():
        default = f", by itself in {openvino_arithmetic.upper()}" if engine == "openvino" else ""
        axes.plot([], [], marker, color="#555555", label=_ENGINES[engine] + default)
    for maker, colour in _COLOURS.items():
        axes.plot([], [], "-", linewidth=5, color=colour, label=maker)
    axes.legend(fontsize=8, loc="lower right")


def _draw_points(axes: Axes, row: dict[str, Any], threads: str) -> None:
    """One for each engine, joined."""
    colour = _COLOURS[row["maker"]]
    points = _points(row, threads)
    axes.plot([ms for _, ms, _ in points], [auroc for _, _, auroc in points], "-", color=colour, alpha=0.4)
    for engine, ms, auroc in points:
        axes.plot([ms], [auroc], _MARKERS[engine], color=colour, markersize=7)


def _draw_names(axes: Axes, rows: Sequence[dict[str, Any]], threads: str) -> None:
    """Right of all points of a maker; where names would cover each other, ours move up and theirs down."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    for maker, direction in ((OURS, 1.0), (THEIRS, -1.0)):
        slowest = [(row, *_points(row, threads)[-1]) for row in rows if row["maker"] == maker]
        beside_ms = 1.3 * max((ms for _, _, ms, _ in slowest), default=1.0)
        height = -direction * np.inf
        for row, _, ms, auroc in sorted(slowest, key=lambda named: direction * named[3]):
            beyond = height + direction * _NAME_HEIGHT * (high - low)
            height = max(auroc, beyond) if direction > 0.0 else min(auroc, beyond)
            defects = f", {row['labelled_defects']} labelled defects" if row["labelled_defects"] else ""
            colour = _COLOURS[maker]
            axes.annotate(
                row["model"] + defects,
                (ms, auroc),
                xytext=(beside_ms, height),
                va="center",
                fontsize=8,
                color=colour,
                arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.4, "relpos": (0.0, 0.5), "shrinkB": 4.0},
            )


def _draw_line(axes: Axes, row: dict[str, Any], threads: str, line: int) -> None:
    colour = _COLOURS[row["maker"]]
    times_ms = _times_ms(row, threads)
    low, high = min(times_ms.values()), max(times_ms.values())
    axes.plot([low, high], [line, line], "-", color=colour, alpha=0.4)
    for engine, ms in times_ms.items():
        axes.plot([ms], [line], _MARKERS[engine], color=colour, markersize=5)
    axes.annotate(
        row["model"], (low, line), xytext=(-8, -3), textcoords="offset points", ha="right", fontsize=8, color=colour
    )


def _points(row: dict[str, Any], threads: str) -> list[tuple[str, float, float]]:
    """Engine, median milliseconds and AUROC of those that were timed, the fastest first."""
    times_ms = _times_ms(row, threads)
    return [
        (engine, times_ms[engine], row["engines"][engine]["image_auroc"])
        for engine in sorted(times_ms, key=times_ms.__getitem__)
    ]


def _times_ms(row: dict[str, Any], threads: str) -> dict[str, float]:
    """Median milliseconds by engine, of those that were timed."""
    return {
        engine: measured["latency"][threads]["median_ms"]
        for engine, measured in row.get("engines", {}).items()
        if NOT_RUN not in measured and threads in measured["latency"]
    }


def _has_accuracy(row: dict[str, Any]) -> bool:
    return any(measured.get("image_auroc") is not None for measured in row["engines"].values())


def _table(rows: Sequence[dict[str, Any]], threads: str) -> str:
    header = ["model", "labelled defects", *(f"{label}, ms" for label in _ENGINES.values())]
    header += ["times ours, FP32", "times ours, INT8", "image AUROC", "AP"]
    lines = [[row["model"], str(row["labelled_defects"] or "none"), *_cells(row, threads)] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def _cells(row: dict[str, Any], threads: str) -> list[str]:
    engines = row["engines"]
    times_ms = _times_ms(row, threads)
    best = fastest(row, threads)
    over = {} if best is None else engines[best]["latency"][threads]["over"]
    return [
        *(_rounded(times_ms[engine]) if engine in times_ms else _ABSENT for engine in _ENGINES),
        *(_ratio(over.get(precision)) for precision in REFERENCES),
        *(_accuracy([engines[engine] for engine in _ENGINES if engine in engines], name) for name in _ACCURACY),
    ]


def _ratio(over: dict[str, Any] | None) -> str:
    if over is None:
        return _ABSENT
    low, high = over["ci"]
    return f"{_rounded(over['median'])} ({_rounded(low)} to {_rounded(high)})"


def _rounded(value: float) -> str:
    """Three digits where there are as many before the point, else two."""
    if value >= 100.0:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def _accuracy(engines: Sequence[dict[str, Any]], name: str) -> str:
    """In the field's way, .931; one figure where all engines agree on it, else one for each, in their order."""
    values = [measured.get(name) for measured in engines]
    figures = [_ABSENT if value is None else f"{value:.3f}".removeprefix("0") for value in values]
    return figures[0] if len(set(figures)) == 1 else " / ".join(figures)


def _note(row: dict[str, Any]) -> str:
    if NOT_RUN in row:
        return f"not run: {row[NOT_RUN]}"
    bank = f"; a memory bank of {row['memory_bank']:,} patches" if row["memory_bank"] else ""
    failed = [f"; {_ENGINES[name]} not run: {of[NOT_RUN]}" for name, of in row["engines"].items() if NOT_RUN in of]
    return f"weights {row['weights']}{bank}{''.join(failed)}"


def _caption(result: dict[str, Any]) -> str:
    height, width = result["input_hw"]
    return (
        f"{result['data']}, seed {result['seed']}: {result['train_normals']} normal training images, "
        f"{result['test_images']} test images. {width} x {height} pixels, batch 1, frame in memory to score and map, "
        f"median over {result['rounds']} rounds in which all take turns. *Times ours*: the fastest engine of a model "
        "over ours on ONNX Runtime within the same round, with its 95 % interval. Accuracy is measured on each engine, "
        f"where the weights are those of a fitted model. OpenVINO by itself computes FP32 models in "
        f"{result['openvino_arithmetic'].upper()} on this processor. Input that `fit` would take: "
        f"{result['fit_chooses']}."
    )


def _provenance(result: dict[str, Any]) -> str:
    environment = result["environment"]
    lines = [
        f"Command: `{result['command']}`" if "command" in result else "",
        f"Measured: {environment['date'].partition('T')[0]} at commit {environment['commit']}.",
        f"Machine: {environment['cpu']}, {environment['cores']} cores, {environment['system']}, "
        f"Python {environment['python']}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in environment["packages"].items()) + ".",
    ]
    return "\n".join(line for line in lines if line)


def _threads(count: str) -> str:
    return f"{count} thread{'s' * (count != '1')}"
