"""TensorRT on the GPU of this machine, through PyCUDA, with our scoring kernel as its plugin."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from meliad_edge.errors import EngineError
from meliad_edge.runtime.cuda import CudaGraph, CudaGraphError, Device
from meliad_edge.runtime.engine import RawScores
from meliad_edge.runtime.onnxruntime_engine import OUTPUT_NAMES
from meliad_edge.runtime.tensorrt_build import TensorRt

_logger = logging.getLogger(__name__)

# Of cuStreamCreate: work on the default stream, of whatever library, neither waits for ours nor ends a capture.
_NON_BLOCKING = 1

DEVICE_PARTS = ("host_to_device", "compute", "device_to_host")
# The first one sets the size, the second captures its graph.
_FORGOTTEN_RUNS = 2

_OUTPUT_TYPES: dict[str, DTypeLike] = {"score_raw": np.float32, "map_raw": np.float32, "nearest": np.int64}


@dataclass(frozen=True, slots=True)
class _Staging:
    """Page-locked memory for one batch; two of them let the host fill one while the device works on the other.

    Attributes:
        frames: uint8 [max_batch, H, W, 3].
        outputs: By name, [max_batch, ...].
        done: Recorded when the batch has left the device.
    """

    frames: NDArray[np.uint8]
    outputs: dict[str, NDArray[Any]]
    done: Any


class TensorRtEngine:
    """Scores frames with an engine that was built on this machine.

    All memory is allocated here, and between the network and the scoring nothing leaves the device. From the second
    batch of a size on, the network is one CUDA graph. It may be used from any thread, but from one at a time.

    Args:
        device: The GPU.
        tensorrt: TensorRT with the plugin.
        engine: What :func:`~meliad_edge.runtime.engine_file.read_engine` gave: it is code, and executed.

    Raises:
        EngineError: TensorRT refuses the engine, it is not one of ours, or the device has not enough memory.
    """

    def __init__(self, device: Device, tensorrt: TensorRt, engine: bytes) -> None:
        self._device = device
        self._cuda = device.driver
        self._tensorrt = tensorrt
        self._batch = 0
        self._graph: CudaGraph | None = None
        self._captures = True
        with device.current("loading the engine"):
            self._runtime = tensorrt.trt.Runtime(tensorrt.logger)
            self._engine = self._runtime.deserialize_cuda_engine(engine)
            if self._engine is None:
                raise tensorrt.failure("load the engine")
            self._frames_name, frames_shape = self._check_tensors()
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise tensorrt.failure("make an execution context, for which the device may lack memory")
            self._allocate(frames_shape)

    @property
    def name(self) -> str:
        """What executes the model."""
        return f"tensorrt-{self._tensorrt.trt.__version__}+kernel"

    @property
    def input_size_hw(self) -> tuple[int, int]:
        """Height and width in pixels of the frames that :meth:`infer` takes."""
        height, width = self._staging[0].frames.shape[1:3]
        return height, width

    @property
    def has_cuda_graph(self) -> bool:
        """Whether batches of the size of the last one are launched as a CUDA graph."""
        return self._graph is not None

    def infer(self, frames: NDArray[np.uint8]) -> RawScores:
        """Score any number of RGB frames, uint8 [N, H, W, 3], in batches that the engine takes.

        Raises:
            EngineError: The device fails.
        """
        results = {
            name: np.empty((len(frames), *buffer.shape[1:]), buffer.dtype)
            for name, buffer in self._staging[0].outputs.items()
        }
        size = len(self._staging[0].frames)
        starts = range(0, len(frames), size)
        with self._device.current("scoring"):
            for index, start in enumerate(starts):
                staging = self._staging[index % 2]
                if index >= 2:
                    _collect(staging, results, start - 2 * size)
                self._submit(staging, frames[start : start + size])
            for index, start in list(enumerate(starts))[-2:]:
                _collect(self._staging[index % 2], results, start)
        return RawScores(*(results[name] for name in OUTPUT_NAMES))

    def time_on_device(self, frames: NDArray[np.uint8], runs: int) -> dict[str, list[float]]:
        """Seconds by the clock of the device, of a batch that it takes at once: transfers and computing apart.

        The batch goes the way that :meth:`infer` sends it, with events between its parts. The sum of the three is what
        trtexec calls latency.

        Args:
            frames: uint8 RGB [N, H, W, 3], N at most the largest batch.
            runs: How often it is sent; two runs before are forgotten.

        Returns:
            ``host_to_device``, ``compute`` and ``device_to_host``, [runs] each.

        Raises:
            EngineError: The device fails.
        """
        taken_s: dict[str, list[float]] = {part: [] for part in DEVICE_PARTS}
        with self._device.current("timing"):
            for run in range(-_FORGOTTEN_RUNS, runs):
                marks = [self._cuda.Event() for _ in range(len(DEVICE_PARTS) + 1)]
                unused = iter(marks)
                self._submit(self._staging[0], frames, lambda: next(unused).record(self._stream))  # noqa: B023
                marks[-1].synchronize()
                if run >= 0:
                    for part, before, after in zip(DEVICE_PARTS, marks, marks[1:], strict=False):
                        taken_s[part].append(1e-3 * before.time_till(after))
        return taken_s

    def close(self) -> None:
        """Give the memory of the device back; the engine cannot be used any more."""
        with self._device.current("closing the engine"):
            self._drop_graph()
            # TensorRT's objects in the order in which they depend on each other, then the memory they used.
            del self._context, self._engine, self._runtime
            del self._staging, self._on_device, self._stream

    def _check_tensors(self) -> tuple[str, tuple[int, ...]]:
        """Name and largest shape of the frames, if inputs and outputs are those of our graphs."""
        trt, engine = self._tensorrt.trt, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names if name not in inputs}
        if len(inputs) != 1 or outputs != {name: np.dtype(kind) for name, kind in _OUTPUT_TYPES.items()}:
            msg = f"the engine takes {inputs} and gives {sorted(outputs)}; it is not one of ours, build it again"
            raise EngineError(msg)
        _, _, largest = engine.get_tensor_profile_shape(inputs[0], 0)
        return inputs[0], tuple(largest)

    def _allocate(self, frames_shape: tuple[int, ...]) -> None:
        """Everything for the largest batch; only host memory is doubled, because the device works in order."""
        self._set_batch(frames_shape[0])
        shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in OUTPUT_NAMES}
        self._stream = self._cuda.Stream(_NON_BLOCKING)
        self._staging = tuple(
            _Staging(
                self._cuda.pagelocked_empty(frames_shape, np.uint8),
                {name: self._cuda.pagelocked_empty(shapes[name], _OUTPUT_TYPES[name]) for name in OUTPUT_NAMES},
                self._cuda.Event(self._cuda.event_flags.DISABLE_TIMING),
            )
            for _ in range(2)
        )
        on_host = {self._frames_name: self._staging[0].frames, **self._staging[0].outputs}
        self._on_device = {name: self._cuda.mem_alloc(buffer.nbytes) for name, buffer in on_host.items()}
        for name, memory in self._on_device.items():
            self._context.set_tensor_address(name, int(memory))

    def _set_batch(self, size: int) -> None:
        _, *rest = self._engine.get_tensor_shape(self._frames_name)
        if not self._context.set_input_shape(self._frames_name, (size, *rest)):
            raise self._tensorrt.failure(f"take frames of shape {[size, *rest]}")

    def _submit(self, staging: _Staging, frames: NDArray[np.uint8], mark: Callable[[], None] = lambda: None) -> None:
        """Enqueue a batch: frames to the device, network and scoring, outputs back; ``mark`` before, between, after."""
        staging.frames[: len(frames)] = frames
        mark()
        self._cuda.memcpy_htod_async(self._on_device[self._frames_name], staging.frames[: len(frames)], self._stream)
        mark()
        self._execute(len(frames))
        mark()
        for name, buffer in staging.outputs.items():
            self._cuda.memcpy_dtoh_async(buffer[: len(frames)], self._on_device[name], self._stream)
        mark()
        staging.done.record(self._stream)

    def _execute(self, size: int) -> None:
        if size != self._batch:
            # A graph is of one shape, and TensorRT wants to have run in a new one before it is captured.
            self._drop_graph()
            self._set_batch(size)
            self._batch = size
            self._enqueue()
            return
        if self._graph is None and self._captures:
            self._capture()
        if self._graph is not None:
            self._graph.launch()
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise self._tensorrt.failure("execute the engine")

    def _capture(self) -> None:
        self._stream.synchronize()  # once per size
        try:
            self._graph = CudaGraph(self._stream, self._enqueue)
        except (CudaGraphError, EngineError, self._cuda.Error) as error:
            self._captures = False
            _logger.warning("no CUDA graph (%s); batches are launched kernel by kernel, which is slower", error)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
            self._graph = None


def _collect(staging: _Staging, results: dict[str, NDArray[Any]], start: int) -> None:
    """Wait for a batch and copy its outputs to where they belong."""
    staging.done.synchronize()
    for name, buffer in staging.outputs.items():
        part = results[name][start : start + len(buffer)]
        part[:] = buffer[: len(part)]
