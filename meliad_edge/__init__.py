"""meliad-edge: interpretable few-shot anomaly detection, from ten labelled defects to a watched camera."""

__version__ = "0.1.0"
