"""anomalib's PatchCore and PaDiM as detectors of ours: other people's code, our images, split, weights and metrics.

anomalib's own torch models are used as they are, without Lightning and on the CPU. What differs from their defaults:
the backbone is ours (EfficientNet-Lite0, levels of strides 8 and 16, with the normalisation of its weights), since
their WideResNet-50 has no weights without a download; PatchCore chooses its coreset from a random part of the patches.
Neither can use labelled anomalies. Importing this module registers them; fitting needs ``meliad-edge[peers]``.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meliad_edge.benchmarks.job import PEER_PREFIX, Variant
from meliad_edge.cli.output import require_extra
from meliad_edge.errors import ModelError
from meliad_edge.models.backbone import Backbone
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.network import (
    Detector,
    DetectorNetwork,
    FittedDetector,
    TrainingImages,
    no_prototypes,
    register,
)
from meliad_edge.progress import track

_STRIDES = (8, 16)
_BATCH = 16

LEFT_OUT = (
    "anomalib EfficientAD: its teacher's weights and ImageNette are downloaded from github.com and s3.amazonaws.com "
    "(without a network: URLError, name or service not known)",
    "anomalib SuperSimpleNet: it always asks timm's hub for pretrained weights (without a network: "
    "LocalEntryNotFoundError), and its 300 epochs would take days on a CPU: one step of 32 images at 256 pixels took "
    "41 to 51 s on one core of a busy machine",
    "anomalib with WideResNet-50, its default: no weights without timm's hub (LocalEntryNotFoundError)",
)

# A model of anomalib in evaluation mode: normalised images [N, 3, H, W] to score [N] and map [N, 1, H, W].
Model = Callable[[Tensor], Any]


class PeerNetwork(DetectorNetwork):
    """A fitted model of anomalib behind the interface of our networks; only its backbone can be saved."""

    def __init__(self, backbone: Backbone, input_hw: tuple[int, int], model: Model) -> None:
        super().__init__(input_hw)
        self.backbone = backbone
        # In a tuple torch does not see it: it would be saved, with the tensors of its backbone twice.
        self._model = (model,)

    @property
    def model(self) -> Model:
        """What anomalib fitted."""
        return self._model[0]

    @property
    def grid_hw(self) -> tuple[int, int]:
        """One cell per pixel: anomalib interpolates and smooths its maps itself."""
        return self.input_hw

    @property
    def top_cells(self) -> None:
        """The score follows anomalib's definition."""
        return

    def describe(self) -> dict[str, Any]:
        """Nothing: it cannot be rebuilt."""
        return {}

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score uint8 frames [N, H, W, 3]; the indices of prototypes, all -1, are [N, 2, 1, 1] to save a gigabyte."""
        predicted = self.model(normalised(self.backbone, frames))
        score, evidence = predicted.pred_score.flatten(), predicted.anomaly_map.squeeze(1)
        return score, evidence, no_prototypes(evidence[:, :1, :1])


def normalised(backbone: Backbone, frames: Tensor) -> Tensor:
    """Frames as the backbone's own network takes them, float32 [N, 3, H, W]."""
    shift: Tensor = backbone.shift  # type: ignore[assignment]
    scale: Tensor = backbone.scale  # type: ignore[assignment]
    return (frames.permute(0, 3, 1, 2).float() - shift) * scale


class _Peer(Detector):
    """Fits one of anomalib's models on the normal images."""

    strides: ClassVar[tuple[int, ...]] = _STRIDES

    def fit(self, images: TrainingImages, features: FeatureExtractor, *, seed: int) -> FittedDetector:
        """Fit on normal images; labelled anomalies are ignored.

        Raises:
            MissingExtraError: anomalib is not installed.
        """
        require_extra("anomalib", "peers")
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            model = self._fit_model(features.backbone, images.normal, seed)
        return FittedDetector(PeerNetwork(features.backbone, images.size_hw, model.eval()).eval(), (), {})

    def build(
        self, backbone: Backbone, input_hw: tuple[int, int], state: dict[str, Tensor], description: dict[str, Any]
    ) -> DetectorNetwork:
        """Not supported.

        Raises:
            ModelError: Always.
        """
        msg = "anomalib's models are measured, not kept: a run folder of one cannot be used again"
        raise ModelError(msg)

    @abstractmethod
    def _fit_model(self, backbone: Backbone, frames: NDArray[np.uint8], seed: int) -> Any:
        """The fitted model."""


@register(f"{PEER_PREFIX}patchcore")
@dataclass(frozen=True, slots=True)
class AnomalibPatchcore(_Peer):
    """PatchCore (Roth et al., CVPR 2022), anomalib's ``PatchcoreModel``.

    Attributes:
        candidates: Patches, drawn at random, that the coreset is chosen from. The authors choose from all; ELPV has
            869,000, with which we estimate more than a day on one core.
        coreset_ratio: Share of the candidates that is kept; anomalib's default.
        neighbours: Patches of the bank around the nearest one that weigh the image score; anomalib's default.
    """

    candidates: int = 50_000
    coreset_ratio: float = 0.1
    neighbours: int = 9

    def _fit_model(self, backbone: Backbone, frames: NDArray[np.uint8], seed: int) -> Any:
        models = _torch_models("patchcore")
        model = models.PatchcoreModel(
            _layers(backbone), backbone.name, pre_trained=False, num_neighbors=self.neighbours
        )
        _share_weights(model, backbone)
        cells = len(frames) * (frames.shape[1] // _STRIDES[0]) * (frames.shape[2] // _STRIDES[0])
        model.embedding_store = draw_patches(model, _batches(backbone, frames), self.candidates, cells, seed)
        with muted():
            model.subsample_embedding(self.coreset_ratio)
        return model


@register(f"{PEER_PREFIX}padim")
@dataclass(frozen=True, slots=True)
class AnomalibPadim(_Peer):
    """PaDiM (Defard et al., 2021), anomalib's ``PadimModel``.

    Attributes:
        dimensions: Channels, drawn at random from the 152, that are kept; 100 as in the paper for ResNet-18.
    """

    dimensions: int = 100

    def _fit_model(self, backbone: Backbone, frames: NDArray[np.uint8], seed: int) -> Any:
        models = _torch_models("padim")
        model = models.PadimModel(backbone.name, _layers(backbone), pre_trained=False, n_features=self.dimensions)
        _share_weights(model, backbone)
        model.train()
        model.feature_extractor.eval()
        for batch in _batches(backbone, frames):
            model(batch)
        model.fit()
        return model


PEERS = (
    Variant("anomalib PatchCore", f"{PEER_PREFIX}patchcore"),
    Variant("anomalib PaDiM", f"{PEER_PREFIX}padim"),
)


def _torch_models(method: str) -> Any:
    """The module of anomalib with the torch model of a method."""
    with muted():
        return importlib.import_module(f"anomalib.models.image.{method}.torch_model")


def draw_patches(model: Any, batches: Iterable[Tensor], count: int, total: int, seed: int) -> list[Tensor]:
    """Embeddings [n, D] of patches that are drawn at random from those of all images, in the order of the images.

    Args:
        model: anomalib's ``PatchcoreModel``; it is left in training mode, with an empty store.
        batches: Normalised images.
        count: Patches to draw; all of them where there are fewer.
        total: Patches of all images.
        seed: Of the draw.
    """
    kept = torch.zeros(total, dtype=torch.bool)
    kept[torch.from_numpy(np.random.default_rng(seed).permutation(total)[:count])] = True
    model.train()
    model.feature_extractor.eval()
    drawn, start = [], 0
    for batch in batches:
        patches = model(batch)
        drawn.append(patches[kept[start : start + len(patches)]])
        start += len(patches)
        model.embedding_store.clear()
    return drawn


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Without anomalib's progress bars, and its warnings of what is deprecated in itself and in what it imports."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _layers(backbone: Backbone) -> list[str]:
    """Names of the backbone's levels in timm, which anomalib asks for."""
    return list(backbone.features.feature_info.module_name())


def _share_weights(model: Any, backbone: Backbone) -> None:
    model.feature_extractor.feature_extractor.load_state_dict(backbone.features.state_dict())


def _batches(backbone: Backbone, frames: NDArray[np.uint8]) -> Iterator[Tensor]:
    """The normalised images of each batch."""
    for start in track(range(0, len(frames), _BATCH), "features of normals"):
        yield normalised(backbone, torch.from_numpy(frames[start : start + _BATCH]))
