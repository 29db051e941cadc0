"""`--kill RANK@WHEN`: an actor killed on purpose, to see the run recover."""

import re
from dataclasses import dataclass

from moe_router.config import Config
from moe_router.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL the process of `rank` in the middle of the step after `step`."""

    rank: int
    step: int

    @classmethod
    def parse(cls, text: str, config: Config) -> "Kill":
        """Read "1@0.5" (a fraction of train.steps) or "1@150" (a step).

        Raises:
            ConfigError: malformed, no such rank, or after the end.
        """
        found = re.fullmatch(r"(\d+)@(\d+|\d*\.\d+)", text.strip())
        if found is None:
            raise ConfigError(f"--kill {text}: want RANK@STEP or RANK@FRACTION, such as 1@0.5")
        rank, when = int(found[1]), found[2]
        steps = config.train.steps
        if rank >= config.cluster.actors:
            last = config.cluster.actors - 1
            raise ConfigError(f"--kill {text}: rank {rank}, want 0..{last} (cluster.actors)")
        step = round(float(when) * steps) if "." in when else int(when)
        if not 0 <= step < steps:
            raise ConfigError(f"--kill {text}: step {step}, want 0..{steps - 1} (train.steps)")
        return cls(rank, step)
