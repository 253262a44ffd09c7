"""Opens damaged and forged bundles without end: each opens or is refused in one line, quickly, and that is all.

    python tests/fuzz/fuzz_bundle.py --seconds 600 --seed 1 --keep tests/fuzz/corpus

Inputs that break the rule are kept; test_corpus.py replays them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import resource
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from meliad_edge.bundle import GoldenFrame, Manifest, open_bundle, write_bundle
from meliad_edge.calibrate import calibrate
from meliad_edge.errors import BundleError
from meliad_edge.exemplars import Exemplar
from meliad_edge.precision import DEFAULT_LIMITS

LONGEST_LINE = 600
SLOWEST_S = 2.0
UNLISTED = ("manifest.json", "manifest.sig")
BYTES = [
    b"\0", b"\xff", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80" * 9 + b"\1", b"\xff" * 10, b"9" * 400, b"-1", b"1e999",
    b"NaN", b"null", b"\n", b"[", b'{"', b"\x0a\x00", b"ORTM", b"\x00\x00\x00\x80",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**400, 1.5, 1e308, float("nan"), float("inf"), "", "x" * 5000, "\n\x1b[2J",
    [], {}, [[]], ["a"], {"a": 1}, "\ud800",
]  # fmt: skip
NAMES = ["golden/009.png", "../x", "model.int8.onnx", "a" * 300, "manifest.sig", "golden/000.png/"]

Parts = dict[str, bytes]


def verdict(path: Path) -> str:
    """``"opened"``, ``"refused"``, or what is wrong with how a bundle was refused."""
    start = time.perf_counter()
    try:
        open_bundle(path)
    except BundleError as error:
        line = str(error)
        if not line.isprintable():
            return f"not printable: {line!r}"
        if len(line) > LONGEST_LINE:
            return f"{len(line)} characters: {line[:100]}"
        result = "refused"
    except Exception as error:
        return f"{type(error).__name__} instead of BundleError: {error}"
    else:
        result = "opened"
    seconds = time.perf_counter() - start
    return result if seconds < SLOWEST_S else f"{seconds:.1f} s to be {result}"


class Mutator:
    """Makes inputs of two valid bundles: changed bytes, cut and spliced files, changed parts with true digests."""

    def __init__(self, seed: int, folder: Path) -> None:
        self._random = random.Random(seed)
        self._bundles = [path.read_bytes() for path in _write_bundles(folder)]
        self._parts = [_read_parts(data) for data in self._bundles]
        self._ways: list[Callable[[int], bytes]] = [
            lambda which: self._change(self._bundles[which]),
            self._cut,
            self._splice,
            self._change_directory,
            self._change_part,
            self._change_json,
            self._change_graph,
            self._exchange_part,
        ]

    def __iter__(self) -> Iterator[bytes]:
        while True:
            yield self._random.choice(self._ways)(self._random.randrange(2))

    def _cut(self, which: int) -> bytes:
        data = self._bundles[which]
        return data[: self._random.randrange(len(data))]

    def _splice(self, which: int) -> bytes:
        other = self._bundles[1 - which]
        return self._cut(which) + other[self._random.randrange(len(other)) :]

    def _change_directory(self, which: int) -> bytes:
        data = bytearray(self._bundles[which])
        data[-self._random.randrange(1, 1200)] = self._random.randrange(256)
        return bytes(data)

    def _change_part(self, which: int) -> bytes:
        parts = dict(self._parts[which])
        name = self._random.choice(list(parts))
        return self._pack(parts | {name: self._change(parts[name])}, true=name != "manifest.json")

    def _change_json(self, which: int) -> bytes:
        parts = dict(self._parts[which])
        name = self._random.choice([name for name in parts if name.endswith(".json")])
        changed = json.dumps(self._change_value(json.loads(parts[name]))).encode()
        return self._pack(parts | {name: changed}, true=self._random.random() < 0.8)

    def _change_graph(self, which: int) -> bytes:
        parts = self._parts[which]
        return self._pack(parts | {"model.fp32.onnx": self._change(parts["model.fp32.onnx"])})

    def _exchange_part(self, which: int) -> bytes:
        parts, other = dict(self._parts[which]), self._parts[1 - which]
        name, chance = self._random.choice(sorted({*parts, *other})), self._random.random()
        if chance < 0.4:
            parts.pop(name, None)
        elif chance < 0.8:
            parts[name] = other.get(name, b"")
        else:
            parts[self._random.choice(NAMES)] = self._random.choice(BYTES)
        return self._pack(parts, true=self._random.random() < 0.8)

    def _change(self, data: bytes) -> bytes:
        changed, pick = bytearray(data), self._random
        for _ in range(pick.choice((1, 1, 2, 4, 16))):
            way, at = pick.randrange(6), pick.randrange(len(changed) + 1)
            if way < 2 and at < len(changed):
                changed[at] = pick.randrange(256)
            elif way == 2 and at < len(changed):
                changed[at] ^= 1 << pick.randrange(8)
            elif way == 3:
                changed[at : at + pick.choice((0, 1, 4))] = pick.choice(BYTES)
            elif way == 4:
                del changed[at : at + pick.choice((1, 1, 4, 64))]
            else:
                start = pick.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + pick.randrange(1, 64)]
        return bytes(changed)

    def _change_value(self, value: Any) -> Any:
        pick = self._random
        if pick.random() < 0.25 or not isinstance(value, dict | list) or not value:
            return pick.choice(VALUES)
        chance = pick.random()
        if isinstance(value, dict):
            key = pick.choice(list(value))
            if chance < 0.15:
                return {name: inner for name, inner in value.items() if name != key}
            if chance < 0.25:
                return value | {str(pick.choice(VALUES))[:50]: pick.choice(VALUES)}
            return value | {key: self._change_value(value[key])}
        at = pick.randrange(len(value))
        if chance < 0.15:
            return value[:at] + value[at + 1 :]
        if chance < 0.3:
            return value * pick.choice((2, 50))
        return [*value[:at], self._change_value(value[at]), *value[at + 1 :]]

    def _pack(self, parts: Parts, *, true: bool = True) -> bytes:
        """An archive; with a manifest that lists its parts truly where that is possible."""
        try:
            manifest = json.loads(parts["manifest.json"]) if true else None
        except (KeyError, ValueError):
            manifest = None
        if isinstance(manifest, dict):
            manifest["parts"] = {
                name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
                for name, data in parts.items()
                if name not in UNLISTED
            }
            parts = parts | {"manifest.json": json.dumps(manifest).encode()}
        packed = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(packed, "w") as archive:
            warnings.simplefilter("ignore")  # of parts that are there twice
            for name, data in parts.items():
                archive.writestr(name, data)
            if parts and self._random.random() < 0.05:
                archive.writestr(self._random.choice(list(parts)), b"x")
        return packed.getvalue()


def _write_bundles(folder: Path) -> tuple[Path, Path]:
    numbers = np.random.default_rng(1)
    first, second = folder / "first.meliad", folder / "second.meliad"
    manifest = Manifest(
        name="first", detector="meliad", backbone="none", input_hw=(32, 48), grid_hw=(2, 3), top_cells=1,
        precisions={"fp32": DEFAULT_LIMITS["fp32"]}, created_by="fuzz", dataset="none", licence="none",
        train_normals=3, shots=2,
    )  # fmt: skip
    golden = [
        GoldenFrame(
            name=f"{index}.png",
            defect="good",
            frame=numbers.integers(0, 256, (32, 48, 3), np.uint8),
            score=0.5,
            map=numbers.normal(size=(2, 3)).astype(np.float32),
        )
        for index in range(2)
    ]
    patches = [
        Exemplar("crack", f"{index}.png", index, 2, 24, 24, numbers.integers(0, 256, (48, 48, 3), np.uint8))
        for index in range(3)
    ]
    models = {"fp32": _small_graph()}
    write_bundle(first, manifest, models, calibrate([0.5, 1.25, 0.75]), golden, patches)  # type: ignore[arg-type]
    other = manifest.model_copy(update={"name": "second"})
    write_bundle(
        second,
        other,
        models,
        calibrate([1.0, 2.0]),
        golden[:1],
        patches[:1],
        sign=lambda data: bytes(64),  # type: ignore[arg-type]
    )
    return first, second


def _small_graph() -> bytes:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("meliad", 1)]
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "w"], ["sum"]),
            helper.make_node("PatchEntropyScore", ["sum"], ["y"], domain="meliad"),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [helper.make_tensor("w", TensorProto.FLOAT, [4], np.zeros(4, np.float32).tobytes(), raw=True)],
    )
    body = helper.make_function(
        "meliad", "PatchEntropyScore", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], opsets[:1]
    )
    model = helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def _read_parts(data: bytes) -> Parts:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def main() -> None:
    """Run for a while and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for inputs that break the rule")
    arguments = parser.parse_args()
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory(prefix="meliad-fuzz-") as name:
        path = Path(name) / "input.meliad"
        for data in Mutator(arguments.seed, Path(name)):
            if time.monotonic() > end:
                break
            path.write_bytes(data)
            found = verdict(path)
            outcomes[found if found in ("opened", "refused") else "WRONG"] += 1
            if found not in ("opened", "refused"):
                print(found)
                if arguments.keep is not None:
                    (arguments.keep / f"{hashlib.sha256(data).hexdigest()[:12]}.meliad").write_bytes(data)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"seed {arguments.seed}: {sum(outcomes.values()):,} inputs, {dict(outcomes)}, at most {peak_mb:.0f} MB")


if __name__ == "__main__":
    main()
