"""A digest of the code that a result depends on, so that a changed method never reuses an old result."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import meliad_edge

_PACKAGE = meliad_edge.__name__
_ROOT = Path(meliad_edge.__file__).parent


@functools.cache
def source_digest(*modules: str, root: Path = _ROOT) -> str:
    """Digest of the files of some modules and of all modules of ours that they import, directly or not.

    Files are read once per process. The ``__init__`` files of packages do not count: they gather modules, which count
    where they are imported by name; so a change to one detector leaves the results of the others valid.

    Args:
        modules: Full names, such as ``meliad_edge.train``.
        root: Folder of our package.

    Returns:
        32 hexadecimal digits.
    """
    sources: dict[str, bytes] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in sources and (file := _file(module, root)) is not None:
            sources[module] = file.read_bytes()
            waiting += _imported(sources[module])
    digest = hashlib.blake2b(digest_size=16)
    for module, source in sorted(sources.items()):
        digest.update(f"{module} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def _imported(source: bytes) -> Iterator[str]:
    """What a module imports, names that may be modules included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file(module: str, root: Path) -> Path | None:
    """The file of a module of ours; None for packages, for names inside modules, and for what is not ours."""
    package, *parts = module.split(".")
    file = root.joinpath(*parts).with_suffix(".py")
    return file if package == _PACKAGE and parts and file.is_file() else None
