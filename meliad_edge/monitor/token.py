"""The token that opens the page of a watch to other machines."""

from __future__ import annotations

from pathlib import Path

from meliad_edge.errors import UsageError

_SMALLEST_TOKEN = 16
_LARGEST_TOKEN = 4096


def read_token(file: Path) -> str:
    """Read the token that whoever looks at the page must know.

    Args:
        file: Holds the token and nothing else but white space around it.

    Raises:
        UsageError: It cannot be read, or is no secret of a sensible length.
    """
    try:
        with file.open("rb") as opened:
            token = opened.read(_LARGEST_TOKEN + 1).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        msg = f"--token-file {file}: cannot be read ({reason})"
        raise UsageError(msg) from error
    if not _SMALLEST_TOKEN <= len(token) <= _LARGEST_TOKEN or not token.isascii() or not token.isprintable():
        msg = (
            f"--token-file {file}: a token has {_SMALLEST_TOKEN} to {_LARGEST_TOKEN} printable ASCII characters; "
            f"make one with: openssl rand -hex 24"
        )
        raise UsageError(msg)
    return token
