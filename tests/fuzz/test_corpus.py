from __future__ import annotations

import importlib.util
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    pytest.importorskip("onnx", reason="onnx makes the graphs; install the extra export")
    spec = importlib.util.spec_from_file_location("fuzz_bundle", HERE / "fuzz_bundle.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_bundle"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sample", sorted((HERE / "corpus").iterdir()), ids=lambda sample: sample.stem)
def test_what_once_broke_the_rule_is_refused_in_one_line(sample: Path, fuzz: ModuleType) -> None:
    assert fuzz.verdict(sample) == "refused"


def test_a_thousand_inputs_open_or_are_refused_in_one_line(fuzz: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "input.meliad"
    verdicts = set()
    for data in islice(fuzz.Mutator(7, tmp_path), 1000):
        path.write_bytes(data)
        verdicts.add(fuzz.verdict(path))
    assert verdicts == {"opened", "refused"}
