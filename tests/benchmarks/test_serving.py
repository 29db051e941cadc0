"""The serving benchmark at tiny shapes: rows that are saved as they are made, whatever fails."""

import json
import sys

import pytest

from benchmarks import results, serving
from benchmarks.serving_cases import CASES, least_ms
from benchmarks.serving_peer import NAME, beside


def run(monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    command = ["serving", "--shapes", "tiny", "--no-peer", "--save", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    serving.main()
    path = tmp_path / "results" / "serving.json"
    return {row["name"]: row for row in json.loads(path.read_text())} if path.exists() else {}


def test_rows_say_what_the_engine_did(monkeypatch, tmp_path):
    rows = run(monkeypatch, tmp_path)
    assert list(rows) == ["decode/streams1", "ttft/streams1", "decode/streams3", "ttft/streams3"]
    for name, row in rows.items():
        assert row["correct"] and row["value"] > 0 and row["error"] <= serving.NEAR
        assert row["unit"] == ("ms" if name.startswith("ttft") else "tokens/s")
    one = rows["decode/streams1"]
    assert one["peers"][NAME] == {"value": 12.0, "quoted": True} and one["goal"] == 940.0
    assert one["ratio"] == pytest.approx(one["value"] / 12, abs=0.01) and one["step_ms"] > 0


def test_a_row_that_fails_is_told_in_one_line_and_costs_no_other(monkeypatch, tmp_path):
    measure = serving.measure

    def fragile(case, model, streams, copy):
        if streams == 1:
            raise RuntimeError("out of luck\nand more")
        return measure(case, model, streams, copy)

    monkeypatch.setattr(serving, "measure", fragile)
    rows = run(monkeypatch, tmp_path)
    failed = rows["decode/streams1"]
    assert failed["reason"] == "RuntimeError: out of luck" and failed["correct"] is False
    assert rows["decode/streams3"]["correct"]


def test_no_row_begins_after_its_time(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, "--seconds", "0") == {}


def test_a_wrong_token_is_no_row(monkeypatch):
    case = CASES["tiny"]
    model = serving.new_model(case)
    prompt = serving.prompts_of(case, 1)[0]
    with pytest.raises(serving.WrongResult, match="standard deviations below the likeliest"):
        serving.check(model, prompt, [1, 2, 3, 4, 5])


def test_only_the_time_in_which_every_stream_decodes_counts():
    answers = serving.Answers([[1] * 3, [1] * 4], 1.0, [[2, 3, 5], [3, 4, 5, 6]])
    rate, slow = answers.decode()
    assert rate == 3 / 2 and slow == 2  # the tokens at 4, 5 and 5 lie in (3, 5]
    assert answers.first() == [1.0, 2.0]


def test_the_floor_of_a_step_is_what_the_issue_says():
    """0.66 ms a token at 3.0 TB/s, of which the cache of 512 tokens is less than a hundredth."""
    assert least_ms(CASES["qwen3"], 1, 3000.0) == pytest.approx(0.665, abs=0.005)
    assert least_ms(CASES["qwen3"], 256, 3000.0) == pytest.approx(5.2 + 1.2, abs=0.2)


def test_without_time_the_peer_is_quoted():
    case = CASES["tiny"]
    entry = beside(case.config, case.vocab, [(1,)] * 16, 9, seconds=1.0)[NAME]
    assert entry == {"value": 146.0, "quoted": True, "reason": "no time left"}
