"""A direction of anomaly learned from whole images, of which nobody says where the defect is [ours].

Multiple-instance logistic regression: the score of an image, the mean of its top cells, is to tell labelled defects
from normal images. A prior keeps the direction short, so that it corrects the evidence there is and does not replace
it: the fewer the images, the shorter.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# Weight of the squared length of the direction with one image of a class; it falls with the number of the rarer one.
PRIOR = 10.0
LEARNING_RATE = 0.02


def train_direction(
    normal: tuple[NDArray[np.float32], NDArray[np.float32]],
    shots: tuple[NDArray[np.float32], NDArray[np.float32]],
    *,
    top_cells: int,
    steps: int,
) -> NDArray[np.float32]:
    """A direction w for which :func:`image_loss` of evidence + z w is low and its own length small.

    Found by Adam on all images at once, from 0; a given number of steps, not the minimum.

    Args:
        normal: Features z [n, cells, D] of normal images, with a spread of about 1, on which the prior and the rate
            depend, and the evidence [n, cells] of their cells without w, in spreads of normal image scores.
        shots: The same of labelled defects. Their evidence must not come from their own labels, or there is nothing
            left to learn.
        top_cells: Cells whose mean is the score of an image.
        steps: Of Adam; with 0 the direction is 0.

    Returns:
        float32 [D].
    """
    (of_normal, normal_evidence), (of_shots, shot_evidence) = [
        (torch.from_numpy(cells), torch.from_numpy(evidence)) for cells, evidence in (normal, shots)
    ]
    direction = torch.zeros(of_normal.shape[-1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([direction, bias], lr=LEARNING_RATE)
    prior = PRIOR / min(len(of_normal), len(of_shots))
    for _ in range(steps):
        normal_scores = _top_mean(normal_evidence + of_normal @ direction, top_cells) + bias
        shot_scores = _top_mean(shot_evidence + of_shots @ direction, top_cells) + bias
        loss = image_loss(normal_scores, shot_scores) + prior * direction.square().sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return np.asarray(direction.detach().numpy())


def image_loss(normal_scores: Tensor, shot_scores: Tensor) -> Tensor:
    """Cross-entropy of image scores as log odds, both classes with the same weight."""
    return 0.5 * functional.softplus(normal_scores).mean() + 0.5 * functional.softplus(-shot_scores).mean()


def _top_mean(evidence: Tensor, top_cells: int) -> Tensor:
    return evidence.topk(top_cells, dim=1).values.mean(dim=1)
