import csv
import json
from dataclasses import replace

import pytest

from moe_router.config import RunConfig
from moe_router.errors import DataError
from moe_router.observability.csv_log import read_rows
from moe_router.observability.metrics import MetricsWriter, imbalance, read_summary, write_summary
from moe_router.observability.records import EvalRecord

RUN = RunConfig(name="run", load_every=5)


def steps(path):
    return [int(row["step"]) for row in read_rows(path)]


def held_out(step, loss=1.0):
    return EvalRecord(step, loss, loss / 0.693, 4.8, 100)


def test_a_row_a_step_and_a_row_a_layer(tmp_path, make_record):
    with MetricsWriter(tmp_path, RUN) as metrics:
        for step in range(1, 13):
            metrics.write(make_record(step, dropped=step, rows=100))
        metrics.write_eval(held_out(12))
    assert steps(tmp_path / "metrics.csv") == list(range(1, 13))
    row = read_rows(tmp_path / "metrics.csv")[2]
    record = make_record(3)
    assert float(row["loss"]) == pytest.approx(record.loss) and row["dropped"] == "3"
    assert float(row["imbalance"]) == pytest.approx(imbalance(record.load_LE))
    assert float(row["loss_balance"]) == pytest.approx(record.losses["balance"])
    load = read_rows(tmp_path / "load.csv")
    assert [(int(r["step"]), int(r["layer"])) for r in load] == [
        (step, layer) for step in (1, 5, 10, 12) for layer in (0, 1)
    ]
    assert [int(load[3][f"e{e}"]) for e in range(8)] == make_record(5).load_LE[1]
    assert list(tmp_path.glob("tb/events*"))


@pytest.mark.parametrize("how", ["rewind", "resume"])
def test_no_step_appears_twice_after_a_recovery(tmp_path, make_record, how):
    metrics = MetricsWriter(tmp_path, RUN)
    for step in range(1, 9):
        metrics.write(make_record(step))
    metrics.write_eval(held_out(4))
    metrics.write_eval(held_out(8))
    if how == "rewind":
        metrics.rewind(5)
    else:
        metrics.close()
        metrics = MetricsWriter(tmp_path, RUN, resume_from=5)
    assert steps(tmp_path / "metrics.csv") == [1, 2, 3, 4, 5]
    assert steps(tmp_path / "eval.csv") == [4]
    for step in range(6, 11):
        metrics.write(make_record(step, loss=0.5))
    metrics.close()
    assert steps(tmp_path / "metrics.csv") == list(range(1, 11))
    assert [r["loss"] for r in read_rows(tmp_path / "metrics.csv")][5:] == ["0.5"] * 5
    assert len(steps(tmp_path / "load.csv")) == len(set(steps(tmp_path / "load.csv"))) * 2


def test_a_half_written_line_is_repaired(tmp_path, make_record):
    with MetricsWriter(tmp_path, RUN) as metrics:
        for step in range(1, 5):
            metrics.write(make_record(step))
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-20])  # the power went
    with MetricsWriter(tmp_path, RUN, resume_from=3) as metrics:
        metrics.write(make_record(4))
    assert steps(path) == [1, 2, 3, 4]
    widths = {len(row) for row in csv.reader(path.read_text().splitlines())}
    assert len(widths) == 1


def test_a_column_that_comes_later_widens_the_file(tmp_path, make_record):
    with MetricsWriter(tmp_path, RUN) as metrics:
        metrics.write(make_record(1, losses={}))
        metrics.write(make_record(2, losses={"balance": 1.25}))
    first, second = read_rows(tmp_path / "metrics.csv")
    assert (first["loss_balance"], second["loss_balance"]) == ("", "1.25")


def test_imbalance_is_the_worst_layer():
    assert imbalance([[1, 1, 1, 1], [3, 1, 0, 0]]) == 3.0
    assert imbalance([]) is None and imbalance([[0, 0]]) is None


def test_log_every_thins_but_keeps_the_first_and_the_last(tmp_path, make_record):
    with MetricsWriter(tmp_path, replace(RUN, log_every=5)) as metrics:
        for step in range(1, 13):
            metrics.write(make_record(step))
    assert steps(tmp_path / "metrics.csv") == [1, 5, 10, 12]


def test_the_summary_is_json_and_not_nan(tmp_path):
    write_summary(tmp_path, bits_per_byte=1.5, loss=float("nan"))
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text)["bits_per_byte"] == 1.5 and "NaN" not in text
    assert read_summary(tmp_path)["bits_per_byte"] == 1.5
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json"):
        read_summary(tmp_path)
