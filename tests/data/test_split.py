from __future__ import annotations

import importlib.util
import json
from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meliad_edge.data.dataset import Dataset, FewShotSplit, Sample, Subset
from meliad_edge.data.readers import open_dataset
from meliad_edge.data.split import few_shot_split, split_from_json, split_to_json
from meliad_edge.errors import DataError, ModelError, UsageError

needs_elpv = pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="elpv-dataset not installed")


def samples(subset: Subset, root: str = "/data", **counts: int) -> tuple[Sample, ...]:
    """That many samples per class; the files need not exist."""
    return tuple(
        Sample(Path(root, subset, defect, f"{i:03}.png"), defect, subset)
        for defect, count in counts.items()
        for i in range(count)
    )


PLAIN = Dataset("plain", samples("any", good=40, crack=15, hole=15))
MVTEC = Dataset("mvtec", (*samples("train", good=20), *samples("test", good=8, crack=12, hole=9)))
LABELLED = Dataset("labelled", (*MVTEC.samples, *samples("train", crack=6, hole=4)))


def parts(split: FewShotSplit) -> tuple[tuple[Sample, ...], ...]:
    return (split.train_normal, split.shots, split.calibration, split.test)


def counts(of: tuple[Sample, ...]) -> dict[str, int]:
    return dict(Counter(sample.defect for sample in of))


# ---- the ELPV protocol


@needs_elpv
@pytest.mark.parametrize("shots", [0, 1, 10])
def test_elpv_protocol_counts(shots: int) -> None:
    split = few_shot_split(open_dataset("elpv"), shots=shots, seed=0)
    assert len(split.train_normal) + len(split.calibration) == 1131
    assert len(split.calibration) == 283
    assert len(split.shots) == shots
    assert Counter(sample.is_anomaly for sample in split.test) == {False: 377, True: 705}


@needs_elpv
def test_elpv_more_than_ten_shots_and_the_hard_setting() -> None:
    elpv = open_dataset("elpv")
    assert sum(sample.is_anomaly for sample in few_shot_split(elpv, shots=25, seed=0).test) == 690
    hard = few_shot_split(elpv, shots=10, seed=0, shot_class="mono")
    assert counts(hard.shots) == {"mono": 10}
    assert set(counts(hard.test)) == {"good", "poly"}


@needs_elpv
def test_elpv_draw_is_the_same_on_every_machine() -> None:
    split = few_shot_split(open_dataset("elpv"), shots=3, seed=0)
    assert [sample.path.name for sample in split.shots] == ["cell2509.png", "cell0412.png", "cell0124.png"]


# ---- properties of every split


@settings(max_examples=150, deadline=None)
@given(
    subset_sizes=st.fixed_dictionaries(
        {name: st.integers(0, 25) for name in ("train_crack", "train_hole", "test_good", "crack", "hole")}
    ),
    normal_count=st.integers(2, 40),
    is_plain=st.booleans(),
    shots=st.integers(0, 12),
    seed=st.integers(0, 2**32),
    fraction=st.floats(0.01, 0.99),
    shot_class=st.sampled_from([None, "crack", "hole"]),
    order=st.randoms(use_true_random=False),
)
def test_no_image_is_in_two_sets(
    subset_sizes: dict[str, int],
    normal_count: int,
    is_plain: bool,
    shots: int,
    seed: int,
    fraction: float,
    shot_class: str | None,
    order: Any,
) -> None:
    sizes = subset_sizes
    if is_plain:
        everything = samples("any", good=normal_count, crack=sizes["crack"], hole=sizes["hole"])
    else:
        everything = (
            *samples("train", good=normal_count, crack=sizes["train_crack"], hole=sizes["train_hole"]),
            *samples("test", good=sizes["test_good"], crack=sizes["crack"], hole=sizes["hole"]),
        )
    dataset = Dataset("set", everything)
    arguments: dict[str, Any] = {"seed": seed, "calibration_fraction": fraction, "shot_class": shot_class}
    try:
        split = few_shot_split(dataset, shots=shots, **arguments)
    except DataError:
        pool = [sample for sample in everything if sample.is_anomaly and sample.subset == "train"]
        pool = pool or [sample for sample in everything if sample.is_anomaly]
        pool = [sample for sample in pool if shot_class in (None, sample.defect)]
        assert shots > len(pool) or (shot_class and not pool)
        return

    used = [sample for part in parts(split) for sample in part]
    assert len({sample.path for sample in used}) == len(used)
    assert set(used) <= set(everything)
    assert len(split.shots) == shots
    assert all(sample.is_anomaly for sample in split.shots)
    assert not any(sample.is_anomaly for sample in (*split.train_normal, *split.calibration))
    assert split.train_normal
    assert split.calibration
    # Normal images are never wasted, and a set's own split is never crossed except by the shots.
    assert sum(not sample.is_anomaly for sample in used) == sum(not sample.is_anomaly for sample in everything)
    assert all(sample.subset != "test" for sample in (*split.train_normal, *split.calibration))
    assert all(sample.subset != "train" for sample in split.test)
    if shot_class:
        assert shot_class not in {sample.defect for sample in split.test}

    shuffled = list(everything)
    order.shuffle(shuffled)
    assert few_shot_split(Dataset("set", tuple(shuffled)), shots=shots, **arguments) == split


@pytest.mark.parametrize("dataset", [PLAIN, MVTEC, LABELLED], ids=lambda dataset: dataset.name)
def test_fewer_shots_are_the_first_of_more_and_leave_the_normals_alone(dataset: Dataset) -> None:
    few, many = (few_shot_split(dataset, shots=shots, seed=5) for shots in (2, 9))
    assert few.shots == many.shots[:2]
    assert (few.train_normal, few.calibration) == (many.train_normal, many.calibration)


def test_the_seed_decides() -> None:
    assert few_shot_split(PLAIN, shots=5, seed=1) == few_shot_split(PLAIN, shots=5, seed=1)
    first, second = (few_shot_split(PLAIN, shots=5, seed=seed) for seed in (1, 2))
    assert first.shots != second.shots
    assert first.train_normal != second.train_normal


def test_the_place_of_the_data_does_not_matter() -> None:
    elsewhere = Dataset("plain", samples("any", root="/another/place", good=40, crack=15, hole=15))
    here, there = (few_shot_split(dataset, shots=5, seed=3) for dataset in (PLAIN, elsewhere))

    def relative(split: FewShotSplit, root: str) -> list[list[PurePosixPath]]:
        return [[sample.path.relative_to(root) for sample in part] for part in parts(split)]

    assert relative(here, "/data") == relative(there, "/another/place")


# ---- the rules, one by one


def test_without_own_split_ten_anomalies_are_always_kept_back() -> None:
    one, ten = (few_shot_split(PLAIN, shots=shots, seed=0) for shots in (1, 10))
    assert one.test == ten.test
    assert sum(sample.is_anomaly for sample in one.test) == 20
    assert sum(not sample.is_anomaly for sample in one.test) == 10
    assert sum(sample.is_anomaly for sample in few_shot_split(PLAIN, shots=13, seed=0).test) == 17


def test_with_own_split_exactly_the_shots_leave_the_test() -> None:
    split = few_shot_split(MVTEC, shots=4, seed=0)
    in_test = {sample for sample in MVTEC.samples if sample.subset == "test"}
    assert set(split.test) == in_test - set(split.shots)
    assert set(split.shots) < in_test


def test_training_anomalies_come_first_and_unused_ones_go_nowhere() -> None:
    split = few_shot_split(LABELLED, shots=4, seed=0)
    assert {sample.subset for sample in split.shots} == {"train"}
    assert set(split.test) == {sample for sample in LABELLED.samples if sample.subset == "test"}


def test_hard_setting() -> None:
    for dataset in (PLAIN, MVTEC, LABELLED):
        split = few_shot_split(dataset, shots=3, seed=0, shot_class="hole")
        assert counts(split.shots) == {"hole": 3}
        assert set(counts(split.test)) == {"good", "crack"}
        everything = [s for s in dataset.samples if s.defect == "crack" and s.subset != "train"]
        assert counts(split.test)["crack"] == len(everything)


def test_zero_shots() -> None:
    assert few_shot_split(MVTEC, shots=0, seed=0).shots == ()
    normals_only = Dataset("normals", samples("any", good=8))
    split = few_shot_split(normals_only, shots=0, seed=0)
    assert [len(part) for part in parts(split)] == [4, 0, 2, 2]


def test_smallest_set() -> None:
    split = few_shot_split(Dataset("tiny", samples("train", good=2)), shots=0, seed=0)
    assert [len(part) for part in parts(split)] == [1, 0, 1, 0]


@pytest.mark.parametrize(("fraction", "expected"), [(0.001, 1), (0.25, 5), (0.5, 10), (0.999, 19)])
def test_calibration_fraction(fraction: float, expected: int) -> None:
    split = few_shot_split(MVTEC, shots=0, seed=0, calibration_fraction=fraction)
    assert (len(split.calibration), len(split.train_normal)) == (expected, 20 - expected)


# ---- what is refused


def test_too_few_anomalies(refuses: Any) -> None:
    with refuses(
        DataError, "22 shots were asked for, but mvtec has 21 anomalies to draw them from; use --shots 10, which keeps"
    ):
        few_shot_split(MVTEC, shots=22, seed=0)
    with refuses(DataError, "11 shots were asked for, but labelled has 10 anomalies"):
        few_shot_split(LABELLED, shots=11, seed=0)
    with refuses(DataError, "10 shots were asked for, but mvtec has 9 anomalies of class hole"):
        few_shot_split(MVTEC, shots=10, seed=0, shot_class="hole")


@pytest.mark.parametrize("shot_class", ["good", "Hole", ""])
def test_unknown_class(refuses: Any, shot_class: str) -> None:
    with refuses(DataError, f"mvtec has no defect class {shot_class!r} to draw shots from; it has crack, hole"):
        few_shot_split(MVTEC, shots=1, seed=0, shot_class=shot_class)


@pytest.mark.parametrize("normal_count", [0, 1])
def test_too_few_normals(refuses: Any, normal_count: int) -> None:
    dataset = Dataset("poor", samples("train", good=normal_count, crack=5))
    with refuses(DataError, f"poor has {normal_count} normal training images"):
        few_shot_split(dataset, shots=1, seed=0)


def test_bad_arguments(refuses: Any) -> None:
    with refuses(UsageError, "the number of shots is -1"):
        few_shot_split(MVTEC, shots=-1, seed=0)
    for fraction in (0.0, 1.0, -0.5, float("nan")):
        with refuses(UsageError, "the calibration fraction is"):
            few_shot_split(MVTEC, shots=1, seed=0, calibration_fraction=fraction)


def test_half_a_split(refuses: Any) -> None:
    with refuses(DataError, "3 of the 52 images of half are in neither train nor test"):
        few_shot_split(Dataset("half", (*MVTEC.samples, *samples("any", good=3))), shots=1, seed=0)


def test_one_file_under_two_names_is_a_leak(make_files: Any, refuses: Any) -> None:
    root = make_files("train/good/0.png", "train/good/1.png", "test/good/2.png", "test/crack/0.png")
    (root / "test" / "good" / "copy.png").symlink_to(root / "train" / "good" / "0.png")
    with refuses(DataError, "train/good/0.png are the same file"):
        few_shot_split(open_dataset(str(root)), shots=0, seed=0)
    twice = Dataset("twice", (*MVTEC.samples, replace(MVTEC.samples[0], subset="test")))
    with refuses(DataError, "are the same file"):
        few_shot_split(twice, shots=0, seed=0)


def test_equal_files_are_two_images(make_files: Any) -> None:
    root = make_files("train/good/0.png", "train/good/1.png", "test/good/2.png", "test/crack/0.png")
    assert len(few_shot_split(open_dataset(str(root)), shots=0, seed=0).test) == 2


# ---- stored splits


def test_split_survives_json(make_files: Any) -> None:
    root = make_files(
        "train/good/0.png", "train/good/1.png", "test/good/2.png", "test/crack/0.png", "ground_truth/crack/0_mask.png"
    )
    split = few_shot_split(open_dataset(str(root)), shots=1, seed=0)
    stored = json.loads(json.dumps(split_to_json(split)))
    assert split_from_json(stored) == split
    assert stored["root"] == str(root)
    assert stored["shots"] == [
        {"path": "test/crack/0.png", "defect": "crack", "subset": "test", "mask": "ground_truth/crack/0_mask.png"}
    ]


def test_split_with_files_all_over_survives_json() -> None:
    split = FewShotSplit(
        train_normal=(Sample(Path("/a/x.png"), "good", "any"),),
        shots=(Sample(Path("/b/c/y.png"), "hole", "any", Path("/m/y.png")),),
        calibration=(Sample(Path("/a/../d/z.png"), "good", "any"),),
        test=(),
    )
    assert astuple(split_from_json(json.loads(json.dumps(split_to_json(split))))) == astuple(split)


def test_moved_data_and_absolute_paths() -> None:
    stored = split_to_json(few_shot_split(MVTEC, shots=1, seed=0))
    stored["root"] = "/moved"
    stored["calibration"][0]["path"] = "/elsewhere/0.png"
    split = split_from_json(stored)
    assert split.train_normal[0].path.is_relative_to("/moved/train/good")
    assert split.calibration[0].path == Path("/elsewhere/0.png")


def damaged(**changes: Any) -> dict[str, Any]:
    return {**split_to_json(few_shot_split(MVTEC, shots=1, seed=0)), **changes}


@pytest.mark.parametrize(
    ("document", "place"),
    [
        (None, "the document"),
        ([], "the document"),
        ({}, "root"),
        (damaged(extra=1), "extra"),
        (damaged(root=3), "root"),
        (damaged(shots=None), "shots"),
        (damaged(test=[{"path": "x"}]), "test.0.defect"),
        (damaged(test=[{"path": "", "defect": "good", "subset": "any"}]), "test.0.path"),
        (damaged(test=[{"path": "x", "defect": "good", "subset": "val"}]), "test.0.subset"),
    ],
)
def test_damaged_split(document: object, place: str, refuses: Any) -> None:
    with refuses(ModelError, f"the stored split is damaged: {place}: "):
        split_from_json(document)
