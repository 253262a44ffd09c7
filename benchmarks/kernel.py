"""The scoring kernel beside what it replaces: ONNX Runtime's own execution of the function body, in one run."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.benchmarks.sample_model import SampleModel, sample_model
from meliad_edge.errors import UsageError
from meliad_edge.export.graph import IR_VERSION, OPSET, export_bare_backbone
from meliad_edge.export.scoring_function import scoring_function, scoring_node, scoring_opset
from meliad_edge.models.backbone import load_backbone
from meliad_edge.models.meliad import TOP_SHARE
from meliad_edge.models.scoring import ScoringParameters
from meliad_edge.progress import track
from meliad_edge.runtime.kernel_library import find_kernel_library

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SIZE = 256
PATCHES = (256, 512, 1024, 2048, 4096)
_ROWS = 16  # of the grid whose columns grow with the patches
_ROUNDS = 10
# Runs of one session in a row, so that small sizes are not measured in the caches that a large one has filled.
_WARM_UP, _RUNS_PER_ROUND = 5, 10
# Until the threads of the session before have stopped to wait for work at full speed.
_REST_S = 0.02
_INSTRUCTION_SET = "MELIAD_EDGE_INSTRUCTION_SET"


def run(rounds: int = _ROUNDS, patches: Sequence[int] = PATCHES) -> dict[str, Any]:
    """Time the kernel, the function body, a bare matrix product of the same shape, and the bare backbone in turn.

    Embeddings and prototypes are those of the default detector on real images where the extra demo is installed. The
    body's work beside the product is measured with embeddings of depth 1, where there is next to no product, and
    compared with the whole kernel. "vectors" is the kernel without screening.

    Args:
        rounds: Rounds of 10 runs of each; medians are reported.
        patches: Numbers of patches, multiples of 16.

    Returns:
        JSON values: per number of threads and patches the milliseconds and their ratios, the straight line through
        the kernel's times, its share of the backbone, peak memory, and the environment.

    Raises:
        UsageError: This installation has no kernel.
    """
    if find_kernel_library() is None:
        msg = "there is no kernel to measure; meliad-edge doctor says how to build it"
        raise UsageError(msg)
    model = sample_model(SIZE)
    cells = _embeddings(model, max(patches))
    threads = sorted({1, describe_environment()["cores"]})
    sizes = {count: _measure(model, cells, patches, count, rounds) for count in threads}
    backbone_ms = {count: _backbone_ms(model, count, rounds) for count in threads}
    slope, intercept, r_squared = _straight_line(patches, [size["kernel_ms"] for size in sizes[1]])
    prototypes, depth = model.network.prototypes.shape
    return {
        "benchmark": "kernel",
        "data": model.data,
        "depth": depth,
        "prototypes": prototypes,
        "rounds": rounds,
        "sizes": sizes[1],
        "sizes_on_all_threads": sizes[threads[-1]],
        "threads": threads[-1],
        "line": {"ms_per_1000_patches": 1e3 * slope, "ms_at_0": intercept, "r_squared": r_squared},
        "backbone_ms": backbone_ms[1],
        "scoring_over_backbone": sizes[1][0]["kernel_ms"] / backbone_ms[1],
        "vectors_over_backbone": sizes[1][0]["vectors_ms"] / backbone_ms[1],
        "backbone_ms_on_all_threads": backbone_ms[threads[-1]],
        "scoring_over_backbone_on_all_threads": sizes[threads[-1]][0]["kernel_ms"] / backbone_ms[threads[-1]],
        "peak_memory": _peak_memory(model, cells),
        "environment": describe_environment(),
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as lines for people."""
    lines = [("shape", f"{result['prototypes']} prototypes, depth {result['depth']}; embeddings of {result['data']}")]
    for key, threads in (("sizes", 1), ("sizes_on_all_threads", result["threads"])):
        lines += [
            (
                f"{size['patches']} patches",
                f"{size['kernel_ms']:7.3f} ms   body {size['body_ms']:7.3f} ms, {size['speedup']:.1f} x;  product "
                f"{size['product_ms']:7.3f} ms, {size['over_product']:.2f} x;  body without its product "
                f"{size['rest_speedup']:.1f} x;  vectors {size['vectors_ms']:7.3f} ms   "
                f"({threads} thread{'s' * (threads > 1)})",
            )
            for size in result[key]
        ]
        if threads == result["threads"]:
            break
    line, memory = result["line"], result["peak_memory"]
    return [
        *lines,
        ("linear", f"{line['ms_per_1000_patches']:.3f} ms per 1,000 patches, R2 {line['r_squared']:.4f}"),
        (
            "share",
            f"{result['scoring_over_backbone']:.1%} of the bare backbone's {result['backbone_ms']:.2f} ms on 1 thread, "
            f"{result['scoring_over_backbone_on_all_threads']:.1%} of {result['backbone_ms_on_all_threads']:.2f} ms on "
            f"{result['threads']}",
        ),
        (
            "memory",
            f"a first run adds {memory['kernel_mb']:.1f} MB with the kernel, {memory['body_mb']:.1f} MB without; one "
            f"matrix of distances has {memory['matrix_mb']:.1f} MB",
        ),
    ]


def plot(result: dict[str, Any], file: Path) -> None:
    """Cost against the number of patches, as an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    patches = [size["patches"] for size in result["sizes"]]
    for key, label, style in (
        ("body_ms", "function body in ONNX Runtime", "s--"),
        ("product_ms", "bare matrix product in ONNX Runtime", "^:"),
        ("kernel_ms", "fused kernel", "o-"),
    ):
        axes.plot(patches, [size[key] for size in result["sizes"]], style, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(patches, [f"{count:,}" for count in patches])
    axes.set_xlabel("patches")
    axes.set_ylabel("milliseconds, one thread")
    axes.set_title(f"Scoring {result['prototypes']} prototypes of depth {result['depth']}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _embeddings(model: SampleModel, patches: int) -> NDArray[np.float32]:
    """Embedded patches of as many frames as it takes, [D, patches]."""
    with torch.inference_mode():
        network = model.network
        embeddings = network.embed(network.backbone(torch.from_numpy(model.frames))).numpy()
    cells = np.moveaxis(embeddings, 1, 0).reshape(embeddings.shape[1], -1)
    return np.ascontiguousarray(np.tile(cells, -(-patches // cells.shape[1]))[:, :patches])


def _measure(
    model: SampleModel, cells: NDArray[np.float32], patches: Sequence[int], threads: int, rounds: int
) -> list[dict[str, float]]:
    prototypes, direction = model.network.prototypes.detach().numpy(), model.network.direction.detach().numpy()
    sizes = []
    for count in track(patches, f"{threads} thread{'s' * (threads > 1)}"):
        scoring = replace(model.network.scoring, top_cells=round(TOP_SHARE * count))
        z = cells[:, :count].reshape(1, -1, _ROWS, count // _ROWS)
        graph = _scoring_model(prototypes, direction, scoring)
        shallow = _scoring_model(prototypes[:, :1], direction[:1], scoring)
        work = {
            "kernel": (_session(graph, threads, with_kernel=True), {"embeddings": z}),
            "vectors": (_session_on_vectors(graph, threads), {"embeddings": z}),
            "body": (_session(graph, threads), {"embeddings": z}),
            "body_rest": (_session(shallow, threads), {"embeddings": z[:, :1]}),
            "product": (_session(_product_model(prototypes), threads), {"cells": cells[:, :count]}),
        }
        ms = _median_ms(work, rounds)
        sizes.append(
            {
                "patches": count,
                **{f"{name}_ms": value for name, value in ms.items()},
                "speedup": ms["body"] / ms["kernel"],
                "over_product": ms["kernel"] / ms["product"],
                "rest_speedup": ms["body_rest"] / ms["kernel"],
                "vector_speedup": ms["body"] / ms["vectors"],
            }
        )
    return sizes


def _backbone_ms(model: SampleModel, threads: int, rounds: int) -> float:
    graph = export_bare_backbone(load_backbone(), (SIZE, SIZE)).SerializeToString()
    return _median_ms({"backbone": (_session(graph, threads), {"frames": model.frames[:1]})}, rounds)["backbone"]


def _median_ms(work: dict[str, tuple[ort.InferenceSession, dict[str, Any]]], rounds: int) -> dict[str, float]:
    samples_s: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, (session, inputs) in work.items():
            time.sleep(_REST_S)
            for repeat in range(_WARM_UP + _RUNS_PER_ROUND):
                start = time.perf_counter()
                session.run(None, inputs)
                if repeat >= _WARM_UP:
                    samples_s[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(samples)) for name, samples in samples_s.items()}


def _straight_line(patches: Sequence[int], ms: Sequence[float]) -> tuple[float, float, float]:
    """Slope, intercept and R2 of the least-squares line."""
    slope, intercept = np.polyfit(patches, ms, 1)
    times = np.asarray(ms)
    residual = times - (slope * np.asarray(patches) + intercept)
    return (
        float(slope),
        float(intercept),
        1.0 - float(np.square(residual).sum() / np.square(times - times.mean()).sum()),
    )


def _peak_memory(model: SampleModel, cells: NDArray[np.float32]) -> dict[str, float]:
    """What a first run adds to the resident memory at its peak, in MB of 10^6 bytes."""
    count = cells.shape[1]
    prototypes, direction = model.network.prototypes.detach().numpy(), model.network.direction.detach().numpy()
    graph = _scoring_model(prototypes, direction, replace(model.network.scoring, top_cells=round(TOP_SHARE * count)))
    inputs = {"embeddings": cells.reshape(1, -1, _ROWS, count // _ROWS)}
    added = {}
    for name, with_kernel in (("kernel_mb", True), ("body_mb", False)):
        session = _session(graph, 1, with_kernel=with_kernel)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _status_mb("VmRSS")
        session.run(None, inputs)
        added[name] = max(0.0, _status_mb("VmHWM") - before)
    return {**added, "matrix_mb": count * len(prototypes) * 4 / 1e6}


def _status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(key)


def _session(model: bytes, threads: int, *, with_kernel: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if with_kernel:
        options.register_custom_ops_library(str(find_kernel_library()))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _session_on_vectors(model: bytes, threads: int) -> ort.InferenceSession:
    """With the kernel as it runs where nothing can be screened; the variable is read with the model."""
    before = os.environ.get(_INSTRUCTION_SET)
    os.environ[_INSTRUCTION_SET] = "avx512"
    try:
        return _session(model, threads, with_kernel=True)
    finally:
        if before is None:
            del os.environ[_INSTRUCTION_SET]
        else:
            os.environ[_INSTRUCTION_SET] = before


def _scoring_model(
    prototypes: NDArray[np.float32], direction: NDArray[np.float32], parameters: ScoringParameters
) -> bytes:
    """The scoring node alone, with its function body."""
    inputs = [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["n", prototypes.shape[1], "h", "w"])]
    constants = {"prototypes": prototypes, "direction": direction}
    node = scoring_node(("embeddings", "prototypes", "direction"), ("score", "map", "nearest"), parameters)
    types = {"score": TensorProto.FLOAT, "map": TensorProto.FLOAT, "nearest": TensorProto.INT64}
    return _model(
        node, inputs, types, constants, opset_imports=[helper.make_opsetid("", OPSET), scoring_opset()],
        functions=[scoring_function()],
    )  # fmt: skip


def _product_model(prototypes: NDArray[np.float32]) -> bytes:
    inputs = [helper.make_tensor_value_info("cells", TensorProto.FLOAT, [prototypes.shape[1], "patches"])]
    node = helper.make_node("MatMul", ["prototypes", "cells"], ["products"])
    constants = {"prototypes": prototypes}
    return _model(
        node, inputs, {"products": TensorProto.FLOAT}, constants, opset_imports=[helper.make_opsetid("", OPSET)]
    )


def _model(
    node: onnx.NodeProto,
    inputs: list[onnx.ValueInfoProto],
    output_types: Mapping[str, int],
    constants: dict[str, NDArray[np.float32]],
    **model: Any,
) -> bytes:
    outputs = [helper.make_tensor_value_info(name, type_, None) for name, type_ in output_types.items()]
    initializers = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph([node], "scoring", inputs, outputs, initializers)
    return bytes(helper.make_model(graph, ir_version=IR_VERSION, **model).SerializeToString())
