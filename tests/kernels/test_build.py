"""The build leaves out what it cannot make, and puts everything where it belongs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def configure_and_install(folder: Path, *options: str, **environment: str) -> tuple[str, list[str]]:
    """Output of the configuration, and the files that installing leaves."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not on this machine")

    def cmake(*arguments: str | Path) -> str:
        done = subprocess.run(
            ["cmake", *arguments], capture_output=True, text=True, env=os.environ | environment, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return " ".join((done.stdout + done.stderr).split())  # CMake wraps its warnings

    output = cmake("-S", ROOT, "-B", folder / "build", *options)
    cmake("--build", folder / "build")
    cmake("--install", folder / "build", "--prefix", folder / "installed")
    installed = sorted(str(path.relative_to(folder / "installed")) for path in folder.glob("installed/**/*.*"))
    return output, installed


def test_without_a_compiler_nothing_is_built_and_it_says_so(tmp_path: Path) -> None:
    output, installed = configure_and_install(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert "no C++ compiler, so the scoring kernel is skipped; models run on the function body they carry" in output
    assert installed == []


def test_without_headers_the_library_is_left_out_and_it_says_so(cxx: str, tmp_path: Path) -> None:
    headers = f"-DONNXRUNTIME_INCLUDE_DIR={tmp_path / 'none'}"
    output, installed = configure_and_install(tmp_path, headers, "-DMELIAD_CUDA=OFF")
    assert "no ONNX Runtime headers, so the scoring kernel is skipped" in output
    assert "fetch_onnxruntime_headers.sh" in output
    assert installed == ["meliad_edge/_kernels/libmeliad_kernels.so"]


def test_headers_that_are_too_old_are_named(cxx: str, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime_cxx_api.h").touch()
    (tmp_path / "onnxruntime_c_api.h").write_text("#define ORT_API_VERSION 12\n")
    output, installed = configure_and_install(tmp_path, f"-DONNXRUNTIME_INCLUDE_DIR={tmp_path}", "-DMELIAD_CUDA=OFF")
    assert "ONNX Runtime 1.12, 1.17 is needed" in output
    assert installed == ["meliad_edge/_kernels/libmeliad_kernels.so"]


def test_tensorrt_headers_that_are_too_old_are_named(cxx: str, tmp_path: Path) -> None:
    (tmp_path / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 8 //!< TensorRT major version.\n")
    headers = (f"-DONNXRUNTIME_INCLUDE_DIR={tmp_path / 'none'}", f"-DTENSORRT_INCLUDE_DIR={tmp_path}")
    output, installed = configure_and_install(tmp_path, *headers, "-DCMAKE_CUDA_ARCHITECTURES=87-virtual")
    if "CUDA toolkit: not found" in output:
        pytest.skip("no CUDA compiler, so TensorRT's headers do not matter")
    assert "TensorRT 8, 10 is needed, so the TensorRT plugin is skipped" in output
    assert installed == ["meliad_edge/_kernels/libmeliad_kernels.so"]


def test_with_everything_the_libraries_are_built_without_warnings_and_export_what_they_should(
    cxx: str, tmp_path: Path
) -> None:
    output, installed = configure_and_install(tmp_path, "-DMELIAD_WARNINGS_AS_ERRORS=ON")
    if "no ONNX Runtime headers" in output:
        pytest.skip("no ONNX Runtime headers; scripts/fetch_onnxruntime_headers.sh gets them")
    assert "ONNX Runtime headers: 1." in output
    exported = {
        "libmeliad_kernels.so": {"meliad_scorer_create", "meliad_scorer_score_tiles", "meliad_last_error"},
        "libmeliad_ort.so": {"RegisterCustomOps"},
        "libmeliad_trt.so": {"getCreators", "setLoggerFinder"},
    }
    built = [name for name in exported if f"{name}: will be built" in output]
    if "CUDA toolkit: not found" not in output and "TensorRT headers: not found" not in output:
        assert built == list(exported)
    assert installed == [f"meliad_edge/_kernels/{name}" for name in built]
    for name, path in zip(built, installed, strict=True):
        symbols = subprocess.run(
            ["nm", "--dynamic", "--defined-only", tmp_path / "installed" / path],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        names = {line.split()[-1] for line in symbols.splitlines()}
        assert names >= exported[name]
        assert all(symbol in exported[name] or symbol.startswith("meliad_") for symbol in names)


def test_wheel_has_the_whole_package_and_no_generic_names(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core", reason="the build backend is not installed here")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    done = subprocess.run(
        [*command, "--config-settings", f"build-dir={tmp_path / 'build'}", ROOT], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"meliad_edge"}
    for folder, inside in [("meliad_edge", ""), ("export", "export/"), ("benchmarks", "benchmarks/")]:
        files = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")}
        assert files
        assert {f"meliad_edge/{inside}{path.as_posix()}" for path in files} <= names
