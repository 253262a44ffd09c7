"""What we ask the builder for; tests/kernels/test_tensorrt_plugin.py builds real engines with TensorRT for RTX."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from meliad_edge.errors import EngineError, MissingExtraError
from meliad_edge.runtime.engine_file import EngineKey
from meliad_edge.runtime.tensorrt_build import build_engine, open_tensorrt, timing_cache_path, with_plugin

onnx = pytest.importorskip("onnx", reason="the stand-in reads graphs with onnx; install the extra export")

PLUGIN = Path("libmeliad_trt.so")


def frames_model() -> bytes:
    helper, types = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Cast", ["frames"], ["score_raw"], to=types.FLOAT)],
        "frames",
        [helper.make_tensor_value_info("frames", types.UINT8, ["batch", 32, 48, 3])],
        [helper.make_tensor_value_info("score_raw", types.FLOAT, ["batch", 32, 48, 3])],
    )
    return bytes(helper.make_model(graph).SerializeToString())


def build(trt: ModuleType, timing_cache: Path) -> bytes:
    tensorrt = with_plugin(trt, PLUGIN)
    return build_engine(tensorrt, frames_model(), max_batch=4, workspace_mb=64, timing_cache=timing_cache)


def test_the_network_is_typed_for_batches_up_to_the_largest_and_fastest_for_one(
    tensorrt_stand_in: ModuleType, tmp_path: Path
) -> None:
    engine = build(tensorrt_stand_in, tmp_path / "orin.timing")
    assert engine.startswith(tensorrt_stand_in.MARK)
    assert tensorrt_stand_in.get_plugin_registry().libraries == [str(PLUGIN)]
    assert tensorrt_stand_in.built == [
        {
            "strongly_typed": True,
            "tf32": False,
            "workspace": 64 << 20,
            "profile": {"frames": [[1, 32, 48, 3], [1, 32, 48, 3], [4, 32, 48, 3]]},
        }
    ]


def test_measurements_are_kept_for_the_next_build(tensorrt_stand_in: ModuleType, tmp_path: Path) -> None:
    cache = tmp_path / "orin.timing"
    for builds in (1, 2):
        build(tensorrt_stand_in, cache)
        assert cache.read_bytes() == b"measured " * builds
    assert list(tmp_path.iterdir()) == [cache]


def test_measurements_of_no_use_are_replaced(tensorrt_stand_in: ModuleType, tmp_path: Path) -> None:
    cache = tmp_path / "orin.timing"
    cache.write_bytes(b"foreign")
    build(tensorrt_stand_in, cache)
    assert cache.read_bytes() == b"measured "


def test_measurements_are_of_one_tensorrt_and_one_gpu() -> None:
    key = EngineKey(
        model_sha256="a" * 64,
        precision="fp16",
        tensorrt="10.3.0",
        cuda="12.6",
        driver="540.4.0",
        gpu="Orin (nvgpu)",
        compute_capability="8.7",
        plugin_sha256="b" * 64,
    )
    folder = Path("bundles")
    assert timing_cache_path(folder, key) == folder / "tensorrt-10.3.0-orin-nvgpu-sm87.timing"
    others = [{"tensorrt": "11.4.0"}, {"gpu": "H100"}, {"compute_capability": "9.0"}]
    paths = {timing_cache_path(folder, key.model_copy(update=other)) for other in [{}, *others]}
    assert len(paths) == 4
    assert timing_cache_path(folder, key.model_copy(update={"precision": "int8"})) in paths


def test_the_error_is_what_tensorrt_says_in_one_line(tensorrt_stand_in: ModuleType, tmp_path: Path) -> None:
    tensorrt = with_plugin(tensorrt_stand_in, PLUGIN)
    model = onnx.load_model_from_string(frames_model())
    model.functions.append(onnx.helper.make_function("meliad", "F", ["x"], ["x"], [], []))
    with pytest.raises(EngineError) as caught:
        build_engine(
            tensorrt, model.SerializeToString(), max_batch=1, workspace_mb=64, timing_cache=tmp_path / "orin.timing"
        )
    assert str(caught.value) == (
        "TensorRT 10.3.0 cannot parse the graph (the function takes the node from the plugin); see: meliad-edge doctor"
    )
    assert not list(tmp_path.iterdir())


def test_a_builder_that_fails_leaves_nothing(
    tensorrt_stand_in: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_stand_in.Builder, "build_serialized_network", lambda *_: None)
    with pytest.raises(EngineError, match="cannot build an engine"):
        build(tensorrt_stand_in, tmp_path / "orin.timing")
    assert not list(tmp_path.iterdir())


def test_the_plugin_must_have_been_built_and_must_load(
    tensorrt_stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match="the TensorRT plugin was not built; .* pip install"):
        with_plugin(tensorrt_stand_in, None)
    registry = tensorrt_stand_in.get_plugin_registry()
    monkeypatch.setattr(registry, "load_library", lambda _: None)
    with pytest.raises(EngineError, match=r"cannot load broken\.so"):
        with_plugin(tensorrt_stand_in, Path("broken.so"))


def test_tensorrt_must_be_installed_and_new_enough(
    tensorrt_stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        MissingExtraError, match=r"^tensorrt is not installed; run: pip install 'meliad-edge\[tensorrt\]'$"
    ):
        open_tensorrt()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_stand_in)
    monkeypatch.setattr(tensorrt_stand_in, "__version__", "8.6.2")
    with pytest.raises(EngineError, match=r"^TensorRT 8\.6\.2 is too old, 10\.3 \(JetPack 6\) is needed"):
        open_tensorrt()
