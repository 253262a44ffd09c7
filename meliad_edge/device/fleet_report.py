"""A fleet's flash as one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from meliad_edge.bundle import Manifest
from meliad_edge.device.fleet import FleetEntry

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header class="masthead"><div>
<p class="brand">meliad-edge</p>
<h1>{title}</h1>
<p class="subtitle">{summary}</p>
</div></header>
<main>
<h2>Devices</h2>
<div class="card scroll"><table class="data">
{devices_head}
<tbody>
{rows}
</tbody></table></div>
<h2>Steps</h2>
<div class="card scroll"><table class="data">
{steps_head}
<tbody>
{steps}
</tbody></table></div>
</main>
<footer>Bytes are those of files and parts, without what SSH adds.</footer>
</body>
</html>
"""
_FIGURES = ("seconds", "bytes sent")
_CLASSES = {"installed": "right", "unchanged": "", "failed": "wrong", "not tried": ""}


def render_report(manifest: Manifest, entries: Sequence[FleetEntry]) -> str:
    """The page.

    Args:
        manifest: Of the bundle.
        entries: What came of each device.
    """
    count = {verdict: sum(entry.verdict == verdict for entry in entries) for verdict in _CLASSES}
    return _PAGE.format(
        title=escape(f"{manifest.name}, version {manifest.version}"),
        summary=", ".join(f"{n} {verdict}" for verdict, n in count.items() if n),
        style=files("meliad_edge").joinpath("templates/report.css").read_text(encoding="utf-8"),
        devices_head=_head("wave", "device", "outcome", "seconds", "bytes sent", "what went wrong"),
        steps_head=_head("device", "step", "what came out", "seconds", "bytes sent"),
        rows="\n".join(map(_row, entries)),
        steps="\n".join(_step_rows(entry) for entry in entries if entry.result is not None),
    )


def _head(*names: str) -> str:
    cells = (f"<th{' class=figure' if name in _FIGURES else ''}>{name}</th>" for name in names)
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _row(entry: FleetEntry) -> str:
    result = entry.result
    seconds, sent = ("", "") if result is None else (f"{result.seconds:.1f}", f"{result.sent_bytes:,}")
    wave = "canary" if entry.wave == 0 else str(entry.wave)
    return (
        f"<tr><td>{wave}</td><th scope='row'>{escape(entry.host)}</th>"
        f"<td class='{_CLASSES[entry.verdict]}'>{entry.verdict}</td><td class='figure'>{seconds}</td>"
        f"<td class='figure'>{sent}</td><td>{escape(entry.error)}</td></tr>"
    )


def _step_rows(entry: FleetEntry) -> str:
    steps = () if entry.result is None else entry.result.steps
    return "\n".join(
        f"<tr><th scope='row'>{escape(entry.host)}</th><td>{step.name}</td><td>{escape(step.text)}</td>"
        f"<td class='figure'>{step.seconds:.1f}</td><td class='figure'>{step.sent_bytes:,}</td></tr>"
        for step in steps
    )
