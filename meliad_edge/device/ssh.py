"""Commands on a device over SSH; its host key must be known, and whatever goes wrong becomes one line."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

from meliad_edge import errors
from meliad_edge.errors import DeviceError, MeliadError

_CONNECT_S = 15.0
_KEEP_ALIVE_S = 5.0
_KEEP_ALIVES_LOST = 3
_CHUNK_BYTES = 256 * 1024
# Reads "SHA-256 size" lines, each followed by so many bytes; $$ differs for two that send the same at once.
_RECEIVE = """\
while read -r name size; do
    head -c "$size" > ".$name.$$" && [ "$(sha256sum < ".$name.$$")" = "$name  -" ] && mv ".$name.$$" "$name" ||
        { rm -f ".$name.$$"; exit 1; }
done
"""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a device is.

    Attributes:
        host: As one would give it to ``ssh``: a name, an address, or an entry of ``~/.ssh/config``.
        user: None takes what the configuration says.
        port: None takes what the configuration says.
    """

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``[USER@]HOST[:PORT]``."""
        user, at, rest = text.rpartition("@")
        host, colon, port = rest.rpartition(":")
        if colon and port.isdigit() and ":" not in host:
            return cls(host, user if at else None, int(port))
        return cls(rest, user if at else None)

    def __str__(self) -> str:
        user = "" if self.user is None else f"{self.user}@"
        return f"{user}{self.host}" + ("" if self.port is None else f":{self.port}")


class Link:
    """A connection to one device."""

    def __init__(self, address: Address, connection: asyncssh.SSHClientConnection) -> None:
        self.address = address
        self.sent_bytes = 0
        self._connection = connection

    async def ask(
        self, command: str, data: bytes = b"", on_line: Callable[[dict[str, Any]], None] | None = None
    ) -> Any:
        """Run a command that answers in JSON lines.

        Args:
            command: For the device's shell.
            data: Its standard input.
            on_line: Takes each line about a step, as it comes.

        Returns:
            The line that is about none.

        Raises:
            MeliadError: What the device says went wrong, as its own error.
            DeviceError: The link was lost, or the answer is none.
        """
        answer: Any = None
        with _classified(self.address):
            async with self._connection.create_process(command, encoding=None) as process:
                with suppress(BrokenPipeError):  # it has ended before it read; why, is in what follows
                    process.stdin.write(data)
                    process.stdin.write_eof()
                async for line in process.stdout:
                    value = _parse(line)
                    if on_line is not None and isinstance(value, dict) and "step" in value:
                        on_line(value)
                    else:
                        answer = value or answer
                complaint = _text(await process.stderr.read())
                done = await process.wait()
        if done.returncode is None and done.exit_signal is None:
            raise _lost(self.address)
        self.sent_bytes += len(data)
        if isinstance(answer, dict) and "error" in answer:
            raise _error_of(answer.get("code"))(f"{self.address}: {answer['error']}")
        if answer is None or done.returncode != 0:
            raise _no_answer(self.address, command, done, complaint)
        return answer

    async def send(self, files: Mapping[str, bytes], folder: str) -> None:
        """Send files, each under its SHA-256; it has that name only when it is complete.

        Args:
            files: Contents by SHA-256.
            folder: Of the device.

        Raises:
            DeviceError: One cannot be written there, or the link was lost.
        """
        command = f"umask 022; cd {shlex.quote(folder)} || exit 1; {_RECEIVE}"
        with _classified(self.address):
            async with self._connection.create_process(command, encoding=None) as process:
                with suppress(BrokenPipeError):  # it has ended early; why, is in what follows
                    for sha256, data in files.items():
                        process.stdin.write(f"{sha256} {len(data)}\n".encode())
                        for at in range(0, len(data), _CHUNK_BYTES):
                            process.stdin.write(data[at : at + _CHUNK_BYTES])
                            await process.stdin.drain()
                    process.stdin.write_eof()
                complaint = _text(await process.stderr.read()).strip()
                done = await process.wait()
        if done.returncode is None:
            raise _lost(self.address)
        if done.returncode != 0:
            reason = complaint.splitlines()[-1].rpartition(": ")[2] if complaint else "a file was damaged on its way"
            msg = f"{self.address}: {folder} cannot be written ({reason}); what runs was not changed, make room there"
            raise DeviceError(msg)
        self.sent_bytes += sum(map(len, files.values()))


@asynccontextmanager
async def connect(address: Address, known_hosts: Path | None = None) -> AsyncIterator[Link]:
    """Connect to a device, as ``~/.ssh/config`` and the SSH agent say.

    Args:
        address: The device.
        known_hosts: File with its host key; None takes ``~/.ssh/known_hosts``.

    Raises:
        DeviceError: It cannot be reached, its host key is not known or another one, or it lets nobody in.
    """
    options: dict[str, Any] = {}
    if address.user is not None:
        options["username"] = address.user
    if address.port is not None:
        options["port"] = address.port
    if known_hosts is not None:
        options["known_hosts"] = str(known_hosts)
    with _classified(address):
        connection = await asyncssh.connect(
            address.host,
            connect_timeout=_CONNECT_S,
            keepalive_interval=_KEEP_ALIVE_S,
            keepalive_count_max=_KEEP_ALIVES_LOST,
            **options,
        )
    async with connection:
        yield Link(address, connection)


class _classified:
    """Turns what goes wrong on a link into one line of ours."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        address = self._address
        port = "" if address.port is None else f"-p {address.port} "
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            msg = (
                f"{address}: its host key is not the one that is known, or none is known ({_reason(error)}); "
                f"compare it on the device, then: ssh-keyscan {port}{address.host} >> ~/.ssh/known_hosts"
            )
        elif isinstance(error, asyncssh.PermissionDenied):
            msg = f"{address}: our keys do not let us in ({_reason(error)}); try: ssh-copy-id {port}{_login(address)}"
        elif isinstance(error, asyncssh.ConnectionLost | ConnectionResetError | BrokenPipeError):
            raise _lost(address) from error
        elif isinstance(error, TimeoutError | asyncio.TimeoutError):
            msg = f"{address}: no answer in {_CONNECT_S:.0f} s; is it on, and on this network? try: ping {address.host}"
        elif isinstance(error, asyncssh.Error | OSError):
            msg = f"{address}: cannot be reached ({_reason(error)}); try: ssh {port}{_login(address)}"
        else:
            return
        raise DeviceError(msg) from error


def _login(address: Address) -> str:
    return address.host if address.user is None else f"{address.user}@{address.host}"


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


def _lost(address: Address) -> DeviceError:
    return DeviceError(
        f"{address}: the link was lost; what runs there goes on, ask it with: meliad-edge status {address}"
    )


def _no_answer(address: Address, command: str, done: asyncssh.SSHCompletedProcess, complaint: str) -> DeviceError:
    last = (complaint.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.exit_signal is not None:
        last = f"killed by SIG{done.exit_signal[0]}"
    if done.returncode == 127:
        return DeviceError(f"{address}: {last[:200]}; Python 3.10 or newer is needed there: sudo apt install python3")
    return DeviceError(f"{address}: ended without an answer ({last[:200]}); ask it with: meliad-edge status {address}")


def _error_of(code: object) -> type[MeliadError]:
    """The error whose exit code the device ended with."""
    known = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, MeliadError)]
    return next((e for e in known if e.exit_code == code and e is not errors.MissingExtraError), DeviceError)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _text(data: object) -> str:
    return bytes(data).decode(errors="replace") if isinstance(data, bytes | bytearray) else ""
