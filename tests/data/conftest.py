from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]
MakeFiles = Callable[..., Path]


@pytest.fixture
def refuses() -> Refuses:
    """Expect exactly this class of error (no subclass), with this text, on one line."""

    @contextmanager
    def check(error_class: type[Exception], text: str) -> Iterator[None]:
        with pytest.raises(error_class, match=re.escape(text)) as caught:
            yield
        assert type(caught.value) is error_class
        assert "\n" not in str(caught.value)

    return check


@pytest.fixture(scope="session")
def picture() -> NDArray[np.uint8]:
    """A smooth, asymmetric, colourful picture, uint8 [48, 64, 3]."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(noise, (64, 48), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


@pytest.fixture
def make_files(tmp_path: Path) -> MakeFiles:
    """Write small real PNG files (or whatever the suffix says) below the temporary folder, which is returned."""

    def make(*names: str) -> Path:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(path), np.full((8, 8, 3), 90, np.uint8))
        return tmp_path

    return make
