from __future__ import annotations

from pathlib import Path

import pytest

from meliad_edge.errors import UsageError
from meliad_edge.stream.credentials import Credentials, find_credentials, read_secrets, with_credentials
from meliad_edge.stream.uri import parse_source


def secrets_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "secrets.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_each_camera_has_its_own(tmp_path: Path) -> None:
    file = secrets_file(
        tmp_path, '["line 3"]\nuser = "me"\npassword = "a:b@c/d"\n[cam2]\nuser = "you"\npassword = "x"\n'
    )
    secrets = read_secrets(file)
    assert find_credentials("line 3", secrets, {}) == Credentials("me", "a:b@c/d")
    assert find_credentials("cam2", secrets, {}) == Credentials("you", "x")
    assert find_credentials("cam3", secrets, {}) is None


def test_the_environment_serves_what_the_file_does_not() -> None:
    environment = {"MELIAD_EDGE_CAMERA_LINE_3": "me:pass:word", "MELIAD_EDGE_CAMERA_CAM_2": "nocolon"}
    assert find_credentials("line 3", {}, environment) == Credentials("me", "pass:word")
    assert find_credentials("line 3", {"line 3": Credentials("a", "b")}, environment) == Credentials("a", "b")
    with pytest.raises(UsageError, match="MELIAD_EDGE_CAMERA_CAM_2: expected user:password") as caught:
        find_credentials("cam-2", {}, environment)
    assert "nocolon" not in str(caught.value)


def test_they_reach_the_address_that_is_opened_and_nothing_that_is_shown() -> None:
    source = with_credentials(parse_source("rtsp://old:pair@10.0.0.7:554/live?x=1"), Credentials("me", "S3CR:E@T/"))
    assert source.address == "rtsp://me:S3CR%3AE%40T%2F@10.0.0.7:554/live?x=1"
    assert source.shown == "rtsp://10.0.0.7:554/live?x=1"
    assert "S3CR" not in repr(source) + source.name + source.shown + repr(Credentials("me", "S3CR:E@T/"))


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"others may read it \(mode 0644\); run: chmod 600"):
        read_secrets(secrets_file(tmp_path, "", 0o644))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[cam]\nuser = 'me'\n", r"\[cam\] must hold user and password"),
        ("[cam]\nuser = 'me'\npassword = 5\n", r"\[cam\] must hold"),
        ("cam = 'me:S3CR3T'\n", r"\[cam\] must hold"),
        ("[cam]\npassword = S3CR3T\n", "not TOML"),
    ],
)
def test_a_file_of_another_shape_is_refused_without_quoting_it(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        read_secrets(secrets_file(tmp_path, text))
    assert "S3CR3T" not in str(caught.value)
    with pytest.raises(UsageError, match="No such file"):
        read_secrets(tmp_path / "missing.toml")


def test_a_file_needs_no_credentials(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="asks for none"):
        with_credentials(parse_source("belt.mp4"), Credentials("me", "x"))
