"""Users and passwords of cameras, one pair per camera, from a file or the environment, never from the command line."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, urlsplit

from meliad_edge.errors import UsageError
from meliad_edge.stream.uri import SourceKind, SourceUri

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PREFIX = "MELIAD_EDGE_CAMERA_"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a camera asks for; the password is not part of the representation."""

    user: str
    password: str = field(repr=False)


def read_secrets(file: Path) -> dict[str, Credentials]:
    """Read a TOML file with a table per camera name: ``["line 3"]``, ``user = "..."``, ``password = "..."``.

    Raises:
        UsageError: It cannot be read, others may read it too, or it holds something else.
    """
    try:
        with file.open("rb") as opened:
            mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
            if mode & 0o077:
                msg = f"{file}: others may read it (mode {mode:04o}); run: chmod 600 {file}"
                raise UsageError(msg)
            tables = tomllib.load(opened)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        # The message of a decoder may quote the line, which can be the password.
        reason = error.strerror if isinstance(error, OSError) else "not TOML"
        msg = f"{file}: cannot be read ({reason}); write a table per camera: [NAME] with user and password"
        raise UsageError(msg) from None
    secrets = {}
    for name, table in tables.items():
        values = table if isinstance(table, dict) else {}
        if set(values) != {"user", "password"} or not all(isinstance(value, str) for value in values.values()):
            msg = f"{file}: [{name}] must hold user and password, two texts, and nothing else"
            raise UsageError(msg)
        secrets[name] = Credentials(values["user"], values["password"])
    return secrets


def find_credentials(
    camera: str, secrets: Mapping[str, Credentials], environment: Mapping[str, str] = os.environ
) -> Credentials | None:
    """Credentials of a camera: from the file, else from ``MELIAD_EDGE_CAMERA_<NAME>`` as ``user:password``.

    In the variable's name what is not a letter or a digit is ``_``: ``line 3`` reads ``MELIAD_EDGE_CAMERA_LINE_3``.

    Raises:
        UsageError: The variable holds no colon.
    """
    if camera in secrets:
        return secrets[camera]
    variable = _PREFIX + re.sub(r"[^A-Z0-9]", "_", camera.upper())
    value = environment.get(variable)
    if value is None:
        return None
    user, colon, password = value.partition(":")
    if not colon:
        msg = f"{variable}: expected user:password"
        raise UsageError(msg)
    return Credentials(user, password)


def with_credentials(source: SourceUri, credentials: Credentials) -> SourceUri:
    """The source as it is opened with credentials; those in the address itself give way.

    Raises:
        UsageError: It is no network camera.
    """
    if source.kind not in (SourceKind.RTSP, SourceKind.HTTP):
        msg = f"{source.name}: credentials are given, but {source.shown} asks for none; remove them"
        raise UsageError(msg)
    parts = urlsplit(source.address)
    user_info = f"{quote(credentials.user, safe='')}:{quote(credentials.password, safe='')}"
    host_and_port = parts.netloc.rpartition("@")[2]
    return replace(source, address=parts._replace(netloc=f"{user_info}@{host_and_port}").geturl())
