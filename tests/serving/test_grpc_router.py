"""The Router service over a real connection: a server and a client on one event loop."""

import asyncio

import grpc
import pytest
import torch

from moe_router.config import RouterConfig
from moe_router.errors import GatingError
from moe_router.gating import GatingService
from moe_router.gating_records import RouterWeights
from moe_router.placement import Placement
from moe_router.routing import Router
from moe_router.serving import router_pb2 as pb
from moe_router.serving.grpc_router import InProcess, router_adder
from moe_router.serving.grpc_server import serve_grpc
from moe_router.serving.matrices import from_matrix, to_matrix
from moe_router.serving.router_messages import snapshot_message, snapshot_of
from moe_router.serving.router_pb2_grpc import RouterStub
from moe_router.types import Tokens

E, D = 4, 8
PLACEMENT = Placement(((2, 0), (1,), (), (3,)))
Code = grpc.StatusCode


def router(layer: int, seed: int = 0, **config) -> Router:
    torch.manual_seed(seed)
    made = Router(D, RouterConfig(experts=E, top_k=2, **config), layer=layer).eval()
    made.bias_E.normal_(std=0.1)
    return made


def publish(service, *routers, epoch=1, factor=1.1):
    service.publish(
        epoch=epoch,
        step=10 * epoch,
        placements=[PLACEMENT] * len(routers),
        capacity_factor=factor,
        routers=[RouterWeights.of("run", D, each, each.state_dict()) for each in routers],
    )


@pytest.fixture
def own():
    return router(3, bias_rate=0.1, jitter=0.2, z_loss=0.1)


@pytest.fixture
def service(own):
    made = GatingService(decay=0.0)
    publish(made, router(1), own)
    return made


def talk(service, client, **options):
    """Serve, and run `client(stub)`."""

    async def go():
        server, port = await serve_grpc([router_adder(InProcess(service))], **options)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await asyncio.wait_for(client(RouterStub(channel)), 30)
        finally:
            await server.stop(None)

    return asyncio.run(go())


def call(service, method, request, **options):
    async def client(stub):
        return await getattr(stub, method)(request)

    return talk(service, client, **options)


def refused(service, method, request, **options):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        call(service, method, request, **options)
    return error.value.code(), error.value.details()


def route(x_TD, epoch=1, layer=3, **more):
    return pb.RouteRequest(model="run", layer=layer, epoch=epoch, x_TD=to_matrix(x_TD), **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route_equals_the_service(service, dtype):
    x_TD, bounds = torch.randn(11, D).to(dtype), [0, 4, 4, 11]
    reply = call(service, "Route", route(x_TD, offsets_B1=bounds))
    want = service.route("run", 3, 1, x_TD, torch.tensor(bounds))
    assert torch.equal(from_matrix(reply.target_TK, "target"), want.choice.target_TK)
    assert torch.equal(from_matrix(reply.weight_TK, "weight"), want.choice.weight_TK)
    assert torch.equal(from_matrix(reply.position_TK, "position"), want.position_TK)
    assert (reply.epoch, reply.capacity) == (1, want.capacity) == (1, 7)
    assert list(reply.rows_E) == want.plan.rows_G.tolist()
    assert dict(reply.losses) == {name: float(x) for name, x in want.choice.losses.items()}
    assert reply.losses.keys() == {"balance", "z"}


def test_route_without_capacity_and_without_tokens(service, own):
    publish(service, own, epoch=2, factor=None)
    assert not call(service, "Route", route(torch.randn(3, D), epoch=2)).HasField("capacity")
    empty = call(service, "Route", route(torch.zeros(0, D), epoch=2))
    assert (empty.target_TK.rows, empty.target_TK.columns) == (0, 2)


def test_streamed_weights_rebuild_the_router(service, own):
    async def client(stub):
        stream = stub.WatchSnapshot(pb.WatchSnapshotRequest(with_weights=True))
        return snapshot_of(await stream.read())

    held = talk(service, client)
    assert [r.name for r in held.routers] == ["run/1", "run/3"]
    assert (held.epoch, held.step, held.placements) == (1, 10, (PLACEMENT,) * 2)
    assert held.capacity_factor == 1.1  # exactly: the capacity is a fraction of it
    built = held.routers[1].build().eval()
    x_TD = torch.randn(20, D)
    tokens = Tokens(x_TD, torch.arange(20).int(), torch.tensor([0, 20]).int())
    with torch.no_grad():
        ours, theirs = own(tokens), built(tokens)
    assert torch.equal(ours.target_TK, theirs.target_TK)
    assert torch.equal(ours.weight_TK, theirs.weight_TK)
    assert held.routers == service.snapshot().routers


def test_without_weights_there_are_the_facts_alone(service):
    async def client(stub):
        return await stub.WatchSnapshot(pb.WatchSnapshotRequest()).read()

    message = talk(service, client)
    assert all(not each.safetensors and each.config_json for each in message.routers)
    with pytest.raises(GatingError, match="router run/1: no weights; watch with_weights=true"):
        snapshot_of(message).routers[0].build()


def test_every_watcher_gets_each_later_epoch(service, own):
    async def client(stub):
        streams = [stub.WatchSnapshot(pb.WatchSnapshotRequest()) for _ in range(40)]
        seen = [[(await stream.read()).epoch for stream in streams]]
        for epoch in (2, 5):
            publish(service, own, epoch=epoch)
            seen.append([(await stream.read()).epoch for stream in streams])
        # watchers hold no thread each: others are still answered
        await stub.Heartbeat(pb.HeartbeatRequest(rank=0))
        return seen

    assert talk(service, client) == [[1] * 40, [2] * 40, [5] * 40]


def test_a_watcher_that_goes_away_takes_no_other_along(service, own):
    async def client(stub):
        goes, stays = (stub.WatchSnapshot(pb.WatchSnapshotRequest()) for _ in range(2))
        await goes.read()
        await stays.read()
        goes.cancel()
        await asyncio.sleep(0.05)
        publish(service, own, epoch=2)
        return (await stays.read()).epoch

    assert talk(service, client) == 2


def test_a_watcher_may_know_the_present_epoch(service, own):
    async def client(stub):
        stream = stub.WatchSnapshot(pb.WatchSnapshotRequest(after_epoch=1))
        first = asyncio.ensure_future(stream.read())
        done, _ = await asyncio.wait([first], timeout=0.2)
        assert not done
        publish(service, own, epoch=2)
        return (await first).epoch

    assert talk(service, client) == 2


def test_load_and_liveness(service):
    async def client(stub):
        load = to_matrix(torch.arange(2 * E, dtype=torch.int32).view(2, E))
        await stub.ReportLoad(pb.ReportLoadRequest(rank=1, epoch=1, load_LE=load))
        beat = await stub.Heartbeat(pb.HeartbeatRequest(rank=3))
        return beat.epoch, await stub.WatchSnapshot(pb.WatchSnapshotRequest()).read()

    epoch, seen = talk(service, client)
    assert epoch == 1 and list(seen.alive) == [1, 3]
    assert from_matrix(seen.load_LE, "load").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_stale_epoch_and_an_unknown_router_have_their_own_status(service):
    x_TD = torch.zeros(1, D)
    code, said = refused(service, "Route", route(x_TD, epoch=4))
    assert code is Code.FAILED_PRECONDITION and "epoch 4, want 1" in said
    code, said = refused(service, "Route", route(x_TD, layer=0))
    assert code is Code.NOT_FOUND and "there are: run/1, run/3" in said
    load = pb.ReportLoadRequest(rank=0, epoch=2, load_LE=to_matrix(torch.zeros(2, E)))
    assert refused(service, "ReportLoad", load)[0] is Code.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("method", "request_", "said"),
    [
        ("Route", route(torch.zeros(2, D + 1)), "got (2, 9), want (T, 8)"),
        ("Route", route(torch.full((1, D), torch.nan)), "got NaN or infinite"),
        ("Route", route(torch.zeros(2, D), offsets_B1=[0, 3]), "want 0, ascending, and 2"),
        ("Route", route(torch.zeros(2, D), offsets_B1=[0, 2**32 - 1]), "want 0, ascending, and 2"),
        ("Route", route(torch.zeros(2, D, dtype=torch.int32)), "want float32 or bfloat16"),
        ("Route", pb.RouteRequest(model="run", layer=3, epoch=1), "x_TD: no values"),
        (
            "Route",
            pb.RouteRequest(x_TD=pb.Matrix(rows=9, columns=D, float32=bytes(31))),
            "x_TD: 31 bytes, want 288",
        ),
        ("Heartbeat", pb.HeartbeatRequest(rank=4), "rank: got 4, want 0..3"),
        ("ReportLoad", pb.ReportLoadRequest(epoch=1), "load_LE: no values"),
        (
            "ReportLoad",
            pb.ReportLoadRequest(epoch=1, load_LE=to_matrix(torch.zeros(E, 2))),
            "got (4, 2), want layers x experts (2, 4)",
        ),
    ],
)
def test_malformed_requests_are_refused_in_one_line(service, method, request_, said):
    code, details = refused(service, method, request_)
    assert code is Code.INVALID_ARGUMENT and said in details and "\n" not in details


@pytest.mark.parametrize("method", ["Route", "Heartbeat", "ReportLoad"])
def test_every_method_wants_the_token(service, method):
    request = getattr(pb, f"{method}Request")()
    assert refused(service, method, request, token="secret")[0] is Code.UNAUTHENTICATED
    assert service.snapshot().alive == ()


def test_watching_wants_the_token(service):
    async def client(stub):
        async for _ in stub.WatchSnapshot(pb.WatchSnapshotRequest()):
            pass

    with pytest.raises(grpc.aio.AioRpcError) as error:
        talk(service, client, token="secret")
    assert error.value.code() is Code.UNAUTHENTICATED


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"wings": 2}'])
def test_a_config_of_another_version_is_refused(service, text):
    message = snapshot_message(service.snapshot(), with_weights=True)
    message.routers[0].config_json = text
    with pytest.raises(GatingError, match=r"router run/1: config_json: .* same version"):
        snapshot_of(message)
