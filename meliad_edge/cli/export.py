"""``meliad-edge export``: a run to one file for a device, a graph for other tools, or a model repository for Triton."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from meliad_edge.cli.options import Json
from meliad_edge.cli.output import print_json, print_table, require_extra, say
from meliad_edge.errors import UsageError
from meliad_edge.precision import PRECISIONS, Precision

if TYPE_CHECKING:
    from meliad_edge.export.lower import LayerError
    from meliad_edge.export.to_bundle import ExportedModel
    from meliad_edge.export.triton_repository import ServedModel

Format = Literal["bundle", "onnx", "triton", "triton-tensorrt"]

_LAYERS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class _Written:
    """What an export left.

    Attributes:
        out: The file, or the folder of a served model.
        file: The file, or the graph in that folder.
        exported: The graphs, with their parity where they were made here.
        follow: What to do next.
    """

    out: Path
    file: Path
    exported: ExportedModel
    follow: str


def command(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Run folder written by fit; for Triton also a bundle, whose graph is taken as it is.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write, or a model repository for Triton.  [default: RUN/model.meliad, or "
            "RUN/model.PRECISION.onnx]"
        ),
    ] = None,
    format: Annotated[
        Format,
        typer.Option(
            help="A .meliad bundle, a graph in standard ONNX operators for other tools, or a model repository for "
            "Triton's ONNX Runtime or TensorRT."
        ),
    ] = "bundle",
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp16 or int8, to carry beside fp32, or as that of the graph; may be repeated."),
    ] = None,
    sign: Annotated[str | None, typer.Option(metavar="NAME", help="Key to sign the bundle with; see keys.")] = None,
    model_version: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of this release; flash refuses a lower one than the device has.  [default: 0, for Triton that "
            "of the bundle or 1]",
        ),
    ] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="MS", help="Largest p95 from frame to decision that a device may need."),
    ] = None,
    op_library: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Where Triton's server has libmeliad_ort.so, to score with the compiled kernel."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a run as one .meliad bundle for a device, in every precision that decides as the run does."""
    require_extra("torch", "train")
    require_extra("onnx", "export")

    wanted = [_parse_precision(text) for text in precision or []]
    if format != "bundle":
        _refuse_for_bundles_alone(format, sign=sign, model_version=model_version, budget_ms=budget_ms)
    if op_library is not None and format != "triton":
        msg = f"--op-library is for --format triton, not for {format}"
        raise UsageError(msg)
    if format == "bundle":
        written = _export_bundle(run, out, wanted, sign, model_version, budget_ms)
    elif format == "onnx":
        written = _export_onnx(run, out, _one_precision(format, wanted))
    else:
        written = _export_triton(format, run, out, _one_precision(format, wanted), model_version, op_library)
    exported = written.exported
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
    size = written.file.stat().st_size / 1e6
    say("saved", f"{written.out} ({size:.1f} MB, {', '.join(exported.models)})      {written.follow}")
    if json:
        print_json(_record(written))


def _export_bundle(
    run: Path,
    out: Path | None,
    precisions: list[Precision],
    sign: str | None,
    version: int | None,
    budget_ms: float | None,
) -> _Written:
    from meliad_edge.bundle import release
    from meliad_edge.export.to_bundle import export_bundle
    from meliad_edge.keys_folder import keys_folder
    from meliad_edge.run import load_run
    from meliad_edge.signing import load_key

    key = None if sign is None else load_key(sign, keys_folder(), datetime.date.today())
    signer: Callable[[bytes], bytes] | None = None if key is None else key.sign
    path = out or run / "model.meliad"
    _, exported = export_bundle(load_run(run), path, precisions, signer)
    if version is not None or budget_ms is not None:
        release(path, version=version, latency_budget_ms=budget_ms, sign=signer)
    say("signature", "none; make a key with: meliad-edge keys make NAME" if key is None else str(key.public))
    return _Written(path, path, exported, f"next: meliad-edge predict {path} IMAGES...")


def _export_onnx(run: Path, out: Path | None, precision: Precision) -> _Written:
    from meliad_edge.export.to_bundle import export_portable
    from meliad_edge.run import load_run

    path = out or run / f"model.{precision}.onnx"
    exported = export_portable(load_run(run), path, precision)
    return _Written(path, path, exported, "standard ONNX operators only")


def _export_triton(
    format: Format,
    source: Path,
    out: Path | None,
    precision: Precision,
    version: int | None,
    op_library: str | None,
) -> _Written:
    from meliad_edge.export.triton_repository import write_onnx_model, write_tensorrt_model

    if out is None:
        msg = f"--format {format} needs --out REPO, the model repository"
        raise UsageError(msg)
    if version == 0:
        msg = "--model-version 0: Triton counts from 1"
        raise UsageError(msg)
    served, exported, released = _served_model(source, precision)
    number = version or released or 1
    if format == "triton":
        folder = write_onnx_model(out, served, number, op_library)
        follow = f"next: meliad-edge predict MODEL.meliad IMAGES... --triton grpc://HOST:8001/{folder.name}"
    else:
        folder = write_tensorrt_model(out, served, number)
        follow = f"next, on the server: sh {folder / str(number) / 'build-plan.sh'} PATH/TO/libmeliad_trt.so"
    say("digest", f"{served.sha256}; clients need a bundle with this graph")
    return _Written(folder, folder / str(number) / "model.onnx", exported, follow)


def _served_model(source: Path, precision: Precision) -> tuple[ServedModel, ExportedModel, int]:
    """The graph of a bundle as it is, or of a run where it decides as the run does; and the number of its release."""
    from meliad_edge.export.to_bundle import ExportedModel, export_models, read_replay
    from meliad_edge.export.triton_repository import ServedModel
    from meliad_edge.run import load_run
    from meliad_edge.runtime.load import open_trusted, require_precision

    if source.is_file():
        bundle = open_trusted(source)
        require_precision(bundle, precision)
        manifest, graph = bundle.manifest, bundle.models[precision]
        served = ServedModel(manifest.name, graph, manifest.input_hw, manifest.grid_hw)
        return served, ExportedModel({precision: graph}, {}, ()), manifest.version
    run = load_run(source)
    exported = export_models(run, [precision], read_replay(run).replay)
    graph = exported.models[precision]
    served = ServedModel(source.resolve().name, graph, run.network.input_hw, run.network.grid_hw)
    return served, replace(exported, models={precision: graph}), 0


def _refuse_for_bundles_alone(
    format: Format, *, sign: str | None, model_version: int | None, budget_ms: float | None
) -> None:
    if format == "onnx" and (sign is not None or model_version is not None or budget_ms is not None):
        msg = "--sign, --model-version and --budget-ms are for bundles; a plain ONNX file has no place for them"
        raise UsageError(msg)
    if sign is not None or budget_ms is not None:
        msg = "--sign and --budget-ms are for bundles; a model repository has no place for them"
        raise UsageError(msg)


def _one_precision(format: Format, wanted: list[Precision]) -> Precision:
    if len(wanted) > 1:
        msg = f"--format {format} writes one graph, {len(wanted)} precisions are asked for; call it once for each"
        raise UsageError(msg)
    return wanted[0] if wanted else "fp32"


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


def _record(written: _Written) -> dict[str, object]:
    exported = written.exported
    return {
        "out": str(written.out),
        "bytes": written.file.stat().st_size,
        "model_sha256": {precision: sha256(model).hexdigest() for precision, model in exported.models.items()},
        "parity": [result.to_dict() for result in exported.parity],
        "layers": {precision: [asdict(layer) for layer in layers] for precision, layers in exported.layers.items()},
    }
