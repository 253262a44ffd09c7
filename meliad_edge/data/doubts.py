"""What should be looked at before a data set is trusted; none of it keeps a detector from being fitted [ours]."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from meliad_edge.data.dataset import FewShotSplit, Sample
from meliad_edge.data.images import highest_deep_sample
from meliad_edge.errors import ImageError

_END_BYTES = 1 << 16
# Samples of 12 bits are at most 1/16 of what 16 bits hold.
_DEEP_IMAGES, _DARK = 20, 2**13


def doubts_about(split: FewShotSplit) -> Iterator[str]:
    """One sentence for each reason to doubt a split: what was seen, what it does, what to do.

    Of most files only the two ends are read.
    """
    yield from _missing_class(split.test)
    yield from _copies(split)
    yield from _dark_samples(split.train_normal)


def _missing_class(test: Sequence[Sample]) -> Iterator[str]:
    anomalies = sum(sample.is_anomaly for sample in test)
    if not anomalies:
        yield "no defect is left for the test, so how good the model is stays unknown; add some, or take fewer --shots"
    elif anomalies == len(test):
        yield "no normal image is left for the test, so false alarms cannot be counted; add some to test/good"


def _copies(split: FewShotSplit) -> Iterator[str]:
    """Copies of one picture in two sets: the second is then no picture that the model has not seen."""
    sets = {"training": split.train_normal, "calibration": split.calibration, "test": split.test}
    of_path = {sample.path: name for name, samples in sets.items() for sample in samples}
    count, first = 0, ""
    for one, *others in _same(_same([list(of_path)], _ends), _content):
        other = next((path for path in others if of_path[path] != of_path[one]), None)
        if other is not None:
            count += 1
            first = first or f"{one} for {of_path[one]} and {other} for {of_path[other]}"
    if count:
        pictures = "1 picture is" if count == 1 else f"{count:,} pictures are"
        yield (
            f"{pictures} in two sets, as copies in different files, first {first}; thresholds and figures then look "
            "better than they are; remove the copies, or name sets in a CSV file"
        )


def _same(groups: list[list[Path]], key: Callable[[Path], object]) -> list[list[Path]]:
    """Groups of two or more, divided by a key; a file that cannot be read is reported when it is to be used."""
    divided = []
    for group in groups:
        by_key = defaultdict(list)
        for path in group:
            try:
                by_key[key(path)].append(path)
            except OSError:
                continue
        divided += [paths for paths in by_key.values() if len(paths) > 1]
    return divided


def _ends(path: Path) -> object:
    """Size, and what is at both ends, which tells nearly all files apart."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_END_BYTES)
        file.seek(max(0, size - _END_BYTES))
        return size, hashlib.blake2b(start + file.read(_END_BYTES)).digest()


def _content(path: Path) -> object:
    return hashlib.blake2b(path.read_bytes()).digest()


def _dark_samples(samples: Sequence[Sample]) -> Iterator[str]:
    """Files of 16 bits of which only the lower ones are used: what reaches the model has a few levels of grey."""
    found = []
    for sample in samples[:_DEEP_IMAGES]:
        try:
            found.append(highest_deep_sample(sample.path))
        except ImageError:
            continue
    highest = [value for value in found if value is not None]
    if highest and max(highest) < _DARK:
        yield (
            f"16-bit files with nothing above {max(highest):,} of 65,535: their upper bits are empty, and the model "
            f"sees {max(highest) // 257 + 1} levels of grey; let the camera fill them, or save 8 bits"
        )
