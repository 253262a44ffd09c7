from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from meliad_edge.event_store import Verdict
from meliad_edge.events import EventKind
from meliad_edge.monitor.web.app import create_app
from meliad_edge.monitor.web.server import WebServer
from meliad_edge.runtime.predictor import Prediction, Region, StageTimes
from meliad_edge.stream.reader import ReaderState


@pytest.fixture
def client(site: Any) -> Iterator[httpx.Client]:
    with site.client() as client:
        yield client


def problem(response: httpx.Response) -> dict[str, Any]:
    """The problem that a response reports, which has one shape whatever failed."""
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert set(body) == {"type", "title", "status", "detail"}
    assert body["status"] == response.status_code
    assert "Traceback" not in response.text
    assert "\n" not in body["detail"]
    return body


def test_cameras_are_listed_as_they_stand(site: Any, client: httpx.Client, pictures: Any) -> None:
    watch = site.watch
    watch.decide("belt", pictures(40), latency_s=0.03)
    event = watch.begin_anomaly("belt")
    watch.readers[watch.names[1]].state = ReaderState.WAITING
    belt, other, hostile = client.get("/api/v1/cameras").json()["cameras"]
    assert [belt["name"], other["name"], hostile["name"]] == watch.names
    assert [belt["number"], other["number"], hostile["number"]] == [0, 1, 2]
    assert (belt["state"], belt["anomaly"], belt["events"]) == ("streaming", event.id, 1)
    assert belt["score"] == watch.board.latest("belt").prediction.score
    assert belt["threshold"] == watch.threshold.calibration.threshold
    assert belt["p50_ms"] == pytest.approx(20.0)
    assert belt["p99_ms"] == pytest.approx(30.0)
    assert (other["state"], other["frame"], other["score"]) == ("waiting", None, None)


def test_a_score_that_is_not_a_number_is_null(site: Any, client: httpx.Client, pictures: Any) -> None:
    site.watch.predictor.engine.is_broken = True
    site.watch.decide("belt", pictures(40))
    assert client.get("/api/v1/cameras").json()["cameras"][0]["score"] is None
    (point,) = client.get("/api/v1/cameras/0/scores").json()["points"]
    assert point["score"] is None


def test_scores_can_be_asked_for_since_a_time(site: Any, client: httpx.Client, pictures: Any) -> None:
    site.watch.wall_s = 1_790_000_000.0
    for level in (40, 50, 60):
        site.watch.decide("belt", pictures(level))
        site.watch.wall_s += 1.0
    points = client.get("/api/v1/cameras/0/scores").json()["points"]
    assert [point["score"] for point in points] == [40.0, 50.0, 60.0]
    later = client.get("/api/v1/cameras/0/scores", params={"since_s": points[0]["time_s"]}).json()["points"]
    assert later == points[1:]
    highest = client.get("/api/v1/cameras/0/scores", params={"limit": 2}).json()["points"]
    assert [point["score"] for point in highest] == [50.0, 60.0]


def test_a_snapshot_is_small_and_shows_the_evidence_if_wished(site: Any, client: httpx.Client, pictures: Any) -> None:
    site.watch.decide("belt", pictures(40, spot=200, size_hw=(1080, 1920)))
    plain = client.get("/api/v1/cameras/0/snapshot.jpg")
    assert plain.headers["content-type"] == "image/jpeg"
    shown = cv2.imdecode(np.frombuffer(plain.content, np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape == (540, 960, 3)
    assert np.ptp(shown[20, 20].astype(int)) < 8, "grey: nothing is drawn"
    drawn = client.get("/api/v1/cameras/0/snapshot.jpg", params={"overlay": 1})
    picture = cv2.imdecode(np.frombuffer(drawn.content, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (540, 960, 3)
    assert np.ptp(picture[60, 60].astype(int)) > 60, "coloured"
    assert np.ptp(picture[500, 900].astype(int)) < 8, "where there is no evidence nothing is drawn"
    again = client.get("/api/v1/cameras/0/snapshot.jpg", headers={"If-None-Match": plain.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_a_watched_part_of_the_picture_is_drawn_where_it_lies(site: Any, client: httpx.Client, pictures: Any) -> None:
    from dataclasses import replace

    from meliad_edge.runtime.view import Box
    from meliad_edge.stream.watcher import Decision

    watch = site.watch
    decision = watch.decide("belt", pictures(40, size_hw=(1080, 1920)))
    region = Region(1000, 540, 920, 540, 250.0)
    high = np.full((4, 4), 250.0, np.float32)
    prediction = Prediction(250.0, 99.0, high, (region,), StageTimes(0.0, 0.0, 0.0), Box(961, 541, 959, 539))
    watch.board.record_decision(Decision("belt", replace(decision.frame, id=77), prediction, "", 0.01, 0.01))
    drawn = client.get("/api/v1/cameras/0/snapshot.jpg", params={"overlay": 1})
    picture = cv2.imdecode(np.frombuffer(drawn.content, np.uint8), cv2.IMREAD_COLOR)
    assert np.ptp(picture[100, 100].astype(int)) < 8
    assert np.ptp(picture[400, 700].astype(int)) > 60


@pytest.mark.parametrize("number", ["-1", "3", "99999999999999999999"])
@pytest.mark.parametrize("what", ["scores", "snapshot.jpg", "live.mjpg"])
def test_there_is_no_such_camera(client: httpx.Client, number: str, what: str) -> None:
    assert problem(client.get(f"/api/v1/cameras/{number}/{what}"))["status"] == 404


def test_a_camera_without_a_frame_has_no_snapshot(client: httpx.Client) -> None:
    assert "no picture yet" in problem(client.get("/api/v1/cameras/0/snapshot.jpg"))["detail"]


def test_events_come_newest_first_in_pages(site: Any, client: httpx.Client) -> None:
    ids = [site.watch.begin_anomaly(name).id for name in ("belt", "belt", site.watch.names[1], "belt", "belt")]
    first = client.get("/api/v1/events", params={"limit": 2}).json()
    assert [event["id"] for event in first["events"]] == ids[:-3:-1]
    second = client.get("/api/v1/events", params={"limit": 2, "before": first["next"]}).json()
    third = client.get("/api/v1/events", params={"limit": 2, "before": second["next"]}).json()
    pages = [event["id"] for page in (first, second, third) for event in page["events"]]
    assert pages == ids[::-1]
    assert third["next"] is None


def test_events_can_be_filtered(site: Any, client: httpx.Client) -> None:
    watch = site.watch
    belt, other = watch.begin_anomaly("belt"), watch.begin_anomaly(watch.names[1])
    frozen = watch.begin_condition("belt", EventKind.CAMERA, "frozen", "the same picture for 12 s")
    watch.store.judge(belt.id, Verdict.CONFIRMED)

    def ids(**filters: str) -> list[str]:
        return [event["id"] for event in client.get("/api/v1/events", params=filters).json()["events"]]

    assert ids(camera=watch.names[1]) == [other.id]
    assert ids(kind="camera") == [frozen.id]
    assert ids(verdict="confirmed") == [belt.id]
    assert ids(verdict="rejected") == []
    assert ids(verdict="none", kind="anomaly") == [other.id]
    assert ids(camera="no such camera") == []


def test_what_nobody_judged_is_found_behind_what_was(site: Any, client: httpx.Client) -> None:
    watch = site.watch
    open_ones = [watch.begin_anomaly("belt").id for _ in range(3)]
    for _ in range(4):
        watch.store.judge(watch.begin_anomaly("belt").id, Verdict.REJECTED)
    page = client.get("/api/v1/events", params={"verdict": "none", "limit": 2}).json()
    assert [event["id"] for event in page["events"]] == open_ones[:0:-1]
    rest = client.get("/api/v1/events", params={"verdict": "none", "limit": 2, "before": page["next"]}).json()
    assert ([event["id"] for event in rest["events"]], rest["next"]) == ([open_ones[0]], None)


def test_an_event_tells_its_facts_and_its_pictures(site: Any, client: httpx.Client) -> None:
    event = site.watch.begin_anomaly("belt")
    site.watch.store.add_files(event.id, {"clip-000.jpg": b"\xff\xd8clip", "notes.txt": b"not a picture"})
    shown = client.get(f"/api/v1/events/{event.id}").json()
    assert shown["files"] == ["clip-000.jpg", "frame.png", "picture.jpg"]
    assert (shown["camera"], shown["kind"], shown["state"], shown["verdict"]) == ("belt", "anomaly", "new", None)
    assert shown["score"] == event.peak_score
    (region,) = shown["regions"]
    assert (region["x"], region["y"], region["width"], region["height"]) == (0, 0, 80, 60)
    frame = client.get(f"/api/v1/events/{event.id}/files/frame.png")
    assert frame.headers["content-type"] == "image/png"
    stored = cv2.imdecode(np.frombuffer(frame.content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.array_equal(stored, event.frame.image)
    clip = client.get(f"/api/v1/events/{event.id}/files/clip-000.jpg")
    assert (clip.content, clip.headers["content-type"]) == (b"\xff\xd8clip", "image/jpeg")


def test_a_picture_is_sent_again_only_when_it_has_changed(site: Any, client: httpx.Client) -> None:
    event = site.watch.begin_anomaly("belt")
    path = f"/api/v1/events/{event.id}/files/picture.jpg"
    kept = {"If-None-Match": client.get(path).headers["etag"]}
    assert client.get(path, headers=kept).status_code == 304
    site.watch.store.add_files(event.id, {"picture.jpg": b"\xff\xd8another"})
    assert client.get(path, headers=kept).content == b"\xff\xd8another"


def test_an_event_is_judged(site: Any, client: httpx.Client) -> None:
    event = site.watch.begin_anomaly("belt")
    for verdict in ("confirmed", "rejected", None):
        response = client.put(f"/api/v1/events/{event.id}/verdict", json={"verdict": verdict})
        assert (response.status_code, response.json()["verdict"]) == (200, verdict)
        stored = site.watch.store.event(event.id).verdict
        assert (None if stored is None else stored.value) == verdict


@pytest.mark.parametrize(
    "body", [{}, {"verdict": "maybe"}, {"verdict": "confirmed", "by": "me"}, [], "confirmed", None]
)
def test_a_verdict_is_one_of_two_or_none(site: Any, client: httpx.Client, body: Any) -> None:
    event = site.watch.begin_anomaly("belt")
    assert problem(client.put(f"/api/v1/events/{event.id}/verdict", json=body))["status"] == 422
    assert site.watch.store.event(event.id).verdict is None


def test_the_threshold_is_previewed_moved_and_moved_back(site: Any, client: httpx.Client) -> None:
    predictor, threshold = site.watch.predictor, site.watch.threshold
    shipped = threshold.shipped
    standing = client.get("/api/v1/threshold").json()
    assert (standing["threshold"], standing["is_own"]) == (shipped.threshold, False)
    assert (standing["calibration_images"], standing["score_range"]) == (99, [1.0, 99.0])
    preview = client.post("/api/v1/threshold/preview", json={"false_alarm_rate": 0.1}).json()
    assert preview["guaranteed_false_alarm_rate"] == pytest.approx(0.1)
    assert preview["upper_bound"] == pytest.approx(threshold.preview(false_alarm_rate=0.1).upper_bound)
    assert preview["calibration_images"] == 99
    assert predictor.bundle.calibration == shipped, "a preview changes nothing"
    moved = client.put("/api/v1/threshold", json={"false_alarm_rate": 0.1}).json()
    assert moved["threshold"] == preview["threshold"] == predictor.bundle.calibration.threshold
    assert (moved["is_own"], moved["bundle_threshold"]) == (True, shipped.threshold)
    assert client.put("/api/v1/threshold", json={"value": 55.5}).json()["threshold"] == 55.5
    assert predictor.bundle.calibration.threshold == 55.5
    assert client.delete("/api/v1/threshold").json()["is_own"] is False
    assert predictor.bundle.calibration == shipped


@pytest.mark.parametrize(
    "body",
    [{}, {"value": 1.0, "false_alarm_rate": 0.1}, {"false_alarm_rate": 0.0}, {"false_alarm_rate": 1.0},
     {"value": "much"}, {"value": None}, {"rate": 0.1}, "NaN", '{"value": NaN}', '{"value": 1e999}'],
)  # fmt: skip
def test_no_threshold_is_set_that_is_none(site: Any, client: httpx.Client, body: Any) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    for method, path in (("PUT", "/api/v1/threshold"), ("POST", "/api/v1/threshold/preview")):
        response = client.request(method, path, content=content, headers={"Content-Type": "application/json"})
        assert problem(response)["status"] == 422
    assert site.watch.predictor.bundle.calibration == site.watch.threshold.shipped


def test_a_threshold_that_cannot_be_kept_is_not_set(site: Any, client: httpx.Client) -> None:
    (site.watch.bundle_file.parent / "line3.threshold.json.partial").mkdir()
    response = client.put("/api/v1/threshold", json={"value": 50.0})
    assert "could not be kept" in problem(response)["detail"]
    assert site.watch.predictor.bundle.calibration == site.watch.threshold.shipped


def test_latency_is_told_by_stage(site: Any, client: httpx.Client, run_watch: Any) -> None:
    assert client.get("/api/v1/latency").json() == {"stages": {}, "throughput_fps": 0.0}
    watcher = site.watch.board.watcher = run_watch(site.watch)
    server = WebServer(site.watch.make_app())
    latency = httpx.get(server.start() + "/api/v1/latency", trust_env=False).json()
    server.stop()
    assert set(latency["stages"]) == set(watcher.summary().latencies)
    assert latency["stages"]["infer"]["count"] == 6
    assert latency["throughput_fps"] > 0.0


def test_what_runs_is_told(client: httpx.Client) -> None:
    about = client.get("/api/v1/about").json()
    assert (about["model"]["name"], about["model"]["version"]) == ("line3", 7)
    assert (about["keeps_events"], about["needs_token"]) == (True, False)


def test_health_and_readiness(site: Any, client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"alive": True, "stalled_s": 0.0}
    watch = site.watch
    watch.readers["belt"].state = ReaderState.WAITING
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "cameras": 3, "not_delivering": [0]})
    for reader in watch.readers.values():
        reader.state = ReaderState.CONNECTING
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200, "a restart brings no camera back"


def test_a_frame_loop_that_hangs_is_not_healthy(site: Any, client: httpx.Client, hang: Callable[[Any], None]) -> None:
    hang(site.watch)
    assert client.get("/healthz").status_code == 200
    site.watch.now_s += 31.0
    response = client.get("/healthz")
    assert (response.status_code, response.json()) == (503, {"alive": False, "stalled_s": 31.0})


def test_metrics_are_served(site: Any, client: httpx.Client, pictures: Any) -> None:
    site.watch.decide("belt", pictures(40))
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'meliad_score{camera="belt"} 40.0' in response.text


def test_a_watch_without_events_says_so(watch: Any) -> None:
    from meliad_edge.monitor.model_info import ModelInfo

    app = create_app(watch.board, watch.threshold, ModelInfo.of(watch.predictor), watch.metrics)
    server = WebServer(app)
    with httpx.Client(base_url=server.start(), trust_env=False) as client:
        assert "--out" in problem(client.get("/api/v1/events"))["detail"]
        assert client.get("/api/v1/about").json()["keeps_events"] is False
    server.stop()


def test_every_way_is_described(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    assert schema["openapi"].startswith("3.")
    assert {"/api/v1/cameras", "/api/v1/events/{event_id}/verdict", "/api/v1/threshold/preview", "/metrics"} <= set(
        schema["paths"]
    )
    for path in ("/docs", "/redoc"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("POST", "/api/v1/cameras", 405), ("GET", "/api/v1/events?limit=0", 422),
     ("GET", "/api/v1/events?kind=other", 422), ("GET", "/api/v1/cameras/x/scores", 422),
     ("GET", "/static/nothing.js", 404)],
)  # fmt: skip
def test_every_error_is_a_problem(client: httpx.Client, method: str, path: str, status: int) -> None:
    assert problem(client.request(method, path))["status"] == status


def test_an_error_of_ours_is_logged_and_not_shown(
    site: Any, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        msg = "secret detail"
        raise RuntimeError(msg)

    monkeypatch.setattr(site.watch.store, "events", fail)
    response = client.get("/api/v1/events")
    assert problem(response)["status"] == 500
    assert "secret" not in response.text
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "secret detail" in caplog.text
