"""The installed ONNX Runtime custom operator against the NumPy definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_agrees_with_the_definition_at_any_size(
    data: st.DataObject, make_case: Any, onnxruntime_op: Any, precision: Any
) -> None:
    height, width = data.draw(st.integers(1, 20), "height"), data.draw(st.integers(1, 20), "width")
    prototypes = data.draw(st.integers(2, 40) | st.sampled_from([127, 384, 600]), "prototypes")
    case = make_case(
        data.draw(st.integers(0, 2**32 - 1), "seed"),
        images=data.draw(st.integers(1, 4), "images"),
        depth=data.draw(st.sampled_from([1, 3, 7, 31, 65, 129]), "depth"),
        height=height,
        width=width,
        prototypes=prototypes,
        n_normal=data.draw(st.integers(1, prototypes - 1) | st.just(prototypes - 1), "n_normal"),
        top_cells=data.draw(st.integers(1, height * width), "top_cells"),
        softness=data.draw(st.sampled_from([0.0625, 0.5, 1.5, 16.0]), "softness"),
        kappa=data.draw(st.sampled_from([0.0, 0.4375, 0.875]), "kappa"),
    )
    precision.check(onnxruntime_op(case), case)


LARGE = {
    "many patches": {"images": 1, "depth": 33, "height": 64, "width": 64, "top_cells": 205},
    "many prototypes": {"images": 1, "depth": 65, "height": 8, "width": 8, "prototypes": 2048, "n_normal": 1500},
    "many images": {"images": 32, "depth": 25},
    "two prototypes": {"images": 1, "prototypes": 2, "n_normal": 1, "height": 32, "width": 32},
}


@pytest.mark.parametrize("softness", [0.01, 1.5])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_large(shape: dict[str, int], softness: float, make_case: Any, onnxruntime_op: Any, precision: Any) -> None:
    case = make_case(**shape, softness=softness)
    precision.check(onnxruntime_op(case), case)


@pytest.mark.parametrize("depth", [128, 432])
@pytest.mark.parametrize("seed", range(3))
def test_error_at_the_shapes_of_real_models(
    seed: int, depth: int, make_case: Any, onnxruntime_op: Any, reference: Any
) -> None:
    case = make_case(seed, images=1, depth=depth, height=16, width=16, prototypes=384, n_normal=256, top_cells=26)
    exact, plain = reference(case), reference(case, np.float32)
    outputs = onnxruntime_op(case)

    def error(map_: Any) -> float:
        return float(np.sqrt(np.mean((map_ - exact.map) ** 2)))

    assert error(outputs.map) <= 2 * error(plain.map)
    assert outputs.score == pytest.approx(exact.score, abs=1e-5)
    np.testing.assert_array_equal(outputs.nearest, exact.nearest)


def test_score_is_the_mean_of_the_top_cells_of_the_map_that_is_returned(make_case: Any, onnxruntime_op: Any) -> None:
    case = make_case(top_cells=6)
    outputs = onnxruntime_op(case)
    top = np.sort(outputs.map.reshape(len(outputs.map), -1).astype(np.float64), axis=1)[:, -6:]
    np.testing.assert_allclose(outputs.score, top.mean(axis=1) + case.parameters.offset, rtol=1e-6)


def test_all_cells_can_be_top_cells(make_case: Any, onnxruntime_op: Any, precision: Any) -> None:
    case = make_case(height=5, width=7, top_cells=35)
    precision.check(onnxruntime_op(case), case)


def test_one_prototype_per_class(make_case: Any, onnxruntime_op: Any, precision: Any) -> None:
    case = make_case(prototypes=2, n_normal=1)
    outputs = onnxruntime_op(case)
    precision.check(outputs, case)
    assert (outputs.nearest[:, 0] == 0).all()
    assert (outputs.nearest[:, 1] == 1).all()


def test_lowest_index_wins_a_tie(make_case: Any, onnxruntime_op: Any) -> None:
    case = make_case(prototypes=60, n_normal=36)
    repeated = np.concatenate([np.tile(case.prototypes[:18], (2, 1)), np.tile(case.prototypes[36:48], (2, 1))])
    nearest = onnxruntime_op(case.but(prototypes=repeated)).nearest
    assert (nearest[:, 0] < 18).all()
    assert ((nearest[:, 1] >= 36) & (nearest[:, 1] < 48)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30], ids=["nan", "inf", "-inf", "overflow"])
def test_a_cell_that_cannot_be_scored_never_looks_normal(
    value: float, onnxruntime_op: Any, check_broken_cell: Any
) -> None:
    check_broken_cell(onnxruntime_op, value)


def test_an_instruction_set_that_does_not_exist_is_refused(
    make_case: Any, onnxruntime_op: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MELIAD_EDGE_INSTRUCTION_SET", "avx1024")
    with pytest.raises(Exception, match='is "avx1024"; it must be baseline, avx2, avx512, vnni or amx'):
        onnxruntime_op.session(make_case())


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
def test_a_broken_prototype_or_direction_never_looks_normal(
    value: float, make_case: Any, onnxruntime_op: Any, reference: Any
) -> None:
    case = make_case()
    for name in ("prototypes", "direction"):
        array = getattr(case, name).copy()
        array.flat[5] = value
        broken = case.but(**{name: array})
        if name == "direction" or np.isnan(value):
            assert np.isnan(onnxruntime_op(broken).map).all()
        assert np.isnan(onnxruntime_op(broken).score).all()
        assert np.isnan(reference(broken).score).all()


def test_evidence_beyond_single_precision_never_looks_normal(make_case: Any, onnxruntime_op: Any) -> None:
    outputs = onnxruntime_op(make_case(normal_scale=-3e38))
    assert np.isnan(outputs.map).all()
    assert np.isnan(outputs.score).all()


def test_nan_inputs_agree_with_the_definition(make_case: Any, onnxruntime_op: Any, reference: Any) -> None:
    case = make_case(images=4, height=9, width=9)
    random = np.random.default_rng(1)
    z = case.z.copy()
    z[random.random(z.shape) < 0.002] = np.nan
    z[random.random(z.shape) < 0.002] = np.inf
    z[0] = case.z[0]
    broken = case.but(z=z)
    outputs, exact = onnxruntime_op(broken), reference(broken)
    assert 0 < np.isnan(exact.map).sum() < exact.map.size
    np.testing.assert_allclose(outputs.map, exact.map, atol=1e-4)
    np.testing.assert_allclose(outputs.score, exact.score, atol=1e-4)
    np.testing.assert_array_equal(outputs.nearest, exact.nearest)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-40, 1e4], ids=["zeros", "tiny", "denormal", "large"])
def test_magnitudes(scale: float, make_case: Any, onnxruntime_op: Any, precision: Any) -> None:
    case = make_case()
    case = case.but(z=(case.z * scale).astype(np.float32), softness=max(1.5, scale))
    precision.check(onnxruntime_op(case), case)


def test_constant_input_gives_a_constant_map(make_case: Any, onnxruntime_op: Any, precision: Any) -> None:
    case = make_case()
    case = case.but(z=np.full_like(case.z, 0.5))
    outputs = onnxruntime_op(case)
    assert len(np.unique(outputs.map)) == 1
    precision.check(outputs, case)


def test_cells_on_a_prototype(make_case: Any, onnxruntime_op: Any, precision: Any) -> None:
    case = make_case(images=1, depth=33, height=5, width=8, prototypes=40)
    case = case.but(z=np.ascontiguousarray(case.prototypes.T.reshape(1, 33, 5, 8)))
    outputs = onnxruntime_op(case)
    precision.check(outputs, case)
    n_normal = case.parameters.n_normal
    np.testing.assert_array_equal(outputs.nearest[0, 0].ravel()[:n_normal], np.arange(n_normal))
    np.testing.assert_array_equal(outputs.nearest[0, 1].ravel()[n_normal:], np.arange(n_normal, 40))


def test_threads_do_not_change_a_bit(make_case: Any, onnxruntime_op: Any) -> None:
    # Enough work for both threads to be awake at the same time.
    case = make_case(images=4, depth=257, height=19, width=17, prototypes=301, n_normal=250)
    alone = onnxruntime_op(case, threads=1).tobytes()
    for _ in range(5):
        assert onnxruntime_op(case, threads=2).tobytes() == alone


def test_a_batch_does_not_change_a_bit(make_case: Any, onnxruntime_op: Any) -> None:
    case = make_case(images=4)
    together = onnxruntime_op(case)
    alone = [onnxruntime_op(case.but(z=case.z[i : i + 1])) for i in range(4)]
    for name in ("score", "map", "nearest"):
        np.testing.assert_array_equal(getattr(together, name), np.concatenate([getattr(one, name) for one in alone]))


def test_prototypes_may_be_an_input(make_case: Any, onnxruntime_op: Any) -> None:
    case = make_case()
    assert onnxruntime_op(case, constant_prototypes=False).tobytes() == onnxruntime_op(case).tobytes()


def test_one_session_serves_frames_of_any_size(make_case: Any, onnxruntime_op: Any, precision: Any) -> None:
    case = make_case()
    session = onnxruntime_op.session(case)
    random = np.random.default_rng(2)
    for shape in [(1, 33, 2, 2), (3, 33, 20, 20), (1, 33, 4, 1), (0, 33, 3, 3)]:
        other = case.but(z=random.normal(size=shape).astype(np.float32))
        score, evidence, nearest = session.run(["score", "map", "nearest"], {"z": other.z})
        assert (score.shape, evidence.shape) == (shape[:1], (shape[0], *shape[2:]))
        precision.check(type(onnxruntime_op(case))(score, evidence, nearest), other)


def test_shapes_are_inferred(make_case: Any, onnxruntime_op: Any) -> None:
    outputs = {output.name: output for output in onnxruntime_op.session(make_case()).get_outputs()}
    assert outputs["score"].shape == ["n"]
    assert outputs["map"].shape == ["n", "h", "w"]
    assert outputs["nearest"].shape == ["n", 2, "h", "w"]
    assert outputs["nearest"].type == "tensor(int64)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_normal": 40}, "n_normal is 40 of 40 prototypes"),
        ({"n_normal": 0}, "n_normal is 0 of 40 prototypes"),
        ({"top_cells": 0}, "top_cells is 0"),
        ({"softness": 0.0}, "softness is 0.0"),
        ({"softness": float("nan")}, "softness is nan"),
        ({"kappa": 1.0}, "kappa is 1.0"),
    ],
)
def test_impossible_parameters_are_refused_when_the_model_is_loaded(
    change: dict[str, float], message: str, make_case: Any, onnxruntime_op: Any
) -> None:
    with pytest.raises(Exception, match=message):
        onnxruntime_op.session(make_case().but(**change))


def test_inputs_that_do_not_fit_are_refused(make_case: Any, onnxruntime_op: Any) -> None:
    case = make_case(depth=33, height=5, width=7)
    with pytest.raises(Exception, match=r"z has shape \[2, 33, 5, 7\], expected at least top_cells = 36 cells"):
        onnxruntime_op(case.but(top_cells=36))
    with pytest.raises(Exception, match=r"direction has shape \[32\], expected \[33\]"):
        onnxruntime_op(case.but(direction=case.direction[:32]))
