"""Runs our TensorRT backend on real PyCUDA with stand-ins for the driver and for TensorRT: alone in its process.

tensorrt_process.py command ARGUMENTS...       the command line
tensorrt_process.py SCENARIO MODEL.meliad      a function below, whose result is printed as JSON
"""

from __future__ import annotations

import ctypes
import json
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_stand_in

sys.modules["tensorrt"] = tensorrt_stand_in

from meliad_edge.bundle import Bundle, open_bundle  # noqa: E402
from meliad_edge.errors import MeliadError  # noqa: E402
from meliad_edge.runtime.engine import RawScores  # noqa: E402
from meliad_edge.runtime.load import load_engine, load_tensorrt_engine  # noqa: E402

cuda = ctypes.CDLL("libcuda.so.1")


def calls(*names: str) -> dict[str, int]:
    return {name: cuda.cuda_stand_in_calls(name.encode()) for name in names}


def frames_of(bundle: Bundle, count: int) -> Any:
    """Golden frames, each moved by another distance, so that no two are the same."""
    frames = np.empty((count, *bundle.manifest.input_hw, 3), np.uint8)
    for index in range(count):
        frames[index] = np.roll(bundle.golden[index % len(bundle.golden)].frame, 5 * index, axis=1)
    return frames


def differences(result: RawScores, expected: RawScores) -> dict[str, float]:
    return {
        "score": float(np.abs(result.score - expected.score).max()),
        "map": float(np.abs(result.map - expected.map).max()),
        "nearest": float((result.nearest != expected.nearest).mean()),
        "spread": float(np.ptp(expected.score)),
    }


def batches(bundle: Bundle) -> Any:
    """Batches of every kind against ONNX Runtime, the same frames in each."""
    engine, reference = load_tensorrt_engine(bundle, "fp32"), load_engine(bundle, "fp32")
    found = {}
    for count in (1, 1, 3, 4, 4, 9, 14, 2, 0):
        frames = frames_of(bundle, count)
        result, expected = engine.infer(frames), reference.infer(frames) if count else None
        found[f"{len(found)}: {count}"] = (
            [list(part.shape) for part in (result.score, result.map, result.nearest)]
            if expected is None
            else differences(result, expected)
        )
    return {"found": found, "name": engine.name, "executed": tensorrt_stand_in.executions}


def steady(bundle: Bundle) -> Any:
    """What one frame costs once warm, and that results do not change afterwards."""
    engine = load_tensorrt_engine(bundle, "fp32")
    frames = frames_of(bundle, 8)
    first = engine.infer(frames[:1])
    kept = first.score.copy()
    graph_after_first = engine.has_cuda_graph
    engine.infer(frames[1:2])
    names = ("cuMemAlloc", "cuMemHostAlloc", "cuEventSynchronize", "cuStreamSynchronize", "cuGraphLaunch")
    names += ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuLaunchHostFunc", "cuStreamBeginCapture")
    before = calls(*names)
    for frame in frames[2:]:
        engine.infer(frame[np.newaxis])
    after = calls(*names)
    return {
        "frames": len(frames) - 2,
        "calls": {name: after[name] - before[name] for name in names},
        "graph": [graph_after_first, engine.has_cuda_graph],
        "first_unchanged": bool((first.score == kept).all()),
    }


def overlap(bundle: Bundle) -> Any:
    """How many batches are on the device when the first is waited for."""
    engine = load_tensorrt_engine(bundle, "fp32")
    cuda.cuda_stand_in_fail(b"cuEventSynchronize", 700)
    try:
        engine.infer(frames_of(bundle, 14))
    except MeliadError:
        return calls("cuMemcpyHtoDAsync")
    return None


def device_times(bundle: Bundle) -> Any:
    """Transfers and computing of a batch, and that what is scored afterwards is right."""
    engine, reference = load_tensorrt_engine(bundle, "fp32"), load_engine(bundle, "fp32")
    frames = frames_of(bundle, 3)
    launched = calls("cuGraphLaunch")["cuGraphLaunch"]
    start_s = time.perf_counter()
    parts = engine.time_on_device(frames, 5)
    wall_s = time.perf_counter() - start_s
    return {
        "parts": parts,
        "wall_s": wall_s,
        "launched": calls("cuGraphLaunch")["cuGraphLaunch"] - launched,
        "difference": differences(engine.infer(frames), reference.infer(frames)),
    }


def without_graph(bundle: Bundle) -> Any:
    """A TensorRT that cannot be captured."""
    tensorrt_stand_in.refuse_to_execute_in_capture = True
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("meliad_edge.runtime.tensorrt_engine").addHandler(handler)
    engine, reference = load_tensorrt_engine(bundle, "fp32"), load_engine(bundle, "fp32")
    found = []
    for frame in frames_of(bundle, 4):
        found.append(differences(engine.infer(frame[np.newaxis]), reference.infer(frame[np.newaxis])))
    return {
        "found": found,
        "graph": engine.has_cuda_graph,
        "log": records,
        **calls("cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphLaunch"),
    }


def other_thread(bundle: Bundle) -> Any:
    """Loaded in one thread, used and closed in another; nothing stays current or allocated."""
    engine, reference = load_tensorrt_engine(bundle, "fp32"), load_engine(bundle, "fp32")
    frames = frames_of(bundle, 8)
    expected = reference.infer(frames)
    blocks = cuda.cuda_stand_in_blocks()
    said: dict[str, Any] = {}

    def work() -> None:
        engine.infer(frames)
        said["difference"] = differences(engine.infer(frames), expected)
        engine.close()
        said["contexts"] = cuda.cuda_stand_in_contexts()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return {
        **said,
        "blocks": [blocks, cuda.cuda_stand_in_blocks()],
        "contexts_here": cuda.cuda_stand_in_contexts(),
        "graphs": calls("cuGraphInstantiate", "cuGraphDestroy", "cuGraphExecDestroy"),
    }


def failing(bundle: Bundle) -> Any:
    """One error of ours for every call of CUDA that fails, and an engine that works again afterwards."""
    messages = {}
    engine, reference = load_tensorrt_engine(bundle, "fp32"), load_engine(bundle, "fp32")
    frames = frames_of(bundle, 1)
    expected = reference.infer(frames)
    for _ in range(2):
        engine.infer(frames)
    for name in ("cuMemcpyHtoDAsync", "cuGraphLaunch", "cuMemcpyDtoHAsync", "cuEventRecord", "cuEventSynchronize"):
        cuda.cuda_stand_in_fail(name.encode(), 700)
        try:
            engine.infer(frames)
        except MeliadError as error:
            messages[name] = [type(error).__name__, str(error)]
        cuda.cuda_stand_in_fail(name.encode(), 0)
    difference = differences(engine.infer(frames), expected)
    for name in ("cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate"):
        cuda.cuda_stand_in_fail(name.encode(), 2)
        try:
            load_tensorrt_engine(bundle, "fp32")
        except MeliadError as error:
            messages[name] = [type(error).__name__, str(error)]
        cuda.cuda_stand_in_fail(name.encode(), 0)
    return {"messages": messages, "contexts": cuda.cuda_stand_in_contexts(), "difference": difference}


def main() -> None:
    scenario, *arguments = sys.argv[1:]
    if scenario == "command":
        from meliad_edge.cli import main as run_command

        try:
            run_command(arguments)
        finally:
            if tensorrt_stand_in.built:
                (Path(arguments[1]).parent / "built.json").write_text(json.dumps(tensorrt_stand_in.built))
        return
    print(json.dumps(globals()[scenario](open_bundle(Path(arguments[0])))))


if __name__ == "__main__":
    main()
