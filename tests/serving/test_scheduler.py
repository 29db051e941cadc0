"""Slots, tokens, turns: no rank, no clock."""

import pytest

from moe_router.errors import ConfigError, QueueFullError
from moe_router.serving.scheduler import Limits, Scheduler
from tests.serving.work import request


def ids(work):
    return [[admitted.id for admitted in rank.admit] for rank in work]


def one(number, length=1, tokens=4):
    return request(number, "x" * length, max_new_tokens=tokens)


def test_requests_are_dealt_to_the_rank_with_the_most_room():
    scheduler = Scheduler(2, Limits())
    scheduler.add([one(0, 20), one(1), one(2), one(3, 30)])
    assert ids(scheduler.plan()) == [[0], [1, 2, 3]]


def test_calls_take_turns():
    scheduler = Scheduler(1, Limits(slots=3))
    scheduler.add([one(n) for n in range(5)])
    scheduler.add([one(9)])
    assert ids(scheduler.plan()) == [[0, 9, 1]]


def test_a_long_request_is_not_overtaken():
    scheduler = Scheduler(1, Limits(tokens=20))
    for n, length in enumerate((8, 10, 1)):
        scheduler.add([one(n, length)])
    assert ids(scheduler.plan()) == [[0]]
    assert ids(scheduler.plan()) == [[]]
    scheduler.ended(0)
    assert ids(scheduler.plan()) == [[1, 2]]


def test_a_prompt_waits_in_turn_until_a_pass_can_begin_to_read_it():
    scheduler = Scheduler(1, Limits(prefill=10))
    for n, length in enumerate((30, 6, 4, 1)):
        scheduler.add([one(n, length)])
    works = [scheduler.plan() for _ in range(5)]
    assert [ids(work) for work in works] == [[[0]], [[]], [[]], [[1, 2]], [[3]]]
    assert all(rank.read == 10 for work in works for rank in work)


def test_a_full_queue_takes_all_of_a_call_or_nothing():
    scheduler = Scheduler(1, Limits(queue=3, slots=1))
    scheduler.add([one(0), one(1)])
    with pytest.raises(QueueFullError, match="2 requests wait and 2 more came: want at most 3"):
        scheduler.add([one(2), one(3)])
    scheduler.add([one(4)])
    assert ids(scheduler.plan()) == [[0]]


def test_what_can_never_be_computed_is_refused():
    scheduler = Scheduler(1, Limits(queue=3, tokens=50))
    with pytest.raises(ConfigError, match=r"prompt \+ max_tokens=54: want at most 50 tokens"):
        scheduler.add([one(0, 50)])
    with pytest.raises(ConfigError, match="prompts=4: want at most 3 in one request"):
        scheduler.add([one(n) for n in range(4)])
    assert not scheduler.busy


def test_what_nobody_waits_for_leaves_the_queue_and_the_ranks():
    scheduler = Scheduler(1, Limits(slots=1))
    scheduler.add([one(0), one(1)])
    scheduler.plan()
    scheduler.drop(1)
    scheduler.drop(0)
    assert scheduler.busy
    (work,) = scheduler.plan()
    assert (work.admit, work.drop) == ((), (0,)) and not scheduler.busy


def test_after_a_loss_what_ran_comes_first_with_what_it_had():
    scheduler = Scheduler(2, Limits(slots=1))
    scheduler.add([one(0), one(1), one(2)])
    scheduler.plan()
    for token in (7, 8):
        scheduler.made(1, token)
    scheduler.drop(0)
    scheduler.restart()
    (first,), (second,) = (rank.admit for rank in scheduler.plan())
    assert (first.id, first.made, second.id, second.made) == (1, (7, 8), 2, ())
