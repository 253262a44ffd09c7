"""``meliad-edge demo``: the whole line, on real data, in a few minutes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from meliad_edge.cli.output import require_extra, say


def command(out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/demo")) -> None:
    """Run the whole line on real solar cells and write a report."""
    require_extra("torch", "demo")
    require_extra("onnx", "demo")
    require_extra("elpv_dataset", "demo")
    from meliad_edge.demo import run_demo

    page = run_demo(out, say)
    program = "meliad-edge" if shutil.which("meliad-edge") else sys.argv[0]
    say("made", f"{page}      open it in a browser")
    say("", f"{out / 'solar.meliad'}      the model, ready for a device")
    say("try next", f"{program} watch {out / 'solar.meliad'} {out / 'held_out.avi'} --out {out / 'events'}")
    say("", f"{program} fit YOUR_FOLDER --shots 10 --out runs/mine      (train/good, test/good, test/DEFECT)")
