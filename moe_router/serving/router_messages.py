"""What the gating service hands out, as messages of `router.proto` and back."""

import dataclasses
import json

from moe_router.config import RouterConfig
from moe_router.errors import GatingError
from moe_router.gating_records import Load, RouterWeights, Snapshot
from moe_router.gating_route import Decision
from moe_router.placement import Placement
from moe_router.serving import router_pb2 as pb
from moe_router.serving.matrices import from_matrix, to_matrix


def snapshot_message(snapshot: Snapshot, *, with_weights: bool) -> pb.Snapshot:
    """As the stream carries it; read back by `snapshot_of`."""
    return pb.Snapshot(
        epoch=snapshot.epoch,
        step=snapshot.step,
        placements=[_placement_message(each) for each in snapshot.placements],
        capacity_factor=snapshot.capacity_factor,
        alive=snapshot.alive,
        load_LE=to_matrix(snapshot.load_LE),
        routers=[_router_message(router, with_weights) for router in snapshot.routers],
    )


def snapshot_of(message: pb.Snapshot) -> Snapshot:
    """What a client holds: with weights, `snapshot.routers[i].build()` is the Router itself.

    Raises:
        GatingError, ConfigError: the message is not what `snapshot_message` makes.
    """
    limited = message.HasField("capacity_factor")
    return Snapshot(
        epoch=message.epoch,
        step=message.step,
        placements=tuple(map(_placement_of, message.placements)),
        capacity_factor=message.capacity_factor if limited else None,
        routers=tuple(_router_of(router) for router in message.routers),
        alive=tuple(message.alive),
        load_LE=from_matrix(message.load_LE, "load_LE"),
    )


def _placement_message(placement: Placement) -> pb.Placement:
    ranks = [pb.Placement.Rank(experts=held) for held in placement.experts_of_rank]
    return pb.Placement(experts=placement.experts, ranks=ranks)


def _placement_of(message: pb.Placement) -> Placement:
    return Placement(tuple(tuple(rank.experts) for rank in message.ranks))


def load_message(load: Load) -> pb.Load:
    return pb.Load(
        epoch=load.epoch,
        step=load.step,
        alive=load.alive,
        routers=load.routers,
        load_LE=to_matrix(load.load_LE),
        skew_L=load.skew_L.tolist(),
    )


def _router_message(router: RouterWeights, with_weights: bool) -> pb.RouterWeights:
    return pb.RouterWeights(
        model=router.model,
        layer=router.layer,
        dim=router.dim,
        config_json=json.dumps(dataclasses.asdict(router.config)),
        safetensors=router.safetensors if with_weights else None,
    )


def _router_of(message: pb.RouterWeights) -> RouterWeights:
    try:
        config = RouterConfig(**json.loads(message.config_json))
    except (TypeError, json.JSONDecodeError) as error:
        raise GatingError(
            f"router {message.model}/{message.layer}: config_json: {error}; want the fields of "
            "model.moe; use the same version as the server"
        ) from error
    return RouterWeights(
        message.model, message.layer, message.dim, config, message.safetensors or None
    )


def reply_message(decision: Decision) -> pb.RouteReply:
    choice = decision.choice
    return pb.RouteReply(
        epoch=decision.epoch,
        target_TK=to_matrix(choice.target_TK),
        weight_TK=to_matrix(choice.weight_TK),
        position_TK=to_matrix(decision.position_TK),
        capacity=decision.capacity,
        losses={name: float(loss) for name, loss in choice.losses.items()},
        rows_E=decision.plan.rows_G.tolist(),
    )
