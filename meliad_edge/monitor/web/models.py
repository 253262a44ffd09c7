"""What the HTTP interface takes and gives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# A score that is not a number has no JSON value.
Score = Annotated[float | None, Field(description="Raw score; null when it is not a number.")]
JudgedAs = Literal["confirmed", "rejected"]


class Model(BaseModel):
    """The model that decides."""

    name: str
    version: int
    sha256: str
    engine: str
    precision: str


class About(BaseModel):
    """What runs."""

    version: str = Field(description="Of meliad-edge.")
    model: Model
    keeps_events: bool
    needs_token: bool


class Frames(BaseModel):
    """What became of frames: those read were scored, dropped, stale, late or misfits; missed ones scored too late."""

    model_config = ConfigDict(from_attributes=True)

    read: int
    scored: int
    dropped: int
    stale: int
    late: int
    misfit: int
    missed: int
    bad: int
    skipped: int


class CameraState(BaseModel):
    """How a camera stands."""

    number: int = Field(description="Names the camera in addresses.")
    name: str
    state: str
    condition: str = Field(description="What is wrong with the camera, in one word; empty when all is well.")
    condition_detail: str
    drift: str = Field(description="What is wrong with its scores, in one word; empty when all is well.")
    drift_detail: str
    anomaly: str | None = Field(description="Id of the anomaly event that is open.")
    fps: float = Field(description="Decisions per second.")
    frame: int | None = Field(description="Id of the latest frame.")
    captured_s: float | None = Field(description="When it was captured, seconds since 1970.")
    score: Score
    threshold: Score
    p50_ms: float | None = Field(description="Capture to decision, median of the latest frames.")
    p99_ms: float | None


class Camera(CameraState):
    """How a camera stands, and what became of its frames."""

    address: str = Field(description="Without credentials.")
    description: str = Field(description="Size and codec.")
    notice: str = Field(description="The latest fact about it.")
    reconnects: int
    events: int = Field(description="Anomaly events that began.")
    frames: Frames


class Cameras(BaseModel):
    """All cameras."""

    cameras: list[Camera]


class Point(BaseModel):
    """The highest score of a stretch of time."""

    time_s: float = Field(description="Capture time, seconds since 1970.")
    score: Score
    threshold: Score


class Scores(BaseModel):
    """Score history of a camera, oldest first."""

    points: list[Point]


class Patch(BaseModel):
    """The training patch behind a decision."""

    defect: str
    source: str


class EventRegion(BaseModel):
    """A marked region, in pixels of the frame."""

    x: int
    y: int
    width: int
    height: int
    peak: Score
    resembles: Patch | None = None
    differs_from: Patch | None = None


class Event(BaseModel):
    """An event as it stands."""

    id: str
    kind: str
    camera: str
    source: str
    state: str
    started_s: float
    last_seen_s: float
    score: Score
    threshold: Score
    condition: str
    detail: str
    regions: list[EventRegion]
    verdict: JudgedAs | None
    judged_s: float | None
    files: list[str] = Field(description="Its pictures: /api/v1/events/{id}/files/{name}.")


class Events(BaseModel):
    """Events, newest first."""

    events: list[Event]
    next: str | None = Field(description="Give it as `before` for the next page; null on the last.")


class Judgement(BaseModel):
    """What a person says of an event; null takes it back."""

    model_config = ConfigDict(extra="forbid")

    verdict: JudgedAs | None


class Threshold(BaseModel):
    """A threshold, and what is known of its false alarms."""

    threshold: float
    target_false_alarm_rate: float
    guaranteed_false_alarm_rate: float = Field(
        description="At most this share of normal pictures alarms, on average over calibration sets."
    )
    upper_bound: float = Field(description="95 % bound on the share, for this calibration set.")
    calibration_images: int
    score_range: tuple[float, float] = Field(description="Lowest and highest score of the calibration images.")


class Thresholds(Threshold):
    """The threshold in force, and that of the bundle."""

    bundle_threshold: float
    is_own: bool = Field(description="Whether this device has moved it.")


class ThresholdChoice(BaseModel):
    """A threshold, by one of two ways to say it."""

    model_config = ConfigDict(extra="forbid")

    false_alarm_rate: float | None = Field(default=None, gt=0.0, lt=1.0)
    value: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_one(self) -> ThresholdChoice:
        if (self.false_alarm_rate is None) == (self.value is None):
            msg = "give either false_alarm_rate or value"
            raise ValueError(msg)
        return self


class StageLatency(BaseModel):
    """Latency of one stage."""

    count: int
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    p999_ms: float
    mean_ms: float


class Latency(BaseModel):
    """Latencies by stage, of all cameras together."""

    stages: dict[str, StageLatency]
    throughput_fps: float


class Token(BaseModel):
    """What one logs in with."""

    model_config = ConfigDict(extra="forbid")

    token: str = Field(max_length=4096)
