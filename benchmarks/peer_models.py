"""anomalib's models, built by its own classes on our normal images and exported by its own export.

Without a network there are no ImageNet weights of ResNet, and nothing is trained here: those models have random weights
and are measured for their latency alone, which does not depend on them. PatchCore's depends on the size of its memory
bank: that is as large as its defaults make it of as many normal images as a category of MVTec AD has. With the weights
of our backbone, which come in a package, PatchCore and PaDiM score in earnest.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meliad_edge.benchmarks.peer_detectors import (
    AnomalibPadim,
    AnomalibPatchcore,
    PeerNetwork,
    draw_patches,
    muted,
)
from meliad_edge.benchmarks.peer_graph import PeerGraph
from meliad_edge.models.backbone import Backbone, load_backbone
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.network import Detector, TrainingImages
from meliad_edge.progress import track

Frames = NDArray[np.uint8]

_TABLE_PATCHCORE = AnomalibPatchcore()
# Entries of a memory bank as large as that of PatchCore in the accuracy table.
SMALL_BANK = int(_TABLE_PATCHCORE.candidates * _TABLE_PATCHCORE.coreset_ratio)

# Normal images of MVTec AD over its categories: 3,629 / 15. A bank of all those of ELPV would not fit the memory of the
# machines that this is for.
_MVTEC_NORMALS = 242
_BATCH = 16
# Where weights are random, statistics of features only have to be there.
_STATISTICS_FRAMES = 16
_UNTRAINED = "random: anomalib trains it for hours or days on a CPU"


@dataclass(frozen=True, slots=True)
class _Built:
    """A module of anomalib that can be exported, and the facts of :class:`PeerGraph` about it."""

    module: Any
    weights: str
    is_fitted: bool
    memory_bank: int | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """One of anomalib's models.

    Attributes:
        name: Method and backbone.
        build: Makes it of uint8 RGB frames [n, H, W, 3] of normal images and a seed.
    """

    name: str
    build: Callable[[Frames, int], _Built]

    def export(self, frames: Frames, seed: int, folder: Path) -> PeerGraph:
        """Build and export it for one frame of the size of the given ones.

        Args:
            frames: Normal images.
            seed: Of what is drawn at random.
            folder: Where the graph goes.

        Raises:
            Exception: Whatever anomalib, torch or timm raise.
        """
        # Not in inference mode: what is made in it cannot be exported.
        with muted(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built = self.build(frames, seed)
            # By default the batch has any size, which its PatchCore, whose export looks at the size, does not survive.
            path = built.module.eval().to_onnx(
                folder,
                input_size=frames.shape[1:3],
                dynamic_axes=None,
                dynamic_shapes=None,
                opset_version=18,
                verbose=False,
            )
        return PeerGraph(path, built.weights, built.is_fitted, built.memory_bank)


def _patchcore(backbone: str, bank: int | None = None) -> Callable[[Frames, int], _Built]:
    """PatchCore with its default share of the patches of a usual set in its bank, or with so many of them."""

    def build(frames: Frames, seed: int) -> _Built:
        refusal = _hub_refusal(backbone)
        module = _anomalib_model("Patchcore", frames, backbone=backbone, pre_trained=refusal is None)
        stride, *_ = module.model.feature_extractor.reductions
        cells = (frames.shape[1] // stride) * (frames.shape[2] // stride)
        count = bank or int(min(len(frames), _MVTEC_NORMALS) * cells * module.coreset_sampling_ratio)
        # Nothing is learned with random weights: the images that fill the bank are enough.
        seen = frames if refusal is None else frames[: -(-count // cells)]
        batches = _batches(module, seen)
        # Drawn instead of chosen, which would take days and leaves the bank as large.
        module.model.memory_bank = torch.cat(draw_patches(module.model, batches, count, len(seen) * cells, seed))
        return _Built(module, _imagenet_or(refusal), refusal is None, len(module.model.memory_bank))

    return build


def _padim(frames: Frames, seed: int) -> _Built:
    backbone = "resnet18"
    refusal = _hub_refusal(backbone)
    module = _anomalib_model("Padim", frames, backbone=backbone, pre_trained=refusal is None)
    module.model.train()
    module.model.feature_extractor.eval()
    for batch in _batches(module, frames if refusal is None else frames[:_STATISTICS_FRAMES]):
        module.model(batch)
    module.model.fit()
    return _Built(module, _imagenet_or(refusal), refusal is None)


def _with_our_backbone(name: str, detector: Detector) -> Callable[[Frames, int], _Built]:
    """A method of the accuracy table, in the module that anomalib exports."""

    def build(frames: Frames, seed: int) -> _Built:
        backbone = load_backbone(strides=detector.strides)
        no_shots = frames[:0]
        network = detector.fit(TrainingImages(frames, no_shots), FeatureExtractor(backbone), seed=seed).network
        assert isinstance(network, PeerNetwork)
        model: Any = network.model
        options = {"n_features": model.n_features} if name == "Padim" else {}
        module = _anomalib_model(
            name,
            frames,
            backbone=backbone.name,
            layers=model.layers,
            pre_trained=False,
            pre_processor=_pre_processor(backbone, network.input_hw),
            **options,
        )
        module.model = model
        bank = len(model.memory_bank) if name == "Patchcore" else None
        return _Built(module, f"ImageNet, {backbone.name} as ours", True, bank)

    return build


def _efficient_ad(size: str) -> Callable[[Frames, int], _Built]:
    def build(frames: Frames, seed: int) -> _Built:
        module = _anomalib_model("EfficientAd", frames, model_size=size)
        batches = [
            SimpleNamespace(image=image, gt_label=torch.zeros(len(image)))
            for image in _batches(module, frames[:_STATISTICS_FRAMES])
        ]
        module.eval().model.mean_std.update(module.teacher_channel_mean_std(batches))
        module.model.quantiles.update(module.map_norm_quantiles(batches))
        return _Built(module, _UNTRAINED, is_fitted=False)

    return build


def _untrained(name: str) -> Callable[[Frames, int], _Built]:
    def build(frames: Frames, seed: int) -> _Built:
        with _no_pretrained_weights():
            return _Built(_anomalib_model(name, frames), _UNTRAINED, is_fitted=False)

    return build


PEERS = (
    Peer("PatchCore, ResNet-18", _patchcore("resnet18")),
    Peer(f"PatchCore, ResNet-18, {SMALL_BANK:,} patches", _patchcore("resnet18", SMALL_BANK)),
    Peer("PatchCore, WideResNet-50", _patchcore("wide_resnet50_2")),
    Peer("PatchCore, EfficientNet-Lite0", _with_our_backbone("Patchcore", _TABLE_PATCHCORE)),
    Peer("PaDiM, ResNet-18", _padim),
    Peer("PaDiM, EfficientNet-Lite0", _with_our_backbone("Padim", AnomalibPadim())),
    Peer("EfficientAD-S", _efficient_ad("small")),
    Peer("EfficientAD-M", _efficient_ad("medium")),
    Peer("STFPM, ResNet-18", _untrained("Stfpm")),
    Peer("SuperSimpleNet, WideResNet-50", _untrained("Supersimplenet")),
)


def _anomalib_model(name: str, frames: Frames, **options: Any) -> Any:
    """A model of anomalib for images of that size, with its defaults but for the options, and without its metrics."""
    with muted():
        model = getattr(importlib.import_module("anomalib.models"), name)
        pre_processor = model.configure_pre_processor((frames.shape[1], frames.shape[2]))
        return model(**{"pre_processor": pre_processor, "evaluator": False, "visualizer": False, **options})


def _batches(module: Any, frames: Frames) -> Iterator[Tensor]:
    """Images as the module's own pre-processing leaves them."""
    for start in track(range(0, len(frames), _BATCH), "features of normals"):
        images = torch.from_numpy(frames[start : start + _BATCH]).permute(0, 3, 1, 2).float() / 255.0
        yield module.pre_processor(images)


def _pre_processor(backbone: Backbone, input_hw: tuple[int, int]) -> Any:
    """anomalib's, with the normalisation of our backbone, which takes pixels from 0 to 255."""
    transforms = importlib.import_module("torchvision.transforms.v2")
    shift, scale = (torch.as_tensor(values).flatten().expand(3) for values in (backbone.shift, backbone.scale))
    normalise = transforms.Normalize(mean=(shift / 255.0).tolist(), std=(1.0 / (255.0 * scale)).tolist())
    resize = transforms.Resize(list(input_hw), antialias=True)
    pre_processing = importlib.import_module("anomalib.pre_processing")
    return pre_processing.PreProcessor(transform=transforms.Compose([resize, normalise]))


@functools.cache
def _hub_refusal(backbone: str) -> str | None:
    """Why timm has no ImageNet weights of a backbone here; None where it has some."""
    try:
        importlib.import_module("timm").create_model(backbone, pretrained=True)
    except Exception as error:  # the hub client raises errors of several libraries when there is no network
        return type(error).__name__
    return None


def _imagenet_or(refusal: str | None) -> str:
    return "ImageNet" if refusal is None else f"random: timm's hub cannot be reached ({refusal})"


@contextlib.contextmanager
def _no_pretrained_weights() -> Iterator[None]:
    """Models that insist on weights of timm's hub get random ones."""
    timm: Any = importlib.import_module("timm")
    create_model = timm.create_model

    def create_random(*arguments: Any, **options: Any) -> Any:
        return create_model(*arguments, **{**options, "pretrained": False})

    timm.create_model = create_random
    try:
        yield
    finally:
        timm.create_model = create_model
