from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meliad_edge import metrics
from meliad_edge.errors import DataError
from meliad_edge.metrics import auroc_difference, image_metrics, pixel_metrics, precision_recall_curve, roc_curve

# Plain references, straight from the definitions.


def auroc_reference(scores, labels):
    positives = [s for s, y in zip(scores, labels, strict=True) if y]
    negatives = [s for s, y in zip(scores, labels, strict=True) if not y]
    wins = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives))


def ap_and_f1_reference(scores, labels):
    ap = recall_before = 0.0
    best_f1, best_threshold = Fraction(-1), None
    for threshold in sorted(set(scores), reverse=True):
        decided = [s >= threshold for s in scores]
        hits = sum(d and y for d, y in zip(decided, labels, strict=True))
        precision, recall = hits / sum(decided), hits / sum(labels)
        ap += (recall - recall_before) * precision
        recall_before = recall
        f1 = Fraction(2 * hits, sum(decided) + sum(labels))
        if f1 > best_f1:
            best_f1, best_threshold = f1, threshold
    return ap, float(best_f1), best_threshold


def regions_reference(mask):
    """8-connected regions by flood fill, as lists of pixels."""
    left = {(int(r), int(c)) for r, c in np.argwhere(mask)}
    regions = []
    while left:
        region, edge = [], [left.pop()]
        while edge:
            row, column = edge.pop()
            region.append((row, column))
            around = {(row + dr, column + dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1)} & left
            left -= around
            edge.extend(around)
        regions.append(region)
    return regions


def aupro_reference(maps, masks, limit):
    """Every threshold, every region; then trapezoids up to the limit, which may cut one."""
    normals = sum(int((mask == 0).sum()) for mask in masks)
    regions = [regions_reference(mask) for mask in masks]
    points = [(0.0, 0.0)]
    for threshold in sorted(set(np.concatenate([m.ravel() for m in maps]).tolist()), reverse=True):
        alarms = sum(int(((m >= threshold) & (mask == 0)).sum()) for m, mask in zip(maps, masks, strict=True))
        overlaps = [
            sum(m[pixel] >= threshold for pixel in region) / len(region)
            for m, of_image in zip(maps, regions, strict=True)
            for region in of_image
        ]
        points.append((alarms / normals, sum(overlaps) / len(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / limit


@st.composite
def scores_and_labels(draw):
    count = draw(st.integers(2, 40))
    # Few distinct values: ties between and within classes are the rule.
    scores = draw(st.lists(st.integers(-4, 4).map(float), min_size=count, max_size=count))
    labels = draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(lambda y: 0 < sum(y) < len(y)))
    return scores, labels


@st.composite
def maps_and_masks(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = draw(st.sampled_from([2, 5, 1000]))
    maps = [generator.integers(0, values, shape).astype(np.float32) for shape in shapes]
    masks = [generator.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.6])) for shape in shapes]
    # The border gives a normal pixel, its inner corner a defective one.
    maps[0], masks[0] = np.pad(maps[0], 1), np.pad(masks[0], 1)
    masks[0][1, 1] = True
    return maps, masks


@settings(deadline=None)
@given(scores_and_labels())
def test_image_metrics_agree_with_the_definitions(case):
    scores, labels = case
    result = image_metrics(scores, labels, resamples=3)
    ap, f1, threshold = ap_and_f1_reference(scores, labels)
    assert result.image_auroc == pytest.approx(auroc_reference(scores, labels), abs=1e-12)
    assert result.image_ap == pytest.approx(ap, abs=1e-12)
    assert result.image_f1_max == pytest.approx(f1, abs=1e-12)
    assert result.image_f1_max_threshold == threshold
    assert (result.test_normals, result.test_anomalies) == (len(labels) - sum(labels), sum(labels))


@settings(deadline=None, max_examples=50)
@given(scores_and_labels())
def test_curves_enclose_the_areas(case):
    alarm_rate, hit_rate = roc_curve(*case)
    recall, precision = precision_recall_curve(*case)
    result = image_metrics(*case, resamples=1)
    assert (alarm_rate[0], hit_rate[0], alarm_rate[-1], hit_rate[-1]) == (0, 0, 1, 1)
    trapezoids = np.diff(alarm_rate) * (hit_rate[1:] + hit_rate[:-1]) / 2
    assert trapezoids.sum() == pytest.approx(result.image_auroc)
    assert np.sum(np.diff(recall, prepend=0.0) * precision) == pytest.approx(result.image_ap)


@settings(deadline=None, max_examples=60)
@given(maps_and_masks())
def test_pixel_metrics_agree_with_the_definitions(case):
    maps, masks = case
    result = pixel_metrics(maps, masks, resamples=2)
    pooled = np.concatenate([m.ravel() for m in maps]).tolist(), np.concatenate([m.ravel() for m in masks]).tolist()
    assert result.pixel_auroc == pytest.approx(auroc_reference(*pooled), abs=1e-10)
    assert result.pixel_ap == pytest.approx(ap_and_f1_reference(*pooled)[0], abs=1e-10)
    assert result.aupro_30 == pytest.approx(aupro_reference(maps, masks, 0.30), abs=1e-10)
    assert result.aupro_05 == pytest.approx(aupro_reference(maps, masks, 0.05), abs=1e-10)
    assert result.test_masks == sum(bool(mask.any()) for mask in masks)


def test_resamples_without_a_normal_pixel_do_not_count():
    maps = [np.eye(3, dtype=np.float32), np.ones((1, 1), np.float32)]
    masks = [np.eye(3) > 0, np.ones((1, 1)) > 0]
    result = pixel_metrics(maps, masks, resamples=50)
    assert result.pixel_auroc == 1.0
    assert result.pixel_auroc_ci == (1.0, 1.0)


def test_constant_scores_are_chance_level():
    result = image_metrics([0.7] * 10, [True] * 4 + [False] * 6)
    assert (result.image_auroc, result.image_ap) == (0.5, 0.4)
    assert result.image_auroc_ci == (0.5, 0.5)
    assert result.image_f1_max == pytest.approx(2 * 0.4 / 1.4)


def test_separated_scores_are_perfect():
    result = image_metrics([1.0, 2.0, 3.0, 4.0], [False, False, True, True])
    assert (result.image_auroc, result.image_ap, result.image_f1_max) == (1.0, 1.0, 1.0)
    assert result.image_f1_max_threshold == 3.0
    assert result.image_auroc_ci == (1.0, 1.0)


@pytest.mark.parametrize(
    ("scores", "labels", "says"),
    [
        ([1.0, 2.0], [True, True], "got 0 and 2"),
        ([1.0, 2.0], [False, False], "got 2 and 0"),
        ([], [], "got 0 and 0"),
        ([1.0, np.nan, np.inf], [True, False, True], "2 of 3 scores are not finite"),
        ([1.0, 2.0, 3.0], [True, False], "one of each per image"),
    ],
)
def test_unusable_scores_are_refused(scores, labels, says):
    with pytest.raises(DataError, match=says):
        image_metrics(scores, labels)


def test_image_interval_is_seeded_and_covers_the_truth():
    """The 95 % interval of the AUROC holds the true value in about 95 of 100 experiments."""
    generator = np.random.default_rng(0)
    labels = np.arange(120) < 60
    truth = 0.8556  # P(N(1.5, 1) > N(0, 1)) = Phi(1.5 / sqrt 2)
    covered = 0
    for _ in range(100):
        low, high = image_metrics(generator.normal(size=120) + 1.5 * labels, labels, resamples=200).image_auroc_ci
        covered += low <= truth <= high
    assert 86 <= covered <= 100
    scores = generator.normal(size=120)
    assert image_metrics(scores, labels, seed=1) == image_metrics(scores, labels, seed=1)
    assert image_metrics(scores, labels, seed=1) != image_metrics(scores, labels, seed=2)


def blobs(count, size, seed=0):
    """Smooth noisy maps over masks with one to three rectangles; every third image is normal."""
    generator = np.random.default_rng(seed)
    maps, masks = [], []
    for index in range(count):
        mask = np.zeros((size, size), np.uint8)
        for _ in range(index % 3):
            row, column = generator.integers(0, size - size // 4, 2)
            mask[row : row + size // 5, column : column + size // 9] = 255
        maps.append((generator.normal(size=(size, size)) + 1.5 * (mask > 0)).astype(np.float32))
        masks.append(mask)
    return maps, masks


def test_bins_agree_with_the_exact_result(monkeypatch):
    maps, masks = blobs(42, 128)
    exact = pixel_metrics(maps, masks, resamples=20)
    monkeypatch.setattr(metrics, "EXACT_PIXELS", 2**18)
    binned = pixel_metrics(maps, masks, resamples=20)
    assert binned != exact
    assert binned.pixel_auroc == pytest.approx(exact.pixel_auroc, abs=2e-5)
    assert binned.pixel_ap == pytest.approx(exact.pixel_ap, abs=1e-3)
    assert binned.aupro_30 == pytest.approx(exact.aupro_30, abs=1e-4)
    assert binned.aupro_05 == pytest.approx(exact.aupro_05, abs=6e-4)


def test_pixel_intervals_agree_with_images_drawn_again():
    """The bootstrap over binned counts gives what measuring resampled images one by one gives."""
    maps, masks = blobs(30, 32)
    result = pixel_metrics(maps, masks)
    generator = np.random.default_rng(1)
    with_defect = [i for i, mask in enumerate(masks) if mask.any()]
    without = [i for i, mask in enumerate(masks) if not mask.any()]
    again = []
    for _ in range(200):
        drawn = [*generator.choice(with_defect, len(with_defect)), *generator.choice(without, len(without))]
        again.append(pixel_metrics([maps[i] for i in drawn], [masks[i] for i in drawn], resamples=1))
    for name in ("pixel_auroc", "pixel_ap", "aupro_30", "aupro_05"):
        low, high = np.quantile([getattr(result, name) for result in again], [0.025, 0.975])
        interval = getattr(result, f"{name}_ci")
        assert interval == pytest.approx((low, high), abs=0.35 * (high - low)), name
        assert interval[0] <= getattr(result, name) <= interval[1]


def test_regions_count_equally_whatever_their_size():
    values, mask = np.zeros((20, 20)), np.zeros((20, 20), bool)
    mask[0, 0] = mask[10:20, 10:20] = True
    values[0, 0] = 1.0  # only the one-pixel region is found
    values[5, 0] = 0.5  # the first false alarm
    result = pixel_metrics([values], [mask], resamples=1)
    assert result.aupro_05 == pytest.approx(aupro_reference([values], [mask], 0.05))
    assert result.aupro_05 > 0.5


def test_diagonal_neighbours_are_one_region():
    values, mask = np.zeros((6, 6)), np.eye(6, dtype=bool)
    values[0, 0] = 2.0
    one_region = pixel_metrics([values], [mask], resamples=1)
    assert one_region.aupro_30 == pytest.approx(aupro_reference([values], [mask], 0.30))
    assert one_region.aupro_30 < 0.5


def test_pixel_metrics_are_absent_with_the_reason_when_all_masks_are_empty():
    result = pixel_metrics(np.zeros((3, 4, 4)), np.zeros((3, 4, 4), bool))
    assert result.pixel_auroc is None
    assert result.aupro_30_ci is None
    assert result.pixel_absent_because == "the masks of the 3 test images have no defective pixel"
    full = pixel_metrics(np.zeros((2, 4, 4)), np.ones((2, 4, 4), bool))
    assert full.pixel_ap is None
    assert full.pixel_absent_because is not None
    assert "no normal pixel" in full.pixel_absent_because


@pytest.mark.parametrize(
    ("maps", "masks", "says"),
    [
        ([], [], "0 maps and 0 masks"),
        ([np.zeros((2, 2))], [], "1 maps and 0 masks"),
        ([np.zeros((2, 2))], [np.zeros((2, 3))], r"map 0 is \(2, 2\), its mask \(2, 3\)"),
        ([np.zeros((2, 2)), np.full((2, 2), np.nan)], [np.eye(2)] * 2, "map 1 has values that are not finite"),
    ],
)
def test_unusable_maps_are_refused(maps, masks, says):
    with pytest.raises(DataError, match=says):
        pixel_metrics(maps, masks)


def test_lazy_maps_are_never_held_together():
    maps, masks = blobs(6, 16)

    class Lazy:
        def __len__(self):
            return len(maps)

        def __getitem__(self, index):
            return maps[index].copy()

    assert pixel_metrics(Lazy(), masks, resamples=5) == pixel_metrics(maps, masks, resamples=5)


def test_results_become_one_flat_json_object():
    labels = np.arange(20) < 10
    image = image_metrics(np.random.default_rng(0).normal(size=20) + labels, labels).to_dict()
    pixel = pixel_metrics(*blobs(6, 16)).to_dict()
    merged = json.loads(json.dumps({**image, **pixel}, allow_nan=False))
    names = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro_30", "aupro_05")
    for name in names:
        low, high = merged[f"{name}_ci"]
        assert 0 <= low <= merged[name] <= high <= 1
    assert (merged["test_normals"], merged["test_anomalies"], merged["test_masks"]) == (10, 10, 4)
    assert merged["pixel_absent_because"] is None


def test_the_difference_of_two_models_is_that_of_their_auroc_with_what_they_share_cancelled():
    generator = np.random.default_rng(4)
    labels = np.arange(200) < 60
    before = np.round(generator.normal(size=200) + labels, 1)  # with ties
    after = before + generator.normal(scale=0.3, size=200) + 0.4 * labels
    difference, (low, high) = auroc_difference(before, after, labels, seed=5)
    separate = [image_metrics(scores, labels, seed=5) for scores in (before, after)]
    assert difference == pytest.approx(separate[1].image_auroc - separate[0].image_auroc)
    assert 0.0 < low < difference < high
    width = separate[1].image_auroc_ci[1] - separate[0].image_auroc_ci[0]
    assert high - low < 0.7 * width
    assert auroc_difference(before, 2.0 * before + 1.0, labels) == (0.0, (0.0, 0.0))
    shuffled = generator.permutation(200)
    assert auroc_difference(before[shuffled], after[shuffled], labels[shuffled])[0] == pytest.approx(difference)
