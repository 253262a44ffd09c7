"""On real solar cells: the line begins to print numbers on them, which raises false alarms until it is learned."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from meliad_edge.data.dataset import Sample
from meliad_edge.data.images import read_image
from meliad_edge.data.preprocess import to_model_input
from meliad_edge.event_store import EventStore, StoredEvent, Verdict
from meliad_edge.events import SINGLE_IMAGE_WINDOW, EventTracker
from meliad_edge.explain import encode_picture
from meliad_edge.judged_events import pixel_digest
from meliad_edge.run import load_run
from meliad_edge.runtime.load import load_predictor
from meliad_edge.runtime.torch_engine import TorchEngine
from meliad_edge.sinks.folder import FolderSink
from meliad_edge.stream.frames import Frame

pytestmark = pytest.mark.workshop

Invoke = Callable[..., Any]

_DAY = "20261126T120000.000Z"


@dataclass(frozen=True)
class Cell:
    path: Path
    is_defective: bool


def read_cells() -> list[Cell]:
    """Monocrystalline cells of ELPV whose label is certain, shuffled, for neighbours come from one module."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("elpv-dataset is not installed")
    root = Path(spec.submodule_search_locations[0]).absolute() / "data"
    rows = [line.split() for line in (root / "labels.csv").read_text(encoding="ascii").splitlines()]
    cells = [
        Cell(root / path, probability == "1.0")
        for path, probability, kind in rows
        if kind == "mono" and probability in ("0.0", "1.0")
    ]
    return [cells[index] for index in np.random.default_rng(0).permutation(len(cells))]


def print_number(cell: Cell) -> NDArray[np.uint8]:
    """The cell with its number on a white label, uint8 [300, 300, 3]."""
    image = read_image(cell.path)
    image[228:272, 40:200] = 235
    cv2.putText(image, cell.path.stem[-4:], (52, 264), cv2.FONT_HERSHEY_SIMPLEX, 1.4, (20, 20, 20), 4)
    return image


@dataclass(frozen=True)
class Line:
    """A run, and the folder of a watch that nobody has judged.

    Attributes:
        folder: Where everything is.
        run: The run folder.
        bundle: What watched.
        events: Folder of the watch.
        is_defective: By file name of the watched pictures.
        unseen: Cells with numbers that neither run nor watch has seen.
    """

    folder: Path
    run: Path
    bundle: Path
    events: Path
    is_defective: Mapping[str, bool]
    unseen: tuple[Cell, ...]


@pytest.fixture(scope="module")
def line(invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Line:
    folder = tmp_path_factory.mktemp("line")
    cells = read_cells()
    sound, defective = ([cell for cell in cells if cell.is_defective is wanted] for wanted in (False, True))
    with (folder / "cells.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label", "split"))
        rows.writerows((c.path, "good", "train") for c in sound[:100])
        rows.writerows((c.path, "good", "test") for c in sound[100:140])
        rows.writerows((c.path, "broken", "train") for c in defective[:10])
        rows.writerows((c.path, "broken", "test") for c in defective[10:50])
    run, bundle = folder / "run", folder / "cells.meliad"
    for command in (
        ("fit", folder / "cells.csv", "--shots", 10, "--image-size", 128, "--false-alarm-rate", 0.1, "--out", run),
        ("export", run, "--out", bundle),
    ):
        outcome = invoke(*command)
        assert outcome.code == 0, outcome.err
    pool = [*sound[140:260], *defective[50:122]]
    watch(bundle, pool, folder / "events")
    is_defective = {cell.path.name: cell.is_defective for cell in pool}
    return Line(folder, run, bundle, folder / "events", is_defective, (*sound[260:320], *defective[122:182]))


def watch(bundle: Path, cells: Sequence[Cell], events: Path) -> None:
    """What ``watch`` does with a folder of pictures, in this thread and with ids that are always the same."""
    predictor = load_predictor(bundle, threads=1)
    sink = FolderSink(EventStore(events), predictor.bundle.calibration.colour_range)
    for index, cell in enumerate(cells):
        image = print_number(cell)
        tracker = EventTracker("pool", SINGLE_IMAGE_WINDOW, new_id=lambda moment, i=index: f"{_DAY}-{i:06x}")
        changes = [tracker.update(Frame(cell.path.name, index, float(index), image, 0.0), predictor.predict(image))]
        for event in (*changes, tracker.finish()):
            if event is not None:
                sink.publish(event)
    sink.close()


def copy_events(line: Line, name: str) -> Path:
    """Events of the watch that a test may judge as it likes."""
    events = line.folder / name
    shutil.copytree(line.events, events)
    return events


def judge(events: Path, verdict_of: Callable[[StoredEvent], Verdict | None]) -> None:
    with closing(EventStore(events)) as store:
        for event in store.events(limit=1000):
            store.judge(event.id, verdict_of(event))


def truth(line: Line, every: int, only: Verdict | None = None) -> Callable[[StoredEvent], Verdict | None]:
    """What people say who look at every n-th event, and are right."""

    def verdict_of(event: StoredEvent) -> Verdict | None:
        verdict = Verdict.CONFIRMED if line.is_defective[event.record["source"]] else Verdict.REJECTED
        is_seen = int(event.id[-6:], 16) % every == 0 and only in (None, verdict)
        return verdict if is_seen else None

    return verdict_of


def read_manifest(run: Path) -> dict[str, dict[str, Any]]:
    """Entries by event."""
    entries = json.loads((run / "feedback.json").read_text(encoding="utf-8"))["pictures"]
    return {entry["event"]: entry for entry in entries}


def digests(samples: Iterable[Sample]) -> set[str]:
    return {pixel_digest(read_image(sample.path)) for sample in samples}


def alarms(run: Path, cells: Sequence[Cell]) -> list[bool]:
    fitted = load_run(run)
    frames = np.stack([to_model_input(print_number(cell), fitted.network.input_hw) for cell in cells])
    return [bool(alarm) for alarm in TorchEngine(fitted.network).infer(frames).score >= fitted.calibration.threshold]


@dataclass(frozen=True)
class Round:
    """What the verb was given and left behind."""

    events: Path
    run: Path
    result: dict[str, Any]
    said: str


@pytest.fixture(scope="module")
def first(line: Line, invoke: Invoke) -> Round:
    """Every second event was judged."""
    events = copy_events(line, "judged")
    judge(events, truth(line, 2))
    report = line.folder / "report.html"
    outcome = invoke("feedback", line.run, events, "--bundle", line.bundle, "--report", report, "--json")
    assert outcome.code == 0, outcome.err
    return Round(events, Path(outcome.json["run"]), outcome.json, outcome.err)


def test_the_new_run_decides_better_on_parts_that_nobody_judged(line: Line, first: Round) -> None:
    sound, defective = ([c for c in line.unseen if c.is_defective is wanted] for wanted in (False, True))
    false_alarms = [sum(alarms(run, sound)) for run in (line.run, first.run)]
    found = [sum(alarms(run, defective)) for run in (line.run, first.run)]
    assert false_alarms[0] > 0.9 * len(sound)
    assert false_alarms[1] < 0.3 * len(sound)
    assert found[1] > 0.7 * len(defective)


def test_it_is_offered_with_the_command_that_comes_next(line: Line, first: Round) -> None:
    assert first.run == line.folder / "run-2"
    assert first.result["verdict"] == "offered"
    assert first.result["next"] == (
        f"meliad-edge export {first.run} --out {first.run / 'cells.meliad'} --model-version 1"
    )
    rejected, confirmed, test_normal, test_defective, *_ = first.result["sets"]
    assert rejected["before"]["count"] == rejected["before"]["total"] > rejected["after"]["count"]
    assert confirmed["before"]["total"] == first.result["events"]["confirmed"]["held out"]
    assert (test_normal["after"]["total"], test_defective["after"]["total"]) == (40, 40)
    said = first.said
    assert said.index("rule  ") < said.index("saved  ") < said.index("caution  ") < said.index("verdict    offered")
    assert json.loads((first.run / "comparison.json").read_text(encoding="utf-8")) == first.result


def test_every_event_has_one_role_and_its_picture_is_copied(line: Line, first: Round) -> None:
    entries = read_manifest(first.run)
    with closing(EventStore(first.events)) as store:
        judged = {event.id: event for event in store.events(limit=1000) if event.verdict is not None}
    assert entries.keys() == judged.keys()
    assert {file.stem for file in (first.run / "feedback").iterdir()} == judged.keys()
    for event, entry in entries.items():
        assert entry["verdict"] == judged[event].verdict.value
        assert entry["sha256"] == pixel_digest(read_image(judged[event].folder / "frame.png"))
        assert entry["sha256"] == pixel_digest(read_image(first.run / "feedback" / f"{event}.png"))
    counts = first.result["events"]
    confirmed, rejected = sum(counts["confirmed"].values()), sum(counts["rejected"].values())
    assert counts["confirmed"] == {"learn": confirmed - confirmed // 3, "calibrate": 0, "held out": confirmed // 3}
    assert rejected >= 20
    assert counts["rejected"]["held out"] == pytest.approx(rejected / 3, abs=1)
    assert counts["rejected"]["calibrate"] == pytest.approx(rejected / 6, abs=1)


def test_nothing_that_is_compared_on_was_learned_or_calibrated_with(line: Line, first: Round) -> None:
    before, after = load_run(line.run).split, load_run(first.run).split
    assert after.test == before.test
    by_role: dict[tuple[str, str], set[str]] = {}
    for entry in read_manifest(first.run).values():
        by_role.setdefault((entry["verdict"], entry["role"]), set()).add(entry["sha256"])
    parts = [
        (before.train_normal, after.train_normal, by_role["rejected", "learn"]),
        (before.shots, after.shots, by_role["confirmed", "learn"]),
        (before.calibration, after.calibration, by_role["rejected", "calibrate"]),
    ]
    unseen = digests(after.test) | by_role["rejected", "held out"] | by_role["confirmed", "held out"]
    seen = [digests(now) for _, now, _ in parts]
    assert sum(map(len, seen)) == len(set().union(*seen))  # disjoint, too
    assert not unseen & set().union(*seen)
    for was, now, added in parts:
        assert now[: len(was)] == was
        assert digests(now[len(was) :]) == added
    assert {sample.defect for sample in after.shots} == {"broken", "confirmed"}


def test_settings_seed_and_input_size_stay(line: Line, first: Round) -> None:
    before, after = load_run(line.run), load_run(first.run)
    assert after.network.input_hw == before.network.input_hw
    assert after.config.model_copy(update={"out": before.config.out}) == before.config
    assert after.calibration.target_false_alarm_rate == 0.1


def test_the_page_shows_what_changed_sides(line: Line, first: Round) -> None:
    page = (line.folder / "report.html").read_text(encoding="utf-8")
    assert '<p class="subtitle">offered</p>' in page
    assert "Rule, fixed before looking: offered if (1)" in page
    ended = first.result["sets"][0]["mended"]
    assert ended > 0
    assert page.count("false alarm ends") >= ended
    assert "data:image/jpeg;base64," in page


def test_the_same_again_is_the_same(line: Line, first: Round, invoke: Invoke) -> None:
    outcome = invoke("feedback", line.run, first.events, "--bundle", line.bundle, "--json")
    assert outcome.code == 0, outcome.err
    again = Path(outcome.json["run"])
    assert again == line.folder / "run-3"
    assert read_manifest(again) == read_manifest(first.run)
    names = ("network.safetensors", "calibration.json", "exemplars.json")
    assert [(again / name).read_bytes() for name in names] == [(first.run / name).read_bytes() for name in names]
    changing = {"run", "next"}
    assert {k: v for k, v in outcome.json.items() if k not in changing} == {
        k: v for k, v in first.result.items() if k not in changing
    }


def test_a_second_round_adds_and_keeps_every_role(line: Line, first: Round, invoke: Invoke) -> None:
    events = line.folder / "later"
    shutil.copytree(first.events, events)
    judge(events, truth(line, 1))
    earlier = read_manifest(first.run)
    learned = [event for event, entry in earlier.items() if entry["role"] == "learn"]
    taken_back, pruned = learned[:2]
    changed = next(e for e, entry in earlier.items() if (entry["verdict"], entry["role"]) == ("rejected", "held out"))
    with closing(EventStore(events)) as store:
        store.judge(taken_back, None)
        store.judge(changed, Verdict.CONFIRMED)
    shutil.rmtree(events / pruned)
    outcome = invoke("feedback", first.run, events, "--out", line.folder / "second", "--json")
    assert outcome.code == 0, outcome.err
    entries = read_manifest(line.folder / "second")
    assert len(entries) == len(line.is_defective) - 1
    assert taken_back not in entries
    assert entries[changed] == {**earlier[changed], "verdict": "confirmed"}
    for event in earlier.keys() - {taken_back, changed}:
        assert entries[event] == earlier[event]
    split, known = load_run(line.folder / "second").split, load_run(line.run).split
    assert split.test == known.test
    for verdict, role, was, now in (
        ("rejected", "learn", known.train_normal, split.train_normal),
        ("confirmed", "learn", known.shots, split.shots),
        ("rejected", "calibrate", known.calibration, split.calibration),
    ):
        expected = [e for e, entry in entries.items() if (entry["verdict"], entry["role"]) == (verdict, role)]
        assert [sample.path.stem for sample in now[len(was) :]] == expected
        assert all(sample.path.is_relative_to(line.folder / "second") for sample in now[len(was) :])


@pytest.mark.parametrize("verdict", list(Verdict))
def test_one_kind_of_verdict_is_enough(verdict: Verdict, line: Line, invoke: Invoke, tmp_path: Path) -> None:
    events = copy_events(line, f"only {verdict.value}")
    judge(events, truth(line, 6, verdict))
    outcome = invoke("feedback", line.run, events, "--out", tmp_path / "run", "--json")
    assert outcome.code == 0, outcome.err
    (other,) = set(Verdict) - {verdict}
    assert set(outcome.json["events"][other.value].values()) == {0}
    assert any(f"no {other.value} event is held out" in caution for caution in outcome.json["cautions"])


def test_pictures_of_the_data_set_are_not_learned_from(line: Line, invoke: Invoke, tmp_path: Path) -> None:
    split = load_run(line.run).split
    events = copy_events(line, "watched the data set")
    judge(events, truth(line, 6))
    with closing(EventStore(events)) as store:
        stored = [event for event in store.events(limit=1000) if event.verdict is not None]
    chosen = {"a training image": split.train_normal[0], "a test image": split.test[0]}
    for event, sample in zip(stored, chosen.values(), strict=False):
        (event.folder / "frame.png").write_bytes(encode_picture(read_image(sample.path), ".png"))
    (stored[2].folder / "frame.png").write_bytes(b"not a picture")
    outcome = invoke("feedback", line.run, events, "--out", tmp_path / "run", "--json")
    assert outcome.code == 0, outcome.err
    left_out = outcome.json["left_out"]
    assert left_out.keys() == {event.id for event in stored[:3]}
    assert left_out[stored[0].id] == "it is an image of the training set"
    assert left_out[stored[1].id] == "it is an image of the test set, which must stay unseen"
    assert "frame.png" in left_out[stored[2].id]
    assert all(f"{event.id}: " in outcome.err for event in stored[:3])
    assert not left_out.keys() & read_manifest(tmp_path / "run").keys()


def test_what_cannot_be_done_is_said_and_leaves_nothing(
    line: Line, first: Round, invoke: Invoke, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(line.run, moved)
    split = json.loads((moved / "split.json").read_text())
    (moved / "split.json").write_text(json.dumps(split | {"root": "/gone"}))
    target = tmp_path / "target"
    target.mkdir()
    before = sorted(path.name for path in line.folder.iterdir())
    for arguments, code, part in (
        ((line.run, line.events), 3, "none of its events was confirmed or rejected"),
        ((line.run, tmp_path), 3, "no events (no events.sqlite)"),
        (
            (first.run, first.events),
            3,
            "no judged event that is new to the run can be learned from (the run has them all)",
        ),
        ((moved, first.events), 3, "the images it was fitted on are gone, first /gone/"),
        ((line.run, first.events, "--out", target), 2, "exists; name a folder that does not"),
        ((first.run, first.events, "--bundle", line.bundle), 2, "was not exported from"),
    ):
        outcome = invoke("feedback", *arguments)
        assert (outcome.code, part in outcome.error_line) == (code, True), outcome.err
    assert sorted(path.name for path in line.folder.iterdir()) == before
    assert list(target.iterdir()) == []


def test_a_fit_that_fails_leaves_no_folder(
    line: Line, first: Round, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("meliad_edge.feedback.save_run", stop)
    assert invoke("feedback", line.run, first.events, "--out", tmp_path / "run").code == 130
    assert not (tmp_path / "run").exists()


def test_a_damaged_manifest_is_named(line: Line, first: Round, invoke: Invoke, tmp_path: Path) -> None:
    shutil.copytree(first.run, tmp_path / "run")
    (tmp_path / "run" / "feedback.json").write_text("{}")
    outcome = invoke("feedback", tmp_path / "run", first.events)
    assert outcome.code == 4
    assert "feedback.json: damaged" in outcome.error_line
