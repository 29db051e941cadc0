"""What RUN means on the command line: a run's folder, one of its steps, or its name."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from moe_router.errors import CheckpointError, ConfigError
from moe_router.training.checkpoint_files import latest_checkpoint, read_about

_STATE = "state.json"  # a step folder has one, written last
_STEPS = f"step_*/{_STATE}"


@dataclass(frozen=True, slots=True)
class RunPath:
    """Attributes:
    run: runs/NAME.
    asked: the step that was named, None for the newest.
    """

    run: Path
    asked: Path | None

    @property
    def step(self) -> Path:
        """The checkpoint to read.

        Raises:
            CheckpointError: the run has none yet, or all it has are damaged.
        """
        found = self.asked or latest_checkpoint(self.run)
        if found is None:
            for damaged in self.run.glob(_STEPS):
                read_about(damaged.parent)  # says what is wrong with it
            raise CheckpointError(
                f"{self.run}: no whole checkpoint (step_N/{_STATE}); train on until one is written"
            )
        return found


def find_run(name: Path) -> RunPath:
    """The run that is meant.

    Args:
        name: runs/NAME, runs/NAME/step_N, or NAME of a run in ./runs.

    Raises:
        ConfigError: there is none.
    """
    for path in (name, Path("runs") / name):
        if (path / _STATE).is_file():
            return RunPath(path.parent, path)
        if (path / "config.yaml").is_file() or any(path.glob(_STEPS)):
            return RunPath(path, None)
        steps = sorted(path.parent.glob(_STEPS), key=lambda state: (len(state.parent.name), state))
        if steps and path.name.startswith("step_"):
            there = ", ".join(state.parent.name for state in steps)
            raise ConfigError(f"{path}: no such step; want one of {there}, or {path.parent}")
    what = "is no run (no config.yaml, no checkpoint)" if name.exists() else "no such run"
    folder = name.parent if name.parent != Path() else Path("runs")
    known = sorted(p.parent.name for p in folder.glob("*/config.yaml"))
    close = get_close_matches(name.name, known, 1)
    hint = f"did you mean {folder / close[0]}?" if close else "want runs/NAME or runs/NAME/step_N"
    raise ConfigError(f"{name}: {what}; {hint}")
