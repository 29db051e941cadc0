import logging

import pytest

from moe_router.config import RunConfig
from moe_router.observability import metrics as metrics_module
from moe_router.observability.csv_log import read_rows
from moe_router.observability.metrics import MetricsWriter

RUN = RunConfig(name="run")


def test_events_that_were_replayed_are_shown_once(tmp_path, make_record):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = MetricsWriter(tmp_path, RUN)
    for step in range(1, 9):
        metrics.write(make_record(step, loss=9.0))
    metrics.rewind(5)
    for step in range(6, 11):
        metrics.write(make_record(step, loss=1.0))
    metrics.close()
    shown = events.EventAccumulator(str(tmp_path / "tb"))
    shown.Reload()
    losses = [(e.step, e.value) for e in shown.Scalars("train/loss")]
    assert losses == [(s, 9.0 if s <= 5 else 1.0) for s in range(1, 11)]


def test_without_tensorboard_the_csv_goes_on_with_one_note(
    tmp_path, make_record, monkeypatch, caplog
):
    def absent(name):
        raise ImportError("No module named 'tensorboard'")

    monkeypatch.setattr(metrics_module.importlib, "import_module", absent)
    metrics_module._summary_writer.cache_clear()
    with caplog.at_level(logging.WARNING):
        for run in ("a", "b"):
            with MetricsWriter(tmp_path / run, RUN) as metrics:
                metrics.write(make_record(1))
                metrics.rewind(0)
                metrics.write(make_record(1))
    metrics_module._summary_writer.cache_clear()
    assert len(read_rows(tmp_path / "b" / "metrics.csv")) == 1
    assert not (tmp_path / "b" / "tb").exists()
    assert [r.getMessage() for r in caplog.records] == [
        "TensorBoard events are off (No module named 'tensorboard'); metrics.csv goes on. "
        "Fix: pip install tensorboard"
    ]
