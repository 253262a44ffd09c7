from __future__ import annotations

import pytest

from meliad_edge.model_comparison import ComparedSet, RankingChange, apply_rule
from meliad_edge.rates import Rate


def normals(before: int, after: int, total: int) -> ComparedSet:
    """False alarms; those that change do so in one direction."""
    return ComparedSet(
        "normals", False, Rate(before, total), Rate(after, total), max(before - after, 0), max(after - before, 0)
    )


def defects(before: int, after: int, total: int) -> ComparedSet:
    """Defects found; those that change do so in one direction."""
    return ComparedSet(
        "defects", True, Rate(before, total), Rate(after, total), max(after - before, 0), max(before - after, 0)
    )


SAME = normals(3, 3, 100), defects(80, 80, 100)
GAIN, CHANCE = (normals(9, 1, 106), defects(84, 87, 107)), (normals(9, 8, 106), defects(84, 87, 107))
BETTER = RankingChange(0.90, 0.93, 0.03, (0.01, 0.05))
ALIKE = RankingChange(0.92, 0.92, 0.00, (-0.01, 0.01))
WORSE = RankingChange(0.93, 0.90, -0.03, (-0.05, -0.01))


def test_false_alarms_that_end_without_a_loss_are_a_gain() -> None:
    assert apply_rule(normals(6, 1, 6), defects(7, 7, 7), *SAME, GAIN, ALIKE) == ()


def test_what_moving_the_threshold_does_as_well_is_no_gain() -> None:
    assert apply_rule(normals(6, 1, 6), defects(7, 7, 7), *SAME, CHANCE, ALIKE) == (
        "no clear gain (8 of 106 false alarms, the running model 9 with its threshold moved; "
        "87 of 107 defects found, the running model 84 with its threshold moved)",
    )
    assert apply_rule(normals(6, 1, 6), defects(7, 7, 7), *SAME, CHANCE, BETTER) == ()


def test_without_normal_or_without_defective_images_nothing_is_a_gain() -> None:
    none = normals(0, 0, 0)
    assert apply_rule(none, defects(7, 7, 7), none, SAME[1], (), None) == (
        "no clear gain (the images are all of one kind)",
    )


def test_a_lost_defect_weighs_two_false_alarms() -> None:
    assert apply_rule(normals(6, 0, 6), defects(6, 3, 6), *SAME, GAIN, ALIKE) == ()
    assert apply_rule(normals(6, 1, 6), defects(6, 3, 6), *SAME, GAIN, ALIKE) == (
        "of the held-out events 3 of 6 defects are lost, and only 5 of 6 false alarms end",
    )


def test_events_of_one_kind_alone_can_be_enough() -> None:
    assert apply_rule(normals(0, 0, 0), defects(7, 7, 7), *SAME, GAIN, ALIKE) == ()
    assert apply_rule(normals(7, 0, 7), defects(0, 0, 0), *SAME, GAIN, ALIKE) == ()
    assert len(apply_rule(normals(0, 0, 0), defects(7, 6, 7), *SAME, GAIN, ALIKE)) == 1


@pytest.mark.parametrize(
    ("test_normal", "test_anomalous", "ranking", "reason"),
    [
        (normals(3, 9, 100), SAME[1], ALIKE, "9 instead of 3 false alarms on 100 test images"),
        (SAME[0], defects(80, 70, 100), ALIKE, "70 instead of 80 defects found in 100 test images"),
        (*SAME, WORSE, "the test images are ranked worse, AUROC 0.900 instead of 0.930"),
    ],
)
def test_what_the_test_images_lose_clearly_speaks_against_it(
    test_normal: ComparedSet, test_anomalous: ComparedSet, ranking: RankingChange, reason: str
) -> None:
    assert apply_rule(normals(9, 0, 9), defects(9, 9, 9), test_normal, test_anomalous, GAIN, ranking) == (reason,)


def test_a_change_of_the_test_images_within_chance_does_not() -> None:
    changed = normals(3, 5, 100), defects(80, 77, 100)
    assert apply_rule(normals(9, 0, 9), defects(9, 9, 9), *changed, GAIN, ALIKE) == ()
