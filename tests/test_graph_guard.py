from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meliad_edge.bundle import open_bundle
from meliad_edge.graph_guard import check_graph

onnx = pytest.importorskip("onnx", reason="onnx makes the graphs; install the extra export")

EXTERNAL = "the graph reads its weights from other files"


def simple_model() -> Any:
    return onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y) { y = Add(x, w) }'
    )


def external_tensor(name: str = "w") -> Any:
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def in_initializer(model: Any) -> None:
    model.graph.initializer.append(external_tensor())


def in_initializer_without_a_place(model: Any) -> None:
    model.graph.initializer.append(external_tensor())
    del model.graph.initializer[0].external_data[:]


def in_initializer_without_saying_so(model: Any) -> None:
    model.graph.initializer.append(external_tensor())
    model.graph.initializer[0].ClearField("data_location")


def in_sparse_initializer(model: Any) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(external_tensor())


def in_attribute(model: Any) -> None:
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["w"], value=external_tensor()))


def in_list_of_attribute(model: Any) -> None:
    model.graph.node[0].attribute.add(name="list").tensors.append(external_tensor())


def in_subgraph(model: Any) -> None:
    inner = onnx.helper.make_graph([], "inner", [], [], [external_tensor()])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner))


def in_function(model: Any) -> None:
    node = onnx.helper.make_node("Constant", [], ["w"], value=external_tensor())
    opsets = [onnx.helper.make_opsetid("", 17)]
    model.functions.append(onnx.helper.make_function("meliad", "F", [], ["w"], [node], opsets))


PLACES = [
    in_initializer, in_initializer_without_a_place, in_initializer_without_saying_so, in_sparse_initializer,
    in_attribute, in_list_of_attribute, in_subgraph, in_function,
]  # fmt: skip


@pytest.mark.parametrize("hide", PLACES, ids=lambda hide: hide.__name__)
def test_external_data_is_found_wherever_it_is(hide: Callable[[Any], None]) -> None:
    model = simple_model()
    check_graph(model.SerializeToString())
    hide(model)
    with pytest.raises(ValueError, match=EXTERNAL):
        check_graph(model.SerializeToString())


def test_operators_of_other_libraries_are_refused() -> None:
    for change in (
        lambda model: setattr(model.graph.node[0], "domain", "evil.ops"),
        lambda model: model.opset_import.append(onnx.helper.make_opsetid("evil.ops", 1)),
    ):
        model = simple_model()
        change(model)
        with pytest.raises(ValueError, match=r"needs operators of 'evil\.ops'"):
            check_graph(model.SerializeToString())


def function(name: str, *nodes: Any, domain: str = "meliad") -> Any:
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("meliad", 1)]
    return onnx.helper.make_function(domain, name, ["a"], ["b"], list(nodes), opsets)


def test_functions_cannot_unfold() -> None:
    node = onnx.helper.make_node
    call, negate = node("F", ["x"], ["z"], domain="meliad"), node("Neg", ["a"], ["b"])
    twice = simple_model()
    twice.graph.node.extend([call, call])
    twice.functions.append(function("F", negate))
    check_graph(twice.SerializeToString())
    thrice = simple_model()
    thrice.CopyFrom(twice)
    thrice.graph.node.append(call)
    nested = simple_model()
    nested.functions.append(function("F", node("G", ["a"], ["b"], domain="meliad")))
    for model in (thrice, nested):
        with pytest.raises(ValueError, match="calls functions more than 2 times, or from functions"):
            check_graph(model.SerializeToString())
    for domain in ("", "com.microsoft"):
        foreign = simple_model()
        foreign.functions.append(function("Relu", negate, domain=domain))
        with pytest.raises(ValueError, match="defines functions outside the domain meliad"):
            check_graph(foreign.SerializeToString())


def test_onnx_runtimes_own_format_is_refused() -> None:
    data = bytearray(simple_model().SerializeToString())
    data[4:8] = b"ORTM"
    with pytest.raises(ValueError, match="in the format of ONNX Runtime"):
        check_graph(bytes(data))


@pytest.mark.parametrize("field", [b"\x3a\x02\x0a\x00", b"\x08\x00"], ids=["empty nodes", "numbers"])
def test_time_and_memory_are_bounded(field: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 200000 fields"):
            check_graph(field * 2_000_000)
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()


def test_depth_is_limited() -> None:
    model = simple_model()
    for _ in range(20):
        outer = simple_model()
        outer.graph.node[0].attribute.add(name="body").g.CopyFrom(model.graph)
        model = outer
    with pytest.raises(ValueError, match="nested more than 16 deep"):
        check_graph(model.SerializeToString())


@pytest.mark.workshop
def test_our_graphs_pass_and_no_change_of_their_bytes_raises_anything_else(precise_bundle: Path) -> None:
    random = np.random.default_rng(0)
    for model in open_bundle(precise_bundle).models.values():
        check_graph(model)
        head, tail = model[:2000], model[-20_000:]
        for _ in range(300):
            data = bytearray(head + tail)
            for at in random.integers(0, len(data), random.integers(1, 8)):
                data[at] = random.integers(256)
            try:
                check_graph(bytes(data))
            except ValueError as error:
                assert "\n" not in str(error)


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_any_bytes_pass_or_raise_one_line(data: bytes) -> None:
    try:
        check_graph(data)
    except ValueError as error:
        assert "\n" not in str(error)
