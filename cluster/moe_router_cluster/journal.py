"""What happened to a run, in `runs/NAME/logs/run.jsonl`; each rank writes its `rank_R.jsonl`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from moe_router.observability.event_log import EventLog, Fact
from moe_router.observability.records import EvalRecord, StepRecord
from moe_router_cluster.course import Recovery

LOGS = "logs"


class Journal:
    """An `Observer` that writes what is worth a line; steps are not, metrics.csv has them.

    Args:
        step: where the run goes on from.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self._step, self._epoch = step, 0
        self._log = EventLog(run_dir / LOGS / "run.jsonl", self._facts)

    def say(self, event: str, **more: Fact) -> None:
        self._log.write(event, **more)

    def agreed(self, epoch: int, step: int) -> None:
        self._epoch, self._step = epoch, step
        self.say("epoch")

    def stepped(self, records: list[StepRecord], seconds: float) -> None:
        self._step = records[-1].step

    def evaluated(self, record: EvalRecord) -> None:
        self.say("evaluated", held_out_loss=record.loss, quality=str(record))

    def recovered(self, recovery: Recovery) -> None:
        self._step = recovery.from_step
        facts = asdict(recovery)
        lost_at = facts.pop("step")
        self.say("recovered", lost_at=lost_at, **facts)

    def _facts(self) -> Mapping[str, Fact]:
        return {"rank": None, "step": self._step, "epoch": self._epoch}
