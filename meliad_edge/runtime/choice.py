"""What a user can ask to execute a model."""

from __future__ import annotations

from typing import Literal

EngineChoice = Literal["auto", "onnxruntime", "tensorrt"]
