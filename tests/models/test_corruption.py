from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from meliad_edge.models.corruption import corrupt, elastic_crop, foreign_texture, smooth_mask

SIZE_HW = (64, 96)


def _images(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    clean, donor = np.random.default_rng(seed).integers(0, 256, (2, *SIZE_HW, 3)).astype(np.uint8)
    return clean, donor


@pytest.mark.parametrize("seed", range(20))
def test_nothing_changes_outside_the_mask(seed: int) -> None:
    clean, donor = _images(seed)
    corrupted = corrupt(clean, donor, np.random.default_rng(seed))
    outside = corrupted.mask == 0.0
    assert 0.3 < outside.mean() < 1.0
    assert np.array_equal(corrupted.image[outside], (clean.astype(np.float32) / 255.0)[outside])


@pytest.mark.parametrize("seed", range(20))
def test_under_the_mask_the_filling_is_mixed_in_by_its_weight(seed: int) -> None:
    """Solved for T, (1 - M) x + M T gives the same T for a black image and for a white one."""
    _, donor = _images(seed)
    fillings = []
    for level in (0, 255):
        clean = np.full((*SIZE_HW, 3), level, np.uint8)
        corrupted = corrupt(clean, donor, np.random.default_rng(seed))
        weight = corrupted.mask[..., None].astype(np.float64)
        inside = corrupted.mask > 0.2
        fillings.append(((corrupted.image - (1.0 - weight) * (level / 255.0)) / np.maximum(weight, 1e-3))[inside])
    np.testing.assert_allclose(*fillings, atol=1e-5)
    assert fillings[0].min() > -1e-5
    assert fillings[0].max() < 1.0 + 1e-5


def test_it_is_reproducible_by_seed() -> None:
    clean, donor = _images(0)
    first, again, other = (corrupt(clean, donor, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.mask, other.mask)


def test_masks_are_soft_opaque_somewhere_and_of_many_sizes() -> None:
    rng = np.random.default_rng(1)
    masks = np.stack([smooth_mask(SIZE_HW, rng) for _ in range(100)])
    assert masks.dtype == np.float32
    assert masks.min() == 0.0
    np.testing.assert_array_equal(masks.max((1, 2)), 1.0)
    assert ((masks > 0.1) & (masks < 0.9)).any((1, 2)).mean() > 0.9
    areas = (masks > 0.5).mean((1, 2))
    assert areas.min() < 0.01
    assert areas.max() > 0.2


def test_some_masks_are_outlines_around_untouched_pixels() -> None:
    import cv2

    rng = np.random.default_rng(2)
    holes = 0
    for _ in range(40):
        free = (smooth_mask((128, 128), rng) < 0.5).astype(np.uint8)
        holes += cv2.connectedComponents(free)[0] > 2  # the mask itself, and more than one free part
    assert 5 < holes < 40


def test_an_elastic_crop_takes_its_pixels_from_the_donor() -> None:
    rng = np.random.default_rng(3)
    donor = np.full((*SIZE_HW, 3), (50, 100, 150), np.uint8)
    donor[:, :48] = (10, 20, 30)
    for _ in range(10):
        crop = elastic_crop(donor, rng)
        assert crop.shape == (*SIZE_HW, 3)
        assert crop.max() <= 1.0
        # Both colours of the donor are multiples of (1, 2, 3); a change of brightness leaves them so.
        np.testing.assert_allclose(crop[..., 1], np.minimum(2.0 * crop[..., 0], 1.0), atol=0.02)
        assert crop[..., 0].max() > 0.01


def test_foreign_textures_differ_and_stay_in_range() -> None:
    rng = np.random.default_rng(4)
    textures = np.stack([foreign_texture(SIZE_HW, rng) for _ in range(40)])
    assert textures.min() >= 0.0
    assert textures.max() <= 1.0
    spread = textures.std((1, 2, 3))
    assert (textures.std((1, 2)).max(1) < 1e-6).any()  # flat ones
    assert spread.max() > 0.2
    assert len(np.unique(textures.mean((1, 2, 3)))) == 40
