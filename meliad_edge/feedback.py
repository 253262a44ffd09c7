"""Judged events of a watch as more images of a run: dealt out, copied, and the detector fitted again with them.

A confirmed event becomes a labelled defect, a rejected one a normal image. Each event has one role for good: learned
from, calibrated with (rejected ones), or held out for the comparison. The test images of the run stay what they are.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meliad_edge.data.dataset import GOOD, FewShotSplit, Sample
from meliad_edge.data.images import read_image, read_image_size
from meliad_edge.errors import DataError, ImageError, ModelError, UsageError
from meliad_edge.event_store import EventStore, Verdict
from meliad_edge.explain import encode_picture
from meliad_edge.judged_events import JudgedPicture, open_events, pixel_digest, read_judged
from meliad_edge.progress import track
from meliad_edge.run import Run, save_run
from meliad_edge.train import Report, fit_split, open_features

MANIFEST = "feedback.json"
PICTURES = "feedback"
# Not the class that the event resembles: that is a guess of the model, and a guess must not come back as a label.
CONFIRMED = "confirmed"


class Role(Enum):
    """What the picture of an event is for."""

    LEARN = "learn"
    CALIBRATE = "calibrate"
    HELD_OUT = "held out"


# Dealt out in turn, so that a handful of events is divided as many are. The first is always learned from.
_DEAL: Mapping[Verdict, tuple[Role, ...]] = {
    Verdict.CONFIRMED: (Role.LEARN, Role.HELD_OUT, Role.LEARN),
    Verdict.REJECTED: (Role.LEARN, Role.HELD_OUT, Role.LEARN, Role.CALIBRATE, Role.HELD_OUT, Role.LEARN),
}


class FeedbackPicture(BaseModel):
    """One judged event in a run folder; its picture is ``feedback/EVENT.png``.

    Attributes:
        event: Id of the event.
        verdict: What a person said of it.
        role: What it is for.
        camera: Name of what was watched.
        score, threshold: What the watch decided by.
        resembles: Defect class that its strongest region was nearest to.
        sha256: Of its size and pixels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    event: str = Field(pattern=r"^\d{8}T\d{6}\.\d{3}Z-[0-9a-f]{6}$")
    verdict: Verdict
    role: Role
    camera: str
    score: float | None
    threshold: float | None
    resembles: str | None
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @property
    def file_name(self) -> str:
        """Name of its picture."""
        return f"{self.event}.png"

    def sample(self, run_folder: Path) -> Sample:
        """The picture as an image of the data set."""
        defect = CONFIRMED if self.verdict is Verdict.CONFIRMED else GOOD
        return Sample(run_folder.absolute() / PICTURES / self.file_name, defect, "train")


class FeedbackManifest(BaseModel):
    """What a run folder says of the events in it.

    Attributes:
        run: The run folder that was fitted before.
        events: Folder of the watch that was added last.
        pictures: The events in use, those of earlier feedback included.
        left_out: Reason by event of the watch that was added last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    feedback_version: Literal[1] = 1
    run: str
    events: str
    pictures: tuple[FeedbackPicture, ...]
    left_out: dict[str, str]


@dataclass(frozen=True, slots=True)
class Feedback:
    """What a run is to be fitted with again.

    Attributes:
        manifest: The events, each with its role.
        read: Gives the picture of an event, uint8 RGB [H, W, 3].
        added: Events that the run did not have, or not with this verdict.
        withdrawn: Events of the run whose verdict was taken back.
        earlier: Events that earlier feedback gave the run.
    """

    manifest: FeedbackManifest
    read: Mapping[str, Callable[[], NDArray[np.uint8]]]
    added: frozenset[str]
    withdrawn: frozenset[str]
    earlier: frozenset[str]

    def of(self, verdict: Verdict, role: Role) -> tuple[FeedbackPicture, ...]:
        """The pictures of a verdict that have a role."""
        return tuple(p for p in self.manifest.pictures if p.verdict is verdict and p.role is role)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Number of pictures by verdict and role."""
        return {verdict.value: {role.value: len(self.of(verdict, role)) for role in Role} for verdict in Verdict}


def read_manifest(run_folder: Path) -> FeedbackManifest | None:
    """What feedback a run was fitted with; None without any.

    Raises:
        ModelError: The file is damaged.
    """
    file = run_folder / MANIFEST
    try:
        return FeedbackManifest.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        msg = f"{file}: damaged, so what the run learned from is not known; name the run before it"
        raise ModelError(msg) from error


def gather_feedback(run: Run, run_folder: Path, events_folder: Path) -> Feedback:
    """Give every judged event its role.

    The events are put into the order of a hash of their ids and dealt out: of three confirmed ones two are learned from
    and one is held out, of six rejected ones three are learned from, one is calibrated with and two are held out. An
    event that the run has keeps its role; if it was pruned since, its copy in the run folder goes on.

    Args:
        run: The run to add to.
        run_folder: Its folder.
        events_folder: The folder of a watch.

    Raises:
        DataError: There is nothing new to learn from, or the images of the run are gone.
        UsageError: The events are of another version.
        ModelError: The manifest of the run is damaged.
    """
    _require_images(run, run_folder)
    manifest = read_manifest(run_folder)
    earlier = {} if manifest is None else {picture.event: picture for picture in manifest.pictures}
    with closing(open_events(events_folder)) as store:
        judged = read_judged(store, run.network.grid_hw, preferred=earlier)
        kept = {event: entry for event in earlier if (entry := _judged_again(store, earlier[event])) is not None}
    withdrawn = earlier.keys() - kept.keys()
    left_out = dict(judged.left_out)
    read: dict[str, Callable[[], NDArray[np.uint8]]] = {picture.event: picture.read for picture in judged.pictures}
    for event in list(kept):
        file = run_folder / PICTURES / kept[event].file_name
        if file.is_file():
            read[event] = partial(read_image, file)
        elif event not in read:
            left_out[event] = f"{file} is gone"
            del kept[event]
    known = _find_in_data_set(run, judged.pictures)
    known |= {picture.sha256: f"it is the picture of {event}, which the run has" for event, picture in kept.items()}
    new: list[JudgedPicture] = []
    for picture in judged.pictures:
        if picture.event in earlier:
            continue
        if (reason := known.get(picture.sha256)) is not None:
            left_out[picture.event] = reason
        else:
            new.append(picture)
    dealt = [entry for verdict in Verdict for entry in _deal(verdict, new, kept.values())]
    added = {entry.event for entry in dealt} | {event for event in kept if kept[event] != earlier[event]}
    pictures = tuple(sorted((*kept.values(), *dealt), key=lambda picture: picture.event))
    left_out = {event: reason for event, reason in left_out.items() if event not in kept}
    feedback = Feedback(
        FeedbackManifest(run=str(run_folder), events=str(events_folder), pictures=pictures, left_out=left_out),
        read,
        frozenset(added),
        frozenset(withdrawn),
        frozenset(earlier),
    )
    if not withdrawn and all(p.role is Role.HELD_OUT for p in pictures if p.event in added):
        raise DataError(_nothing_new(feedback, events_folder))
    if not run.split.test and not any(p.role is Role.HELD_OUT for p in pictures):
        msg = f"{events_folder}: no event is held out, and the run has no test images to compare on; judge more"
        raise DataError(msg)
    return feedback


def refit(run: Run, feedback: Feedback, out: Path, *, false_alarm_rate: float, report: Report) -> tuple[Run, Feedback]:
    """Fit the detector of a run again, with the same settings, seed and input size and the images of the feedback.

    Args:
        run: The run to add to.
        feedback: The judged events.
        out: Run folder to write; the pictures of the events are copied into it.
        false_alarm_rate: Accepted rate on normal images.
        report: Receives a topic and a sentence for each fact worth telling.

    Returns:
        The new run, and the feedback without the pictures that could not be read any more.

    Raises:
        DataError: None of the images of a set can be read.
        ModelError: No weights for the backbone.
        UsageError: The folder exists.
    """
    try:
        out.mkdir(parents=True, exist_ok=False)
    except FileExistsError as error:
        msg = f"--out {out}: exists; name a folder that does not"
        raise UsageError(msg) from error
    try:
        copied = _copy_pictures(feedback, out, report)
        split = extend_split(run.split, copied, out)
        config = run.config.model_copy(update={"out": out, "false_alarm_rate": false_alarm_rate})
        learned = [p.sample(out) for p in copied.of(Verdict.REJECTED, Role.LEARN)]
        fitted = fit_split(
            config,
            split,
            run.network.input_hw,
            open_features(config),
            dataset=run.dataset,
            licence=run.licence,
            report=report,
            always=learned,
        )
        fitted = replace(
            fitted,
            facts={
                **fitted.facts,
                "feedback_defects": len(copied.of(Verdict.CONFIRMED, Role.LEARN)),
                "feedback_normals": len(learned),
            },
        )
        (out / MANIFEST).write_text(copied.manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        save_run(fitted, out)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # Ours alone: it did not exist.
        raise
    return fitted, copied


def extend_split(split: FewShotSplit, feedback: Feedback, run_folder: Path) -> FewShotSplit:
    """The split with the pictures of the feedback at the end of what is learned from and calibrated with.

    Args:
        split: That of the run before; what earlier feedback added to it is replaced.
        feedback: The judged events.
        run_folder: Where their pictures are.
    """

    def extended(samples: Sequence[Sample], verdict: Verdict, role: Role) -> tuple[Sample, ...]:
        # By name: the run may have been moved since it was fitted.
        own = (sample for sample in samples if sample.path.stem not in feedback.earlier)
        return (*own, *(picture.sample(run_folder) for picture in feedback.of(verdict, role)))

    return FewShotSplit(
        train_normal=extended(split.train_normal, Verdict.REJECTED, Role.LEARN),
        shots=extended(split.shots, Verdict.CONFIRMED, Role.LEARN),
        calibration=extended(split.calibration, Verdict.REJECTED, Role.CALIBRATE),
        test=split.test,
    )


def next_run_folder(run_folder: Path) -> Path:
    """The first free folder beside a run: ``line3-2`` after ``line3``, and ``line3-3`` after that if it is feedback."""
    if run_folder.name in ("", ".."):  # The current folder has a name all the same.
        run_folder = run_folder.resolve()
    stem, number = run_folder.name, 2
    numbered = re.fullmatch(r"(.+)-(\d+)", stem)
    if numbered is not None and (run_folder / MANIFEST).exists():
        stem, number = numbered[1], int(numbered[2]) + 1
    while (folder := run_folder.with_name(f"{stem}-{number}")).exists():
        number += 1
    return folder


def _copy_pictures(feedback: Feedback, out: Path, report: Report) -> Feedback:
    """Write the pictures; those that cannot be read any more are reported and left out."""
    (out / PICTURES).mkdir()
    pictures, left_out = [], dict(feedback.manifest.left_out)
    for picture in track(feedback.manifest.pictures, "copying events"):
        try:
            image = feedback.read[picture.event]()
        except ImageError as error:
            left_out[picture.event] = str(error)
            report("skipped", str(error))
            continue
        (out / PICTURES / picture.file_name).write_bytes(encode_picture(image, ".png"))
        pictures.append(picture)
    update = {"pictures": tuple(pictures), "left_out": left_out}
    return replace(feedback, manifest=feedback.manifest.model_copy(update=update))


def _require_images(run: Run, run_folder: Path) -> None:
    for name in FewShotSplit.__dataclass_fields__:
        samples: tuple[Sample, ...] = getattr(run.split, name)
        if samples and not any(sample.path.is_file() for sample in samples):
            msg = (
                f"{run_folder}: the images it was fitted on are gone, first {samples[0].path}; put them back, or fit "
                "again where they are now"
            )
            raise DataError(msg)


def _find_in_data_set(run: Run, pictures: Iterable[JudgedPicture]) -> dict[str, str]:
    """Digests of pictures that the data set of the run has, with the reason not to take them.

    A watched folder may be that of the test set. Only images of the size of an event's picture are decoded.
    """
    sizes = {picture.size_hw for picture in pictures}
    places = {
        "train_normal": "the training set",
        "shots": "the shots",
        "calibration": "the calibration set",
        "test": "the test set, which must stay unseen",
    }
    samples = [(sample, place) for name, place in places.items() for sample in getattr(run.split, name)]
    found: dict[str, str] = {}
    for sample, place in track(samples, "comparing with images"):
        try:
            if read_image_size(sample.path) in sizes:
                found[pixel_digest(read_image(sample.path))] = f"it is an image of {place}"
        except ImageError:
            continue  # Reported where it is read to be learned from.
    return found


def _judged_again(store: EventStore, picture: FeedbackPicture) -> FeedbackPicture | None:
    """A picture of the run as people judge it now; None where they took their verdict back."""
    event = store.event(picture.event)
    if event is None:
        return picture
    return None if event.verdict is None else _with_verdict(picture, event.verdict)


def _with_verdict(picture: FeedbackPicture, verdict: Verdict) -> FeedbackPicture:
    """The same picture after a person has changed their mind; what was held out stays so."""
    role = Role.LEARN if verdict is Verdict.CONFIRMED and picture.role is Role.CALIBRATE else picture.role
    return picture.model_copy(update={"verdict": verdict, "role": role})


def _deal(
    verdict: Verdict, pictures: Iterable[JudgedPicture], earlier: Iterable[FeedbackPicture]
) -> list[FeedbackPicture]:
    """Give roles to new events of a verdict, going on where earlier feedback stopped."""
    deal = _DEAL[verdict]
    start = sum(picture.verdict is verdict for picture in earlier)
    shuffled = sorted(
        (picture for picture in pictures if picture.verdict is verdict),
        key=lambda picture: hashlib.sha256(picture.event.encode()).digest(),
    )
    return [
        FeedbackPicture(
            event=picture.event,
            verdict=verdict,
            role=deal[(start + index) % len(deal)],
            camera=picture.camera,
            score=picture.score,
            threshold=picture.threshold,
            resembles=picture.resembles,
            sha256=picture.sha256,
        )
        for index, picture in enumerate(shuffled)
    ]


def _nothing_new(feedback: Feedback, events_folder: Path) -> str:
    held_out, left_out = len(feedback.added), feedback.manifest.left_out
    facts = [f"{held_out} would only be held out"] if held_out else []
    if left_out:
        event, reason = next(iter(left_out.items()))
        facts.append(f"{len(left_out)} cannot be used, the first, {event}, because {reason}")
    said = "; ".join(facts) or "the run has them all"
    return f"{events_folder}: no judged event that is new to the run can be learned from ({said}); judge more"
