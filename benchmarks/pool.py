"""Many jobs in parallel processes, each result kept as soon as it is there: an interrupted benchmark goes on later."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import cv2
import threadpoolctl
import torch

from meliad_edge import strict_json
from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.benchmarks.job import Job
from meliad_edge.errors import MeliadError, UsageError
from meliad_edge.progress import hide_progress_bars, progress_bar
from meliad_edge.ray_cluster import ray_cluster

Result = dict[str, Any]
Call = tuple[Job, Path, Path | None]

NOT_RUN = "not_run"

_logger = logging.getLogger(__name__)


def run_jobs(
    jobs: Sequence[Job], work: Path, feature_cache: Path | None, workers: int | None = None, ray: str | None = None
) -> list[Result]:
    """Results of jobs, read from the work folder where it has them, else computed and kept there.

    Results do not depend on the number of processes, nor on which process computes which.

    Args:
        jobs: What to compute.
        work: Folder with one JSON file for each finished job.
        feature_cache: Folder that keeps backbone features from one job to the next; processes share it.
        workers: Jobs at a time; the cores are divided among them. None is half as many as there are cores.
        ray: Address of a Ray cluster that computes them, see :func:`~meliad_edge.ray_cluster.ray_cluster`; every node
            must reach this folder and what is named from it. None computes them in processes of this machine.

    Returns:
        One result per job, in their order: what :meth:`Job.execute` returns, or ``not_run``, why a detector could not
        be fitted, and ``environment``, where and when.

    Raises:
        MeliadError: A data set or a detector cannot be used at all, a process died, or the sources changed meanwhile.
    """
    files = [work / job.file_name() for job in jobs]
    results = [_read(file) for file in files]
    waiting = [index for index, result in enumerate(results) if result is None]
    work.mkdir(parents=True, exist_ok=True)
    with progress_bar() as bar:
        task = bar.add_task(
            f"{'fitting and measuring':<24}", total=len(jobs), completed=len(jobs) - len(waiting), note=""
        )
        calls = {index: (jobs[index], files[index], feature_cache) for index in waiting}
        for index, result in _compute_here(calls, workers) if ray is None else _compute_on_ray(calls, workers, ray):
            results[index] = result
            note = _note(jobs[index], result)
            bar.update(task, advance=1, note=note)
            if not bar.console.is_terminal:  # a log has no bar, and this may take the night
                bar.console.print(note)
    return [result for result in results if result is not None]


def _compute_here(calls: dict[int, Call], workers: int | None) -> Iterator[tuple[int, Result]]:
    """Each result as it is there, with its key."""
    if not calls:
        return
    cores = len(os.sched_getaffinity(0))
    processes = min(workers or _default_workers(cores), len(calls))
    threads = max(1, min(cores // processes, torch.get_num_threads()))
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_prepare_process, initargs=(threads,)
    )
    try:
        futures = {pool.submit(run_and_keep, *call): index for index, call in calls.items()}
        for future in as_completed(futures):
            yield futures[future], _result(future)
    finally:
        pool.shutdown(cancel_futures=True)


def _compute_on_ray(calls: dict[int, Call], workers: int | None, address: str) -> Iterator[tuple[int, Result]]:
    """The same on a cluster; what a lost node had in hand is computed again elsewhere."""
    if not calls:
        return
    with ray_cluster(address) as ray:
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        cores = max(1, sum(nodes))
        threads = max(1, cores // min(workers or _default_workers(cores), len(calls)))
        threads = min([threads, *(count for count in nodes if count)])  # a task must fit on a node
        remote = ray.remote(num_cpus=threads, max_retries=-1)(_run_elsewhere)
        waiting = {remote.remote(Path.cwd(), threads, *call): index for index, call in calls.items()}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            try:
                result: Result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, MeliadError) else error) from None
            yield waiting.pop(done), result


def _run_elsewhere(folder: Path, threads: int, job: Job, file: Path, feature_cache: Path | None) -> Result:
    os.chdir(folder)  # paths count from there
    _prepare_process(threads)
    return run_and_keep(job, file, feature_cache)


def _prepare_process(threads: int) -> None:
    """Share the cores, and leave the terminal to the parent."""
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    threadpoolctl.threadpool_limits(threads)
    hide_progress_bars()


def run_and_keep(job: Job, file: Path, feature_cache: Path | None) -> Result:
    """Run one job and keep its result, in a file that is whole or absent.

    Returns:
        The result, or ``not_run``; this is kept only where it will be the same next time.

    Raises:
        MeliadError: The file has not the name that the job has now.
    """
    # This process imported the sources after the parent had read them.
    if job.file_name() != file.name:
        msg = "the sources or the data changed while the benchmark ran; start it again, finished results are kept"
        raise MeliadError(msg)
    try:
        result = job.execute(feature_cache)
    except UsageError as error:  # such as a detector that needs labels: it will be so next time
        result = {NOT_RUN: str(error)}
    except MeliadError as error:
        return {NOT_RUN: str(error)}
    except Exception as error:  # a defect of one detector does not lose the rows of the others
        _logger.exception("%s cannot be run", file.stem)
        return {NOT_RUN: f"{type(error).__name__}: {error}"}
    result["environment"] = describe_environment()
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text(strict_json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    return result


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        msg = f"a process of the benchmark died ({error}); finished results are kept, go on with fewer --workers"
        raise MeliadError(msg) from error


def _default_workers(cores: int) -> int:
    """Half of the cores: the libraries below use several threads, and a machine is rarely ours alone."""
    return max(1, cores // 2)


def _read(file: Path) -> Result | None:
    try:
        result: Result = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return result


def _note(job: Job, result: Result | None) -> str:
    figure = None if result is None else result.get("image_auroc")
    shown = "not run" if figure is None else f"{figure:.3f}"
    return f"{job.set_name} {job.shots}-shot {job.detector} seed {job.seed}: {shown}"
