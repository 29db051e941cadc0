"""What many clients of an engine got, and when: tokens that leave together count as evenly spread
over the time since the piece before."""

import asyncio
import itertools
import time
from dataclasses import dataclass

from moe_router.serving.engine import Engine
from moe_router.serving.requests import Ask


@dataclass(frozen=True, slots=True)
class Answers:
    """Attributes:
    tokens: of each stream.
    began: when all asked, seconds.
    at: when each token came, by stream.
    """

    tokens: list[list[int]]
    began: float
    at: list[list[float]]

    def decode(self) -> tuple[float, float]:
        """Tokens/s, and the slowest tenth's seconds between two tokens of a stream."""
        first, last = max(times[0] for times in self.at), min(times[-1] for times in self.at)
        made = sum(first < t <= last for times in self.at for t in times)
        gaps = sorted(b - a for times in self.at for a, b in itertools.pairwise(times))
        return made / (last - first), gaps[len(gaps) * 9 // 10]

    def first(self) -> list[float]:
        """Seconds to the first token, sorted."""
        return sorted(times[0] - self.began for times in self.at)


async def ask_all(engine: Engine, prompts: list[tuple[int, ...]], new: int) -> Answers:
    """Every prompt is a client of its own."""

    async def client(prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        times: list[float] = []
        async for piece in engine.stream(Ask(prompts=(prompt,), max_tokens=new, temperature=0.0)):
            tokens += piece.tokens
            spread(times, len(piece.tokens))
        return tokens, times

    began = time.perf_counter()
    both = await asyncio.gather(*(client(prompt) for prompt in prompts))
    return Answers([tokens for tokens, _ in both], began, [times for _, times in both])


def spread(times: list[float], new: int) -> None:
    """Add the times of `new` tokens that have come just now to those of their stream."""
    now = time.perf_counter()
    last = times[-1] if times else now
    times += [last + (now - last) * (i + 1) / new for i in range(new)]
