"""Our engine and PyCUDA, both real, on a driver that keeps device memory on the heap and works only when waited for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.workshop

Run = Callable[..., "subprocess.CompletedProcess[str]"]

# ONNX Runtime adds in another order in another batch; scores and cells go into the hundreds.
TOLERANCE = 1e-3
MAX_BATCH = 4


@pytest.fixture(scope="module")
def built(bundle_file: Path, on_stand_ins: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine beside it. Read only."""
    model = tmp_path_factory.mktemp("built") / "metal.meliad"
    shutil.copy(bundle_file, model)
    done = on_stand_ins("command", "build", model, "--precision", "fp32", "--max-batch", MAX_BATCH, "--json")
    assert done.returncode == 0, done.stderr
    (model.parent / "said.json").write_text(done.stdout)
    return model


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """Such a bundle to change."""
    shutil.copytree(built.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / built.name


def said_by(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    assert "PyCUDA" not in done.stderr  # it complains there of what could not be cleaned up
    return json.loads(done.stdout)


def error_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1].removeprefix("meliad-edge: ")


def same(difference: dict[str, float]) -> bool:
    return max(difference["score"], difference["map"]) < TOLERANCE and difference["nearest"] == 0


def test_build_leaves_an_engine_its_side_file_and_measurements(built: Path) -> None:
    names = {path.name for path in built.parent.iterdir()} - {"said.json", "built.json"}
    assert names == {
        "metal.meliad",
        "metal.fp32.engine",
        "metal.fp32.engine.json",
        "tensorrt-10.3.0-stand-in-orin-sm87.timing",
    }
    said = json.loads((built.parent / "said.json").read_text())
    key = json.loads((built.parent / "metal.fp32.engine.json").read_text())["key"]
    assert key.items() <= said.items()
    assert (said["gpu"], said["compute_capability"], said["cuda"]) == ("Stand-in Orin", "8.7", "12.6")
    assert said["parity"]["passed"]


def test_batches_of_any_size_score_as_in_onnx_runtime(built: Path, on_stand_ins: Run) -> None:
    said = said_by(on_stand_ins("batches", built))
    empty = said["found"].pop("8: 0")
    assert [shape[0] for shape in empty] == [0, 0, 0]
    for call, difference in said["found"].items():
        assert same(difference), (call, difference)
    assert max(difference["spread"] for difference in said["found"].values()) > 100 * TOLERANCE
    # Frames of 1, 1, 3, 4, 4, 9, 14 and 2 in batches of at most 4.
    assert said["executed"] == [1, 1, 3, 4, 4, 4, 4, 1, 4, 4, 4, 2, 2]
    assert said["name"] == "tensorrt-10.3.0+kernel"


def test_a_frame_costs_no_allocation_one_wait_and_one_graph(built: Path, on_stand_ins: Run) -> None:
    said = said_by(on_stand_ins("steady", built))
    frames = said["frames"]
    assert said["calls"] == {
        "cuMemAlloc": 0,
        "cuMemHostAlloc": 0,
        "cuStreamBeginCapture": 0,
        "cuStreamSynchronize": 0,
        "cuLaunchHostFunc": 0,  # the network, were it not in the graph
        "cuGraphLaunch": frames,
        "cuMemcpyHtoDAsync": frames,
        "cuMemcpyDtoHAsync": 3 * frames,
        "cuEventSynchronize": frames,
    }
    assert said["graph"] == [False, True]
    assert said["first_unchanged"]


def test_one_batch_is_filled_while_another_is_computed(built: Path, on_stand_ins: Run) -> None:
    assert said_by(on_stand_ins("overlap", built)) == {"cuMemcpyHtoDAsync": 2}


def test_without_a_graph_it_scores_all_the_same_and_says_so_once(built: Path, on_stand_ins: Run) -> None:
    said = said_by(on_stand_ins("without_graph", built))
    assert all(same(difference) for difference in said["found"])
    assert not said["graph"]
    (line,) = said["log"]
    assert line.startswith("no CUDA graph (TensorRT 10.3.0 cannot execute the engine")
    assert (said["cuStreamBeginCapture"], said["cuStreamEndCapture"], said["cuGraphLaunch"]) == (1, 1, 0)


def test_it_may_be_used_and_closed_in_another_thread(built: Path, on_stand_ins: Run) -> None:
    said = said_by(on_stand_ins("other_thread", built))
    assert same(said["difference"])
    assert (said["contexts"], said["contexts_here"]) == (0, 0)
    blocks_before, blocks_after = said["blocks"]
    assert blocks_before > 0
    assert blocks_after == 0
    made, *destroyed = said["graphs"].values()
    assert made > 0
    assert destroyed == [made, made]


def test_what_cuda_complains_about_is_one_error_of_ours(built: Path, on_stand_ins: Run) -> None:
    said = said_by(on_stand_ins("failing", built))
    assert len(said["messages"]) == 8
    for name, (kind, message) in said["messages"].items():
        assert kind == "EngineError"
        assert f"failed on the GPU ({name} failed: " in message
        assert message.endswith("; see: meliad-edge doctor, or use --engine onnxruntime")
    assert said["contexts"] == 0
    assert same(said["difference"])


def test_predict_takes_the_engine_that_was_built(built: Path, texture_set: Path, on_stand_ins: Run) -> None:
    image = texture_set / "test/scratch/000.png"
    scores = {}
    for choice in ("auto", "tensorrt", "onnxruntime"):
        said = said_by(on_stand_ins("command", "predict", built, image, "--json", "--engine", choice))
        assert said["engine"].startswith("onnxruntime" if choice == "onnxruntime" else "tensorrt-10.3.0")
        assert said["precision"] == "fp32"
        scores[choice] = said["predictions"][0]["score"]
    assert scores["auto"] == scores["tensorrt"] == pytest.approx(scores["onnxruntime"], abs=TOLERANCE)


def test_without_an_engine_predict_takes_onnx_runtime_unless_told(
    bundle_file: Path, texture_set: Path, on_stand_ins: Run
) -> None:
    image = texture_set / "test/scratch/000.png"
    done = on_stand_ins("command", "predict", bundle_file, image, "--json")
    assert said_by(done)["engine"].startswith("onnxruntime")
    assert "TensorRT" not in done.stderr
    line = error_line(on_stand_ins("command", "predict", bundle_file, image, "--engine", "tensorrt"), 10)
    engine = bundle_file.with_suffix(".fp32.engine")
    assert line == f"{engine}: no such file; run: meliad-edge build {bundle_file} --precision fp32"


def test_an_engine_of_another_gpu_is_refused_or_passed_over(built: Path, texture_set: Path, on_stand_ins: Run) -> None:
    image = texture_set / "test/scratch/000.png"
    arguments = ("command", "predict", built, image, "--json")
    reason = (
        f"{built.with_suffix('.fp32.engine')}: built for gpu Stand-in Orin, here it is Stand-in Thor; "
        f"run: meliad-edge build {built} --precision fp32"
    )
    done = on_stand_ins(*arguments, "--engine", "tensorrt", CUDA_STAND_IN_NAME="Stand-in Thor")
    assert error_line(done, 10) == reason
    done = on_stand_ins(*arguments, CUDA_STAND_IN_NAME="Stand-in Thor")
    assert said_by(done)["engine"].startswith("onnxruntime")
    assert f"{reason}; ONNX Runtime is used instead" in done.stderr


def test_an_engine_of_another_model_is_refused(bundle: Path, small_run: Path, invoke: Any, on_stand_ins: Run) -> None:
    assert invoke("export", small_run, "--out", bundle).code == 0
    done = on_stand_ins("command", "predict", bundle, "none.png", "--engine", "tensorrt")
    assert f"{bundle.with_suffix('.fp32.engine')}: built for model_sha256 " in error_line(done, 10)


def test_what_tensorrt_does_not_recognise_is_refused(bundle: Path, on_stand_ins: Run) -> None:
    engine, side = bundle.with_suffix(".fp32.engine"), bundle.with_suffix(".fp32.engine.json")
    fields = json.loads(side.read_text())
    engine.write_bytes(b"no engine")
    fields["engine_sha256"] = hashlib.sha256(b"no engine").hexdigest()
    side.write_text(json.dumps(fields))
    done = on_stand_ins("command", "predict", bundle, "none.png", "--engine", "tensorrt")
    assert error_line(done, 10).startswith("TensorRT 10.3.0 cannot load the engine (magic tag does not match)")


def test_an_engine_that_decides_otherwise_is_not_kept(bundle: Path, on_stand_ins: Run) -> None:
    engine = bundle.with_suffix(".fp32.engine")
    before = engine.read_bytes()
    done = on_stand_ins("command", "build", bundle, "--precision", "fp32", TENSORRT_STAND_IN_SCALE="1.5")
    assert "does not decide as the trained model" in error_line(done, 6)
    assert engine.read_bytes() == before
    assert not list(bundle.parent.glob("*.partial"))


def test_build_names_what_the_bundle_lacks(bundle: Path, on_stand_ins: Run) -> None:
    line = error_line(on_stand_ins("command", "build", bundle), 5)
    assert line == "the bundle carries no fp16 graph, only fp32; export it with --precision fp16"


def test_check_replays_it_beside_onnx_runtime(built: Path, run_folder: Path, on_stand_ins: Run) -> None:
    said = said_by(on_stand_ins("command", "check", built, "--against", run_folder, "--json"))
    frames = {row["engine"]: row["frames"] for row in said["engines"]}
    assert "tensorrt-10.3.0+kernel (golden)" in frames
    assert frames["tensorrt-10.3.0+kernel"] == frames["onnxruntime-cpu"] > 8
    assert said["passed"]


def test_check_says_what_it_cannot_replay(built: Path, on_stand_ins: Run) -> None:
    done = on_stand_ins("command", "check", built, "--json", CUDA_STAND_IN_NAME="Stand-in Thor")
    assert [row["engine"].partition("-")[0] for row in said_by(done)["engines"]] == ["onnxruntime"]
    assert "TensorRT fp32 is not checked: " in done.stderr
    assert "built for gpu Stand-in Orin, here it is Stand-in Thor" in done.stderr


def test_check_refuses_an_engine_that_decides_otherwise(built: Path, on_stand_ins: Run) -> None:
    done = on_stand_ins("command", "check", built, "--json", TENSORRT_STAND_IN_SCALE="1.5")
    assert "tensorrt-10.3.0+kernel" in error_line(done, 6)


def test_bench_measures_it_without_splitting(built: Path, on_stand_ins: Run) -> None:
    said = said_by(on_stand_ins("command", "bench", built, "--frames", "10", "--json"))
    assert (said["engine"], said["precision"]) == ("tensorrt-10.3.0+kernel", "fp32")
    assert list(said["stages"]) == [
        *("capture", "decode", "preprocess", "infer", "host_to_device", "compute", "device_to_host", "post", "total"),
    ]
    assert said["stages"]["compute"]["count"] == said["stages"]["total"]["count"]


def test_transfers_and_computing_are_timed_by_the_device(built: Path, on_stand_ins: Run) -> None:
    said = said_by(on_stand_ins("device_times", built))
    assert list(said["parts"]) == ["host_to_device", "compute", "device_to_host"]
    assert all(len(taken_s) == 5 and min(taken_s) >= 0.0 for taken_s in said["parts"].values())
    # The stand-in computes when it is waited for: nearly all of the time is the network's.
    assert sum(said["parts"]["compute"]) > sum(said["parts"]["host_to_device"]) > 0.0
    assert sum(map(sum, said["parts"].values())) <= said["wall_s"]
    assert said["launched"] == 6  # of seven runs all but the first, as one graph
    assert same(said["difference"])


def test_without_a_gpu_it_says_so(built: Path, on_stand_ins: Run) -> None:
    for verb in (("build", built, "--precision", "fp32"), ("predict", built, "none.png", "--engine", "tensorrt")):
        done = on_stand_ins("command", *verb, CUDA_STAND_IN_NO_DEVICE="1")
        assert error_line(done, 10) == (
            "no NVIDIA GPU can be used (cuInit failed: no CUDA-capable device is detected); see: meliad-edge doctor, "
            "or use --engine onnxruntime"
        )


def test_without_a_driver_it_says_so(built: Path, pycuda: Path) -> None:
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("this machine may have a driver")
    done = subprocess.run(
        [sys.executable, "-c", "from meliad_edge.cli import main; main()"]
        + ["predict", str(built), "none.png", "--engine", "tensorrt"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{pycuda}{os.pathsep}{Path(__file__).parents[2]}"},
    )
    assert error_line(done, 10) == (
        "PyCUDA cannot be used (libcuda.so.1: cannot open shared object file: No such file or directory); "
        "install NVIDIA's driver, or use --engine onnxruntime"
    )


def test_without_pycuda_it_names_the_extra(built: Path, invoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pycuda" else find_spec(name))
    outcome = invoke("build", built, "--precision", "fp32")
    assert outcome.code == 8
    assert outcome.error_line == "pycuda is not installed; run: pip install 'meliad-edge[tensorrt]'"
