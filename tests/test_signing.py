from __future__ import annotations

import datetime
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meliad_edge.bundle import open_bundle
from meliad_edge.errors import SignatureError, UsageError
from meliad_edge.signing import (
    PublicKey,
    load_key,
    make_key,
    own_keys,
    read_public_key,
    trust,
    trusted_keys,
    verify,
)

DAY = datetime.date(2027, 6, 1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The keys folder of this machine, which is empty."""
    monkeypatch.setenv("MELIAD_EDGE_KEYS", str(tmp_path / "keys"))
    return tmp_path / "keys"


@pytest.fixture
def key(folder: Path) -> PublicKey:
    return make_key("line3", DAY, folder).public


def test_a_signature_is_that_of_its_key_and_its_data(key: PublicKey, folder: Path) -> None:
    signing, other = load_key("line3", folder, DAY), make_key("other", None, folder)
    signature = signing.sign(b"manifest")
    assert signature == signing.sign(b"manifest")
    assert verify(b"manifest", signature, [other.public, key], DAY) == key
    for data, signed, trusted in [
        (b"manifest!", signature, [key]),
        (b"manifest", signature[:-1] + bytes([signature[-1] ^ 1]), [key]),
        (b"manifest", signature[:-1], [key]),
        (b"manifest", b"", [key]),
        (b"manifest", signature, [other.public]),
        (b"manifest", signature, []),
    ]:
        with pytest.raises(SignatureError, match="no trusted key made the signature"):
            verify(data, signed, trusted, DAY)
    with pytest.raises(SignatureError, match="not signed"):
        verify(b"manifest", None, [key], DAY)


def test_a_key_is_accepted_through_its_last_day(key: PublicKey, folder: Path) -> None:
    signature = load_key("line3", folder, DAY).sign(b"x")
    assert verify(b"x", signature, [key], DAY) == key
    with pytest.raises(SignatureError, match=r"line3 \([0-9a-f]{16}\), which expired on 2027-06-01"):
        verify(b"x", signature, [key], DAY + datetime.timedelta(days=1))


def test_the_private_half_is_for_its_owner_alone(key: PublicKey, folder: Path) -> None:
    assert stat.S_IMODE((folder / "line3.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / "line3.pub").read_text().split()[0] == "meliad-ed25519"
    assert read_public_key(folder / "line3.pub") == key


def test_no_key_is_ever_replaced(key: PublicKey, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is a key of that name"):
        make_key("line3", None, folder)
    assert own_keys(folder) == [key]
    stranger = make_key("line3", None, tmp_path / "elsewhere")
    trust(folder / "line3.pub", folder)
    trust(folder / "line3.pub", folder)
    with pytest.raises(UsageError, match="another key of that name is trusted"):
        trust(tmp_path / "elsewhere" / "line3.pub", folder)
    assert trusted_keys(folder) == [key]
    assert stranger.public != key


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a" * 65, "line 3", "line\n3"])
def test_names_are_file_names(name: str, folder: Path) -> None:
    for use in (lambda: make_key(name, None, folder), lambda: load_key(name, folder, DAY)):
        with pytest.raises(UsageError, match="key name"):
            use()
    assert not folder.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "meliad-ed25519",
        "ssh-ed25519 AAAA line3 never",
        "meliad-ed25519 AAAA line3 never",
        f"meliad-ed25519 {'A' * 43}= ../line3 never",
        f"meliad-ed25519 {'A' * 43}= line3 tomorrow",
        f"meliad-ed25519 {'A' * 43}! line3 never",
        "\udcff",
        "x " * 5000,
    ],
)
def test_what_is_no_public_key(text: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.pub"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match="not a public key of meliad-edge") as caught:
        trust(file, folder)
    assert "\n" not in str(caught.value)
    assert not folder.exists()


def test_what_is_no_private_key(key: PublicKey, folder: Path) -> None:
    with pytest.raises(UsageError, match="no such key; make one with: meliad-edge keys make nobody"):
        load_key("nobody", folder, DAY)
    make_key("other", None, folder)
    (folder / "other.pub").write_text(key.to_line())
    with pytest.raises(UsageError, match=r"not the public half of other\.key"):
        load_key("other", folder, DAY)
    (folder / "other.key").write_text("-----BEGIN PRIVATE KEY-----\n")
    with pytest.raises(UsageError, match="not a private key") as caught:
        load_key("other", folder, DAY)
    assert "BEGIN" not in str(caught.value)


def test_what_no_bundle_is_signed_with(key: PublicKey, folder: Path) -> None:
    with pytest.raises(UsageError, match="expired on 2027-06-01; no device would accept it"):
        load_key("line3", folder, DAY + datetime.timedelta(days=1))
    (folder / "line3.key").chmod(0o644)
    with pytest.raises(UsageError, match="others may read this private key; run: chmod 600"):
        load_key("line3", folder, DAY)


@pytest.mark.workshop
def test_from_the_key_to_the_device(
    folder: Path, small_run: Path, texture_set: Path, tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    picture = texture_set / "test" / "good" / "000.png"
    bundle, unsigned = tmp_path / "signed.meliad", tmp_path / "unsigned.meliad"
    assert invoke("keys", "make", "line3", "--expires", "2999-12-31").code == 0
    assert invoke("export", small_run, "--out", bundle, "--sign", "line3").code == 0
    assert invoke("export", small_run, "--out", unsigned).code == 0
    first = bundle.read_bytes()
    assert invoke("export", small_run, "--out", bundle, "--sign", "line3").code == 0
    assert bundle.read_bytes() == first
    assert open_bundle(unsigned).signed.signature is None

    for path in (bundle, unsigned):  # nobody is trusted here yet, so anything runs
        assert invoke("predict", path, picture).code == 0
    assert invoke("keys", "trust", folder / "line3.pub").code == 0
    assert [(row["name"], row["use"], row["expires"]) for row in invoke("keys", "list", "--json").json] == [
        ("line3", "signs here", "2999-12-31"),
        ("line3", "trusted", "2999-12-31"),
    ]
    assert invoke("predict", bundle, picture).code == 0
    for verb in (
        ("predict", unsigned, picture),
        ("check", unsigned),
        ("watch", unsigned, picture),
        ("bench", unsigned),
    ):
        outcome = invoke(*verb)
        assert outcome.code == 5
        assert outcome.error_line == (
            f"{unsigned}: the bundle is not signed, and this machine only runs signed ones; export it with --sign NAME"
        )

    forged = tmp_path / "forged.meliad"
    with zipfile.ZipFile(bundle) as archive, zipfile.ZipFile(forged, "w") as target:
        for name in archive.namelist():
            data = archive.read(name)
            target.writestr(name, data.replace(b'"shots": 2', b'"shots": 9') if name == "manifest.json" else data)
    assert open_bundle(forged).manifest.shots == 9  # its digests are right
    outcome = invoke("predict", forged, picture)
    assert outcome.code == 5
    assert f"{forged}: no trusted key made the signature; trusted are line3 (" in outcome.error_line


def test_a_key_that_is_not_there_is_named_before_anything_is_done(
    folder: Path, tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    outcome = invoke("export", tmp_path, "--sign", "nobody")
    assert outcome.code == 2
    assert outcome.error_line.endswith("no such key; make one with: meliad-edge keys make nobody")
