"""Who is computed where, and who waits: slots and tokens of each rank, and a bounded queue."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from moe_router.config import require
from moe_router.errors import QueueFullError
from moe_router.serving.requests import Request, Work


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Attributes:
    slots: sequences that a rank computes at once.
    tokens: cache slots of a rank: prompts, and what they may grow to.
    prefill: prompt tokens that a rank reads in one pass; longer prompts are read in parts, so
            that running sequences do not wait for them.
    queue: sequences that wait.
    """

    slots: int = 32
    tokens: int = 65_536
    prefill: int = 2_048
    queue: int = 256

    def __post_init__(self) -> None:
        for key in ("slots", "tokens", "prefill", "queue"):
            require(getattr(self, key) >= 1, f"limits.{key}", getattr(self, key), "1 or more")


@dataclass(slots=True)
class _Rank:
    running: dict[int, Request] = field(default_factory=dict)
    made: dict[int, list[int]] = field(default_factory=dict)  # tokens, by running request
    drop: list[int] = field(default_factory=list)
    reserved: int = 0  # cache slots
    unread: int = 0  # prompt tokens, if all passes read as many as they may

    def has_room(self, request: Request, limits: Limits) -> bool:
        fits = self.reserved + request.cost <= limits.tokens
        # what would wait for its first part at the rank waits here, in turn with other calls
        reads = self.unread < limits.prefill
        return fits and reads and len(self.running) < limits.slots


class Scheduler:
    """Calls take turns: one with many prompts does not keep one with a single prompt waiting, and
    none is ever overtaken by later ones because it is long.

    Args:
        ranks: W.
    """

    def __init__(self, ranks: int, limits: Limits) -> None:
        self._limits = limits
        self._ranks = [_Rank() for _ in range(ranks)]
        self._calls: deque[deque[Request]] = deque()  # what waits, by call
        self._waiting = 0

    @property
    def busy(self) -> bool:
        """A pass has something to do, if only to let go of what nobody waits for."""
        return self._waiting > 0 or any(rank.running or rank.drop for rank in self._ranks)

    @property
    def waiting(self) -> int:
        return self._waiting

    @property
    def running(self) -> int:
        return sum(len(rank.running) for rank in self._ranks)

    @property
    def cache_use(self) -> float:
        """Share of the cache slots that running requests may come to take."""
        return sum(rank.reserved for rank in self._ranks) / (self._limits.tokens * len(self._ranks))

    def add(self, requests: Sequence[Request]) -> None:
        """Put the prompts of one call into the queue, all or none.

        Raises:
            ConfigError: one could never be computed.
            QueueFullError: too many wait.
        """
        most = self._limits.tokens
        for request in requests:
            want = f"at most {most} tokens; ask for fewer, or raise the engine's limit"
            require(request.cost <= most, "prompt + max_tokens", request.cost, want)
        most = self._limits.queue
        require(len(requests) <= most, "prompts", len(requests), f"at most {most} in one request")
        if self._waiting + len(requests) > self._limits.queue:
            raise QueueFullError(
                f"{self._waiting} requests wait and {len(requests)} more came: want at most "
                f"{most}; ask again later"
            )
        self._calls.append(deque(requests))
        self._waiting += len(requests)

    def plan(self) -> list[Work]:
        """The next pass of each rank: what waits is dealt to the ranks with the most room."""
        admit: list[list[Request]] = [[] for _ in self._ranks]
        while self._calls:
            request = self._calls[0][0]
            open_ranks = [
                i for i, rank in enumerate(self._ranks) if rank.has_room(request, self._limits)
            ]
            if not open_ranks:
                break
            chosen = min(open_ranks, key=lambda i: self._ranks[i].reserved)
            self._ranks[chosen].running[request.id] = request
            self._ranks[chosen].reserved += request.cost
            self._ranks[chosen].unread += len(request.prompt) + len(request.made)
            admit[chosen].append(request)
            self._take_turn()
        read = self._limits.prefill
        work = [
            Work(tuple(new), tuple(rank.drop), read)
            for new, rank in zip(admit, self._ranks, strict=True)
        ]
        for rank in self._ranks:
            rank.drop.clear()
            rank.unread = max(0, rank.unread - read)
        return work

    def made(self, request_id: int, token: int) -> None:
        """Remember a token, for a rank that begins anew."""
        for rank in self._ranks:
            if request_id in rank.running:
                rank.made.setdefault(request_id, []).append(token)

    def ended(self, request_id: int) -> None:
        """The rank has let it go."""
        for rank in self._ranks:
            request = rank.running.pop(request_id, None)
            rank.made.pop(request_id, None)
            if request is not None:
                rank.reserved -= request.cost

    def drop(self, request_id: int) -> None:
        """Nobody waits for it any more."""
        for rank in self._ranks:
            if request_id in rank.running:
                rank.drop.append(request_id)
        self.ended(request_id)
        self._calls = deque(
            kept for call in self._calls if (kept := deque(r for r in call if r.id != request_id))
        )
        self._waiting = sum(map(len, self._calls))

    def restart(self) -> None:
        """The ranks hold nothing any more: what was running goes to the front of the queue."""
        lost = [
            replace(request, made=(*request.made, *rank.made.get(request.id, ())))
            for rank in self._ranks
            for request in rank.running.values()
        ]
        self._ranks = [_Rank() for _ in self._ranks]
        self._calls.extendleft(deque([r]) for r in sorted(lost, key=lambda r: -r.id))
        self._waiting += len(lost)

    def _take_turn(self) -> None:
        self._waiting -= 1
        call = self._calls.popleft()
        call.popleft()
        if call:
            self._calls.append(call)
