"""The compiled scoring kernel as a PyTorch operator, ``torch.ops.meliad.patch_entropy_score``.

It computes what :func:`~meliad_edge.models.scoring.patch_entropy_score` computes, without the matrix of distances, on
the CPU and, where the kernels were built with CUDA, on tensors of a CUDA device. Gradients come from that function.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from meliad_edge.errors import MeliadError
from meliad_edge.models.scoring import ScoringParameters, patch_entropy_score
from meliad_edge.runtime.kernel_library import find_kernel_library

# Of the CUDA kernels: tensor cores and copies as Ampere has them.
_OLDEST_CAPABILITY = (8, 0)

_logger = logging.getLogger(__name__)


class _Parameters(ctypes.Structure):
    _fields_ = [
        ("n_normal", ctypes.c_int64),
        ("top_cells", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("softness", "normal_scale", "anomaly_scale", "bias", "kappa", "offset")),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "depth", "cells")),
        *((name, ctypes.c_void_p) for name in ("z", "direction", "score", "map", "nearest")),
    ]


def fused_patch_entropy_score(
    embeddings: Tensor, prototypes: Tensor, direction: Tensor, parameters: ScoringParameters
) -> tuple[Tensor, Tensor, Tensor]:
    """Score embeddings with the compiled kernel; arguments and results as ``patch_entropy_score`` has them.

    Where there is no kernel for their device, that function does it, and says so once.

    Args:
        embeddings: float32 [N, D, H, W]; on a CUDA device float16, too.
        prototypes: [K, D] of the same type, the normal class first.
        direction: float32 [D].
        parameters: Scalars.

    Raises:
        ValueError: Shapes or types do not fit each other or the parameters.
        MeliadError: The kernel failed.
    """
    score, evidence, nearest = torch.ops.meliad.patch_entropy_score(
        embeddings, prototypes, direction, **asdict(parameters)
    )
    return score, evidence, nearest


@torch.library.custom_op("meliad::patch_entropy_score", mutates_args=())
def _operator(
    embeddings: Tensor,
    prototypes: Tensor,
    direction: Tensor,
    n_normal: int,
    top_cells: int,
    softness: float,
    normal_scale: float,
    anomaly_scale: float,
    bias: float,
    kappa: float,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = ScoringParameters(n_normal, top_cells, softness, normal_scale, anomaly_scale, bias, kappa, offset)
    _check(embeddings, prototypes, direction, parameters)
    kernel = _kernel(embeddings.device.type)
    if kernel is None or not len(embeddings):
        with torch.no_grad():
            return patch_entropy_score(embeddings, prototypes, direction, parameters)
    count, _, height, width = embeddings.shape
    score = embeddings.new_empty(count, dtype=torch.float32)
    evidence = embeddings.new_empty((count, height, width), dtype=torch.float32)
    nearest = embeddings.new_empty((count, 2, height, width), dtype=torch.int64)
    embeddings, prototypes, direction = embeddings.contiguous(), prototypes.contiguous(), direction.contiguous()
    tensors = (embeddings, direction, score, evidence, nearest)
    batch = _Batch(count, len(direction), height * width, *(tensor.data_ptr() for tensor in tensors))
    kernel(_Parameters(*asdict(parameters).values()), prototypes, batch)
    return score, evidence, nearest


@_operator.register_fake
def _(embeddings: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    count, _depth, height, width = embeddings.shape
    return (
        embeddings.new_empty(count, dtype=torch.float32),
        embeddings.new_empty((count, height, width), dtype=torch.float32),
        embeddings.new_empty((count, 2, height, width), dtype=torch.int64),
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.parameters = ScoringParameters(*inputs[3:])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, of_score: Tensor, of_map: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    inputs = embeddings, prototypes, direction = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
    with torch.enable_grad():
        score, evidence, _nearest = patch_entropy_score(embeddings, prototypes, direction, ctx.parameters)
        gradients = torch.autograd.grad((score, evidence), inputs, (of_score, of_map))
    return (*gradients, *(None for _ in fields(ScoringParameters)))


_operator.register_autograd(_backward, setup_context=_keep_inputs)


def _check(embeddings: Tensor, prototypes: Tensor, direction: Tensor, parameters: ScoringParameters) -> None:
    shapes = (
        f"embeddings {list(embeddings.shape)}, prototypes {list(prototypes.shape)}, direction {list(direction.shape)}"
    )
    fit = embeddings.ndim == 4 and prototypes.ndim == 2 and direction.shape == prototypes.shape[1:]
    if not fit or embeddings.shape[1] != prototypes.shape[1]:
        msg = f"{shapes}: expected [N, D, H, W], [K, D] and [D]"
        raise ValueError(msg)
    if not (
        0 < parameters.n_normal < len(prototypes)
        and 0 < parameters.top_cells <= embeddings.shape[2] * embeddings.shape[3]
    ):
        msg = f"{shapes} do not fit n_normal = {parameters.n_normal} and top_cells = {parameters.top_cells}"
        raise ValueError(msg)
    devices = {embeddings.device, prototypes.device, direction.device}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        msg = f"embeddings, prototypes and direction are on {names}; move them to one device"
        raise ValueError(msg)
    allowed = (torch.float32, torch.float16) if embeddings.is_cuda else (torch.float32,)
    if embeddings.dtype not in allowed or prototypes.dtype != embeddings.dtype or direction.dtype != torch.float32:
        msg = (
            f"embeddings are {embeddings.dtype}, prototypes {prototypes.dtype}, direction {direction.dtype}; "
            f"expected {' or '.join(map(str, allowed))} for the first two and torch.float32 for the direction"
        )
        raise ValueError(msg)


_Kernel = Callable[[_Parameters, Tensor, _Batch], None]


@cache
def _kernel(device: str) -> _Kernel | None:
    """What runs on tensors of that kind of device, looked for once."""
    library = _load()
    if library is not None and device == "cpu":
        scorers = _Scorers(library)
        return lambda parameters, prototypes, batch: _run_on_cpu(scorers, parameters, prototypes, batch)
    if library is not None and device == "cuda" and _serves_cuda(library):
        return lambda parameters, prototypes, batch: _run_on_cuda(library, parameters, prototypes, batch)
    _logger.warning("there is no compiled scoring kernel for %s tensors; PyTorch's own operators do its work", device)
    return None


def _serves_cuda(library: ctypes.CDLL) -> bool:
    """Whether it was built with CUDA, and the device is new enough for its kernels."""
    return hasattr(library, "meliad_cuda_score_patches") and torch.cuda.get_device_capability() >= _OLDEST_CAPABILITY


def _load() -> ctypes.CDLL | None:
    path = find_kernel_library("c")
    try:
        return None if path is None else _declare(ctypes.CDLL(str(path)))
    except OSError as error:
        _logger.warning("%s cannot be loaded (%s)", path, error)
        return None


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    handle = ctypes.c_void_p
    library.meliad_last_error.restype = ctypes.c_char_p
    library.meliad_scorer_create.restype = handle
    library.meliad_scorer_create.argtypes = [handle, handle, ctypes.c_int64, ctypes.c_int64]
    library.meliad_scorer_destroy.argtypes = [handle]
    library.meliad_scorer_tile_count.restype = ctypes.c_int64
    library.meliad_scorer_tile_count.argtypes = [handle, handle]
    library.meliad_scorer_score_tiles.argtypes = [handle, handle, ctypes.c_int64, ctypes.c_int64]
    library.meliad_scorer_score_images.argtypes = [handle, handle]
    if hasattr(library, "meliad_cuda_score_patches"):
        library.meliad_cuda_workspace_bytes.restype = ctypes.c_size_t
        library.meliad_cuda_workspace_bytes.argtypes = [ctypes.c_int64, ctypes.c_int64]
        library.meliad_cuda_score_patches.argtypes = [
            handle, handle, ctypes.c_int64, ctypes.c_int, handle, handle, handle
        ]  # fmt: skip
    return library


class _Scorer:
    """A scorer of the library: prototypes in the order in which the kernel reads them."""

    def __init__(self, library: ctypes.CDLL, parameters: _Parameters, prototypes: Tensor) -> None:
        self._library = library
        self._handle = library.meliad_scorer_create(ctypes.byref(parameters), prototypes.data_ptr(), *prototypes.shape)
        if not self._handle:
            raise MeliadError(library.meliad_last_error().decode())

    def __del__(self) -> None:
        self._library.meliad_scorer_destroy(self._handle)

    def tile_count(self, batch: _Batch) -> int:
        return int(self._library.meliad_scorer_tile_count(self._handle, ctypes.byref(batch)))

    def score_tiles(self, batch: _Batch, first: int, end: int) -> None:
        self._require(self._library.meliad_scorer_score_tiles(self._handle, ctypes.byref(batch), first, end))

    def score_images(self, batch: _Batch) -> None:
        self._require(self._library.meliad_scorer_score_images(self._handle, ctypes.byref(batch)))

    def _require(self, failed: int) -> None:
        if failed:  # on the thread that the library remembers it for
            raise MeliadError(self._library.meliad_last_error().decode())


class _Scorers:
    """The scorer of the last call, which the next one most often needs again: packing takes longer than scoring."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._key: tuple[Any, ...] | None = None
        self._prototypes: Tensor | None = None  # kept, so that no other tensor can take its place in memory
        self._scorer: _Scorer | None = None

    def get(self, parameters: _Parameters, prototypes: Tensor) -> _Scorer:
        if prototypes.is_inference():  # nobody counts its changes
            return _Scorer(self._library, parameters, prototypes)
        key = (prototypes.data_ptr(), prototypes._version, *prototypes.shape, bytes(parameters))
        scorer = self._scorer
        if scorer is None or key != self._key:
            scorer = _Scorer(self._library, parameters, prototypes)
            self._key, self._prototypes, self._scorer = key, prototypes, scorer
        return scorer


def _run_on_cpu(scorers: _Scorers, parameters: _Parameters, prototypes: Tensor, batch: _Batch) -> None:
    scorer = scorers.get(parameters, prototypes)
    tiles = scorer.tile_count(batch)
    threads = min(torch.get_num_threads(), tiles)
    bounds = [tiles * thread // threads for thread in range(threads + 1)]
    if threads == 1:
        scorer.score_tiles(batch, 0, tiles)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(scorer.score_tiles, [batch] * threads, bounds[:-1], bounds[1:]):
                pass
    scorer.score_images(batch)


def _run_on_cuda(library: ctypes.CDLL, parameters: _Parameters, prototypes: Tensor, batch: _Batch) -> None:
    with torch.cuda.device(prototypes.device):
        bytes_needed = library.meliad_cuda_workspace_bytes(batch.images, batch.cells)
        workspace = torch.empty(bytes_needed, dtype=torch.uint8, device=prototypes.device)
        error = library.meliad_cuda_score_patches(
            ctypes.byref(parameters),
            prototypes.data_ptr(),
            len(prototypes),
            int(prototypes.dtype == torch.float16),
            ctypes.byref(batch),
            workspace.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    if error:
        raise MeliadError(library.meliad_last_error().decode())
