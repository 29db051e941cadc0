"""One rank's part of serving: sequences that join and leave one batch.

New prompts are read in one pass with the next tokens of the running sequences, a part of them if
they are long. While there are none, fixed steps decode (`models/steps.py`): on a GPU each is
launched before the tokens of the last one are read. What they do not cover (`Steps`' `obstacle`,
traces, log-probabilities) is a pass a token.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from moe_router.models import CausalLM, KVCache, prefixes
from moe_router.models.generate import require_causal
from moe_router.models.sampling import Draws, sample
from moe_router.models.steps import Steps, obstacle
from moe_router.models.transfer import Download
from moe_router.routing.context import PLAIN, Context
from moe_router.serving.requests import Event, Finish, Request, Work
from moe_router.serving.row import Row
from moe_router.serving.scoring import score, score_prompt
from moe_router.serving.tracing import Tracer, joined

_log = logging.getLogger(__name__)


class Decoder:
    """Args:
    model: every rank's has the same weights but for its experts; it is put into eval mode.
    stop_id: ends a sequence; no part of its text.
    ahead: steps that are launched before the tokens of one are read; None: 1 on a GPU, else 0.
    remember: tokens that the cache has room for from the start; what running sequences leave of it
        holds earlier texts, for prompts that begin like them.

    Raises:
        NotCausalError: a layer's routing looks at later tokens.
    """

    def __init__(
        self, model: CausalLM, stop_id: int | None, *, ahead: int | None = None, remember: int = 0
    ) -> None:
        require_causal(model)
        self._model, self._stop_id = model.eval(), stop_id
        self._device = model.embed.weight.device
        self._rows: list[Row] = []
        if remember and (why := prefixes.obstacle(model.config)):
            _log.info("every prompt is read whole: %s", why)
            remember = 0
        self._cache = KVCache(model.config.steps, 0, remember)
        self._prefixes = prefixes.Prefixes(self._cache, remember) if remember else None
        why = obstacle(model)
        if why:
            _log.info("every token is a pass of its own: %s", why)
        self._steps = None if why else Steps(model, self._cache)
        self._ahead = int(self._device.type == "cuda") if ahead is None else ahead
        self._flying: deque[Download] = deque()

    @torch.no_grad()
    def step(self, work: Work) -> list[Event]:
        """One forward pass, also without any sequence: other ranks may need this one's experts.

        Returns:
            What is known by now of every sequence, which is forgotten once its event has a
            `finish`.
        """
        for row in self._rows:
            row.done = row.done or row.request.id in work.drop
        steps, events = self._steps, []
        live = sum(not row.done for row in self._rows)
        if (
            steps is not None
            and steps.bucket
            and (work.admit or steps.left == 0 or 2 * live <= steps.bucket)
        ):
            events = self._end_steps(steps)
        if steps is None or not steps.bucket:
            self._keep([i for i, row in enumerate(self._rows) if not row.done])
        if work.admit:
            self._admit(work.admit)
        if steps is not None and not self._rows:  # and no other rank waits for these experts
            return events
        if steps is None or not all(row.plain for row in self._rows):
            return events + self._pass(work.read)
        return events + self._fixed(steps)

    def _admit(self, requests: Sequence[Request]) -> None:
        first = len(self._rows)
        self._rows += [Row.of(request) for request in requests]
        self._cache.join(len(requests))
        if self._prefixes is None:
            return
        for i, row in enumerate(self._rows[first:], first):
            if not row.request.reads_all:
                row.advance(self._prefixes.lend(i, row.feed))
                row.known = min(row.held, len(row.request.prompt))

    def _remember(self, i: int) -> None:
        """A text that begins like this one need not be read again."""
        if self._prefixes is not None:
            self._prefixes.remember(i, self._rows[i].read)

    def _fixed(self, steps: Steps) -> list[Event]:
        """Launch a step, and tell of the one that is due."""
        rows = self._rows
        if not steps.bucket:
            ways = [row.request.sampling for row in rows]
            noise = [row.noise_N[row.made :] for row in rows]
            held, shifts = [row.held for row in rows], [row.request.shift for row in rows]
            steps.begin([row.feed[0] for row in rows], ways, noise, held, shifts)
        flying = len(self._flying)
        if any(not r.done and r.made + flying < r.request.sampling.max_new_tokens for r in rows):
            self._flying.append(steps.launch())
            if flying < self._ahead:
                return []
        events = self._land()
        if all(row.done for row in rows):
            self._end_steps(steps)
        return events

    def _land(self) -> list[Event]:
        """The tokens of the step that was launched first. What ran on is not told of."""
        events = []
        for row, token in zip(self._rows, self._flying.popleft().tolist(), strict=True):
            if not row.done:
                events.append(self._advance(row, token))
        return events

    def _end_steps(self, steps: Steps) -> list[Event]:
        events = []
        while self._flying:
            events += self._land()
        steps.end()
        self._keep([i for i, row in enumerate(self._rows) if not row.done])
        return events

    def _pass(self, read: int) -> list[Event]:
        """Prompts and single tokens in one forward pass."""
        rows, shares = self._rows, self._shares(read)
        bounds = [0, *accumulate(shares)]
        ready = [i for i, row in enumerate(rows) if shares[i] == len(row.feed)]
        watched = any(row.request.trace for row in rows)
        tracer = Tracer(self._model.config.steps) if watched else None
        scored = any(row.request.logprobs is not None for row in rows)
        last_R = torch.tensor([bounds[i + 1] - 1 for i in ready]).long().to(self._device)
        logits_TV = self._forward(bounds, tracer, None if scored else last_R)
        tokens = self._choose([rows[i] for i in ready], logits_TV[last_R] if scored else logits_TV)
        chosen = dict(zip(ready, tokens, strict=True))
        traces = [None] * len(rows) if tracer is None else tracer.traces(bounds)
        events = []
        for i, row in enumerate(rows):
            if row.request.trace and shares[i]:
                row.trace = joined(row.trace, traces[i])
            if row.request.logprobs is not None and shares[i]:
                self._score(row, chosen.get(i), logits_TV[bounds[i] : bounds[i + 1]])
            if i in chosen:
                events.append(self._advance(row, chosen[i]))
                if shares[i] > 1:  # of a prompt; what is made of it is remembered at its end
                    self._remember(i)
            else:
                row.advance(shares[i])
        self._keep([i for i, row in enumerate(rows) if not row.done])
        return events

    def _shares(self, read: int) -> list[int]:
        """How many tokens of each sequence this pass takes: the next one of each that runs, and
        `read` of prompts, the earlier ones first."""
        shares = []
        for row in self._rows:
            share = 1 if len(row.feed) == 1 else min(len(row.feed), read)
            read -= share if len(row.feed) > 1 else 0
            shares.append(share)
        return shares

    def _forward(self, bounds: list[int], tracer: Tracer | None, asked_R: Tensor | None) -> Tensor:
        """fp32 logits after each token that the sequences were fed, or those asked for."""
        offsets_B1 = torch.tensor(bounds, dtype=torch.int32)
        parts = list(zip(self._rows, (b - a for a, b in pairwise(bounds)), strict=True))
        ids = [token for row, n in parts for token in row.feed[:n]]
        position = [row.held + i for row, n in parts for i in range(n)]
        logits: Tensor = self._model(
            torch.tensor(ids, dtype=torch.int64).to(self._device),
            torch.tensor(position, dtype=torch.int32).to(self._device),
            offsets_B1,
            cache=self._cache,
            context=self._context(tracer),
            asked_R=asked_R,
        ).logits_TV
        return logits

    def _context(self, tracer: Tracer | None) -> Context:
        context = PLAIN if tracer is None else tracer.context
        shifts = [row.request.shift for row in self._rows]
        if not any(shifts):
            return context
        return replace(context, shift_B=torch.tensor(shifts).to(self._device))

    def _choose(self, rows: Sequence[Row], logits_BV: Tensor) -> list[int]:
        """The next token of each sequence, each by its own sampling."""
        if not rows:
            return []
        draws = Draws.of([row.request.sampling for row in rows], self._device)
        uniform_B = torch.stack([row.noise_N[row.made] for row in rows])
        tokens: list[int] = sample(logits_BV, uniform_B.to(self._device), draws).tolist()
        return tokens

    def _score(self, row: Row, token: int | None, logits_NV: Tensor) -> None:
        """Remember the scores of the prompt, if it is echoed, and of the token that was drawn, if
        it is text; after an echo in any case, for who reads one cuts the last score off."""
        asked = row.request
        assert asked.logprobs is not None
        if asked.echo and not asked.made and row.held < len(asked.prompt):
            row.scores += score_prompt(logits_NV, asked.prompt, row.held, asked.logprobs)
        told = asked.echo or token != self._stop_id
        if token is not None and not asked.reads_only and told:
            row.scores += score(logits_NV[-1:], [token], asked.logprobs)

    def _advance(self, row: Row, token: int) -> Event:
        """Its feed is in the cache, and this is what comes next."""
        row.advance(len(row.feed))
        row.feed = [token]
        told: int | None = token
        finish: Finish = ""
        if row.request.reads_only:
            told, finish = None, "length"
        elif token == self._stop_id:
            told, finish = None, "stop"
        else:
            row.made += 1
            finish = "length" if row.made == row.request.sampling.max_new_tokens else ""
        row.done = bool(finish)
        event = Event(row.request.id, told, finish, row.trace, tuple(row.scores), row.known)
        row.scores, row.trace, row.known = [], None, 0
        return event

    def _keep(self, going: Sequence[int]) -> None:
        if len(going) < len(self._rows):
            for i in set(range(len(self._rows))).difference(going):
                self._remember(i)
            self._rows = [self._rows[i] for i in going]
            self._cache.keep(torch.tensor(going, dtype=torch.int64, device=self._device))
