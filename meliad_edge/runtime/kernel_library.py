"""Where the compiled scoring kernel is, if this installation has one."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

LIBRARY_NAME = "libmeliad_ort.so"


def find_kernel_library() -> Path | None:
    """Path of the ONNX Runtime custom-op library, or None when models run on their function body.

    It is None when the installation was built without a compiler or without ONNX Runtime headers, and when the
    environment has ``MELIAD_EDGE_KERNEL=off``, which compares and debugs without the kernel.
    """
    if os.environ.get("MELIAD_EDGE_KERNEL") == "off":
        return None
    packaged = Path(__file__).parents[1] / "_kernels" / LIBRARY_NAME
    if packaged.is_file():
        return packaged
    return _installed_library()


def _installed_library() -> Path | None:
    """The library of the installed distribution: a checkout on the path shadows the package that was installed."""
    try:
        files = importlib.metadata.files("meliad-edge")
    except importlib.metadata.PackageNotFoundError:
        return None
    located = (Path(str(file.locate())) for file in files or () if file.name == LIBRARY_NAME)
    return next((path for path in located if path.is_file()), None)
