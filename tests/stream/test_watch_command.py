from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

WriteVideo = Callable[..., Path]
GOOD, BAD = 20, 200

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def watch(bundle: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the verb; returns exit code, standard output and standard error."""
    from meliad_edge.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["watch", str(bundle), *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def test_one_line_per_event_and_a_summary(watch: Run, write_video: WriteVideo) -> None:
    levels = [GOOD] * 8 + [BAD] * 6 + [GOOD] * 8
    code, out, err = watch(write_video("belt.avi", levels * 2))
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.fullmatch(
            r"\d\d:\d\d:\d\d  ANOMALY  belt\.avi  score \d+\.\d\d \(threshold 100\.\d\d\)  "
            r"region 0,0 64x48  like 'crack' \(exp3\.jpg\)",
            line,
        )
    assert "frames     44 read, 44 scored, 0 dropped" in err
    assert "events     2\n" in err
    assert "engine     onnxruntime-cpu" in err
    for stage in ("frame to decision", "preprocess", "infer", "post", "capture to decision"):
        assert re.search(rf"{stage} +p50 +[\d.]+  p90 +[\d.]+  p95 +[\d.]+  p99 +[\d.]+ ms", err)


def test_json_is_one_object_per_event_and_the_summary_last(watch: Run, write_video: WriteVideo, tmp_path: Path) -> None:
    levels = [GOOD] * 8 + [BAD] * 6 + [GOOD] * 8
    code, out, _ = watch(write_video("belt.avi", levels), "--json", "--out", tmp_path / "out")
    assert code == 0
    event, summary = (json.loads(line) for line in out.splitlines())
    assert (event["type"], event["source"], event["first_frame"]) == ("event", "belt.avi", 8)
    assert summary["type"] == "summary"
    assert summary["frames"] == {
        "read": 22, "scored": 22, "dropped": 0, "stale": 0, "late": 0, "misfit": 0, "missed": 0, "bad": 0, "skipped": 0
    }  # fmt: skip
    assert summary["events"] == 1
    assert set(summary["latency"]["frame_to_decision"]) >= {"p50_ms", "p90_ms", "p95_ms", "p99_ms", "cov", "count"}
    states = [json.loads(line)["state"] for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert states[0] == "new" and states[-1] == "end"
    assert summary["sinks"][0]["published"] == len(states)
    assert len(list((tmp_path / "out").glob("*/picture.jpg"))) == 1


def test_a_folder_with_a_bad_picture_is_a_partial_failure(watch: Run, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for index, level in enumerate((BAD, GOOD, BAD)):
        cv2.imwrite(str(folder / f"{index}.png"), np.full((32, 32, 3), level, np.uint8))
    (folder / "3.png").write_bytes(b"")
    code, out, err = watch(folder)
    assert code == 9
    assert [line.split("  ")[2] for line in out.splitlines()] == ["0.png", "2.png"]
    assert "3.png: 0 bytes" in err
    assert err.splitlines()[-1].startswith("meliad-edge: 1 image or frame not decoded; ")


def test_some_sources_fail_and_the_others_go_on(watch: Run, write_video: WriteVideo, tmp_path: Path) -> None:
    good = write_video("belt.avi", [GOOD] * 9)
    code, out, err = watch(
        tmp_path / "missing.mp4", "ftp://me:S3CR3T@host/x", good, tmp_path / "no-such-folder/*", "--json"
    )
    assert code == 9
    assert json.loads(out)["frames"]["scored"] == 9
    assert "missing.mp4" in err and "ftp:// is not known" in err and "no images in" in err
    assert err.splitlines()[-1].startswith("meliad-edge: 3 sources given up; ")
    assert "S3CR3T" not in out + err


def test_all_sources_failing_ends_with_the_first_error(watch: Run, tmp_path: Path) -> None:
    code, out, err = watch(tmp_path / "missing.mp4")
    assert (code, out) == (7, "")
    assert err == f"meliad-edge: {tmp_path}/missing.mp4: no such file or device; check the address for typing errors\n"
    code, _, _ = watch(tmp_path / "missing.mp4", tmp_path / "missing-too.mp4")
    assert code == 7


def test_a_truncated_video_is_scored_and_reported(watch: Run, write_video: WriteVideo) -> None:
    path = write_video("belt.avi", [(37 * i) % 90 for i in range(60)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    code, out, err = watch(path, "--json")
    assert code == 9
    summary = json.loads(out)
    assert summary["sources"][0]["is_truncated"]
    assert 0 < summary["frames"]["scored"] < 60
    assert "truncated or damaged" in err


def test_max_frames_and_window(watch: Run, write_video: WriteVideo) -> None:
    path = write_video("belt.avi", [BAD] * 30)
    code, out, err = watch(path, "--max-frames", 4, "--window", "5/5")
    assert (code, out) == (0, "")
    assert "4 scored" in err
    code, out, _ = watch(path, "--max-frames", 4, "--window", "4/4")
    assert (code, len(out.splitlines())) == (0, 1)


@pytest.mark.parametrize(("option", "value"), [("--window", "5"), ("--window", "6/5"), ("--out", "mqtt://broker/x")])
def test_wrong_options_are_refused_before_anything_is_read(watch: Run, option: str, value: str) -> None:
    code, out, err = watch("missing.mp4", option, value)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_live_watch_with_its_summary(mjpeg_server: Any, bundle: Path, stop_signal: int) -> None:
    # A shell that runs the tests in the background makes its children ignore Ctrl-C; this one must not.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from meliad_edge.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "watch", str(bundle), mjpeg_server.url, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=bundle.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        event = json.loads(process.stdout.readline())
        process.send_signal(stop_signal)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert event["state"] == "new"
    summary = json.loads(out.splitlines()[-1])
    assert summary["type"] == "summary"
    assert summary["frames"]["scored"] > 0
    assert "Traceback" not in err
