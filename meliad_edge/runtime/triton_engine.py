"""A model on a Triton server, over gRPC: frames there, scores, maps and nearest prototypes back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, model_config_pb2
from tritonclient.utils import InferenceServerException

from meliad_edge.errors import EngineError
from meliad_edge.runtime.engine import RawScores
from meliad_edge.runtime.onnxruntime_engine import OUTPUT_NAMES
from meliad_edge.runtime.triton_model import DIGEST, FRAMES, TritonAddress

_TYPES: dict[str, tuple[str, DTypeLike]] = {
    "score_raw": ("FP32", np.dtype("<f4")),
    "map_raw": ("FP32", np.dtype("<f4")),
    "nearest": ("INT64", np.dtype("<i8")),
}
TIMEOUT_S = 30.0


class TritonEngine:
    """Scores frames on a server that has the graph of a bundle.

    It is asked for one version by number: a server that goes over to another one fails a call, it does not change
    decisions unnoticed. It may be used from any thread.

    Args:
        address: Where the model is.
        name: Of the model there, unless the address names another.
        digests: SHA-256 of the graphs that may decide.
        input_hw: Height and width in pixels of the frames that they take.
        grid_hw: Height and width of their maps.
        timeout_s: Longest time that one answer may take.

    Attributes:
        model_sha256: Which of the digests the server has.

    Raises:
        EngineError: The server cannot be reached, or has no such model, or one that is another or not ready.
    """

    def __init__(
        self,
        address: TritonAddress,
        name: str,
        digests: Collection[str],
        *,
        input_hw: tuple[int, int],
        grid_hw: tuple[int, int],
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._address = address
        self._model = address.model or name
        self._timeout_s = timeout_s
        self._input_size_hw = input_hw
        self._shapes: Mapping[str, tuple[int, ...]] = {
            "score_raw": (1,),
            "map_raw": grid_hw,
            "nearest": (2, *grid_hw),
        }
        self._client = InferenceServerClient(address.target, ssl=address.is_encrypted)
        config = self._read_config()
        self.model_sha256: str = config.parameters[DIGEST].string_value
        if self.model_sha256 not in digests:
            theirs = self.model_sha256[:12] or "none that says what it was made of"
            ours = " or ".join(digest[:12] for digest in digests)
            self._refuse(
                f"serves the graph {theirs}, the bundle has {ours}",
                "export the bundle with --format triton, or name another model",
            )
        self._check_tensors(config)
        self._version = self._only_version(config)
        self._max_batch: int = config.max_batch_size
        # One of the two may be left out of a configuration.
        self._platform: str = config.platform or config.backend

    @property
    def name(self) -> str:
        """What executes the model."""
        return f"triton-{self._platform}"

    @property
    def input_size_hw(self) -> tuple[int, int]:
        """Height and width in pixels of the frames that :meth:`infer` takes."""
        return self._input_size_hw

    def infer(self, frames: NDArray[np.uint8]) -> RawScores:
        """Score any number of RGB frames, uint8 [N, H, W, 3], in batches that the server takes.

        Raises:
            EngineError: The server fails, does not answer in time, or answers with something else than scores.
        """
        starts = range(0, len(frames), self._max_batch)
        batches = [self._infer_batch(frames[start : start + self._max_batch]) for start in starts]
        return RawScores(*(np.concatenate([batch[name] for batch in batches]) for name in OUTPUT_NAMES))

    def _read_config(self) -> Any:
        """What the server says of the model, once it is ready."""
        timeout_s = self._timeout_s
        try:
            self._client.is_server_live(client_timeout=timeout_s)
        except InferenceServerException as error:
            self._refuse(_reason(error, timeout_s), "check the address, and whether the server runs", error)
        try:
            if not self._client.is_model_ready(self._model, client_timeout=timeout_s):
                self._refuse("is not ready", "see the log of the server, and the names of its models")
            return self._client.get_model_config(self._model, client_timeout=timeout_s).config
        except InferenceServerException as error:
            self._refuse(_reason(error, timeout_s), "see the log of the server, and the names of its models", error)

    def _check_tensors(self, config: Any) -> None:
        """Refuse a model whose inputs and outputs are not those of the bundle."""
        height, width = self._input_size_hw
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {FRAMES: ("TYPE_UINT8", (height, width, 3))}
        wanted |= {name: (f"TYPE_{_TYPES[name][0]}", self._shapes[name]) for name in OUTPUT_NAMES}
        served = {
            tensor.name: (model_config_pb2.DataType.Name(tensor.data_type), tuple(tensor.dims))
            for tensor in (*config.input, *config.output)
        }
        for name in sorted(wanted.keys() | served.keys()):
            if served.get(name) != wanted.get(name):
                theirs, ours = (_describe(tensors.get(name)) for tensors in (served, wanted))
                self._refuse(
                    f"has {theirs} as {name}, the bundle {ours}", "export the bundle again with --format triton"
                )
        if config.max_batch_size < 1:
            self._refuse("takes no batches", "export the bundle again with --format triton")

    def _only_version(self, config: Any) -> str:
        versions = config.version_policy.specific.versions
        if len(versions) != 1:
            self._refuse(
                f"serves {len(versions) or 'any'} versions, and its digest is that of one",
                "export the bundle again with --format triton",
            )
        return str(versions[0])

    def _infer_batch(self, frames: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        tensor = InferInput(FRAMES, list(frames.shape), "UINT8")
        tensor.set_data_from_numpy(np.ascontiguousarray(frames))
        try:
            result = self._client.infer(
                self._model,
                [tensor],
                model_version=self._version,
                outputs=[InferRequestedOutput(name) for name in OUTPUT_NAMES],
                client_timeout=self._timeout_s,
            )
        except InferenceServerException as error:
            self._refuse(_reason(error, self._timeout_s), "see the log of the server", error)
        return self._read_answer(result.get_response(), len(frames))

    def _read_answer(self, response: Any, count: int) -> dict[str, NDArray[Any]]:
        """The three outputs of an answer, if it is what was asked for; the score loses its axis of one."""
        advice = "see whether something between here and the server changes answers"
        if response.model_version != self._version:
            self._refuse(f"answered with version {response.model_version} instead of {self._version}", advice)
        names = [output.name for output in response.outputs]
        if sorted(names) != sorted(OUTPUT_NAMES) or len(response.raw_output_contents) != len(names):
            received = f"{sorted(names)} in {len(response.raw_output_contents)} parts"
            self._refuse(f"answered with {received} instead of {sorted(OUTPUT_NAMES)}", advice)
        outputs = dict(zip(names, response.outputs, strict=True))
        contents = dict(zip(names, response.raw_output_contents, strict=True))
        arrays = {}
        for name in OUTPUT_NAMES:
            datatype, element = _TYPES[name]
            wanted = (datatype, (count, *self._shapes[name]))
            theirs = (outputs[name].datatype, tuple(outputs[name].shape))
            if theirs != wanted:
                self._refuse(f"answered with {_describe(theirs)} as {name} instead of {_describe(wanted)}", advice)
            shape = wanted[1]
            needed = int(np.prod(shape)) * np.dtype(element).itemsize
            if len(contents[name]) != needed:
                self._refuse(f"answered with {len(contents[name])} bytes as {name} instead of {needed}", advice)
            arrays[name] = np.frombuffer(contents[name], element).reshape(shape)
            if datatype == "FP32" and not np.isfinite(arrays[name]).all():
                self._refuse(f"answered with a {name} that is not finite", advice)
        arrays["score_raw"] = arrays["score_raw"][:, 0]
        return arrays

    def _refuse(self, what: str, advice: str, cause: Exception | None = None) -> NoReturn:
        msg = f"{self._address.shown}: model {self._model} {_printable(what)}; {advice}"
        raise EngineError(msg) from cause


def _describe(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if tensor is None else f"{tensor[0].removeprefix('TYPE_')} {list(tensor[1])}"


def _reason(error: InferenceServerException, timeout_s: float) -> str:
    """Why a call failed, in one line."""
    status = str(error.status()).removeprefix("StatusCode.")
    if status == "DEADLINE_EXCEEDED":
        return f"cannot be used (no answer within {timeout_s:g} s)"
    return f"cannot be used ({status}: {error.message()})"


def _printable(text: str) -> str:
    """What a server said, for the one line of an error: short, and nothing a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split())[:300])
