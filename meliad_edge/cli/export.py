"""``meliad-edge export``: a run to one file for a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meliad_edge.cli.options import Json, RunFolder
from meliad_edge.cli.output import print_json, require_extra, say


def command(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="Bundle to write.  [default: RUN/model.meliad]")] = None,
    json: Json = False,
) -> None:
    """Write a run as one .meliad bundle for a device."""
    require_extra("torch", "train")
    require_extra("onnx", "export")
    from meliad_edge.export.to_bundle import export_bundle
    from meliad_edge.run import load_run

    path = out or run / "model.meliad"
    manifest, results = export_bundle(load_run(run), path)
    for result in results:
        say("parity", f"{result.engine}: {result.frames} frames, 0 label flips, score error {result.score_error:.3%}")
    say("saved", f"{path} ({path.stat().st_size / 1e6:.1f} MB)      next: meliad-edge predict {path} IMAGES...")
    if json:
        print_json(
            {
                "bundle": str(path),
                "bytes": path.stat().st_size,
                "model_sha256": manifest.parts["model.fp32.onnx"].sha256,
                "parity": [result.to_dict() for result in results],
            }
        )
