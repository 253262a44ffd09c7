from __future__ import annotations

import random
import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from meliad_edge.stream.backoff import Backoff
from meliad_edge.stream.frames import Frame, FrameBuffer


def frame(frame_id: int) -> Frame:
    return Frame("s", frame_id, float(frame_id), np.zeros((1, 1, 3), np.uint8), 0.0)


def drain(buffer: FrameBuffer) -> list[int]:
    ids = []
    while (taken := buffer.take()) is not None:
        ids.append(taken.id)
    return ids


@given(st.lists(st.booleans(), max_size=60))
def test_the_latest_frame_wins_and_every_loss_is_counted(puts: list[bool]) -> None:
    buffer = FrameBuffer(1, lossless=False)
    put = 0
    taken = []
    for is_put in puts:
        if is_put:
            buffer.put(frame(put))
            put += 1
        elif (got := buffer.take()) is not None:
            assert got.id == put - 1
            taken.append(got.id)
    assert taken == sorted(set(taken))
    assert len(taken) + buffer.dropped + len(buffer) == put


def test_a_lossless_buffer_makes_the_reader_wait_and_keeps_the_order() -> None:
    buffer = FrameBuffer(3, lossless=True)
    most_waiting = []
    reader = threading.Thread(target=lambda: [buffer.put(frame(i)) for i in range(200)])
    reader.start()
    ids: list[int] = []
    while len(ids) < 200:
        most_waiting.append(len(buffer))
        ids += drain(buffer)
    reader.join(5)
    assert ids == list(range(200))
    assert max(most_waiting) <= 3
    assert buffer.dropped == 0


def test_closing_lets_a_waiting_reader_go() -> None:
    buffer = FrameBuffer(1, lossless=True)
    buffer.put(frame(0))
    answers: list[bool] = []
    reader = threading.Thread(target=lambda: answers.append(buffer.put(frame(1))))
    reader.start()
    buffer.close()
    reader.join(5)
    assert answers == [False]
    assert drain(buffer) == [0]


@given(seed=st.integers(0, 1000), failures=st.integers(1, 40))
def test_backoff_grows_to_its_cap_and_starts_again_after_success(seed: int, failures: int) -> None:
    backoff = Backoff(random.Random(seed), first_s=0.5, cap_s=30.0)
    delays_s = [backoff.next_delay_s() for _ in range(failures)]
    for attempt, delay_s in enumerate(delays_s):
        ceiling_s = min(30.0, 0.5 * 2**attempt)
        assert 0.5 * ceiling_s <= delay_s <= ceiling_s
    backoff.reset()
    assert backoff.next_delay_s() <= 0.5


def test_two_clients_do_not_return_in_step() -> None:
    first, second = Backoff(random.Random(1)), Backoff(random.Random(2))
    assert first.next_delay_s() != second.next_delay_s()
