"""An engine in another process, as the fronts see it: `moe_router.serving.service.Watched`."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from moe_router.errors import ClusterError, MoeRouterError
from moe_router.serving.requests import Ask, Facts, Health, Piece

_HEALTH_S = 5.0  # a replica that is being made does not answer
_GONE = (RayError, RayServeException)  # Serve's own, where it could not make one, are no RayErrors


class RemoteEngine:
    """Args:
    handle: Serve's, of the EngineReplica.
    model: the name that clients know.
    """

    def __init__(self, handle: Any, model: str) -> None:
        self.model = model
        self._handle = handle
        self._streams = handle.options(stream=True, method_name="stream")

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        """See `Engine.stream`. Raises ClusterError where the engine itself is gone."""
        pieces = self._streams.remote(ask)
        ended = False
        try:
            async for piece in pieces:
                yield piece
            ended = True
        except RayTaskError as error:
            ended = True
            if isinstance(error.cause, MoeRouterError):
                raise error.cause from None
            raise
        except _GONE as error:
            ended = True
            raise ClusterError("the engine was lost and is made anew; ask again later") from error
        finally:
            if not ended:  # whoever asked is gone, so the ranks must not go on
                pieces.cancel()

    async def facts(self) -> Facts:
        found: Facts = await self._handle.facts.remote()
        return found

    async def kill(self, rank: int) -> None:
        try:
            await self._handle.kill.remote(rank)
        except RayTaskError as error:
            if isinstance(error.cause, MoeRouterError):
                raise error.cause from None
            raise

    async def metrics(self) -> str:
        """See `Engine.metrics`. Raises ClusterError where the engine itself is gone."""
        try:
            found: str = await asyncio.wait_for(self._handle.metrics.remote(), _HEALTH_S)
        except (TimeoutError, *_GONE) as error:
            raise ClusterError("the engine is being made; ask again later") from error
        return found

    async def health(self) -> Health:
        try:
            found: Health = await asyncio.wait_for(self._handle.health.remote(), _HEALTH_S)
        except (TimeoutError, *_GONE):
            return Health(False, "the engine is being made", self.model)
        return found
