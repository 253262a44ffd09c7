"""``meliad-edge export``: a run to one file for a device, or to a graph for other tools."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from meliad_edge.cli.options import Json, RunFolder
from meliad_edge.cli.output import print_json, print_table, require_extra, say
from meliad_edge.errors import UsageError
from meliad_edge.precision import PRECISIONS, Precision

if TYPE_CHECKING:
    from meliad_edge.export.lower import LayerError
    from meliad_edge.export.to_bundle import ExportedModel

_LAYERS_SHOWN = 10


def command(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="File to write.  [default: RUN/model.meliad, or RUN/model.PRECISION.onnx]")
    ] = None,
    format: Annotated[
        Literal["bundle", "onnx"],
        typer.Option(help="A .meliad bundle, or a graph in standard ONNX operators for other tools."),
    ] = "bundle",
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp16 or int8, to carry beside fp32, or as that of the graph; may be repeated."),
    ] = None,
    sign: Annotated[str | None, typer.Option(metavar="NAME", help="Key to sign the bundle with; see keys.")] = None,
    model_version: Annotated[
        int | None,
        typer.Option(
            min=0, help="Number of this release; flash refuses a lower one than the device has.  [default: 0]"
        ),
    ] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="MS", help="Largest p95 from frame to decision that a device may need."),
    ] = None,
    json: Json = False,
) -> None:
    """Write a run as one .meliad bundle for a device, in every precision that decides as the run does."""
    require_extra("torch", "train")
    require_extra("onnx", "export")
    from meliad_edge.bundle import release
    from meliad_edge.export.to_bundle import export_bundle, export_portable
    from meliad_edge.keys_folder import keys_folder
    from meliad_edge.run import load_run
    from meliad_edge.signing import load_key

    key = None if sign is None else load_key(sign, keys_folder(), datetime.date.today())
    wanted = [_parse_precision(text) for text in precision or []]
    if format == "onnx":
        if key is not None or model_version is not None or budget_ms is not None:
            msg = "--sign, --model-version and --budget-ms are for bundles; a plain ONNX file has no place for them"
            raise UsageError(msg)
        if len(wanted) > 1:
            msg = f"--format onnx writes one graph, {len(wanted)} precisions are asked for; call it once for each"
            raise UsageError(msg)
        chosen: Precision = wanted[0] if wanted else "fp32"
        path = out or run / f"model.{chosen}.onnx"
        exported = export_portable(load_run(run), path, chosen)
        follow = "standard ONNX operators only"
    else:
        path = out or run / "model.meliad"
        signer = None if key is None else key.sign
        _, exported = export_bundle(load_run(run), path, wanted, signer)
        if model_version is not None or budget_ms is not None:
            release(path, version=model_version, latency_budget_ms=budget_ms, sign=signer)
        say("signature", "none; make a key with: meliad-edge keys make NAME" if key is None else str(key.public))
        follow = f"next: meliad-edge predict {path} IMAGES..."
    for lowered, layers in exported.layers.items():
        _say_layers(lowered, layers)
        if not json:
            _print_layers(lowered, layers)
    for result in exported.parity:
        say(
            "parity",
            f"{result.engine} {result.precision}: {result.frames} frames, 0 label flips, score error "
            f"{result.score_error:.3%} of {result.limits.score:.0%} allowed",
        )
    size = path.stat().st_size / 1e6
    say("saved", f"{path} ({size:.1f} MB, {', '.join(exported.models)})      {follow}")
    if json:
        print_json(_record(path, exported))


def _parse_precision(text: str) -> Precision:
    for known in PRECISIONS:
        if text == known:
            return known
    msg = f"--precision {text}: choose one of {', '.join(PRECISIONS)}"
    raise UsageError(msg)


def _say_layers(precision: Precision, layers: tuple[LayerError, ...]) -> None:
    kept = [layer.layer for layer in layers if layer.precision == "fp32"]
    lowered = f"{len(layers) - len(kept)} of {len(layers)} layers"
    say(precision, f"{lowered}; in fp32, because too much is lost in them: {', '.join(kept)}" if kept else lowered)


def _print_layers(precision: Precision, layers: tuple[LayerError, ...]) -> None:
    print_table(
        ("layer", "score error alone", "signal to noise", "precision"),
        [
            (layer.layer, f"{layer.score_error:.2%}", f"{layer.signal_to_noise_db:.0f} dB", layer.precision)
            for layer in sorted(layers, key=lambda layer: -layer.score_error)[:_LAYERS_SHOWN]
        ],
        caption=f"{precision}: the {_LAYERS_SHOWN} layers that change scores most; --json lists all",
    )


def _record(path: Path, exported: ExportedModel) -> dict[str, object]:
    return {
        "out": str(path),
        "bytes": path.stat().st_size,
        "model_sha256": {precision: sha256(model).hexdigest() for precision, model in exported.models.items()},
        "parity": [result.to_dict() for result in exported.parity],
        "layers": {precision: [asdict(layer) for layer in layers] for precision, layers in exported.layers.items()},
    }
