"""Where the compiled library is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from meliad_edge.runtime import kernel_library


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder elsewhere, as a checkout that shadows the installed package."""
    package = tmp_path / "checkout" / "meliad_edge"
    monkeypatch.setattr(kernel_library, "__file__", str(package / "runtime" / "kernel_library.py"))
    monkeypatch.delenv("MELIAD_EDGE_KERNEL", raising=False)
    return package


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with an installed meliad-edge that has a library."""
    site = tmp_path / "site-packages"
    library = site / "meliad_edge" / "_kernels" / "libmeliad_ort.so"
    library.parent.mkdir(parents=True)
    library.touch()
    information = site / "meliad_edge-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: meliad-edge\nVersion: 0.1.0\n")
    (information / "RECORD").write_text(f"meliad_edge/_kernels/{library.name},,\n")
    monkeypatch.syspath_prepend(str(site))
    return site


def test_the_library_beside_the_package_is_first(checkout: Path, site_packages: Path) -> None:
    library = checkout / "_kernels" / "libmeliad_ort.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert kernel_library.find_kernel_library() == library


def test_a_checkout_uses_the_library_of_the_installed_distribution(checkout: Path, site_packages: Path) -> None:
    assert kernel_library.find_kernel_library() == site_packages / "meliad_edge/_kernels/libmeliad_ort.so"


def test_a_library_that_was_deleted_is_not_found(checkout: Path, site_packages: Path) -> None:
    (site_packages / "meliad_edge/_kernels/libmeliad_ort.so").unlink()
    assert kernel_library.find_kernel_library() is None


def test_off_means_off(checkout: Path, site_packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MELIAD_EDGE_KERNEL", "off")
    assert kernel_library.find_kernel_library() is None


def test_every_host_has_its_library(checkout: Path) -> None:
    for host, name in kernel_library.LIBRARY_NAMES.items():
        library = checkout / "_kernels" / name
        library.parent.mkdir(parents=True, exist_ok=True)
        library.touch()
        assert kernel_library.find_kernel_library(host) == library
