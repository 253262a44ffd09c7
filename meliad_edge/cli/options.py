"""Arguments that several verbs share, defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meliad_edge.precision import Precision
from meliad_edge.runtime.choice import EngineChoice

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder written by fit.", show_default=False)]
BundleFile = Annotated[
    Path, typer.Argument(metavar="MODEL.meliad", help="Bundle written by export.", show_default=False)
]
BundlePrecision = Annotated[
    Precision | None,
    typer.Option(
        "--precision",
        help="Which graph of the bundle.  [default: what build made an engine of, else int8 where it carries one, "
        "else fp32]",
    ),
]
BundleEngine = Annotated[
    EngineChoice,
    typer.Option(
        "--engine", help="auto is TensorRT where build has left an engine for this machine, else ONNX Runtime."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
KnownHosts = Annotated[
    Path | None,
    typer.Option("--known-hosts", metavar="FILE", help="Host keys of devices.  [default: ~/.ssh/known_hosts]"),
]
Host = Annotated[str, typer.Argument(metavar="HOST", help="[USER@]HOST[:PORT] as for ssh.", show_default=False)]
HostOrFleet = Annotated[
    str,
    typer.Argument(
        metavar="HOST", help="[USER@]HOST[:PORT] as for ssh, or FLEET.toml, an inventory.", show_default=False
    ),
]
