"""The dispatch benchmark in a tiny form, with real ranks over gloo: those of the other tests, which
are there already. `moe-router doctor --links` is tested with ranks of its own."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from benchmarks import dispatch, dispatch_measure, results
from benchmarks.dispatch_ranks import PROGRESS, Ranks
from tests.gloo import run_ranks

NAMES = ("all_to_all", "padded", "gather_scatter", "peer_memory")


KINDS = ("uniform", "hot_rank", "ragged", "empty_rank")
ONLY = ",".join(["dispatch/24x16/top2of8", "*/hot_rank", "*/ragged", "dispatch/*/empty_rank"])


def measured(rank, ranks, args):
    dispatch_measure.measure_jobs(torch.device("cpu"), *args)


def run_here(ranks, kind, function, *args, meanwhile):
    assert kind == "cpu" and function is dispatch_measure.measure_jobs
    run_ranks(ranks, measured, args)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(dispatch, "local_device", lambda ranks: "cpu")
    monkeypatch.setattr(dispatch, "run_here", run_here)

    def run(*arguments):
        dispatch.main([*arguments, "--samples", "1", "--save"])
        return {
            row["name"]: row for row in json.loads((tmp_path / "results/dispatch.json").read_text())
        }

    return run


def test_routings_have_rows_that_were_checked(saved):
    rows = saved("--shape", "24,16,2,8", "--only", ONLY)
    names = [dispatch.case_name("dispatch", (24, 16, 2, 8), kind) for kind in KINDS]
    back = [dispatch.case_name("combine", (24, 16, 2, 8), kind) for kind in KINDS[1:3]]
    assert set(rows) == {*names, *back}
    for name, row in rows.items():
        assert row["correct"] and row["value"] == row["p50"] <= row["p99"], name
        p50 = {n: row["transports"][n]["p50"] for n in NAMES if row["transports"][n]["p50"]}
        assert row["transport"] == min(p50, key=p50.get) and row["chooser"] == "all_to_all"
        assert row["bytes_over_minimum"] >= 1.0
        assert set(row["transports"]) == {*NAMES, "plain all-to-all", row_of_the_floor(row)}
        assert row["ratio"] == pytest.approx(row["peer_value"] / row["value"], abs=1e-3)
        # 24 tokens of 64 bytes; no rank sends another one more
        assert 0 < row["remote_bytes"] <= 24 * 16 * 4
    assert rows["dispatch/24x16/top2of8/hot_rank"]["remote_bytes"] == 24 * 16 * 4


def row_of_the_floor(row):
    (name,) = (name for name in row["transports"] if name.startswith("bare"))
    return name


def test_weak_scaling_is_the_speed_of_one_rank_over_that_of_two(saved):
    (row,) = saved("--layer", "32,16,8,4,2", "--only", "layer/*").values()
    assert row["reasons"] == {} and row["transport"] in NAMES
    assert set(row["us"]) == {"alone", *NAMES} and row["shape"] == [32, 16, 8, 4, 2]
    assert row["value"] == pytest.approx(row["us"]["alone"] / row["us"][row["transport"]], abs=2e-3)


def test_a_wrong_or_lost_row_has_no_time():
    found = {"correct": True, "reason": "", "dispatch": [3.0, 1.0, 2.0], "combine": [1.0]}
    lost = {"correct": False, "reason": "does not fit", "dispatch": [], "combine": []}
    contenders = {"all_to_all": found, "padded": lost, "gather_scatter": lost, "plain": found}
    said = {"contenders": contenders, "chosen": "padded", "remote_bytes": 1000}
    said["copy_bytes_per_s"] = 1e9
    row, _ = dispatch.case_rows((8, 4, 2, 4), "zipf", said, 2)
    assert row["transport"] == "all_to_all" and (row["p50"], row["p99"]) == (2.0, 3.0)
    assert row["transports"]["padded"] == {"p50": None, "p99": None, "reason": "does not fit"}
    assert row["graph"] is False and row["graph_p50"] is None
    assert row["ceiling"] == 1.0 and row["remote_gb_s"] == 0.5 and row["of_copy"] == 0.5
    replayed = found | {"dispatch_graph": [0.5, 1.5, 1.0], "combine_graph": [1.0], "graph": False}
    row, _ = dispatch.case_rows(
        (8, 4, 2, 4), "zipf", said | {"contenders": contenders | {"padded": replayed}}, 2
    )
    assert row["transports"]["padded"] == {"p50": 2.0, "p99": 3.0, "graph_p50": 1.0}
    no_graph = found | {"graph": False, "graph_reason": "no capture"}
    row, _ = dispatch.case_rows(
        (8, 4, 2, 4), "zipf", said | {"contenders": contenders | {"padded": no_graph}}, 2
    )
    assert row["transports"]["padded"] == {"p50": 2.0, "p99": 3.0, "graph_reason": "no capture"}
    nothing = said | {"contenders": dict.fromkeys(NAMES, lost)}
    row, _ = dispatch.case_rows((8, 4, 2, 4), "zipf", nothing, 2)
    assert row["value"] is None and row["ratio"] is None and not row["correct"]
    assert dispatch_measure.ROUNDS >= 5


def test_a_contender_that_fails_does_not_lose_the_others(saved, monkeypatch, capsys):
    """The first start dies while padded is at work, the second while nobody is."""
    starts = []

    def dies(ranks, kind, function, jobs, excluded, samples, folder, seconds, meanwhile):
        starts.append(([job.name for job in jobs], dict(excluded)))
        if len(starts) < 3:
            at = {"job": jobs[0].name, "contender": "" if excluded else "padded"}
            (Path(folder) / PROGRESS).write_text(json.dumps(at))
            raise ProcessExitedException("Traceback\nboom: 7", 0, 1, 1)
        run_here(ranks, kind, function, jobs, excluded, samples, folder, 60, meanwhile=meanwhile)

    monkeypatch.setattr(dispatch, "run_here", dies)
    only = "dispatch/24x16/top2of8/zipf,*/ragged"
    rows = saved("--shape", "24,16,2,8", "--only", only)
    jobs = ["24x16.zipf", "24x16.ragged"]
    padded = {"padded": "in 24x16.zipf: boom: 7"}
    assert starts == [(jobs, {}), (jobs, padded), (jobs[1:], padded)]
    zipf, ragged = rows["dispatch/24x16/top2of8/zipf"], rows["dispatch/24x16/top2of8/ragged"]
    assert (zipf["value"], zipf["reason"]) == (None, "boom: 7") and not zipf["correct"]
    assert ragged["correct"] and ragged["transports"]["padded"]["reason"] == padded["padded"]
    assert "padded in 24x16.zipf: boom: 7" in capsys.readouterr().out


def raises(rank, ranks, folder):
    """One rank fails; both hear of it and go on."""
    both = Ranks(folder, {"left out": "it hung"})
    both.begin("job")

    def work():
        if rank == 1:
            raise ValueError("no room\nfor more")
        return 3

    said = [both.attempt("one", work), both.attempt("left out", work)]
    return [*said, both.attempt("other", lambda: 4), both.time_is_up(time.monotonic() + rank - 1)]


def test_ranks_agree_on_who_failed(tmp_path):
    first, second = run_ranks(2, raises, str(tmp_path))
    assert first[0] == (None, "failed on another rank")
    assert second[0] == (None, "ValueError: no room")
    assert first[1:] == second[1:] == [(None, "it hung"), (4, ""), True]  # by the clock of rank 0
    at = json.loads((tmp_path / PROGRESS).read_text())
    assert at == {"job": "job", "contender": "other"}


def test_time_that_is_over_begins_nothing(saved, capsys):
    with pytest.raises(FileNotFoundError):
        saved("--shape", "24,16,2,8", "--only", "*/zipf", "--seconds", "0")
    assert capsys.readouterr().out == "24x16.zipf: no time left\n"
