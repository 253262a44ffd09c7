from __future__ import annotations

import ast
import hashlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from meliad_edge.device import bootstrap

SOURCE = Path(bootstrap.__file__)


def run(home: Path, action: str, **arguments: object) -> dict[str, object]:
    """As a device does: the source on standard input, one JSON object out."""
    done = subprocess.run(
        [sys.executable, "-I", "-", action, json.dumps(arguments)],
        input=SOURCE.read_bytes(),
        capture_output=True,
        env=os.environ | {"MELIAD_EDGE_HOME": str(home)},
        check=True,
    )
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def wheel(home: Path, **files: str) -> str:
    """A wheel as it arrives."""
    home.joinpath("incoming").mkdir(parents=True, exist_ok=True)
    path = home / "incoming" / "wheel"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path.rename(path.with_name(sha256))
    return sha256


def test_it_needs_the_standard_library_alone() -> None:
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 7))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module).partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names


def test_what_the_machine_is(tmp_path: Path) -> None:
    facts = run(tmp_path / "home", "prepare")
    assert facts["home"] == str(tmp_path / "home")
    assert facts["python"] == list(sys.version_info[:2])
    assert facts["wheels"] == []
    assert (tmp_path / "home" / "incoming").is_dir()


def test_a_wheel_is_unpacked_once_with_its_library_files_at_the_top(tmp_path: Path) -> None:
    sha256 = wheel(tmp_path, **{"a.py": "A = 1", "p-1.data/purelib/b.py": "", "p-1.data/scripts/tool": ""})
    bootstrap._unpack_wheel(tmp_path, sha256)
    folder = tmp_path / "wheels" / sha256
    assert {path.name for path in folder.glob("*.py")} == {"a.py", "b.py"}
    assert list((tmp_path / "incoming").iterdir()) == []
    bootstrap._unpack_wheel(tmp_path, sha256)  # there already


def test_a_wheel_that_was_damaged_is_removed(tmp_path: Path) -> None:
    sha256 = wheel(tmp_path, a="")
    (tmp_path / "incoming" / sha256).write_bytes(b"cut sho")
    answer = run(tmp_path, "make_runtime", wheels=[sha256], interpreter=sys.executable)
    assert answer == {"error": f"wheel {sha256[:12]} was damaged on its way; flash again"}
    assert list(tmp_path.glob("*/*")) == []


def test_a_wheel_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    sha256 = wheel(tmp_path / "home", **{"../../../escaped": "x"})
    bootstrap._unpack_wheel(tmp_path / "home", sha256)
    assert not list(tmp_path.glob("escaped")) and not list((tmp_path / "home").glob("escaped"))


def test_a_runtime_that_does_not_start_is_not_one(tmp_path: Path) -> None:
    answer = run(tmp_path, "make_runtime", wheels=[], interpreter="/bin/false")
    assert str(answer["error"]).startswith("meliad-edge does not start with /bin/false")
    assert list(tmp_path.glob("runtimes/*/python")) == []


def test_the_unit_is_one_that_systemd_takes_and_finds_hardened(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    serve = tmp_path / "serve"
    serve.write_text(bootstrap.SERVE.format(home=f"'{tmp_path}'"))
    serve.chmod(0o755)
    unit = tmp_path / "meliad-edge.service"
    unit.write_text(bootstrap.make_unit(tmp_path, pwd.getpwuid(os.geteuid()).pw_name))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    # Of 10; systemd calls a service below 5 OK. Cameras and GPU stay reachable.
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=30", unit]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout.splitlines()[-1]


def test_the_service_script_is_one_that_a_shell_takes(tmp_path: Path) -> None:
    script = bootstrap.SERVE.format(home=f"'{tmp_path}'")
    assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0
