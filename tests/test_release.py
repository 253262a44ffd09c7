"""The version and the budget of a bundle, given when it is released."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from meliad_edge.bundle import Manifest, open_bundle, read_parts, release
from meliad_edge.signing import make_key, verify

pytestmark = pytest.mark.workshop


def test_a_release_changes_the_manifest_alone(small_bundle: Path, tmp_path: Path) -> None:
    key = make_key("line3", None, tmp_path)
    paths = [Path(shutil.copy(small_bundle, tmp_path / f"{n}.meliad")) for n in range(2)]
    for path in paths:
        release(path, version=3, latency_budget_ms=40.0, sign=key.sign)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    before, after = open_bundle(small_bundle), open_bundle(paths[0])
    assert (after.manifest.version, after.manifest.latency_budget_ms) == (3, 40.0)
    changed = {"version": 3, "latency_budget_ms": 40.0}
    assert before.manifest.model_copy(update=changed) == after.manifest
    assert read_parts(small_bundle)[2] == read_parts(paths[0])[2]
    assert verify(after.signed.manifest, after.signed.signature, [key.public], datetime.date.today()) == key.public
    assert release(paths[0], sign=key.sign) == after.manifest  # what is not named stays


def test_a_bundle_of_before_has_version_0_and_no_budget(small_bundle: Path) -> None:
    fields = json.loads(read_parts(small_bundle)[1].manifest)
    del fields["version"], fields["latency_budget_ms"]
    manifest = Manifest.model_validate(fields)
    assert (manifest.version, manifest.latency_budget_ms) == (0, None)


def test_export_writes_both(small_run: Path, invoke: Any, tmp_path: Path) -> None:
    out = tmp_path / "metal.meliad"
    assert invoke("export", small_run, "--out", out, "--model-version", 7, "--budget-ms", 25).code == 0
    manifest = open_bundle(out).manifest
    assert (manifest.version, manifest.latency_budget_ms) == (7, 25.0)


@pytest.mark.parametrize("option", [("--model-version", 1), ("--budget-ms", 9)])
def test_a_plain_graph_has_no_place_for_them(small_run: Path, invoke: Any, option: tuple[object, ...]) -> None:
    outcome = invoke("export", small_run, "--format", "onnx", *option)
    assert outcome.code == 2
    assert outcome.error_line.startswith("--sign, --model-version and --budget-ms are for bundles")
