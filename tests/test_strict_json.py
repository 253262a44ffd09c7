from __future__ import annotations

import json

from meliad_edge import strict_json


def test_what_is_not_finite_becomes_null_and_the_rest_stays() -> None:
    value = {"a": float("nan"), "b": [1.5, float("inf"), {"c": (-float("inf"), 2)}], "d": "nan", "e": None, "f": True}
    assert json.loads(strict_json.dumps(value)) == {
        "a": None,
        "b": [1.5, None, {"c": [None, 2]}],
        "d": "nan",
        "e": None,
        "f": True,
    }
