from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meliad_edge.config import FitConfig, load_fit_config
from meliad_edge.errors import UsageError
from meliad_edge.precision import DEFAULT_LIMITS, ParityLimits


def test_without_a_file_only_the_data_is_needed() -> None:
    config = load_fit_config(None, {"data": "elpv", "shots": None})
    assert config == FitConfig(data="elpv")
    assert (config.detector, config.shots, config.seed, config.backbone) == ("meliad", 10, 0, "tf_efficientnet_lite0")
    assert (config.image_size, config.budget) == (None, 2.0)


def test_the_command_line_wins_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "line.toml"
    file.write_text('data = "parts"\nshots = 3\nseed = 7\nweights = "w.pth"\n')
    config = load_fit_config(file, {"shots": 5, "seed": None, "data": None})
    assert (config.data, config.shots, config.seed, config.weights) == ("parts", 5, 7, Path("w.pth"))


def test_zero_on_the_command_line_is_given(tmp_path: Path) -> None:
    file = tmp_path / "line.toml"
    file.write_text('data = "parts"\nshots = 3\n')
    assert load_fit_config(file, {"shots": 0}).shots == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("shots = ", "cannot be read"),
        ("\x00", "cannot be read"),
        ("shots = 3", "data is not given"),
        ('data = "x"\nshot = 3', "unknown key 'shot'; the keys are data, out, detector, options, shots"),
        ('data = "x"\n[train]\nlr = 1', "unknown key 'train'"),
        ('data = "x"\nshots = -1', "shots = -1 is not allowed"),
        ('data = "x"\nshots = "ten"', "shots = 'ten' is not allowed"),
        ('data = "x"\nshots = 2.5', "shots = 2.5 is not allowed"),
        ('data = "x"\nimage_size = 250', "image_size = 250 is not allowed"),
        ('data = "x"\nimage_size = 32', "image_size = 32 is not allowed"),
        ('data = "x"\nbudget = 0.5', "budget = 0.5 is not allowed"),
        ('data = "x"\nbudget = nan', "budget = nan is not allowed"),
        ('data = "x"\nfalse_alarm_rate = 0.0', "false_alarm_rate = 0.0 is not allowed"),
        ('data = "x"\nfalse_alarm_rate = nan', "false_alarm_rate = nan is not allowed"),
        ("data = 3", "data = 3 is not allowed"),
    ],
)
def test_refuses_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "line.toml"
    file.write_text(text)
    _refuses(file, {}, says)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    _refuses(tmp_path / name, {"data": "x"}, "cannot be read")


def test_not_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "line.toml"
    file.write_bytes(b'data = "\xff"')
    _refuses(file, {}, "cannot be read")


def _refuses(file: Path, overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_fit_config(file, overrides)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits_of_a_precision_come_from_the_project_file(tmp_path: Path) -> None:
    file = tmp_path / "project.toml"
    file.write_text('data = "parts"\n[limits.int8]\nscore = 0.25\nmap = 1.5\n')
    config = load_fit_config(file, {})
    assert config.limits_of("int8") == ParityLimits(score=0.25, map=1.5)
    assert config.limits_of("fp16") == DEFAULT_LIMITS["fp16"]


@pytest.mark.parametrize("limits", ["int4 = {score = 1, map = 1}", "int8 = {score = 0, map = 1}", "int8 = {score = 1}"])
def test_limits_that_make_no_sense(limits: str, tmp_path: Path) -> None:
    file = tmp_path / "project.toml"
    file.write_text(f'data = "parts"\n[limits]\n{limits}\n')
    with pytest.raises(UsageError, match="limits"):
        load_fit_config(file, {})
