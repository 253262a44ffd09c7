"""What an ONNX graph from a file must not do, found without an ONNX library: a device has none.

A graph may name files of the machine as its weights ("external data"), operators of libraries, and functions that
call functions, which unfold without bound. A bundle of ours does none of it. The reader walks the protobuf encoding
of ``onnx.proto`` and looks at nothing but that: how much memory a small, correct graph asks for when it runs is not
seen here, and signatures are what protects against that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "meliad"})
_MAX_DEPTH = 16
# The default model in INT8, the largest of ours, has 6,400.
_MAX_FIELDS = 200_000
_OURS = "meliad"
# Of functions: one node in front, one at the end.
_MAX_CALLS = 2
# At byte 4 it makes ONNX Runtime take a file for a model in its own format, which is not looked into here.
_ORT_MARK = b"ORTM"
_EXTERNAL = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class _Message:
    """Which fields of a message of ``onnx.proto`` hold messages to walk into, and which are looked at."""

    inner: Mapping[int, str] = field(default_factory=dict)
    domain: int | None = None
    data_location: int | None = None
    external_data: int | None = None


_MESSAGES = {
    "Model": _Message({7: "Graph", 8: "OperatorSetId", 25: "Function"}),
    "OperatorSetId": _Message(domain=1),
    "Graph": _Message({1: "Node", 5: "Tensor", 15: "SparseTensor"}),
    "Function": _Message({7: "Node", 9: "OperatorSetId", 11: "Attribute"}, domain=10),
    "Node": _Message({5: "Attribute"}, domain=7),
    "Attribute": _Message(
        {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    ),
    "SparseTensor": _Message({1: "Tensor", 2: "Tensor"}),
    "Tensor": _Message(data_location=14, external_data=13),
}


def check_graph(model: bytes) -> None:
    """Refuse a graph that reads files or needs operators of libraries other than ours.

    Args:
        model: The serialised ONNX model.

    Raises:
        ValueError: Says what it does, or that it is no ONNX model.
    """
    if model[4:8] == _ORT_MARK:
        msg = "the graph is in the format of ONNX Runtime, not an ONNX model"
        raise ValueError(msg)
    pending = [("Model", 0, len(model), 0, False)]
    fields = calls = 0
    while pending:
        name, start, end, depth, in_function = pending.pop()
        if depth > _MAX_DEPTH:
            msg = f"the graph is nested more than {_MAX_DEPTH} deep"
            raise ValueError(msg)
        message = _MESSAGES[name]
        domains = set()
        for number, kind, value, value_end in _fields(model, start, end):
            fields += 1
            if fields > _MAX_FIELDS:
                msg = f"the graph has more than {_MAX_FIELDS} fields"
                raise ValueError(msg)
            if number == message.external_data or (number == message.data_location and value == _EXTERNAL):
                msg = "the graph reads its weights from other files"
                raise ValueError(msg)
            if kind != _BYTES:
                continue
            if number == message.domain:
                domains.add(_domain(model[value:value_end]))
            elif number in message.inner:
                inner = message.inner[number]
                pending.append((inner, value, value_end, depth + 1, in_function or inner == "Function"))
        if name == "Function" and domains != {_OURS}:
            msg = f"the graph defines functions outside the domain {_OURS}"
            raise ValueError(msg)
        if name == "Node" and _OURS in domains:
            calls += 1
            if in_function or calls > _MAX_CALLS:
                msg = f"the graph calls functions more than {_MAX_CALLS} times, or from functions"
                raise ValueError(msg)


def _domain(encoded: bytes) -> str:
    domain = encoded.decode("utf-8", "replace")
    if domain not in DOMAINS:
        msg = f"the graph needs operators of {domain[:40]!r}"
        raise ValueError(msg)
    return domain


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number and kind of each field, and its value, or where its bytes start and end."""
    at = start
    while at < end:
        key, at = _varint(data, at, end)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at, end)
            yield number, kind, value, at
            continue
        if kind == _BYTES:
            size, at = _varint(data, at, end)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            msg = "the graph is not an ONNX model"
            raise ValueError(msg)
        if size > end - at:
            msg = "the graph is cut short"
            raise ValueError(msg)
        yield number, kind, at, at + size
        at += size


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            msg = "the graph is cut short"
            raise ValueError(msg)
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    msg = "the graph is not an ONNX model"
    raise ValueError(msg)
