"""One sequence of a rank's batch: what of it is in the cache, and what comes next."""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from moe_router.models.sampling import sampling_noise
from moe_router.serving.requests import Request, Score, Trace

_HOST = torch.device("cpu")


@dataclass(slots=True)
class Row:
    """Attributes:
    noise_N: fp32, a number for each token that may be made.
    read: tokens in the cache.
    feed: those that are not in it yet; the last of them says what comes next.
    made: tokens of the answer so far.
    done: its last event was given, or nobody waits for it.
    scores, trace, known: to be told with the next token.
    """

    request: Request
    noise_N: Tensor
    feed: list[int]
    made: int
    read: list[int] = field(default_factory=list)
    done: bool = False
    scores: list[Score] = field(default_factory=list)
    trace: Trace | None = None
    known: int = 0

    @classmethod
    def of(cls, request: Request) -> Self:
        noise_N = sampling_noise([request.prompt], request.sampling, _HOST)[0]
        made = len(request.made)
        return cls(request, noise_N, [*request.prompt, *request.made], made)

    @property
    def held(self) -> int:
        """Tokens in the cache."""
        return len(self.read)

    def advance(self, tokens: int) -> None:
        """So many of its feed are in the cache now."""
        self.read += self.feed[:tokens]
        self.feed = self.feed[tokens:]

    @property
    def plain(self) -> bool:
        """Whether its prompt is read, and it wants its next token and nothing else."""
        asked = self.request
        watched = asked.trace or asked.logprobs is not None or asked.reads_only
        return self.held > 0 and len(self.feed) == 1 and not watched
