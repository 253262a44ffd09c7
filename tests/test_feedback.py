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

from meliad_edge.data.images import read_image
from meliad_edge.event_store import EventStore, StoredEvent, Verdict
from meliad_edge.events import SINGLE_IMAGE_WINDOW, EventTracker
from meliad_edge.judged_events import pixel_digest
from meliad_edge.runtime.load import load_predictor
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
    """Monocrystalline cells of ELPV whose label is certain, sound ones first."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("elpv-dataset is not installed")
    root = Path(spec.submodule_search_locations[0]).absolute() / "data"
    rows = [line.split() for line in (root / "labels.csv").read_text(encoding="ascii").splitlines()]
    return [
        Cell(root / path, wanted == "1.0")
        for wanted in ("0.0", "1.0")
        for path, probability, kind in rows
        if (probability, kind) == (wanted, "mono")
    ]


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
        rows.writerows((c.path, "good", "train") for c in sound[:60])
        rows.writerows((c.path, "good", "test") for c in sound[60:80])
        rows.writerows((c.path, "broken", "train") for c in defective[:6])
        rows.writerows((c.path, "broken", "test") for c in defective[6:26])
    run, bundle = folder / "run", folder / "cells.meliad"
    for command in (
        ("fit", folder / "cells.csv", "--shots", 6, "--image-size", 128, "--false-alarm-rate", 0.1, "--out", run),
        ("export", run, "--out", bundle),
    ):
        outcome = invoke(*command)
        assert outcome.code == 0, outcome.err
    pool = [*sound[80:140], *defective[26:62]]
    watch(bundle, pool, folder / "events")
    is_defective = {cell.path.name: cell.is_defective for cell in pool}
    return Line(folder, run, bundle, folder / "events", is_defective, (*sound[140:200], *defective[62:122]))


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


def judge(events: Path, is_right: Callable[[StoredEvent], Verdict | None]) -> None:
    with closing(EventStore(events)) as store:
        for event in store.events(limit=1000):
            store.judge(event.id, is_right(event))


def file_digests(paths: Iterable[Path]) -> set[str]:
    return {pixel_digest(read_image(path)) for path in paths}


@dataclass(frozen=True)
class Given:
    """What the verb was given and left behind."""

    line: Line
    events: Path
    run: Path
    result: dict[str, Any]
    said: str


@pytest.fixture(scope="module")
def first(line: Line, invoke: Invoke) -> Given:
    """The first feedback: every second event was judged as it is."""
    events = line.folder / "judged"
    shutil.copytree(line.events, events)

    def truth(event: StoredEvent) -> Verdict | None:
        if int(event.id[-6:], 16) % 2:
            return None
        return Verdict.CONFIRMED if line.is_defective[event.record["source"]] else Verdict.REJECTED

    judge(events, truth)
    report = line.folder / "report.html"
    outcome = invoke("feedback", line.run, events, "--bundle", line.bundle, "--report", report, "--json")
    assert outcome.code == 0, outcome.err
    return Given(line, events, Path(outcome.json["run"]), outcome.json, outcome.err)


def test_show(first: Given) -> None:
    print(first.said)
    print(json.dumps(first.result, indent=1))
    assert 0
