from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from meliad_edge.errors import UsageError
from meliad_edge.models.backbone import load_backbone
from meliad_edge.models.features import FeatureExtractor
from meliad_edge.models.network import TrainingImages, create_detector
from meliad_edge.models.reconstruction import BOUNDARY, MARGIN, EntropyHead, margin_loss


def _slow_margin_loss(pooled: NDArray[np.float64], labels: list[int], ids: list[int], boundary: float) -> float:
    groups: dict[int, list[float]] = {}
    for i in range(len(labels)):
        for j in range(i + 1, len(labels)):
            if ids[i] != ids[j]:
                distance = float(np.sqrt(((pooled[i] - pooled[j]) ** 2).sum()))
                sign = 1.0 if labels[i] == labels[j] else -1.0
                groups.setdefault(labels[i] + labels[j], []).append(max(0.0, MARGIN + sign * (distance - boundary)))
    return float(np.mean([np.mean(losses) for losses in groups.values()]))


@pytest.mark.parametrize("seed", range(5))
def test_margin_loss_is_the_equation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pooled = rng.normal(size=(10, 6))
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    labels = rng.integers(0, 2, 10).tolist()
    ids = rng.integers(0, 6, 10).tolist()
    ids = [image + 100 * label for image, label in zip(ids, labels, strict=True)]  # an image has one label
    for image in range(10):  # repetitions of an image have one embedding
        pooled[image] = pooled[ids.index(ids[image])]
    loss = margin_loss(
        torch.from_numpy(pooled), torch.tensor(labels), torch.tensor(ids), torch.tensor(BOUNDARY, dtype=torch.float64)
    )
    assert loss.item() == pytest.approx(_slow_margin_loss(pooled, labels, ids, BOUNDARY), abs=1e-6)


def test_repetitions_of_one_image_are_no_pair() -> None:
    pooled = torch.nn.functional.normalize(torch.randn(3, 4), dim=1)[[0, 0, 1, 1]]
    loss = margin_loss(pooled, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), torch.tensor(BOUNDARY))
    mixed_alone = MARGIN - ((pooled[0] - pooled[2]).norm() - BOUNDARY)
    assert loss.item() == pytest.approx(max(0.0, mixed_alone.item()), abs=1e-5)


def test_score_is_the_mean_of_the_top_cells_of_the_map_plus_offset() -> None:
    torch.manual_seed(3)
    head = EntropyHead(channels=20, cells=64).eval()
    with torch.inference_mode():
        head.offset.fill_(0.7)
        head.phi.fill_(1.5)
        scored = head(torch.randn(4, 20, 8, 8))
    top = np.sort(scored.evidence.numpy().reshape(4, -1), axis=1)[:, -head.top_cells :]
    np.testing.assert_allclose(scored.score.numpy() - 0.7, top.mean(axis=1), rtol=1e-5)


def test_an_embedding_with_one_bright_cell_has_less_entropy_than_an_even_one() -> None:
    head = EntropyHead(channels=4, cells=16)
    even = torch.zeros(1, 2, 16, 16)
    peaked = even.clone()
    peaked[..., 3] = 9.0
    assert head._channel_entropy(even) == pytest.approx(1.0)  # noqa: SLF001
    assert float(head._channel_entropy(peaked).max()) < 0.1  # noqa: SLF001


def test_it_learns_from_labels_and_needs_them(texture_set: Path) -> None:
    frames = np.zeros((2, 64, 64, 3), np.uint8)
    with pytest.raises(UsageError, match="got none"):
        create_detector("meliad-reconstruction").fit(
            TrainingImages(frames, frames[:0]), FeatureExtractor(load_backbone()), seed=0
        )


@pytest.mark.parametrize("option", [{"steps": 0}, {"margin_weight": -1.0}, {"entropy_weight": -0.1}])
def test_an_option_out_of_range_is_refused(option: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="is not allowed"):
        create_detector("meliad-reconstruction", option)


def test_the_whole_line_runs_with_it(texture_set: Path, invoke, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, bundle = tmp_path / "run", tmp_path / "model.meliad"
    fitted = invoke(
        "fit", texture_set, "--detector", "meliad-reconstruction", "--shots", 4, "--image-size", 128, "--out", run
    )
    assert fitted.code == 0, fitted.err
    measured = invoke("evaluate", run, "--json")
    assert measured.json["image_auroc"] > 0.7  # chance is 0.5
    assert invoke("export", run, "--out", bundle).code == 0
    picture = texture_set / "test" / "stain" / "000.png"
    predicted = json.loads(invoke("predict", bundle, picture, "--json").out)
    assert predicted["predictions"][0]["is_anomaly"] in (True, False)
    assert all(region["resembles"] is None for region in predicted["predictions"][0]["regions"])
