from __future__ import annotations

import pytest

from meliad_edge.benchmarks import limit
from meliad_edge.benchmarks.environment import describe_environment


def test_limit_compares_with_the_bare_backbone() -> None:
    result = limit.run(rounds=1)
    assert result["fp32_over_backbone"] == pytest.approx(
        result["median_ms"]["predict"] / result["median_ms"]["backbone"]
    )
    assert result["watch_over_backbone"] > 0.0
    assert {topic for topic, _ in limit.describe(result)} == {"backbone", "predict", "watch", "engine"}


def test_environment_says_where_a_figure_comes_from() -> None:
    environment = describe_environment()
    assert environment["cores"] >= 1
    assert environment["packages"]["onnxruntime"]
    assert environment["date"].endswith("Z")
