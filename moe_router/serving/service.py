"""What the fronts ask of whoever makes text: the engine itself, or a handle of one elsewhere."""

from collections.abc import AsyncGenerator
from typing import Protocol

from moe_router.serving.requests import Ask, Facts, Health, Piece


class Service(Protocol):
    """Attributes:
    model: the name that clients know.
    """

    model: str

    def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        """See `Engine.stream`."""
        ...

    async def health(self) -> Health: ...

    async def metrics(self) -> str:
        """For Prometheus."""
        ...


class Watched(Service, Protocol):
    """A service that a page may look into."""

    async def facts(self) -> Facts: ...

    async def kill(self, rank: int) -> None:
        """SIGKILL the process of a rank. Raises ConfigError: there is no such rank."""
        ...
