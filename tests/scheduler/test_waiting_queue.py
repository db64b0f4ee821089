"""The queue's order."""

from __future__ import annotations

import random

import pytest

from scheduler.messages import Request
from scheduler.sequence import Sequence
from scheduler.waiting_queue import WaitingQueue


def sequence(number: int, priority: int = 0, arrival_time: float = 0.0) -> Sequence:
    return Sequence(Request(str(number), (1,), priority=priority, arrival_time=arrival_time), number, 100)


def test_priority_then_arrival_then_number() -> None:
    queue = WaitingQueue()
    expected = [
        sequence(4, -1, 9.0),
        sequence(3, 0, 1.0),
        sequence(1, 0, 2.0),
        sequence(2, 0, 2.0),
        sequence(0, 1),
    ]
    for one in reversed(expected):
        queue.add(one)
    assert list(queue) == expected
    assert queue[0] is expected[0]


def test_one_that_comes_back_gets_its_old_place() -> None:
    queue = WaitingQueue()
    sequences = [sequence(number) for number in range(4)]
    for one in sequences:
        queue.add(one)
    for one in (sequences[1], sequences[0]):
        queue.remove(one)
    queue.add(sequences[1])
    assert list(queue) == sequences[1:]


def test_removing_the_unknown_is_an_error() -> None:
    queue = WaitingQueue()
    queue.add(sequence(1))
    for stranger in (sequence(0), sequence(1), sequence(2)):
        with pytest.raises(ValueError, match="does not wait"):
            queue.remove(stranger)
    assert len(queue) == 1


def test_random_additions_and_removals_keep_the_order() -> None:
    rng = random.Random(5)
    queue = WaitingQueue()
    present: list[Sequence] = []
    for number in range(2000):
        if present and rng.random() < 0.45:
            queue.remove(present.pop(rng.randrange(len(present))))
        else:
            present.append(sequence(number, rng.randrange(3), rng.random()))
            queue.add(present[-1])
    assert list(queue) == sorted(present, key=lambda one: one.order)
