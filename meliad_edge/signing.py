"""Ed25519 keys and signatures: who made a bundle, checked by the device that runs it.

A keys folder holds, for every key pair made here, ``NAME.key`` (PKCS 8, readable by its owner alone) and ``NAME.pub``,
one line to be carried to devices; and in ``trusted/`` the public keys of those whose bundles this machine accepts.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from meliad_edge.errors import SignatureError, UsageError

_ALGORITHM = "meliad-ed25519"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NEVER = "never"
_MAX_KEY_FILE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class PublicKey:
    """What tells that a signature was made with the private key of that name.

    Attributes:
        name: Given by whoever made it.
        raw: The 32 bytes of the key.
        expires: Last day it is accepted; None for ever.
    """

    name: str
    raw: bytes
    expires: datetime.date | None

    @property
    def id(self) -> str:
        """Fingerprint: the first 16 digits of its SHA-256."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.name} ({self.id})"

    def to_line(self) -> str:
        """The one line of its file."""
        expires = _NEVER if self.expires is None else self.expires.isoformat()
        return f"{_ALGORITHM} {base64.b64encode(self.raw).decode()} {self.name} {expires}\n"


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key pair of this machine."""

    public: PublicKey
    private: Ed25519PrivateKey

    def sign(self, data: bytes) -> bytes:
        """Sign bytes; the same bytes always get the same signature, 64 bytes."""
        return self.private.sign(data)


def make_key(name: str, expires: datetime.date | None, folder: Path) -> SigningKey:
    """Make a key pair; nothing is ever replaced.

    Raises:
        UsageError: The name is not allowed or taken.
    """
    private_file, public_file = folder / f"{_checked_name(name)}.key", folder / f"{name}.pub"
    if private_file.exists() or public_file.exists():
        msg = f"{private_file}: there is a key of that name; choose another one"
        raise UsageError(msg)
    private = Ed25519PrivateKey.generate()
    public = PublicKey(name, private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw), expires)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(private_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public_file.write_text(public.to_line(), encoding="ascii")
    return SigningKey(public, private)


def load_key(name: str, folder: Path, today: datetime.date) -> SigningKey:
    """Read a key pair of this machine, to sign with it.

    Args:
        name: Of the key.
        folder: The keys folder.
        today: A key signs up to and including its last day.

    Raises:
        UsageError: There is none of that name, its files are damaged, others may read it, or it has expired.
    """
    private_file, public_file = folder / f"{_checked_name(name)}.key", folder / f"{name}.pub"
    if not private_file.is_file():
        msg = f"{private_file}: no such key; make one with: meliad-edge keys make {name}"
        raise UsageError(msg)
    if stat.S_IMODE(private_file.stat().st_mode) & 0o077:
        msg = f"{private_file}: others may read this private key; run: chmod 600 {private_file}, or make another one"
        raise UsageError(msg)
    try:
        private = load_pem_private_key(private_file.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        msg = f"{private_file}: not a private key; make another one with: meliad-edge keys make NAME"
        raise UsageError(msg) from error
    public = read_public_key(public_file)
    if not isinstance(private, Ed25519PrivateKey) or public.raw != private.public_key().public_bytes(
        Encoding.Raw, PublicFormat.Raw
    ):
        msg = f"{public_file}: not the public half of {private_file.name}; copy both files again"
        raise UsageError(msg)
    if public.expires is not None and today > public.expires:
        msg = f"key {public} expired on {public.expires}; no device would accept it, make another one"
        raise UsageError(msg)
    return SigningKey(public, private)


def own_keys(folder: Path) -> list[PublicKey]:
    """Public halves of the key pairs made on this machine."""
    return [read_public_key(path.with_suffix(".pub")) for path in sorted(folder.glob("*.key"))]


def trusted_keys(folder: Path) -> list[PublicKey]:
    """Public keys whose bundles this machine accepts."""
    return [read_public_key(path) for path in sorted((folder / "trusted").glob("*.pub"))]


def trust(file: Path, folder: Path) -> PublicKey:
    """Accept bundles that are signed with a key from now on.

    Raises:
        UsageError: The file is not a public key, or another one of that name is trusted already.
    """
    key = read_public_key(file)
    target = folder / "trusted" / f"{key.name}.pub"
    if target.exists() and read_public_key(target) != key:
        msg = f"{target}: another key of that name is trusted; remove that file first if it shall be replaced"
        raise UsageError(msg)
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    target.write_text(key.to_line(), encoding="ascii")
    return key


def read_public_key(file: Path) -> PublicKey:
    """Read the one line of a public key.

    Raises:
        UsageError: The file is missing or not a public key.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(_MAX_KEY_FILE_BYTES).decode("ascii")
        algorithm, encoded, name, expires = text.split()
        raw = base64.b64decode(encoded, validate=True)
        if algorithm != _ALGORITHM or len(raw) != 32 or not _NAME.fullmatch(name):
            raise ValueError
        return PublicKey(name, raw, None if expires == _NEVER else datetime.date.fromisoformat(expires))
    except (OSError, ValueError, binascii.Error) as error:
        msg = f"{file}: not a public key of meliad-edge; it is the .pub file that: meliad-edge keys make NAME writes"
        raise UsageError(msg) from error


def verify(data: bytes, signature: bytes | None, trusted: list[PublicKey], today: datetime.date) -> PublicKey:
    """Find the trusted key that a signature was made with.

    Args:
        data: What was signed.
        signature: 64 bytes, or None where there is none.
        trusted: Keys this machine accepts.
        today: A key is accepted up to and including its last day.

    Raises:
        SignatureError: There is no signature, no trusted key made it, or that key has expired.
    """
    if signature is None:
        msg = "the bundle is not signed, and this machine only runs signed ones; export it with --sign NAME"
        raise SignatureError(msg)
    for key in trusted:
        try:
            Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, data)
        except InvalidSignature:
            continue
        if key.expires is not None and today > key.expires:
            msg = f"the bundle is signed with key {key}, which expired on {key.expires}; sign it with another"
            raise SignatureError(msg)
        return key
    names = ", ".join(map(str, trusted)) or "none"
    msg = f"no trusted key made the signature; trusted are {names}; trust another with: meliad-edge keys trust FILE.pub"
    raise SignatureError(msg)


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        msg = f"key name {name!r}: use up to 64 letters, digits, dots, dashes and underscores"
        raise UsageError(msg)
    return name
