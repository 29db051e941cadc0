import base64
import math
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.observability.report_series import POINTS, SCALE, column, curve, load_maps, percent


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=2000))
def test_a_curve_is_short_and_keeps_its_extremes(ys):
    made = curve(enumerate(ys, 1))
    assert len(made["x"]) <= POINTS and made["x"][-1] == len(ys)
    assert max(made["high"]) == pytest.approx(max(ys), rel=1e-4, abs=1e-12)
    assert min(made["low"]) == pytest.approx(min(ys), rel=1e-4, abs=1e-12)
    slack = 1e-3 + 1e-4 * max(map(abs, ys))
    for low, y, high in zip(made["low"], made["y"], made["high"], strict=True):
        assert low - slack <= y <= high + slack


def test_smoothing_does_not_lag_behind_a_slope():
    made = curve((step, 2.0 * step) for step in range(1, 301))
    assert made["smooth"] == pytest.approx(made["y"], rel=1e-4)


def test_blank_and_infinite_cells_are_gaps():
    rows = [{"step": str(i), "loss": v} for i, v in enumerate(["1", "", "nan", "inf", "3"])]
    assert column(rows, "loss", 2.0)["x"] == [0, 4] and column(rows, "loss", 2.0)["y"] == [2, 6]
    assert column(rows, "absent") == {}


def test_percent_leaves_out_steps_without_a_whole():
    rows = [{"step": "1", "a": "1", "b": "4"}, {"step": "2", "a": "0", "b": "0"}]
    assert percent(rows, "a", "b")["y"] == [25.0] and percent(rows, "a", "b")["x"] == [1]


def test_a_heatmap_is_load_over_mean_column_by_column():
    load = [(10, 0, (3, 1)), (10, 1, (2, 2)), (20, 0, (0, 4)), (20, 1, (0, 0))]
    rows = [
        {"step": str(step), "layer": str(layer), "e0": str(a), "e1": str(b)}
        for step, layer, (a, b) in load
    ]
    made = load_maps(rows)
    assert made["steps"] == [10, 20] and made["experts"] == 2
    cells = [array("H", base64.b64decode(layer)).tolist() for layer in made["layers"]]
    assert cells == [[SCALE * 3 // 2, SCALE // 2, 0, 2 * SCALE], [SCALE, SCALE, 0, 0]]
    assert load_maps([]) is None


def test_a_huge_heatmap_stays_within_its_share_of_the_file():
    rows = [
        {"step": str(step), "layer": str(layer), **{f"e{e}": "1" for e in range(256)}}
        for step in range(40)
        for layer in range(48)
    ]
    made = load_maps(rows)
    assert sum(map(len, made["layers"])) < 800_000
    assert made["steps"][-1] == 39 and math.isclose(len(made["steps"]), 14, abs_tol=6)
