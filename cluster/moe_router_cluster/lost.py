"""What the driver is told when ranks of a group are gone."""

from collections.abc import Iterable

from moe_router.errors import WorkerLostError


class ActorsLost(WorkerLostError):
    """Raised in the driver; never crosses a process.

    Attributes:
        ranks: whose process is gone or frozen. Empty when only a connection broke.
        stuck: alive, but in a collective behind one that is gone: to be replaced as well.
    """

    def __init__(self, ranks: Iterable[int], reason: str, stuck: Iterable[int] = ()) -> None:
        self.ranks = frozenset(ranks)
        self.stuck = frozenset(stuck)
        super().__init__(reason)
