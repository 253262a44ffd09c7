"""``meliad-edge build``: a TensorRT engine for the GPU of this machine."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Annotated

import typer

from meliad_edge.cli.options import BundleFile, Json
from meliad_edge.cli.output import print_json, require_extra, say
from meliad_edge.precision import Precision


def command(
    model: BundleFile,
    precision: Annotated[Precision, typer.Option(help="Which graph of the bundle.")] = "fp16",
    workspace_mb: Annotated[
        int, typer.Option(min=16, help="Most device memory in MiB for intermediate results of one layer.")
    ] = 1024,
    max_batch: Annotated[int, typer.Option(min=1, max=256, help="Frames of the largest batch.")] = 8,
    json: Json = False,
) -> None:
    """Build a TensorRT engine beside a bundle, on the device that runs it; kept only if it decides as the model."""
    from meliad_edge.parity import check_golden, require_parity
    from meliad_edge.runtime.cuda import Device
    from meliad_edge.runtime.engine_file import engine_path, write_engine
    from meliad_edge.runtime.load import open_trusted, require_precision
    from meliad_edge.runtime.tensorrt_build import build_engine, engine_key, open_tensorrt, timing_cache_path
    from meliad_edge.runtime.tensorrt_engine import TensorRtEngine

    require_extra("onnx", "tensorrt")
    from meliad_edge.export.tensorrt_graph import to_tensorrt

    bundle = open_trusted(model)
    require_precision(bundle, precision)
    device = Device()
    tensorrt = open_tensorrt()
    key = engine_key(tensorrt, device, bundle.model_sha256(precision), precision)
    say("device", f"{key.gpu}, compute capability {key.compute_capability}, TensorRT {key.tensorrt}, CUDA {key.cuda}")
    say("building", f"{precision}, batches of 1 to {max_batch}; this takes minutes on a small device")
    start = time.perf_counter()
    with device.current("building the engine"):
        built = build_engine(
            tensorrt,
            to_tensorrt(bundle.models[precision]),
            max_batch=max_batch,
            workspace_mb=workspace_mb,
            timing_cache=timing_cache_path(model.parent, key),
        )
    build_s = time.perf_counter() - start
    with closing(TensorRtEngine(device, tensorrt, built)) as engine:
        result = check_golden(bundle, engine, precision)
    require_parity([result])
    say("parity", f"{result.frames} frames, 0 label flips, score error {result.score_error:.3%}")
    path = engine_path(model, precision)
    write_engine(path, built, key, max_batch=max_batch)
    say("saved", f"{path} ({len(built) / 1e6:.1f} MB, {build_s:.0f} s)      next: meliad-edge bench {model}")
    if json:
        print_json(
            {
                "engine": str(path),
                "bytes": len(built),
                "build_s": build_s,
                "max_batch": max_batch,
                **key.model_dump(),
                "parity": result.to_dict(),
            }
        )
