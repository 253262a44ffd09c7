"""The whole exception tree of meliad-edge, with the exit code each error ends a command with.

    MeliadError                1   anything below, or an error of ours with no better name
    ├── UsageError             2   wrong arguments or project file
    ├── DataError              3   a data set cannot be used
    │   └── ImageError         3   one image cannot be used; the rest of a batch goes on
    ├── ModelError             4   weights, a run folder or a detector cannot be used
    ├── BundleError            5   a .meliad file is damaged, foreign or unsafe
    │   └── SignatureError     5   nobody this machine trusts signed it
    ├── ParityError            6   an exported model does not decide as the trained one does
    ├── SourceError            7   a camera or video cannot be read
    ├── MissingExtraError      8   an optional dependency is not installed
    ├── PartialFailureError    9   the work was done, but some inputs failed and were reported
    ├── EngineError           10   a TensorRT engine, the GPU it needs or a Triton server cannot be used
    ├── DeviceError           11   a device cannot be reached, or cannot take or keep a model
    └── RegressionError       12   a model became slower than is allowed

Every message is one line: what failed, the value seen, what to do next.
"""

from __future__ import annotations

from typing import ClassVar


class MeliadError(Exception):
    """Base of every error that meliad-edge raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(MeliadError):
    """The command line or the project file asks for something impossible."""

    exit_code = 2


class DataError(MeliadError):
    """A data set cannot be used as it is."""

    exit_code = 3


class ImageError(DataError):
    """One image cannot be decoded or is refused; other images are not affected."""


class ModelError(MeliadError):
    """Backbone weights, a run folder or a detector cannot be used."""

    exit_code = 4


class BundleError(MeliadError):
    """A ``.meliad`` bundle is damaged, foreign, of an unknown version, or unsafe to open."""

    exit_code = 5


class SignatureError(BundleError):
    """A bundle is not signed, or not by a key that this machine trusts and that has not expired."""


class ParityError(MeliadError):
    """An exported model does not reproduce the decisions of the model it came from."""

    exit_code = 6


class SourceError(MeliadError):
    """A camera, stream or video cannot be opened or read."""

    exit_code = 7


class MissingExtraError(MeliadError):
    """An optional dependency is needed for this verb and is not installed."""

    exit_code = 8

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'meliad-edge[{extra}]'")


class PartialFailureError(MeliadError):
    """The work was done, but some of its inputs failed; each was reported on its own line."""

    exit_code = 9


class EngineError(MeliadError):
    """A TensorRT engine or a model on a Triton server cannot be used: it is not there, belongs to another, or fails."""

    exit_code = 10


class DeviceError(MeliadError):
    """A device cannot be reached, its link was lost, or it cannot take, keep or go back to a model."""

    exit_code = 11


class RegressionError(MeliadError):
    """A model is slower than an earlier measurement allows."""

    exit_code = 12
