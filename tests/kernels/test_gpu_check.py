"""kernels/gpu_check.sh: what it does where there is no GPU, and that its check finds a wrong kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def run_on_cpu(cxx: str, program: Path, kernel: Path) -> subprocess.CompletedProcess[str]:
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DMELIAD_CUDA_ON_CPU"]
    sources = ["-x", "c++", KERNELS / "gpu_check.cu", kernel, KERNELS / "cuda" / "preprocess.cu"]
    subprocess.run([cxx, *flags, *sources, "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True)


def test_right_kernels_are_found_right(cxx: str, tmp_path: Path) -> None:
    done = run_on_cpu(cxx, tmp_path / "gpu_check", KERNELS / "cuda" / "patch_entropy.cu")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("| right |") == 16, "twelve of the scoring, four of the resize"
    assert "executed on the CPU: no times" in done.stdout


def test_a_wrong_kernel_is_found(cxx: str, tmp_path: Path) -> None:
    source = (KERNELS / "cuda" / "patch_entropy.cu").read_text()
    for include in ("patch_entropy.hpp", "tensor_core.cuh"):
        source = source.replace(f'"{include}"', f'"{KERNELS / "cuda" / include}"')
    wrong = tmp_path / "wrong.cu"
    wrong.write_text(
        source.replace("1 - parameters.kappa * entropy_bits", "1 - parameters.kappa * 1.001f * entropy_bits")
    )
    assert wrong.read_text() != source
    done = run_on_cpu(cxx, tmp_path / "gpu_check", wrong)
    assert done.returncode == 1
    assert "**WRONG**" in done.stdout


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("no nvcc on this machine")
    if Path("/dev/nvidia0").exists() or Path("/dev/nvgpu").exists():
        pytest.skip("there is a GPU on this machine: run kernels/gpu_check.sh")
    report = tmp_path / "report.md"
    done = subprocess.run([KERNELS / "gpu_check.sh", report], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "gpu_check: there is no CUDA device here, or no driver for it: nvidia-smi tells more\n"
    assert not report.exists()


def test_without_nvcc_it_says_so(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "realpath"):
        (tools / name).symlink_to(str(shutil.which(name)))
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is where the script looks for it")
    done = subprocess.run(
        [KERNELS / "gpu_check.sh"], capture_output=True, text=True, env=os.environ | {"PATH": str(tools)}
    )
    assert done.returncode == 2
    assert "nvcc is not found" in done.stderr
