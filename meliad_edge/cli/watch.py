"""``meliad-edge watch``: score cameras, videos and folders, and report events."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meliad_edge.cli.options import BundleEngine, BundleFile, BundlePrecision
from meliad_edge.cli.output import print_json, say

if TYPE_CHECKING:
    from rich.progress import Progress

    from meliad_edge.errors import MeliadError
    from meliad_edge.events import Event, Window
    from meliad_edge.sinks.sink import QueuedSink
    from meliad_edge.stream.reader import Reader
    from meliad_edge.stream.watcher import Decision, WatchSummary


def command(
    model: BundleFile,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Videos, folders or globs of images, file://, rtsp://, http:// (MJPEG), v4l2:///dev/videoN, csi://N.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str | None, typer.Option(metavar="URI", help="Folder for events.jsonl and a picture of every event.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per event, then a summary.")] = False,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Stop after so many scored frames.")] = None,
    window: Annotated[
        str, typer.Option(metavar="N/M", help="Frames of a video or camera: N anomalous ones of M make an event.")
    ] = "3/5",
    engine: BundleEngine = "auto",
    precision: BundlePrecision = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine.  [default: every core]")] = None,
) -> None:
    """Watch sources with a bundle: a line per event, counters and latencies at the end; Ctrl-C ends it."""
    from meliad_edge.device_threshold import threshold_file
    from meliad_edge.errors import PartialFailureError
    from meliad_edge.runtime.load import load_predictor
    from meliad_edge.sinks.destinations import open_sink
    from meliad_edge.sinks.lines import LineSink, describe_as_json, describe_for_people
    from meliad_edge.sinks.sink import QueuedSink
    from meliad_edge.stream.watcher import Camera, Watcher

    event_window = _parse_window(window)
    predictor = load_predictor(model, precision=precision, engine=engine, threads=threads)
    if (own := threshold_file(model)).exists():
        say("threshold", f"{predictor.bundle.calibration.threshold:.3f}, set on this device in {own}")
    sinks = []
    if out is not None:
        sinks.append(QueuedSink(open_sink(out, predictor.bundle.calibration.colour_range)))
    failures: list[MeliadError] = []

    def give_up(name: str, error: MeliadError) -> None:
        failures.append(error)
        if len(sources) > 1:  # The error of an only source is the last line anyway.
            _say_about(name, str(error))

    def publish(event: Event) -> None:
        for sink in sinks:
            sink.publish(event)

    readers = _open_readers(sources, give_up)
    with ExitStack() as stack:
        stdout = sys.stdout  # A progress bar on a terminal replaces it with one that writes to standard error.
        bar = stack.enter_context(_open_bar()) if _can_show_bar(readers) else None
        sinks.append(QueuedSink(LineSink(_line_writer(stdout, bar), describe_as_json if json else describe_for_people)))
        for sink in sinks:
            stack.callback(sink.close)
        watcher = Watcher(
            predictor,
            [Camera(reader, window=event_window) for reader in readers],
            on_event=publish,
            on_notice=_say_about,
            on_failure=give_up,
            on_decision=_bar_mover(bar, readers, max_frames),
        )
        with _interruptible():
            watcher.run(max_frames=max_frames)
    summary = watcher.summary()
    if len(failures) == len(sources) and watcher.scored == 0:
        raise failures[0]
    _say_losses(sinks)
    if json:
        print_json(_summary_record(summary, predictor.engine.name, sinks))
    else:
        _say_summary(summary, predictor.engine.name)
    if len(failures) == len(sources):
        raise failures[0]
    if problems := _list_problems(len(failures), summary):
        msg = f"{problems}; each was reported above, the rest was watched"
        raise PartialFailureError(msg)


def _parse_window(text: str) -> Window:
    from meliad_edge.errors import UsageError
    from meliad_edge.events import Window

    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        msg = f"--window {text}: expected N/M as in 3/5"
        raise UsageError(msg)
    return Window(int(match[1]), int(match[2]))


def _open_readers(sources: list[str], give_up: Callable[[str, MeliadError], None]) -> list[Reader]:
    from meliad_edge.errors import MeliadError
    from meliad_edge.stream.sources import open_source
    from meliad_edge.stream.uri import parse_source, redact, with_unique_names

    parsed, readers = [], []
    for text in sources:
        try:
            parsed.append(parse_source(text))
        except MeliadError as error:
            give_up(redact(text), error)
    for source in with_unique_names(parsed):
        try:
            readers.append(open_source(source))
        except MeliadError as error:
            give_up(source.name, error)
    return readers


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C, or the SIGTERM of a service manager, end the watch as if the sources had ended."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)


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


def _say_losses(sinks: list[QueuedSink]) -> None:
    for sink in sinks:
        if lost := sink.published - sink.delivered:
            say(
                "sink",
                f"{sink.name}: {lost} of {sink.published} event messages lost "
                f"({sink.overflowed} because it is too slow, {sink.failed} because it failed)",
            )


def _say_summary(summary: WatchSummary, engine: str) -> None:
    frames = summary.frames
    say(
        "frames",
        f"{frames.read:,} read, {frames.scored:,} scored, {frames.dropped:,} dropped for newer ones, "
        f"{frames.stale:,} too old, {frames.bad:,} bad",
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


def _summary_record(summary: WatchSummary, engine: str, sinks: list[QueuedSink]) -> dict[str, Any]:
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
    }


def _list_problems(failed: int, summary: WatchSummary) -> str:
    truncated = sum(source.is_truncated for source in summary.sources)
    counted = (
        (failed, "given up", "source", "sources"),
        (summary.frames.bad, "not decoded", "image or frame", "images or frames"),
        (truncated, "truncated", "video", "videos"),
    )
    return ", ".join(f"{n} {one if n == 1 else many} {what}" for n, what, one, many in counted if n > 0)
