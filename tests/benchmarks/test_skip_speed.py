"""The benchmark of skipping on random weights, in its tiny form."""

import json

import pytest

from benchmarks import dense_routing_table, energy, results, skip_speed


def test_every_row_is_measured_and_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(skip_speed.torch.cuda, "is_available", lambda: False)
    skip_speed.main(["--rounds", "1", "--seconds", "0.01", "--save"])
    rows = json.loads((tmp_path / "results" / "skip_speed.json").read_text())
    of = {row["name"]: row for row in rows}
    assert len(of) == 9 and capsys.readouterr().out.count("ratio") == 9
    assert of["train/D32/2x16/dense"]["executed"] == 1
    assert of["train/D32/2x16/skip/0.5"]["executed"] == pytest.approx(0.5, abs=0.03)
    assert of["train/D32/2x16/skip/0.125/every2"]["executed"] == pytest.approx(0.56, abs=0.03)
    for batch in (1, 3):
        kept = [of[f"decode/D32/{batch}/{name}"]["executed"] for name in skip_speed.BIASES]
        assert kept[0] == kept[2] == 1 and 0.2 < kept[1] < 0.8
    text = "\n".join(dense_routing_table.skip_speed(rows))
    assert "| decode/D32/1/skip/0.5 | " in text and "CPU, " in text


def test_a_text_that_is_full_begins_anew(monkeypatch):
    monkeypatch.setattr("benchmarks.skip_steps.STRETCH", 5)
    bench = skip_speed.Bench("cpu", rounds=1, seconds=0.01)
    rows = bench.jobs("D32", skip_speed.TINY["D32"])["decode/D32/1"]()
    assert [row["executed"] for row in rows][::2] == [1, 1]


def test_without_a_counter_there_are_no_joules():
    if not energy.torch.cuda.is_available():
        assert energy.joules(lambda: None, seconds=0.01) is None
