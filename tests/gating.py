"""Routers, and a gating service that knows one, for the tests of all its fronts."""

import torch

from moe_router.config import RouterConfig
from moe_router.gating_records import RouterWeights
from moe_router.placement import Placement
from moe_router.routing import Router

E, D = 4, 8
CONFIG = RouterConfig(experts=E, top_k=2)


def router(config=CONFIG, *, dim=D, layer=0, seed=0) -> Router:
    torch.manual_seed(seed)
    made = Router(dim, config, layer=layer).eval()
    if config.bias_rate > 0:
        made.bias_E.normal_()
    return made


def weights(made: Router, model="run", dim=D) -> RouterWeights:
    return RouterWeights.of(model, dim, made, made.state_dict())


def publish(service, *routers, epoch=1, step=0, ranks=2, factor=None, placement=None):
    return service.publish(
        epoch=epoch,
        step=step,
        placements=[placement or Placement.contiguous(E, ranks)] * max(1, len(routers)),
        capacity_factor=factor,
        routers=[weights(made) for made in routers or [router()]],
    )
