"""One rank's part of serving: sequences that join and leave one batch, one forward pass a step.

New prompts are read in the same pass in which the running sequences get their next token. It does
not cut a long prompt into parts.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from moe_router.models import CausalLM, KVCache, Sampling
from moe_router.models.generate import require_causal
from moe_router.models.sampling import sample, sampling_noise
from moe_router.serving.requests import Event, Request, Score, Trace, Work
from moe_router.serving.scoring import score, score_prompt
from moe_router.serving.tracing import Tracer

_HOST = torch.device("cpu")


@dataclass(slots=True)
class _Row:
    """One sequence of the batch.

    Attributes:
        noise_N: fp32, a number for each token that may be made.
        feed: tokens that the next pass reads.
        held: tokens in the cache.
        made: tokens of the answer so far.
    """

    request: Request
    noise_N: Tensor
    feed: list[int]
    held: int
    made: int

    @classmethod
    def of(cls, request: Request) -> "_Row":
        noise_N = sampling_noise([request.prompt], request.sampling, _HOST)[0]
        made = len(request.made)
        return cls(request, noise_N, [*request.prompt, *request.made], 0, made)


class Decoder:
    """Args:
    model: every rank's has the same weights but for its experts; it is put into eval mode.
    stop_id: ends a sequence; no part of its text.

    Raises:
        NotCausalError: a layer's routing looks at later tokens.
    """

    def __init__(self, model: CausalLM, stop_id: int | None) -> None:
        require_causal(model)
        self._model, self._stop_id = model.eval(), stop_id
        self._device = model.embed.weight.device
        self._rows: list[_Row] = []
        self._cache = KVCache(model.config.steps, 0)

    @torch.no_grad()
    def step(self, work: Work) -> list[Event]:
        """One forward pass, also without any sequence: other ranks may need this one's experts.

        Returns:
            An event for every sequence, which is forgotten once its event has a `finish`.
        """
        if work.drop:
            gone = set(work.drop)
            self._keep([i for i, row in enumerate(self._rows) if row.request.id not in gone])
        if work.admit:
            self._rows += [_Row.of(request) for request in work.admit]
            self._cache.join(len(work.admit))
        bounds = [0, *accumulate(len(row.feed) for row in self._rows)]
        watched = any(row.request.trace for row in self._rows)
        tracer = Tracer(self._model.config.steps) if watched else None
        logits_TV = self._forward(bounds, tracer)
        last_B = torch.tensor(bounds[1:], dtype=torch.int64).to(self._device) - 1
        logits_BV = logits_TV[last_B]
        token_B = self._choose(logits_BV)
        traces = [None] * len(self._rows) if tracer is None else tracer.traces(bounds)
        events = []
        for i, (row, token) in enumerate(zip(self._rows, token_B, strict=True)):
            scores = self._scores(row, token, logits_TV[bounds[i] : bounds[i + 1]])
            events.append(
                self._advance(row, token, traces[i] if row.request.trace else None, scores)
            )
        going = [i for i, event in enumerate(events) if not event.finish]
        if len(going) < len(events):
            self._keep(going)
        return events

    def _forward(self, bounds: list[int], tracer: Tracer | None) -> Tensor:
        """(T, V) fp32 logits after each token that the sequences were fed."""
        offsets_B1 = torch.tensor(bounds, dtype=torch.int32)
        ids = [token for row in self._rows for token in row.feed]
        position = [row.held + n for row in self._rows for n in range(len(row.feed))]
        logits_TV: Tensor = self._model(
            torch.tensor(ids, dtype=torch.int64).to(self._device),
            torch.tensor(position, dtype=torch.int32).to(self._device),
            offsets_B1,
            cache=self._cache,
            context=None if tracer is None else tracer.context,
        ).logits_TV
        return logits_TV

    def _choose(self, logits_BV: Tensor) -> list[int]:
        """The next token of each sequence, each by its own sampling."""
        alike: dict[tuple[float, int, float], list[int]] = defaultdict(list)
        for i, row in enumerate(self._rows):
            asked = row.request.sampling
            alike[asked.temperature, asked.top_k, asked.top_p].append(i)
        token_B = [0] * len(self._rows)
        for rows in alike.values():
            chosen = self._sample(logits_BV, rows, self._rows[rows[0]].request.sampling)
            for i, token in zip(rows, chosen, strict=True):
                token_B[i] = token
        return token_B

    def _sample(self, logits_BV: Tensor, rows: Sequence[int], sampling: Sampling) -> list[int]:
        uniform_B = torch.stack([self._rows[i].noise_N[self._rows[i].made] for i in rows])
        row_B = torch.tensor(rows, device=self._device)
        tokens: list[int] = sample(logits_BV[row_B], uniform_B.to(self._device), sampling).tolist()
        return tokens

    def _scores(self, row: _Row, token: int, logits_TV: Tensor) -> tuple[Score, ...]:
        """Of the prompt, if it is echoed, and of the token that was drawn, if it is text."""
        asked = row.request
        if asked.logprobs is None:
            return ()
        echoed = asked.echo and row.held == 0 and not asked.made
        scores = score_prompt(logits_TV, asked.prompt, asked.logprobs) if echoed else []
        if not asked.reads_only and token != self._stop_id:
            scores += score(logits_TV[-1:], [token], asked.logprobs)
        return tuple(scores)

    def _advance(
        self, row: _Row, token: int, trace: Trace | None, scores: tuple[Score, ...]
    ) -> Event:
        row.held += len(row.feed)
        row.feed = [token]
        if row.request.reads_only:
            return Event(row.request.id, None, "length", trace, scores)
        if token == self._stop_id:
            return Event(row.request.id, None, "stop", trace, scores)
        row.made += 1
        full = row.made == row.request.sampling.max_new_tokens
        return Event(row.request.id, token, "length" if full else "", trace, scores)

    def _keep(self, going: list[int]) -> None:
        self._rows = [self._rows[i] for i in going]
        self._cache.keep(torch.tensor(going, dtype=torch.int64, device=self._device))
