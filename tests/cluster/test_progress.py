import io
import math

import pytest
from rich.console import Console

from moe_router.observability.records import StepRecord
from moe_router_cluster import progress
from moe_router_cluster.progress import View, clock, short


def record(step: int, **fields) -> StepRecord:
    loss = 2 * math.log(2)  # 2 bits a token
    return StepRecord(step, loss, {}, 1.0, 1e-3, tokens=100, seconds=0.1, **fields)


def view_on(stream: io.StringIO, **console) -> View:
    wide = Console(file=stream, width=200, **console)
    return View(wide, steps=10, bytes_per_token=0.5, actors=2)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61.6, "1:02"), (3602, "1:00:02"), (-1, "0:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(("n", "text"), [(950, "950"), (13_140, "13.1k"), (2.4e6, "2.4M")])
def test_short(n, text):
    assert short(n) == text


def test_a_log_gets_one_line_in_five_seconds(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    out = io.StringIO()
    with view_on(out) as view:
        view.at(0, generation=1)
        for step in range(1, 8):
            now += 1.0
            view.steps([record(step, load_LE=[[3, 1]], rows=8, dropped=2)])
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "6/10"]
    assert lines[1] == (
        "step 6/10 (60%)  loss 1.386  4.00 bits/byte  100 tok/s  balance 1.50  dropped 12 (25.0%)  "
        "gen 1 x2  0:04 left"
    )


def test_the_last_step_is_always_told():
    out = io.StringIO()
    with view_on(out) as view:
        view.at(0, generation=1)
        view.steps([record(1)])
        view.steps([record(10)])
    assert "step 10/10 (100%)" in out.getvalue()


def test_a_terminal_gets_a_bar_and_lines_above_it():
    out = io.StringIO()
    with view_on(out, force_terminal=True) as view:
        view.at(4, generation=2)
        view.steps([record(5)])
        view.say("actor 1 killed at step 4, recovered in 1.8 s")
    assert "actor 1 killed at step 4, recovered in 1.8 s" in out.getvalue()
    assert "gen 2 x2" in out.getvalue()
    assert "\x1b[?25h" in out.getvalue()  # the cursor is back


def test_speed_forgets_what_was_before_a_recovery(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    pace = progress.Pace()
    pace.restart(0)
    now = 10.0
    pace.mark(10, 1000)
    assert pace.tokens_per_second == 100
    assert pace.seconds_left(10, 20) == 10
    now = 15.0
    pace.restart(5)
    assert pace.seconds_left(5, 20) is None
    now = 16.0
    pace.mark(6, 50)
    assert pace.tokens_per_second == 50
    assert pace.seconds_left(6, 20) == 14
