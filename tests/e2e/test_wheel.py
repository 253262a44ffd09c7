"""The built wheel in a fresh environment without torch: slow, because it builds twice and installs once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import pytest

ROOT = Path(__file__).parents[2]
WORKSHOP = ("torch", "torchvision", "timm", "onnx", "onnxscript", "sklearn", "safetensors")


def _build(folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder / "wheel"]
    done = subprocess.run(
        [*command, "--config-settings", f"build-dir={folder / 'build'}", ROOT],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "wheel").glob("meliad_edge-*.whl")
    return wheel


@dataclass(frozen=True)
class Installation:
    """A virtual environment that has nothing but the wheel and what it depends on."""

    python: Path
    site_packages: Path
    has_kernel: bool

    def run(self, *arguments: object, code: int = 0, **environment: str) -> str:
        """Standard output of ``meliad-edge``; nothing of the checkout is on the path."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MELIAD"))}
        done = subprocess.run(
            [self.python.with_name("meliad-edge"), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=self.python.parent,
            env=clean | environment,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout or done.stderr

    def predict(self, *arguments: object, **environment: str) -> Any:
        return json.loads(self.run("predict", *arguments, "--json", **environment))


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("installation")
    wheel = _build(folder)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        has_kernel = any(name.endswith("libmeliad_ort.so") for name in archive.namelist())
    return Installation(python, site_packages, has_kernel)


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is installed on a machine without compilers; a folder for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("without-compiler")
    (folder / "bin").mkdir()
    nowhere = str(folder / "no-such-compiler")
    wheel = _build(folder, PATH=str(folder / "bin"), CXX=nowhere, CC=nowhere)
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(folder / "package")
    return folder / "package"


@pytest.fixture
def pictures(texture_set: Path) -> tuple[Path, ...]:
    return tuple(texture_set / "test" / name / "000.png" for name in ("good", "scratch", "stain"))


def test_only_the_package_lands_in_site_packages(installation: Installation) -> None:
    site = installation.site_packages
    for name in ("export", "benchmarks", "kernels", "tests", "scripts", "docs"):
        assert not (site / name).exists()
        assert not (site / f"{name}.py").exists()
    for inside in (
        "export/to_bundle.py",
        "benchmarks/latency.py",
        "benchmarks/__main__.py",
        "templates/report.html",
        "py.typed",
    ):
        assert (site / "meliad_edge" / inside).is_file()
    for folder in ("export", "benchmarks"):
        assert not (site / "meliad_edge" / folder).is_symlink()


def test_torch_is_not_installed(installation: Installation) -> None:
    for name in WORKSHOP:
        assert not (installation.site_packages / name).exists()


def test_predict_gives_the_scores_of_the_workshop(
    installation: Installation, invoke: Any, bundle_file: Path, pictures: tuple[Path, ...]
) -> None:
    expected = invoke("predict", bundle_file, *pictures, "--json").json["predictions"]
    result = installation.predict(bundle_file, *pictures)
    assert result["engine"] == ("onnxruntime-cpu+kernel" if installation.has_kernel else "onnxruntime-cpu")
    for ours, theirs in zip(result["predictions"], expected, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], rel=1e-3)
        assert ours["decision"] == theirs["decision"]


def test_without_a_compiler_the_function_body_gives_the_same_scores(
    installation: Installation, without_compiler: Path, bundle_file: Path, pictures: tuple[Path, ...]
) -> None:
    with_kernel = installation.predict(bundle_file, *pictures)
    body = installation.predict(bundle_file, *pictures, PYTHONPATH=str(without_compiler))
    off = installation.predict(bundle_file, *pictures, MELIAD_EDGE_KERNEL="off")
    assert body["engine"] == off["engine"] == "onnxruntime-cpu"
    for a, b, c in zip(with_kernel["predictions"], body["predictions"], off["predictions"], strict=True):
        assert b["score"] == c["score"]
        assert a["score"] == pytest.approx(b["score"], rel=1e-3)
        assert a["decision"] == b["decision"]
        for ours, theirs in zip(a["regions"], b["regions"], strict=True):
            assert ours == pytest.approx(theirs) if isinstance(ours, float) else ours.keys() == theirs.keys()


def test_every_runtime_verb_works(
    installation: Installation, bundle_file: Path, pictures: tuple[Path, ...], tmp_path: Path
) -> None:
    video = tmp_path / "belt.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (128, 128))
    for picture in pictures * 4:
        writer.write(cv2.imread(str(picture)))
    writer.release()
    assert json.loads(installation.run("check", bundle_file, "--json"))["passed"] is True
    summary = json.loads(installation.run("watch", bundle_file, video, "--json").splitlines()[-1])
    assert summary["frames"]["scored"] == 12
    stages = json.loads(installation.run("bench", bundle_file, "--frames", 10, "--json"))["stages"]
    assert {"infer", "score"} <= stages.keys()
    assert json.loads(installation.run("doctor", "--json"))["ok"] is True
    assert "meliad-edge 0." in installation.run("--version")


@pytest.mark.parametrize(
    "arguments",
    [("fit", "elpv"), ("evaluate", "x"), ("calibrate", "x"), ("export", "x"), ("demo",)],
    ids=lambda a: a[0],
)
def test_workshop_verbs_name_the_extra(installation: Installation, arguments: tuple[str, ...]) -> None:
    line = installation.run(*arguments, code=8)
    assert line.startswith("meliad-edge: torch is not installed; run: pip install 'meliad-edge[")
    assert len(line.splitlines()) == 1


def test_check_against_a_run_names_the_extra(installation: Installation, bundle_file: Path) -> None:
    assert "pip install 'meliad-edge[train]'" in installation.run("check", bundle_file, "--against", "x", code=8)


@pytest.mark.parametrize("verb", ["predict", "watch", "check", "bench", "doctor", "--help"])
def test_the_runtime_never_imports_the_workshop(
    verb: str, bundle_file: Path, pictures: tuple[Path, ...], tmp_path: Path
) -> None:
    """Where torch is installed, it is still not imported."""
    arguments = {
        "predict": [str(bundle_file), str(pictures[0]), "--save", str(tmp_path)],
        "watch": [str(bundle_file), str(pictures[0])],
        "check": [str(bundle_file)],
        "bench": [str(bundle_file), "--frames", "10"],
    }.get(verb, [])
    script = f"""
import sys
from meliad_edge.cli import main
try:
    main({[verb, *arguments]!r})
except SystemExit as stopped:
    assert not stopped.code, stopped.code
loaded = [name for name in {WORKSHOP!r} if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
