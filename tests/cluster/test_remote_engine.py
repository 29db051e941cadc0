"""An engine that Serve cannot reach, as the fronts see it. No Ray session."""

import asyncio

import pytest

from moe_router.errors import ClusterError
from moe_router.serving.requests import Ask, Health

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")


class Handle:
    """Of a deployment that answers everything with `error`."""

    def __init__(self, error):
        self.error = error
        self.metrics = self.health = self

    def options(self, **_):
        return self

    def remote(self, *_):
        return self

    def __await__(self):
        raise self.error
        yield

    async def __aiter__(self):
        raise self.error
        yield


@pytest.mark.parametrize("by", ["Ray", "Serve"])
def test_an_engine_that_is_gone_is_said_to_be(by):
    from ray.exceptions import ActorDiedError
    from ray.serve.exceptions import DeploymentUnavailableError  # after the filter: it warns

    from moe_router_cluster.remote_engine import RemoteEngine

    error = ActorDiedError() if by == "Ray" else DeploymentUnavailableError("engine")
    engine = RemoteEngine(Handle(error), "tiny")

    async def ask():
        with pytest.raises(ClusterError, match="the engine was lost"):
            await anext(engine.stream(Ask(prompts=("a",))))
        with pytest.raises(ClusterError, match="the engine is being made"):
            await engine.metrics()
        return await engine.health()

    assert asyncio.run(ask()) == Health(False, "the engine is being made", "tiny")
