from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

SIZE = 128
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on standard output."""
        return json.loads(self.out)

    @property
    def error_line(self) -> str:
        """The last line on standard error, which must be the only one that names the program, without a traceback."""
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        assert [line for line in lines if line.startswith("meliad-edge: ")] == lines[-1:]
        return lines[-1].removeprefix("meliad-edge: ")


Invoke = Callable[..., Outcome]


@pytest.fixture(scope="session")
def invoke() -> Invoke:
    """Run the real command line in this process."""
    from meliad_edge.cli import main

    def run(*arguments: object) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as stopped,
        ):
            main([str(argument) for argument in arguments])
        return Outcome(int(stopped.value.code or 0), out.getvalue(), err.getvalue())

    return run


def _texture(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Brushed metal: soft shading, horizontal grain and noise, uint8 [128, 128, 3]."""
    shading = cv2.resize(rng.normal(0.0, 8.0, (4, 4)), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    grain = cv2.blur(rng.normal(0.0, 40.0, (SIZE, SIZE)), (31, 1))
    level = 120.0 + shading + grain + rng.normal(0.0, 4.0, (SIZE, SIZE))
    tint = np.array([0.95, 1.0, 1.05])
    return np.asarray(np.clip(level[..., None] * tint, 0, 255), dtype=np.uint8)


def _scratch(rng: np.random.Generator, mask: NDArray[np.uint8]) -> None:
    x, y = (int(v) for v in rng.integers(25, SIZE - 25, 2))
    angle = rng.uniform(0.3, 2.8)
    end = (int(x + 40 * np.cos(angle)), int(y + 40 * np.sin(angle)))
    cv2.line(mask, (x, y), end, 255, 3)


def _stain(rng: np.random.Generator, mask: NDArray[np.uint8]) -> None:
    centre = tuple(int(v) for v in rng.integers(25, SIZE - 25, 2))
    cv2.ellipse(mask, centre, tuple(int(v) for v in rng.integers(8, 15, 2)), int(rng.integers(180)), 0, 360, 255, -1)


_DEFECTS = {"scratch": (_scratch, 235), "stain": (_stain, 45)}


def write_texture_set(root: Path, *, train: int = 24, test: int = 8, defects: int = 8) -> Path:
    """An MVTec-style set of drawn pictures: two defect classes with masks, the same on every machine."""
    rng = np.random.default_rng(20)
    for folder, count in (("train/good", train), ("test/good", test)):
        (root / folder).mkdir(parents=True)
        for index in range(count):
            cv2.imwrite(str(root / folder / f"{index:03d}.png"), _texture(rng))
    for name, (draw, level) in _DEFECTS.items():
        (root / "test" / name).mkdir(parents=True)
        (root / "ground_truth" / name).mkdir(parents=True)
        for index in range(defects):
            picture, mask = _texture(rng), np.zeros((SIZE, SIZE), np.uint8)
            draw(rng, mask)
            picture[mask > 0] = picture[mask > 0] // 4 + level * 3 // 4
            cv2.imwrite(str(root / "test" / name / f"{index:03d}.png"), picture)
            cv2.imwrite(str(root / "ground_truth" / name / f"{index:03d}_mask.png"), mask)
    return root


@pytest.fixture(scope="session")
def texture_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MVTec-style set: 24 normal training pictures, 8 normal and 2 x 8 defective test pictures. Read only."""
    return write_texture_set(tmp_path_factory.mktemp("textures") / "metal")


@pytest.fixture(scope="session")
def run_folder(texture_set: Path, invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that `fit` left. Read only."""
    out = tmp_path_factory.mktemp("fit") / "run"
    outcome = invoke("fit", texture_set, "--shots", 4, "--image-size", SIZE, "--out", out)
    assert outcome.code == 0, outcome.err
    return out


@pytest.fixture(scope="session")
def small_run(texture_set: Path, invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at 64 pixels with two shots, which is quicker. Read only."""
    out = tmp_path_factory.mktemp("fit-small") / "run"
    outcome = invoke("fit", texture_set, "--shots", 2, "--image-size", 64, "--out", out)
    assert outcome.code == 0, outcome.err
    return out


@pytest.fixture(scope="session")
def bundle_file(run_folder: Path, invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that `export` made of it. Read only."""
    path = tmp_path_factory.mktemp("export") / "metal.meliad"
    outcome = invoke("export", run_folder, "--out", path)
    assert outcome.code == 0, outcome.err
    return path


@pytest.fixture(scope="session")
def small_bundle(small_run: Path, invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle at 64 pixels, which is quicker. Read only."""
    path = tmp_path_factory.mktemp("export-small") / "metal.meliad"
    outcome = invoke("export", small_run, "--out", path)
    assert outcome.code == 0, outcome.err
    return path


@pytest.fixture(scope="session")
def precise_export(run_folder: Path, invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What export says of the same run in every precision."""
    path = tmp_path_factory.mktemp("export-precise") / "metal.meliad"
    outcome = invoke("export", run_folder, "--precision", "fp16", "--precision", "int8", "--out", path, "--json")
    assert outcome.code == 0, outcome.err
    record: dict[str, Any] = outcome.json
    return record


@pytest.fixture(scope="session")
def precise_bundle(precise_export: dict[str, Any]) -> Path:
    """The bundle of that export. Read only."""
    return Path(precise_export["out"])


@pytest.fixture(scope="session")
def cuda_include() -> Path:
    """The folder of CUDA's headers: of a toolkit, of the system, or of the wheels that torch brings."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parents[1] / "include"] if nvcc is not None else []
    folders += [Path("/usr/local/cuda/include"), Path("/usr/include")]
    spec = importlib.util.find_spec("nvidia")
    for wheels in (spec.submodule_search_locations or []) if spec else []:
        folders += Path(wheels).glob("*/include")
    found = next((folder for folder in folders if (folder / "cuda_runtime_api.h").is_file()), None)
    if found is None:
        pytest.skip("no CUDA headers: neither a toolkit nor NVIDIA's wheels are here")
    return found


@dataclass(frozen=True)
class EmulatedDevice:
    """A 64-bit ARM system under emulation, one command at a time.

    Attributes:
        root: The file system it starts from, which other devices share.
        changes: Folder for what it writes.
    """

    root: Path
    changes: Path

    def command(self, *arguments: object) -> list[str]:
        """What runs a command of the device on this machine."""
        script = ROOT / "scripts" / "run_in_aarch64_root.sh"
        return [str(argument) for argument in (script, self.root, self.changes, *arguments)]

    def run(self, *arguments: object, **environment: str) -> Outcome:
        """Run a command there; nothing of this machine's environment but PATH reaches it."""
        clean = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, env=clean | environment)
        return Outcome(done.returncode, done.stdout, done.stderr)

    def receive(self, path: Path) -> None:
        """Copy a file or folder of this machine to the same path there."""
        assert self.run("mkdir", "--parents", path.parent).code == 0
        target = self.changes / "files" / path.relative_to("/")
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copy(path, target)


def _run_script(name: str, *arguments: object) -> str:
    """The one line that a script of ours says."""
    command = [ROOT / "scripts" / name, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def aarch64_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system of 64-bit ARM, which this machine can execute. Read only."""
    folder = ROOT / ".cache" / "aarch64-root"
    line = _run_script("make_aarch64_root.sh", folder, sys.executable)
    if not line.endswith(f" in {folder}"):
        pytest.skip(line)
    outcome = EmulatedDevice(folder, tmp_path_factory.mktemp("aarch64-probe")).run("true")
    if outcome.code == 125:
        pytest.skip(outcome.err.splitlines()[-1])
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="session")
def aarch64_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel for 64-bit ARM, cross-compiled."""
    folder = tmp_path_factory.mktemp("aarch64-wheel")
    line = _run_script("build_aarch64_wheel.sh", folder, sys.executable)
    wheels = list(folder.iterdir())
    if not wheels:
        pytest.skip(line)
    (wheel,) = wheels
    return wheel


@pytest.fixture(scope="session")
def emulated_device(
    aarch64_root: Path, aarch64_wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> EmulatedDevice:
    """An emulated device whose own pip installed the wheel, with no network."""
    device = EmulatedDevice(aarch64_root, tmp_path_factory.mktemp("aarch64-device"))
    device.receive(aarch64_wheel)
    (pip,) = aarch64_root.glob("usr/share/python-wheels/pip-*.whl")
    options = ("--no-index", "--no-cache-dir", "--break-system-packages", "--root-user-action=ignore")
    outcome = device.run("python3", f"/{pip.relative_to(aarch64_root)}/pip", "install", *options, aarch64_wheel)
    assert outcome.code == 0, outcome.err
    return device


@pytest.fixture(scope="session")
def triton_stand_in() -> ModuleType:
    """The module with a server of Triton's protocol; see tests/runtime/triton_stand_in.py."""
    pytest.importorskip("tritonclient.grpc", reason="the extra triton is not installed", exc_type=ImportError)
    path = Path(__file__).parent / "runtime" / "triton_stand_in.py"
    spec = importlib.util.spec_from_file_location("triton_stand_in", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
