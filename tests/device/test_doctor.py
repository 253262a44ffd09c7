from __future__ import annotations

import json
import subprocess
import sys

import pytest

from meliad_edge.cli import main
from meliad_edge.device import remote


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *arguments])
    return int(stopped.value.code or 0)


def test_json_is_one_object_on_standard_output(capsys):
    assert run("--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    onnxruntime = next(fact for fact in answer["facts"] if fact["name"] == "ONNX Runtime")
    assert onnxruntime["status"] == "ok"
    assert set(onnxruntime) == {"topic", "name", "value", "status", "fix", "required"}


def test_table_groups_by_topic_and_keeps_commands_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("MELIAD_EDGE_KERNEL", "off")
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    topics = [line for line in lines if line and not line.startswith(" ")]
    assert topics == ["system", "machine", "runtime", "GPU", "workshop", "cameras"]
    at = next(index for index, line in enumerate(lines) if line.split()[:3] == ["warn", "scoring", "kernel"])
    assert lines[at + 1].strip().startswith("in a checkout: sudo apt install g++ && scripts")
    assert lines[at + 1].endswith("pip install .")


def test_a_missing_requirement_ends_with_its_fix(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run("--json") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ok"] is False
    assert captured.err == (
        "meliad-edge: 1 required part(s) missing: ONNX Runtime; run: pip install --force-reinstall onnxruntime\n"
    )


def test_the_probe_that_travels_needs_nothing_else():
    alone = [sys.executable, "-I", "-S", "-c", remote._PROBE_FROM_ARCHIVE]
    done = subprocess.run(alone, input=remote._probe_archive(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    names = {fact["name"] for fact in json.loads(done.stdout)["facts"]}
    assert {"system", "ONNX Runtime", "memory"} <= names
