from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from meliad_edge.runtime.kernel_library import find_kernel_library

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def pycuda() -> Path:
    """A folder to import PyCUDA from."""
    folder = ROOT / ".cache" / "pycuda"
    script = ROOT / "scripts" / "build_pycuda_for_tests.sh"
    done = subprocess.run([script, folder, sys.executable], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if not done.stdout.endswith(f" in {folder}\n"):
        pytest.skip(done.stdout.strip())
    return folder


@pytest.fixture(scope="session")
def driver_stand_in(pycuda: Path, cuda_include: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 that needs no GPU."""
    compiler = shutil.which("c++")
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("no C++ compiler on this machine")
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-isystem",
        str(cuda_include),
    ]
    source = str(HERE / "cuda_driver_stand_in.cpp")

    def build(*more: str) -> None:
        command = [compiler, *flags, source, *more, f"-Wl,-soname,{library.name}", "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def names(which: str, file: Path) -> set[str]:
        done = subprocess.run(["nm", "-D", which, file], capture_output=True, text=True, check=True)
        return {line.split()[-1] for line in done.stdout.splitlines()}

    build()
    (module,) = (pycuda / "pycuda").glob("_driver*.so")
    # PyCUDA wants every function of the driver to exist; those that nothing here calls say that they are not supported.
    wanted = {name for name in names("--undefined-only", module) if name.startswith("cu")}
    rest = folder / "rest.cpp"
    rest.write_text(
        "".join(
            f'extern "C" int {name}() {{ return 801; }}\n' for name in sorted(wanted - names("--defined-only", library))
        )
    )
    build(str(rest))
    return folder


@pytest.fixture(scope="session")
def on_stand_ins(pycuda: Path, driver_stand_in: Path) -> Run:
    """Runs tensorrt_process.py: our backend on real PyCUDA, with stand-ins for the driver and for TensorRT."""
    if find_kernel_library() is None or find_kernel_library("tensorrt") is None:
        pytest.skip("no kernel libraries: building them needs ONNX Runtime's and TensorRT's headers, and nvcc")
    path = os.pathsep.join([str(pycuda), str(ROOT)])

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", HERE / "tensorrt_process.py", *arguments]
        settings = {"PYTHONPATH": path, "LD_LIBRARY_PATH": str(driver_stand_in)}
        return subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=os.environ | settings | environment
        )

    return run


@pytest.fixture
def tensorrt_stand_in() -> ModuleType:
    """A fresh TensorRT that builds engines and cannot execute them in this process."""
    spec = importlib.util.spec_from_file_location("tensorrt_stand_in", HERE / "tensorrt_stand_in.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
