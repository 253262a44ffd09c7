"""What a local camera is asked to deliver."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from urllib.parse import parse_qsl

_LARGEST = 16384


@dataclass(frozen=True, slots=True)
class PictureFormat:
    """Size in pixels and frames per second."""

    width: int
    height: int
    fps: int


CSI_FORMAT = PictureFormat(1280, 720, 30)
USB_FORMAT = PictureFormat(640, 480, 30)


def parse_format(query: str, default: PictureFormat) -> PictureFormat:
    """Read ``width=1920&height=1080&fps=30``, each of them optional.

    Raises:
        ValueError: Another name, or no number between 1 and 16384; the message says which.
    """
    known = [field.name for field in fields(PictureFormat)]
    form = default
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            msg = f"{name!r} is not known; give {', '.join(known)}"
            raise ValueError(msg)
        if not (value.isdecimal() and 1 <= int(value) <= _LARGEST):
            msg = f"{name} must be a number between 1 and {_LARGEST}, not {value!r}"
            raise ValueError(msg)
        form = replace(form, **{name: int(value)})
    return form
