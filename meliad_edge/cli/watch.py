"""``meliad-edge watch``: score cameras, videos and folders, and report events."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meliad_edge.cli.options import BundleEngine, BundleFile, BundlePrecision
from meliad_edge.cli.output import print_json, say

if TYPE_CHECKING:
    from rich.progress import Progress

    from meliad_edge.errors import MeliadError
    from meliad_edge.sinks.delivery import DeliveryStatus
    from meliad_edge.sinks.sink import EventQueue
    from meliad_edge.stream.reader import Reader
    from meliad_edge.stream.watcher import Decision, WatchSummary
    from meliad_edge.watch_config import WatchConfig


def command(
    model: BundleFile,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE...",
            help="Videos, folders or globs of images, file://, rtsp://, http:// (MJPEG), v4l2:///dev/videoN, csi://N.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TOML file with cameras and any of these options; see docs/watch.md."),
    ] = None,
    camera_secrets: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file with user and password per camera, readable by you.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with the pictures that arrive in a folder.")] = False,
    out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URI",
            help="Folder that keeps the events; also mqtt:// and https:// to deliver them from there. May be repeated.",
            show_default=False,
        ),
    ] = None,
    keep_days: Annotated[
        float | None, typer.Option(min=0.0, help="Remove events nobody judged when they are older.  [default: 30]")
    ] = None,
    keep_gb: Annotated[
        float | None, typer.Option(min=0.0, help="Remove the oldest beyond so many gigabytes.  [default: 10]")
    ] = None,
    serve: Annotated[
        str | None,
        typer.Option(metavar="[HOST:]PORT", help="Serve a page, /metrics and an HTTP interface.", show_default=False),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Holds the token that opens the page to other machines.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="PEM certificate: serve HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per event, then a summary.")] = False,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Stop after so many scored frames.")] = None,
    window: Annotated[
        str, typer.Option(metavar="N/M", help="Frames of a video or camera: N anomalous ones of M make an event.")
    ] = "3/5",
    engine: BundleEngine = "auto",
    precision: BundlePrecision = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine.  [default: every core]")] = None,
    needs_camera: Annotated[
        bool, typer.Option("--needs-camera", hidden=True, help="End when no camera is there, as on probation.")
    ] = False,
) -> None:
    """Watch sources with a bundle: a line per event, counters and latencies at the end; Ctrl-C ends it."""
    from meliad_edge.device_threshold import threshold_file
    from meliad_edge.errors import PartialFailureError
    from meliad_edge.event_store import EventStore
    from meliad_edge.runtime.load import load_predictor
    from meliad_edge.sinks.lines import LineSink, describe_as_json, describe_for_people
    from meliad_edge.stream.credentials import read_secrets
    from meliad_edge.watch import Watch, open_cameras

    given = {
        "camera_secrets": camera_secrets,
        "out": tuple(out) if out else None,
        "keep_days": keep_days,
        "keep_gb": keep_gb,
        "serve": serve,
        "token_file": token_file,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
    }
    settings = _read_settings(config, sources or [], window, follow, given)
    page = settings.page()
    configs = settings.camera
    secrets = {} if settings.camera_secrets is None else read_secrets(settings.camera_secrets)
    predictor = load_predictor(model, precision=precision, engine=engine, threads=threads)
    if (own := threshold_file(model)).exists():
        say("threshold", f"{predictor.bundle.calibration.threshold:.3f}, set on this device in {own}")
    folder, destinations = settings.outputs()
    store = None if folder is None else EventStore(folder, retention=settings.retention())
    failures: list[MeliadError] = []

    def give_up(name: str, error: MeliadError) -> None:
        failures.append(error)
        if len(configs) > 1:  # The error of an only source is the last line anyway.
            _say_about(name, str(error))

    cameras = open_cameras(predictor, configs, secrets, give_up, calibration=predictor.bundle.calibration)
    readers = [camera.reader for camera in cameras]
    with ExitStack() as stack:
        stdout = sys.stdout  # A progress bar on a terminal replaces it with one that writes to standard error.
        bar = stack.enter_context(_open_bar()) if _can_show_bar(readers) else None
        lines = LineSink(_line_writer(stdout, bar), describe_as_json if json else describe_for_people)
        watch = stack.enter_context(
            Watch(
                predictor,
                cameras,
                store=store,
                destinations=destinations,
                sinks=[lines],
                on_notice=_say_about,
                on_failure=give_up,
                on_decision=_bar_mover(bar, readers, max_frames),
            )
        )
        if page is not None:
            say("page", watch.serve(page))
        with suppress(KeyboardInterrupt):  # also the SIGTERM of a service manager: as if the sources had ended
            watch.run(max_frames=max_frames, needs_camera=needs_camera)
    deliveries = watch.delivery_statuses
    summary = watch.summary()
    if len(failures) == len(configs) and not summary.frames.scored:
        raise failures[0]
    _say_losses(watch.sinks)
    _say_deliveries(deliveries)
    if json:
        print_json(_summary_record(summary, predictor.engine.name, watch.sinks, deliveries))
    else:
        _say_summary(summary, predictor.engine.name)
    if len(failures) == len(configs):
        raise failures[0]
    if problems := _list_problems(len(failures), summary):
        msg = f"{problems}; each was reported above, the rest was watched"
        raise PartialFailureError(msg)


def _read_settings(
    file: Path | None, sources: list[str], window: str, follow: bool, options: dict[str, Any]
) -> WatchConfig:
    """What the file says, then the command line: it adds sources and wins in everything else."""
    from meliad_edge.errors import UsageError
    from meliad_edge.watch_config import WatchConfig, command_line_cameras, read_watch_config

    settings = WatchConfig() if file is None else read_watch_config(file)
    cameras = (*settings.camera, *command_line_cameras(sources, window=window, follow=follow))
    if not cameras:
        msg = "nothing to watch; name a SOURCE, or a --config FILE with [[camera]] tables"
        raise UsageError(msg)
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("keep_days", "keep_gb"):
        if not math.isfinite(given.get(name, 0.0)):
            msg = f"--{name.replace('_', '-')} {given[name]}: must be a finite number"
            raise UsageError(msg)
    return settings.model_copy(update={**given, "camera": cameras})


def _can_show_bar(readers: list[Reader]) -> bool:
    return sys.stderr.isatty() and bool(readers) and not any(reader.source.is_live for reader in readers)


def _open_bar() -> Progress:
    from meliad_edge.progress import progress_bar

    return progress_bar()


def _bar_mover(bar: Progress | None, readers: list[Reader], max_frames: int | None) -> Callable[[Decision], None]:
    """What moves the bar by one frame; its end is known only once the videos are open."""
    if bar is None:
        return lambda decision: None
    task = bar.add_task(f"{'watching':<24}", total=None, note="")

    def move(decision: Decision) -> None:
        totals = [reader.total for reader in readers if reader.total is not None]
        total = sum(totals) if len(totals) == len(readers) else None
        if max_frames is not None:
            total = max_frames if total is None else min(total, max_frames)
        bar.update(task, advance=1, total=total)

    return move


def _line_writer(stdout: Any, bar: Progress | None) -> Callable[[str], None]:
    """What writes a result: above the bar if both are on one terminal, else straight to standard output."""
    if bar is not None and stdout.isatty():
        return lambda line: bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def write_line(line: str) -> None:
        stdout.write(f"{line}\n")
        stdout.flush()

    return write_line


def _say_about(name: str, text: str) -> None:
    say(f"{name}  ", text)


def _say_losses(sinks: Sequence[EventQueue]) -> None:
    for sink in sinks:
        if lost := sink.published - sink.delivered:
            say(
                "sink",
                f"{sink.name}: {lost} of {sink.published} event messages lost "
                f"({sink.overflowed} because it is too slow, {sink.failed} because it failed)",
            )


def _say_deliveries(deliveries: Sequence[DeliveryStatus]) -> None:
    for delivery in deliveries:
        text = f"{delivery.name}: {delivery.delivered} delivered"
        if delivery.pending:
            text += f", {delivery.pending} kept for the next start ({delivery.last_error or 'no time left'})"
        if delivery.rejected or delivery.lost:
            text += f", {delivery.rejected} refused, {delivery.lost} lost"
        say("delivery", text)


def _say_summary(summary: WatchSummary, engine: str) -> None:
    frames = summary.frames
    say(
        "frames",
        f"{frames.read:,} read, {frames.scored:,} scored, {frames.dropped:,} dropped for newer ones, "
        f"{frames.stale:,} too old, {frames.bad:,} bad",
    )
    if frames.misfit:
        say("", f"{frames.misfit:,} of another size than region and mask were made for")
    if frames.skipped or frames.late or frames.missed:
        say(
            "",
            f"{frames.skipped:,} beyond the frame rate wanted, {frames.late:,} given up and {frames.missed:,} decided "
            "beyond the latency budget",
        )
    say("events", f"{summary.events:,}")
    say("engine", engine)
    topic = "latency"
    for stage, latency in summary.latencies.items():
        p50, p90, p95, p99 = (1e3 * s for s in (latency.p50_s, latency.p90_s, latency.p95_s, latency.p99_s))
        name = stage.replace("_", " ")
        say(topic, f"{name:<20} p50 {p50:8.2f}  p90 {p90:8.2f}  p95 {p95:8.2f}  p99 {p99:8.2f} ms")
        topic = ""
    say("throughput", f"{summary.throughput_fps:.1f} frames/s")


def _summary_record(
    summary: WatchSummary, engine: str, sinks: Sequence[EventQueue], deliveries: Sequence[DeliveryStatus]
) -> dict[str, Any]:
    return {
        "type": "summary",
        "engine": engine,
        "frames": asdict(summary.frames),
        "events": summary.events,
        "throughput_fps": summary.throughput_fps,
        "latency": {stage: latency.to_dict() for stage, latency in summary.latencies.items()},
        "sources": [
            {
                "name": source.name,
                "state": source.state.value,
                "frames": asdict(source.frames),
                "events": source.events,
                "reconnects": source.reconnects,
                "is_truncated": source.is_truncated,
                "error": None if source.error is None else str(source.error),
            }
            for source in summary.sources
        ],
        "sinks": [
            {"name": sink.name, "published": sink.published, "overflowed": sink.overflowed, "failed": sink.failed}
            for sink in sinks
        ],
        "deliveries": [asdict(delivery) for delivery in deliveries],
    }


def _list_problems(failed: int, summary: WatchSummary) -> str:
    truncated = sum(source.is_truncated for source in summary.sources)
    counted = (
        (failed, "given up", "source", "sources"),
        (summary.frames.bad, "not decoded", "image or frame", "images or frames"),
        (summary.frames.misfit, "of another size than region and mask", "image or frame", "images or frames"),
        (truncated, "truncated", "video", "videos"),
    )
    return ", ".join(f"{n} {one if n == 1 else many} {what}" for n, what, one, many in counted if n > 0)
