"""A Triton model repository of one exported graph; needs no torch and nothing of Triton.

REPO/NAME/config.pbtxt          what Triton must know of the model; written last
REPO/NAME/VERSION/model.onnx    the graph of the bundle, byte for byte; for TensorRT what its parser takes of it
REPO/NAME/VERSION/build-plan.sh for TensorRT: makes model.plan beside it, on the machine that serves it
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from meliad_edge.errors import UsageError
from meliad_edge.export.tensorrt_graph import to_tensorrt
from meliad_edge.runtime.engine_file import write_atomically
from meliad_edge.runtime.triton_model import DIGEST, FRAMES, served_name

# As in the engines that build makes.
MAX_BATCH = 8
_WORKSPACE_MB = 1024


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A graph to serve.

    Attributes:
        name: Of the bundle or the run; the folder has it as far as Triton can spell it.
        graph: Serialised, as a bundle carries it.
        input_hw: Height and width in pixels of the frames it takes.
        grid_hw: Height and width of its maps.
    """

    name: str
    graph: bytes
    input_hw: tuple[int, int]
    grid_hw: tuple[int, int]

    @property
    def sha256(self) -> str:
        """What clients tell the model by."""
        return hashlib.sha256(self.graph).hexdigest()


def write_onnx_model(repository: Path, model: ServedModel, version: int, op_library: str | None = None) -> Path:
    """Write a model that Triton's ONNX Runtime executes.

    Args:
        repository: Folder of all models; made where it is not there.
        model: What is served.
        version: Its number there, from 1 on; the only one that is served.
        op_library: Path on the server of our library for ONNX Runtime, which then takes both nodes of ours; None leaves
            them to their bodies in standard operators.

    Returns:
        The folder of the model.

    Raises:
        UsageError: The repository has that version of another graph, or the name holds nothing that Triton can spell.
    """
    operations = "" if op_library is None else f"model_operations {{ op_library_filename: {json.dumps(op_library)} }}\n"
    config = _config(model, version, "onnxruntime_onnx", "KIND_AUTO") + operations
    return _write(repository, model, version, {"model.onnx": model.graph}, config)


def write_tensorrt_model(repository: Path, model: ServedModel, version: int) -> Path:
    """Write a model that Triton's TensorRT executes once ``build-plan.sh`` has made its plan there.

    Args:
        repository: Folder of all models; made where it is not there.
        model: What is served.
        version: Its number there, from 1 on; the only one that is served.

    Returns:
        The folder of the model.

    Raises:
        BundleError: TensorRT cannot take the graph.
        UsageError: The repository has that version of another graph, or the name holds nothing that Triton can spell.
    """
    files = {"model.onnx": to_tensorrt(model.graph), "build-plan.sh": _build_script(model).encode()}
    return _write(repository, model, version, files, _config(model, version, "tensorrt_plan", "KIND_GPU"))


def _write(repository: Path, model: ServedModel, version: int, files: dict[str, bytes], config: str) -> Path:
    folder = repository / _folder_name(model)
    place = folder / str(version)
    graph = place / "model.onnx"
    if graph.is_file() and graph.read_bytes() != files["model.onnx"]:
        msg = f"{graph}: is another graph, and a version is served by its number; give a higher --model-version"
        raise UsageError(msg)
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(place / name, content)
    # Last, because a server that looks again and again serves what it says.
    write_atomically(folder / "config.pbtxt", config.encode())
    return folder


def _folder_name(model: ServedModel) -> str:
    name = served_name(model.name)
    if not name:
        msg = f"{model.name!r}: Triton's names have letters, digits, '_', '.' and '-'; rename the run or the bundle"
        raise UsageError(msg)
    return name


def _config(model: ServedModel, version: int, platform: str, kind: str) -> str:
    """The fields of ``ModelConfig`` in protobuf's text format."""
    (height, width), (rows, columns) = model.input_hw, model.grid_hw
    frames = f"data_type: TYPE_UINT8 dims: [ {height}, {width}, 3 ]"
    # Frames of noise: a time does not depend on what is in a frame, and the server needs no picture.
    warm_up = ",\n".join(
        f'  {{ name: "{size} frames" batch_size: {size} '
        f'inputs {{ key: "{FRAMES}" value {{ {frames} random_data: true }} }} }}'
        for size in (1, MAX_BATCH)
    )
    return f"""\
# Written by meliad-edge export. The version that is served is the one whose digest is here.
name: "{served_name(model.name)}"
platform: "{platform}"
max_batch_size: {MAX_BATCH}
input [ {{ name: "{FRAMES}" {frames} }} ]
output [
  {{ name: "score_raw" data_type: TYPE_FP32 dims: [ 1 ] reshape {{ shape: [ ] }} }},
  {{ name: "map_raw" data_type: TYPE_FP32 dims: [ {rows}, {columns} ] }},
  {{ name: "nearest" data_type: TYPE_INT64 dims: [ 2, {rows}, {columns} ] }}
]
version_policy {{ specific {{ versions: [ {version} ] }} }}
instance_group [ {{ count: 1 kind: {kind} }} ]
dynamic_batching {{ }}
parameters {{ key: "{DIGEST}" value {{ string_value: "{model.sha256}" }} }}
model_warmup [
{warm_up}
]
"""


def _build_script(model: ServedModel) -> str:
    """How ``trtexec`` makes the plan; the precision is that of the graph."""
    height, width = model.input_hw
    shapes = " ".join(
        f"--{which}Shapes={FRAMES}:{size}x{height}x{width}x3"
        for which, size in (("min", 1), ("opt", 1), ("max", MAX_BATCH))
    )
    return f"""\
#!/bin/sh
# build-plan.sh PATH/TO/libmeliad_trt.so: makes model.plan, for the GPU of this machine and the TensorRT of this
# trtexec, which must be that of the server. The plugin travels in the plan, for which TensorRT wants it marked as
# compatible with other versions; start the server with
#   --backend-config=tensorrt,version-compatible=true
set -eu
plugin=$(readlink -f "${{1:?path of libmeliad_trt.so}}")
cd "$(dirname "$0")"
trtexec --onnx=model.onnx --saveEngine=model.plan.partial \\
    --dynamicPlugins="$plugin" --setPluginsToSerialize="$plugin" --versionCompatible \\
    {shapes} \\
    --stronglyTyped --noTF32 --memPoolSize=workspace:{_WORKSPACE_MB} --skipInference
mv model.plan.partial model.plan
"""
