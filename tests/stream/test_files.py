from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from meliad_edge.data.images import list_images
from meliad_edge.errors import DataError, SourceError, UsageError
from meliad_edge.stream import files
from meliad_edge.stream.files import FollowedImageReader
from meliad_edge.stream.frames import Frame
from meliad_edge.stream.reader import Reader, ReaderState
from meliad_edge.stream.sources import open_source
from meliad_edge.stream.uri import parse_source

SHARED_VIDEO = Path(__file__).parents[3] / "shared" / "data" / "videos" / "bottle-detection.mp4"

WriteVideo = Callable[..., Path]


def read_all(reader: Reader) -> list[Frame]:
    ready = threading.Event()
    reader.start(ready)
    frames = []
    while not reader.is_finished:
        ready.clear()
        while (frame := reader.take()) is not None:
            frames.append(frame)
        if not reader.is_finished:
            assert ready.wait(10)
    reader.join(10)
    return frames


def read_source(text: object) -> tuple[list[Frame], Reader]:
    reader = open_source(parse_source(str(text)))
    return read_all(reader), reader


def test_every_frame_of_a_video_arrives_in_order(write_video: WriteVideo) -> None:
    levels = list(range(0, 250, 5))
    frames, reader = read_source(write_video("belt.avi", levels))
    assert [frame.id for frame in frames] == list(range(50))
    assert [round(float(frame.image.mean())) for frame in frames] == pytest.approx(levels, abs=2)
    assert {frame.image.shape for frame in frames} == {(48, 64, 3)}
    assert all(a.captured_s <= b.captured_s for a, b in zip(frames, frames[1:], strict=False))
    assert (reader.state, reader.read, reader.dropped, reader.total) == (ReaderState.ENDED, 50, 0, 50)
    assert not reader.is_truncated


def test_no_two_frames_share_memory(write_video: WriteVideo) -> None:
    frames, _ = read_source(write_video("belt.avi", [10, 200, 10]))
    assert not np.shares_memory(frames[0].image, frames[1].image)


def test_colours_are_rgb(tmp_path: Path) -> None:
    path = tmp_path / "red.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (64, 48))
    writer.write(np.full((48, 64, 3), (0, 0, 255), np.uint8))  # OpenCV writes BGR.
    writer.release()
    frames, _ = read_source(path)
    assert frames[0].image[24, 32] == pytest.approx([255, 0, 0], abs=6)


def test_a_truncated_video_yields_what_it_has_and_says_so(write_video: WriteVideo) -> None:
    path = write_video("belt.avi", [(37 * i) % 250 for i in range(60)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    frames, reader = read_source(path)
    assert 0 < len(frames) < 55
    assert (reader.state, reader.error, reader.is_truncated) == (ReaderState.ENDED, None, True)
    assert f"ended after {len(frames)} of 60" in reader.notices[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", r"not a video that can be decoded \(0 bytes\)"), (b"hello" * 99, "495 bytes")],
)
def test_a_video_that_never_opens_is_an_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "belt.mp4"
    if content is not None:
        path.write_bytes(content)
    frames, reader = read_source(path)
    assert not frames
    assert reader.state is ReaderState.FAILED
    with pytest.raises(SourceError, match=message):
        raise reader.error or AssertionError


@pytest.mark.parametrize("size_hw", [(520, 16_400), (528, 16)])
def test_pictures_of_a_size_that_no_camera_has_are_bad(write_video: WriteVideo, size_hw: tuple[int, int]) -> None:
    frames, reader = read_source(write_video("belt.avi", [10] * 3, size_hw))
    assert (frames, reader.bad, reader.state) == ([], 3, ReaderState.FAILED)
    frames, _ = read_source(write_video("long.avi", [10] * 3, (512, 16)))
    assert len(frames) == 3


def test_a_video_without_frames_is_an_error(write_video: WriteVideo) -> None:
    _, reader = read_source(write_video("empty.avi", []))
    with pytest.raises(SourceError, match="not one frame could be decoded"):
        raise reader.error or AssertionError


def test_stopping_ends_a_reader_that_waits_for_room(write_video: WriteVideo) -> None:
    reader = open_source(parse_source(str(write_video("belt.avi", [10] * 100))))
    ready = threading.Event()
    reader.start(ready)
    assert ready.wait(10)
    reader.stop()
    reader.join(10)
    assert reader.state is ReaderState.ENDED
    assert reader.read <= 6  # What fits into the buffer, and the one in hand.


def write_image(path: Path, level: int) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    cv2.imwrite(str(path), np.full((20, 30, 3), level, np.uint8))


def test_a_bad_picture_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    for index in (0, 2, 4):
        write_image(tmp_path / f"{index}.png", 10 * index)
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "3.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("not even by name")
    frames, reader = read_source(tmp_path)
    assert [(frame.source, frame.id) for frame in frames] == [("0.png", 0), ("2.png", 2), ("4.png", 4)]
    assert [int(frame.image[0, 0, 0]) for frame in frames] == [0, 20, 40]
    assert (reader.read, reader.bad, reader.total) == (3, 2, 5)
    assert ["1.png" in reader.notices[0], "3.jpg" in reader.notices[1], len(reader.notices)] == [True, True, 2]
    assert not reader.is_sequence


def test_a_glob_names_pictures_so_that_they_can_be_told_apart(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png"):
        write_image(tmp_path / name, 50)
    frames, _ = read_source(tmp_path / "*" / "1.png")
    assert [frame.source for frame in frames] == ["a/1.png", "b/1.png"]


def test_one_picture_is_a_source(tmp_path: Path) -> None:
    write_image(tmp_path / "part.png", 50)
    frames, _ = read_source(tmp_path / "part.png")
    assert [frame.source for frame in frames] == ["part.png"]


def test_a_folder_of_bad_pictures_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"")
    _, reader = read_source(tmp_path)
    with pytest.raises(SourceError, match="none of 1 images could be read"):
        raise reader.error or AssertionError


def test_a_folder_without_pictures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        open_source(parse_source(str(tmp_path)))


@pytest.mark.skipif(not SHARED_VIDEO.exists(), reason="the shared videos are not beside the repository")
def test_a_real_h264_video() -> None:
    frames, reader = read_source(SHARED_VIDEO)
    assert len(frames) == reader.total == 1189
    assert {frame.image.shape for frame in frames} == {(360, 640, 3)}
    assert not reader.is_truncated


def write_picture(path: Path, level: int = 20) -> None:
    cv2.imwrite(str(path), np.full((9, 9, 3), level, np.uint8))


class Looks:
    """Lets a followed folder be looked at again and again, and does something between two looks."""

    def __init__(self, *between: Callable[[], object]) -> None:
        self._between = iter(between)

    def __call__(self, delay_s: float) -> bool:
        try:
            next(self._between)()
        except StopIteration:
            return True
        return False


def follow(source: object, *between: Callable[[], object]) -> tuple[list[str], FollowedImageReader]:
    reader = FollowedImageReader(parse_source(str(source)), wait=Looks(*between))
    names: list[str] = []
    ready = threading.Event()
    reader.start(ready)
    while not reader.is_finished:
        frame = reader.take()
        if frame is not None:
            names.append(frame.source)
        else:
            ready.wait(0.01)
    return names, reader


def nothing() -> None:
    pass


def test_a_followed_folder_gives_what_is_there_and_what_arrives(tmp_path: Path) -> None:
    write_picture(tmp_path / "1.png")
    names, reader = follow(
        tmp_path, nothing, lambda: write_picture(tmp_path / "0.png"), nothing,
        lambda: write_picture(tmp_path / "2.jpg"), nothing, nothing,
    )  # fmt: skip
    assert names == ["1.png", "0.png", "2.jpg"]
    assert (reader.state, reader.bad) == (ReaderState.ENDED, 0)


def test_a_picture_that_is_still_being_written_is_waited_for(tmp_path: Path) -> None:
    write_picture(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "whole.png").unlink()
    path = tmp_path / "part.png"
    names, reader = follow(
        tmp_path, lambda: path.write_bytes(data[:40]), lambda: path.write_bytes(data[:60]),
        lambda: path.write_bytes(data), nothing, nothing,
    )  # fmt: skip
    assert (names, reader.bad) == (["part.png"], 0)


def test_a_damaged_picture_in_a_followed_folder_is_reported_once_and_the_rest_goes_on(tmp_path: Path) -> None:
    names, reader = follow(
        tmp_path, lambda: (tmp_path / "0.png").write_bytes(b"no picture"), lambda: write_picture(tmp_path / "1.png"),
        nothing, nothing, nothing,
    )  # fmt: skip
    assert (names, reader.bad) == (["1.png"], 1)


def test_a_name_that_is_used_again_is_a_new_picture(tmp_path: Path) -> None:
    path = tmp_path / "part.png"
    write_picture(path)
    names, _ = follow(tmp_path, nothing, path.unlink, lambda: write_picture(path), nothing, nothing)
    assert names == ["part.png", "part.png"]


class Share:
    """Lists pictures as long as no fault is set."""

    def __init__(self) -> None:
        self.fault: Exception | None = None

    def fail(self, fault: Exception | None) -> Callable[[], None]:
        return lambda: setattr(self, "fault", fault)

    def list_images(self, path_or_glob: str) -> list[Path]:
        if self.fault is not None:
            raise self.fault
        return list_images(path_or_glob)


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> Share:
    share = Share()
    monkeypatch.setattr(files, "list_images", share.list_images)
    return share


def test_a_share_that_cannot_be_listed_is_waited_for(tmp_path: Path, share: Share) -> None:
    write_picture(tmp_path / "1.png")
    names, reader = follow(
        tmp_path, nothing, share.fail(OSError(errno.ESTALE, "Stale file handle")), nothing,
        share.fail(DataError("cannot list folder")), nothing,
        share.fail(None), lambda: write_picture(tmp_path / "2.png"), nothing, nothing,
    )  # fmt: skip
    assert (names, reader.state, reader.error) == (["1.png", "2.png"], ReaderState.ENDED, None)
    (notice,) = (notice for notice in reader.notices if "listed again" in notice)
    assert "Stale file handle" in notice


def test_pictures_are_not_judged_again_when_an_empty_folder_stood_in_for_them(tmp_path: Path) -> None:
    folder, away = tmp_path / "share", tmp_path / "away"
    folder.mkdir()
    write_picture(folder / "1.png")
    names, reader = follow(
        folder, nothing, lambda: folder.rename(away), folder.mkdir, nothing, folder.rmdir, lambda: away.rename(folder),
        nothing, nothing, lambda: write_picture(folder / "1.png"), nothing, nothing,
    )  # fmt: skip
    assert (names, reader.error) == (["1.png", "1.png"], None)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="this Python takes any pattern")
def test_a_wrong_pattern_is_an_error_that_no_waiting_mends(tmp_path: Path) -> None:
    (tmp_path / "cam").mkdir()
    _, reader = follow(tmp_path / "cam" / "a**b.png", nothing)
    assert "cannot use the pattern" in str(reader.error)


def test_a_glob_is_followed_too(tmp_path: Path) -> None:
    (tmp_path / "cam").mkdir()
    names, _ = follow(
        tmp_path / "cam" / "ok*.png", lambda: write_picture(tmp_path / "cam" / "ok1.png"),
        lambda: write_picture(tmp_path / "cam" / "other.png"), nothing, nothing,
    )  # fmt: skip
    assert names == ["ok1.png"]


def test_only_a_folder_that_is_there_can_be_followed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_source(parse_source(str(tmp_path / "later" / "*.png")), follow=True)
    for text, options in (("rtsp://cam/live", {"follow": True}), ("belt.mp4", {"max_fps": 5.0})):
        with pytest.raises(UsageError):
            open_source(parse_source(text), **options)  # type: ignore[arg-type]
