"""Rows of numbers while a run goes on: CSV files that anything can read, and TensorBoard events.

A row describes the one step it names, not the steps since the row before. Only one process of a
run may write.
"""

import importlib
import logging
import math
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_router.config import RunConfig
from moe_router.observability.csv_log import Cell, CsvLog
from moe_router.observability.files import explained
from moe_router.observability.records import EvalRecord, StepRecord
from moe_router.observability.summary import read_summary, write_summary

__all__ = ["MetricsWriter", "imbalance", "read_summary", "write_summary"]

log = logging.getLogger(__name__)


_QUALITY = ("bits_per_byte", "unigram_bits_per_byte", "accuracy", "matthews")


class MetricsWriter:
    """Writes metrics.csv, load.csv, eval.csv and tb/ of one run.

    Args:
        run_dir: made if it is not there.
        config: `log_every` and `load_every` thin out metrics.csv and load.csv; the first step
            and the last one before `close` are always there.
        resume_from: steps already done and kept; rows after it are removed. 0 starts anew.

    Raises:
        MoeRouterError: the disk refused.
        DataError: a file of ours was replaced by something else.
    """

    def __init__(self, run_dir: Path, config: RunConfig, *, resume_from: int = 0) -> None:
        self.run_dir = run_dir
        self.config = config
        with explained(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = CsvLog(run_dir / "metrics.csv", keep=resume_from)
        self._load = CsvLog(run_dir / "load.csv", keep=resume_from)
        self._eval = CsvLog(run_dir / "eval.csv", keep=resume_from)
        self._events = _open_events(run_dir, resume_from)
        self._latest: StepRecord | None = None
        self._logged = self._loaded = 0  # the last step in metrics.csv, in load.csv

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, record: StepRecord) -> None:
        """Log one committed step; a step that was written before is replaced.

        Raises:
            MoeRouterError: the disk refused.
        """
        self._latest = record
        if record.step == 1 or record.step % self.config.log_every == 0:
            self._write_metrics(record)
        if record.step == 1 or record.step % self.config.load_every == 0:
            self._write_load(record)

    def write_eval(self, record: EvalRecord) -> None:
        """Log held-out quality; a second evaluation at one step replaces the first."""
        row: dict[str, Cell] = {
            "step": record.step,
            "loss": record.loss,
            "tokens": record.tokens,
        }
        row |= {k: v for k in _QUALITY if (v := getattr(record, k)) is not None}
        self._eval.append([row])
        self._scalars("eval", {k: v for k, v in row.items() if k != "step"}, record.step)

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: all ranks went back there and will replay."""
        for part in (self._metrics, self._load, self._eval):
            part.rewind(step)
        if self._latest is not None and self._latest.step > step:
            self._latest = None
        self._logged, self._loaded = min(self._logged, step), min(self._loaded, step)
        if self._events is not None:
            self._events.close()
            self._events = _open_events(self.run_dir, step)

    def close(self) -> None:
        """Log the last step if it was skipped, and finish the events. May be called twice."""
        last, self._latest = self._latest, None
        if last is not None and last.step > self._logged:
            self._write_metrics(last)
        if last is not None and last.step > self._loaded:
            self._write_load(last)
        if self._events is not None:
            self._events.close()
            self._events = None

    def _write_metrics(self, record: StepRecord) -> None:
        row = _metrics_row(record)
        self._metrics.append([row])
        self._logged = record.step
        self._scalars("train", {k: v for k, v in row.items() if k != "step"}, record.step)

    def _write_load(self, record: StepRecord) -> None:
        rows: list[dict[str, Cell]] = [
            {"step": record.step, "layer": layer, **{f"e{e}": n for e, n in enumerate(load_E)}}
            for layer, load_E in enumerate(record.load_LE)
        ]
        self._load.append(rows)
        self._loaded = record.step
        worst = {f"layer_{i}": imbalance([load_E]) for i, load_E in enumerate(record.load_LE)}
        self._scalars("imbalance", worst, record.step)

    def _scalars(self, group: str, values: dict[str, Any], step: int) -> None:
        if self._events is not None:
            for name, value in values.items():
                if value is not None:
                    self._events.add_scalar(f"{group}/{name}", value, step)


def imbalance(load_LE: list[list[int]]) -> float | None:
    """Largest over mean load, of the worst layer; 1 is perfect balance. None without load."""
    ratios = [max(load_E) * len(load_E) / sum(load_E) for load_E in load_LE if sum(load_E) > 0]
    return max(ratios, default=None)


def _metrics_row(record: StepRecord) -> dict[str, Cell]:
    speed = record.tokens / record.seconds if record.seconds > 0 else None
    return {
        "step": record.step,
        "loss": record.loss,
        "bits_per_token": record.loss / math.log(2),
        "grad_norm": record.grad_norm,
        "lr": record.lr,
        "tokens": record.tokens,
        "seconds": record.seconds,
        "tokens_per_second": speed,
        "imbalance": imbalance(record.load_LE),
        "dropped": record.dropped,
        "rows": record.rows,
        "executed_flops": record.executed_flops,
        "dense_flops": record.dense_flops,
        "dispatch_us": record.dispatch_us,
        "dispatch_bytes": record.dispatch_bytes,
        **{f"loss_{name}": value for name, value in record.losses.items()},
    }


def _open_events(run_dir: Path, kept: int) -> Any:
    """A TensorBoard writer that hides events after step `kept`, or None without tensorboard."""
    writer = _summary_writer()
    if writer is None:
        return None
    with explained(run_dir / "tb"):
        return writer(str(run_dir / "tb"), purge_step=kept + 1 if kept > 0 else 0, flush_secs=10)


@cache  # the note appears once in a process
def _summary_writer() -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        log.warning(
            "TensorBoard events are off (%s); metrics.csv goes on. Fix: pip install tensorboard",
            error,
        )
        return None
