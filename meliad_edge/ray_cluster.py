"""A Ray cluster for as long as something runs on it."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from meliad_edge.errors import MissingExtraError, UsageError

_CONNECT_S = 5.0


@contextmanager
def ray_cluster(address: str) -> Iterator[Any]:
    """Connect to a cluster, or start one, and leave it at the end.

    Args:
        address: ``"auto"``, ``HOST:PORT`` or ``ray://HOST:PORT`` of a running cluster; ``"local"`` starts one on this
            machine.

    Yields:
        The module ``ray``.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: There is no cluster at that address.
    """
    # Before the import, which reads them; what is wrong comes as exceptions, too.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
    _require_listener(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, next(iter(str(error).strip().splitlines()), type(error).__name__)) from error
    with redirect_stdout(sys.stderr):  # Ray prints what happens in the cluster; standard output is for results
        try:
            yield ray
        finally:
            ray.shutdown()


def _require_listener(address: str) -> None:
    """Ray itself waits ten minutes for a cluster that is not there.

    Raises:
        UsageError: Nobody listens at an address with a port.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not (colon and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, reason: str) -> UsageError:
    return UsageError(f"--ray {address}: {reason}; give auto, HOST:PORT of a running cluster, or local")
