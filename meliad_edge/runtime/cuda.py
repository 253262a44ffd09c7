"""The GPU of this machine through PyCUDA: its primary context, and CUDA graphs, which PyCUDA lacks."""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from meliad_edge.device.probe import driver_version
from meliad_edge.errors import EngineError, MissingExtraError

# Other threads of the process may use the device while one captures.
_CAPTURE_MODE_THREAD_LOCAL = 1
_INSTEAD = "or use --engine onnxruntime"


@dataclass(frozen=True, slots=True)
class Gpu:
    """What an engine depends on of the device and its driver.

    Attributes:
        name: As the driver calls it.
        compute_capability: For example ``"8.7"``.
        cuda: Version of CUDA that the driver supports, for example ``"12.6"``.
        driver: Version of the driver, or of the Jetson Linux that brings it; ``"unknown"`` where no file says it.
    """

    name: str
    compute_capability: str
    cuda: str
    driver: str


class Device:
    """The first GPU, with its primary context, which TensorRT and the kernels share through the CUDA runtime.

    Raises:
        MissingExtraError: PyCUDA is not installed.
        EngineError: There is no driver or no GPU.
    """

    def __init__(self) -> None:
        self.driver = _import_pycuda()
        try:
            self.driver.init()
            self._device = self.driver.Device(0)
            self._context = _primary_context(self.driver)
        except self.driver.Error as error:
            msg = f"no NVIDIA GPU can be used ({_one_line(error)}); see: meliad-edge doctor, {_INSTEAD}"
            raise EngineError(msg) from error

    @property
    def gpu(self) -> Gpu:
        """What this device is."""
        major, minor = self._device.compute_capability()
        cuda = self.driver.get_driver_version()
        return Gpu(
            name=self._device.name(),
            compute_capability=f"{major}.{minor}",
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
            driver=driver_version() or "unknown",
        )

    @contextmanager
    def current(self, doing: str) -> Iterator[None]:
        """Make the device current for this thread, whichever thread that is, and translate what CUDA complains about.

        Args:
            doing: For the message of the error, for example ``"scoring"``.

        Raises:
            EngineError: A call of CUDA failed.
        """
        try:
            self._context.push()
            try:
                yield
            finally:
                self._context.pop()
        except (self.driver.Error, CudaGraphError) as error:
            msg = f"{doing} failed on the GPU ({_one_line(error)}); see: meliad-edge doctor, {_INSTEAD}"
            raise EngineError(msg) from error


@functools.cache
def _primary_context(driver: Any) -> Any:
    """The context of the process, given back when it ends: PyCUDA's destructor would detach it as no primary one is."""
    context = driver.Device(0).retain_primary_context()
    atexit.register(context.detach)
    return context


class CudaGraphError(Exception):
    """The driver refuses to capture, instantiate or launch a graph."""


class CudaGraph:
    """Work that was captured from a stream and is launched with one call.

    Args:
        stream: PyCUDA stream, idle.
        enqueue: Enqueues the work on that stream; nothing in it may wait for the device.

    Raises:
        CudaGraphError: The work cannot be captured; the stream can be used as before.
    """

    def __init__(self, stream: Any, enqueue: Callable[[], None]) -> None:
        self._stream = ctypes.c_void_p(stream.handle)
        self._executable = ctypes.c_void_p()
        graph = ctypes.c_void_p()
        _call("cuStreamBeginCapture_v2", self._stream, _CAPTURE_MODE_THREAD_LOCAL)
        try:
            try:
                enqueue()
            finally:
                _call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
            _call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        finally:
            if graph:
                _call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Enqueue all of the captured work."""
        _call("cuGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """Give its memory back; what was launched is finished first."""
        _call("cuGraphExecDestroy", self._executable)


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")  # PyCUDA has loaded it


def _call(function: str, *arguments: Any) -> None:
    code = getattr(_library(), function)(*arguments)
    if code != 0:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(code, ctypes.byref(text))
        msg = f"{function} failed: {(text.value or b'unknown error').decode()} ({code})"
        raise CudaGraphError(msg)


def _import_pycuda() -> Any:
    if importlib.util.find_spec("pycuda") is None:
        raise MissingExtraError("pycuda", "tensorrt")
    try:
        import pycuda.driver
    except ImportError as error:
        msg = f"PyCUDA cannot be used ({_one_line(error)}); install NVIDIA's driver, {_INSTEAD}"
        raise EngineError(msg) from error
    return pycuda.driver


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
