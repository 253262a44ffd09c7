"""Who scores the units: processes of this machine, or a Ray cluster; both run the same scorer."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from meliad_edge.archive.scorer import ScoringTask, UnitDone, UnitScorer
from meliad_edge.child_process import end_with_parent
from meliad_edge.errors import MeliadError
from meliad_edge.ray_cluster import ray_cluster

_scorer: UnitScorer | None = None  # Of a worker process.


def default_workers() -> int:
    """One per core of this machine."""
    return len(os.sched_getaffinity(0))


def score_here(task: ScoringTask, units: Sequence[int], workers: int) -> Generator[UnitDone, None, None]:
    """Score units in processes of this machine, which end when it is closed or interrupted; each as it is done.

    Raises:
        MeliadError: A process died, or the model cannot be loaded.
    """
    with TemporaryDirectory() as folder:
        # Not an argument of the workers: Python would wait for ever on one that dies before it has read a model.
        handed_over = Path(folder, "task.pickle")
        handed_over.write_bytes(pickle.dumps(task))
        pool = ProcessPoolExecutor(
            min(workers, len(units)),
            multiprocessing.get_context("spawn"),
            initializer=_prepare,
            initargs=(handed_over,),
        )
        try:
            for future in as_completed([pool.submit(_score, unit) for unit in units]):
                yield future.result()
        except BrokenProcessPool as error:
            msg = (
                f"a worker died ({error}), perhaps for want of memory; what is done is kept, go on with fewer --workers"
            )
            raise MeliadError(msg) from error
        except (GeneratorExit, KeyboardInterrupt):
            for worker in multiprocessing.active_children():  # a unit may take long, and is there whole or not at all
                worker.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare(handed_over: Path) -> None:
    global _scorer
    end_with_parent()
    import cv2

    cv2.setNumThreads(1)
    _scorer = UnitScorer(pickle.loads(handed_over.read_bytes()))  # noqa: S301 - written by the process that asks


def _score(unit: int) -> UnitDone:
    assert _scorer is not None
    return _scorer.score(unit)


def score_on_ray(
    task: ScoringTask, units: Sequence[int], workers: int | None, address: str
) -> Generator[UnitDone, None, None]:
    """Score units on a Ray cluster, by Ray Data: what a lost node had in hand is done again elsewhere.

    Args:
        task: Archive and result must be reached from every node.
        units: Their numbers.
        workers: Most at a time; None takes every core of the cluster.
        address: As ``ray.init`` takes it; ``"local"`` starts a cluster of this machine.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: There is no cluster at that address.
    """
    with ray_cluster(address) as ray:
        import ray.data as ray_data

        context = ray_data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        most = workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // task.threads)
        stored = ray.put(task)
        rows = [{"unit": unit} for unit in units]
        scored = ray_data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _RayScorer,
            fn_constructor_args=([stored],),  # in a list, or Ray takes it for lost when an actor starts again
            batch_size=None,
            concurrency=(1, min(most, len(rows))),
            num_cpus=task.threads,
        )
        for row in scored.iter_rows():
            yield UnitDone(**row)


class _RayScorer:
    """The scorer as Ray Data calls it: a column of units in, columns of what came of them out."""

    def __init__(self, stored: list[Any]) -> None:
        import cv2
        import ray

        cv2.setNumThreads(1)
        self._scorer = UnitScorer(ray.get(stored[0]))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        done = [self._scorer.score(int(unit)) for unit in batch["unit"]]
        return {name: [getattr(one, name) for one in done] for name in UnitDone.__slots__}
