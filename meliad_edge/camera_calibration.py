"""Scores of good parts as a camera of this device shows them: a threshold made of photographs may not fit its video."""

from __future__ import annotations

import numpy as np

from meliad_edge.errors import MeliadError, UsageError
from meliad_edge.progress import progress_bar
from meliad_edge.runtime.predictor import Predictor
from meliad_edge.stream.watcher import Camera, Decision, Watcher

FEWEST_FRAMES = 30


def collect_scores(predictor: Predictor, camera: Camera, frames: int) -> list[float]:
    """Score what a camera, video or folder shows until there is enough of it.

    Of a video or folder with more frames, some at even distances are taken; a camera gives them at the rate that its
    reader allows.

    Args:
        predictor: Decides on frames; its threshold plays no part.
        camera: The source and its view, not started.
        frames: Most scores returned.

    Raises:
        MeliadError: The source cannot be read.
        UsageError: It has fewer than 30 frames, or a score is not a number.
    """
    scores: list[float] = []
    failures: list[MeliadError] = []
    is_live = camera.reader.source.is_live
    with progress_bar() as bar:
        task = bar.add_task(f"{'good parts':<24}", total=frames if is_live else None, note="")

        def take(decision: Decision) -> None:
            scores.append(decision.prediction.score)
            bar.update(task, advance=1, total=frames if is_live else camera.reader.total)

        Watcher(
            predictor,
            [camera],
            on_event=lambda event: None,
            on_notice=lambda name, notice: None,
            on_failure=lambda name, error: failures.append(error),
            on_decision=take,
        ).run(max_frames=frames if is_live else None)
    if failures:
        raise failures[0]
    if len(scores) > frames:
        scores = [scores[index] for index in np.linspace(0, len(scores) - 1, frames).round().astype(int)]
    if len(scores) < FEWEST_FRAMES:
        msg = f"{camera.name}: {len(scores)} frames; a threshold needs at least {FEWEST_FRAMES} of good parts"
        raise UsageError(msg)
    return scores
