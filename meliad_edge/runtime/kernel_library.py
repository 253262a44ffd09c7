"""Where the compiled scoring kernel is, if this installation has it."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Literal

Host = Literal["onnxruntime", "tensorrt", "c"]

LIBRARY_NAMES: dict[Host, str] = {
    "onnxruntime": "libmeliad_ort.so",
    "tensorrt": "libmeliad_trt.so",
    "c": "libmeliad_kernels.so",
}


def find_kernel_library(host: Host = "onnxruntime") -> Path | None:
    """Path of the library for a host, or None when models run on their function body.

    It is None when the installation was built without a compiler or without the headers of the host, and when the
    environment has ``MELIAD_EDGE_KERNEL=off``, which compares and debugs without the kernel.

    Args:
        host: What loads it: ONNX Runtime, TensorRT, or whoever can load a C library, such as ctypes.
    """
    if os.environ.get("MELIAD_EDGE_KERNEL") == "off":
        return None
    name = LIBRARY_NAMES[host]
    packaged = Path(__file__).parents[1] / "_kernels" / name
    if packaged.is_file():
        return packaged
    return _installed_library(name)


def _installed_library(name: str) -> Path | None:
    """The library of the installed distribution: a checkout on the path shadows the package that was installed."""
    try:
        files = importlib.metadata.files("meliad-edge")
    except importlib.metadata.PackageNotFoundError:
        return None
    located = (Path(str(file.locate())) for file in files or () if file.name == name)
    return next((path for path in located if path.is_file()), None)
