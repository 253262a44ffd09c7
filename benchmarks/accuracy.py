"""Accuracy under the frozen few-shot protocol: sets, settings, detectors and seeds, beside published figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meliad_edge.benchmarks.datasets import folder_of, locate_set
from meliad_edge.benchmarks.environment import describe_environment
from meliad_edge.benchmarks.job import Job, Variant
from meliad_edge.benchmarks.pool import NOT_RUN, run_jobs
from meliad_edge.benchmarks.published import PUBLISHED
from meliad_edge.benchmarks.summary import INTERVALS, summarise
from meliad_edge.data.readers import open_dataset
from meliad_edge.errors import UsageError

HARD_SHOTS = 10
SEEDS = 5
# One shot is a matter of luck, so it is drawn more often.
SEEDS_OF_ONE_SHOT = 10
PROTOCOL = (
    "three quarters of the normals train, a quarter of these held out for the threshold; the test is the other quarter "
    "and all anomalies but ten, which are kept back for the shots; a set with a split of its own keeps it; hard: all "
    "shots from one class, which the test then lacks, mean over the classes; metrics on raw scores"
)


@dataclass(frozen=True, slots=True)
class Setting:
    """How many labelled anomalies, and from which classes.

    Attributes:
        shots: Labelled anomalies.
        is_hard: All from one class, which the test then lacks; each class in turn.
    """

    shots: int
    is_hard: bool = False

    @property
    def name(self) -> str:
        """As in the table: ``10-shot``, ``hard``, or ``hard, 3-shot`` where it is not ten."""
        if not self.is_hard:
            return f"{self.shots}-shot"
        return "hard" if self.shots == HARD_SHOTS else f"hard, {self.shots}-shot"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run and with what.

    Attributes:
        variants: Rows in every setting.
        sets: Names of sets, or data sets as ``fit`` takes them.
        settings: The settings.
        data_folder: Where the folders of the sets are.
        set_cache: Folder for the CSV files of the sets.
        feature_cache: Folder for backbone features; None keeps none.
        work: Folder with the finished results.
        seeds: Number of seeds, 0 upwards; None means 5, and 10 for one shot.
        image_size: Height and width of the model's input in pixels; None lets ``fit`` choose them.
        interpretability: Whether to measure how well the maps explain, too.
        workers: Jobs at a time; None means half of the cores.
        ray: Address of a Ray cluster that computes them; None computes them here.
        peers: Rows without labels only: detectors that cannot use any.
    """

    variants: tuple[Variant, ...]
    sets: tuple[str, ...]
    settings: tuple[Setting, ...]
    data_folder: Path
    set_cache: Path
    feature_cache: Path | None
    work: Path
    seeds: int | None = None
    image_size: int | None = None
    interpretability: bool = False
    workers: int | None = None
    ray: str | None = None
    peers: tuple[Variant, ...] = ()


def parse_settings(text: str) -> tuple[Setting, ...]:
    """Settings from text such as ``10,1,0,hard``; ``hard3`` is the hard setting with three shots.

    Raises:
        UsageError: An entry is neither a number nor ``hard``.
    """
    settings = []
    for word in _words(text):
        is_hard = word.startswith("hard")
        number = word.removeprefix("hard")
        if not (number.isdecimal() or (is_hard and not number)):
            msg = f"setting {word!r} is unknown; give numbers of shots or hard, for example 10,1,0,hard"
            raise UsageError(msg)
        settings.append(Setting(int(number or HARD_SHOTS), is_hard))
    return tuple(settings)


def parse_variants(text: str) -> tuple[Variant, ...]:
    """Detectors with their default options, from text such as ``meliad,devnet``."""
    return tuple(Variant(name, name) for name in _words(text))


def parse_sets(text: str) -> tuple[str, ...]:
    """Data sets from text such as ``elpv,cookies``."""
    return tuple(_words(text))


def run(plan: Plan, benchmark: str = "accuracy") -> dict[str, Any]:
    """Run or read every result of a plan and summarise each row.

    Raises:
        MeliadError: As :func:`~meliad_edge.benchmarks.pool.run_jobs`.
    """
    rows, left_out = _plan_rows(plan)
    jobs = [job for row in rows for job in row.jobs]
    results = iter(run_jobs(jobs, plan.work, plan.feature_cache, plan.workers, plan.ray))
    shown_sets = {row.set_name for row in rows}
    return {
        "benchmark": benchmark,
        "protocol": PROTOCOL,
        "intervals": INTERVALS,
        "image_size": plan.image_size,
        "rows": [row.summarise([next(results) for _ in row.jobs]) for row in rows],
        "published": [asdict(figure) for figure in PUBLISHED if figure.data in shown_sets],
        "left_out": left_out,
        "environment": describe_environment(),
    }


@dataclass(frozen=True, slots=True)
class _Row:
    set_name: str
    setting: Setting
    variant: Variant
    jobs: tuple[Job, ...]

    def summarise(self, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The row as JSON values; ``not_run`` says why it has no figures."""
        row = {
            "set": self.set_name,
            "setting": self.setting.name,
            "shots": self.setting.shots,
            "label": self.variant.label,
            "detector": self.variant.detector,
            "options": self.variant.options,
        }
        reasons = [result[NOT_RUN] for result in results if NOT_RUN in result]
        if reasons:
            return {**row, NOT_RUN: reasons[0]}
        runs = [
            {"seed": job.seed, "shot_class": job.shot_class, **result}
            for job, result in zip(self.jobs, results, strict=True)
        ]
        summary = {
            **row,
            "seeds": len({job.seed for job in self.jobs}),
            **summarise(_grouped(runs, "seed")),
            "runs": runs,
        }
        if self.setting.is_hard:
            by_class = _grouped(runs, "shot_class")
            summary["classes"] = {
                of_class[0]["shot_class"]: summarise([[result] for result in of_class]) for of_class in by_class
            }
        return summary


def _plan_rows(plan: Plan) -> tuple[list[_Row], list[str]]:
    """The rows, and one line for everything that is left out."""
    rows, left_out = [], []
    for name in plan.sets:
        data = locate_set(name, plan.data_folder, plan.set_cache)
        if data is None:
            left_out.append(f"{name}: no folder {plan.data_folder / folder_of(name)}; name another with --data-folder")
            continue
        set_name = name if data != name else open_dataset(data).name
        for setting in plan.settings:
            classes: Sequence[str | None] = [None]
            if setting.is_hard:
                classes, note = _hard_classes(data, setting.shots)
                left_out += [f"{set_name}, {setting.name}: {note}"] if note else []
            if classes:
                rows += [
                    _Row(set_name, setting, variant, _jobs(plan, variant, set_name, data, setting.shots, classes))
                    for variant in plan.variants
                ]
        rows += [
            _Row(set_name, Setting(0), variant, _jobs(plan, variant, set_name, data, 0, [None]))
            for variant in plan.peers
        ]
    return rows, left_out


def _jobs(
    plan: Plan, variant: Variant, set_name: str, data: str, shots: int, classes: Sequence[str | None]
) -> tuple[Job, ...]:
    seeds = plan.seeds or (SEEDS_OF_ONE_SHOT if shots == 1 else SEEDS)
    return tuple(
        Job(
            set_name,
            data,
            variant.detector,
            shots,
            seed,
            shot_class,
            plan.image_size,
            variant.options,
            plan.interpretability,
        )
        for seed in range(seeds)
        for shot_class in classes
    )


def _hard_classes(data: str, shots: int) -> tuple[list[str], str]:
    """Classes with enough images for the shots, and what to say about those without."""
    counts = Counter(sample.defect for sample in open_dataset(data).samples if sample.is_anomaly)
    enough = sorted(name for name, count in counts.items() if count >= shots)
    too_small = sorted(counts.keys() - set(enough))
    if len(counts) < 2:
        return [], "left out, the set has one class of defects"
    note = f"classes with fewer than {shots} images left out: {', '.join(too_small)}" if too_small else ""
    return enough, note


def _grouped(runs: Iterable[dict[str, Any]], key: str) -> list[list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for result in runs:
        groups.setdefault(result[key], []).append(result)
    return list(groups.values())


def _words(text: str) -> list[str]:
    """Comma-separated words, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
