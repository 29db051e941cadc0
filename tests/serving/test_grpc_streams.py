"""Many streams, and readers that do not read, beside calls that want their answer: the server is
a process of its own, so that its memory and threads are its own too."""

import asyncio
import time

import grpc
import pytest
import torch

from benchmarks.gating_server import MODEL, serving
from moe_router.gating import GatingService
from moe_router.serving import grpc_guard
from moe_router.serving import router_pb2 as pb
from moe_router.serving.grpc_router import InProcess, router_adder
from moe_router.serving.grpc_server import serve_grpc
from moe_router.serving.matrices import from_matrix, to_matrix
from moe_router.serving.router_pb2_grpc import RouterStub
from tests.gating import E, publish

STREAMS = 200
NARROW = [("grpc.http2.bdp_probe", 0)]  # a window of 64 KiB, which a fast reader would widen
Code = grpc.StatusCode


def route(dim, epoch=1):
    return pb.RouteRequest(model=MODEL, epoch=epoch, x_TD=to_matrix(torch.ones(1, dim)))


def test_two_hundred_streams_starve_nobody():
    """Watchers that know another epoch each, and inspectors, on a service that has threads for
    none of them: calls are answered meanwhile, and all streams live."""

    async def client(server):
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = RouterStub(channel)
            watching = [
                stub.WatchSnapshot(pb.WatchSnapshotRequest(after_epoch=known))
                for known in range(1, STREAMS // 2 + 1)
            ]
            inspecting = [
                stub.Inspect(pb.InspectRequest(every_ms=100)) for _ in range(STREAMS // 2)
            ]
            for stream in inspecting:
                assert (await stream.read()).epoch == 1
            for known, stream in enumerate(watching, 1):
                if known > 1:  # the others get the present one
                    assert (await stream.read()).epoch == 1
            before = server.threads()
            for rank in range(4):
                beat = await stub.Heartbeat(pb.HeartbeatRequest(rank=rank), timeout=10)
                assert beat.epoch == 1
                reply = await stub.Route(route(8), timeout=10)
                assert from_matrix(reply.target_TK, "target").shape == (1, 2)
            for stream in inspecting:
                while len((found := await stream.read()).alive) < 4:
                    pass
                assert list(found.alive) == [0, 1, 2, 3] and list(found.routers) == ["bench/0"]
            assert not any(stream.done() for stream in (*watching, *inspecting))
            return before, server.threads()

    with serving(experts=4, dim=8) as server:
        before, after = asyncio.run(asyncio.wait_for(client(server), 60))
        assert after <= before + 2 and before < STREAMS // 2


def test_readers_that_do_not_read_cost_no_memory_and_see_the_newest():
    """200 watchers of epochs that come faster than they read, 256 KiB each."""

    async def client(server):
        async with grpc.aio.insecure_channel(server.address, options=NARROW) as channel:
            stub = RouterStub(channel)
            request = pb.WatchSnapshotRequest(with_weights=True)
            streams = [stub.WatchSnapshot(request) for _ in range(STREAMS)]
            for stream in streams:
                await stream.read()
            await asyncio.sleep(0.5)
            first = server.resident_mib()
            for _ in range(10):
                beat = await stub.Heartbeat(pb.HeartbeatRequest(rank=0), timeout=5)
                await asyncio.sleep(0.2)
            grown, epoch = server.resident_mib() - first, beat.epoch
            seen = [(await streams[0].read()).epoch]
            while seen[-1] < epoch:
                seen.append((await streams[0].read()).epoch)
            return grown, seen, epoch

    with serving(experts=256, dim=256, epochs_every_ms=20) as server:
        grown, seen, epoch = asyncio.run(asyncio.wait_for(client(server), 60))
    assert grown < 32  # MiB; one message more for each stream would be 50
    assert seen == sorted(set(seen)) and len(seen) < epoch / 4  # most were never sent


def talk(service, client):
    async def go():
        server, port = await serve_grpc([router_adder(InProcess(service))])
        try:
            address = f"127.0.0.1:{port}"
            async with grpc.aio.insecure_channel(address, options=NARROW) as channel:
                return await asyncio.wait_for(client(RouterStub(channel)), 60)
        finally:
            await server.stop(None)

    return asyncio.run(go())


@pytest.fixture
def service():
    made = GatingService(decay=0.0)
    publish(made)
    return made


def test_inspect_tells_the_load_of_the_moment(service):
    async def client(stub):
        stream = stub.Inspect(pb.InspectRequest(every_ms=100))
        seen = [await stream.read()]
        for epoch, loads in ((1, [4.0, 0, 0, 0]), (2, [1.0, 2, 3, 2])):
            if epoch == 2:
                publish(service, epoch=2, step=7)
            service.report_load(0, epoch, torch.tensor([loads]))
            while (found := await stream.read()).load_LE == seen[-1].load_LE:
                pass
            seen.append(found)
        return seen

    none, one, two = talk(service, client)
    assert from_matrix(none.load_LE, "load").tolist() == [[0.0] * E] and list(none.skew_L) == [0]
    assert (one.epoch, one.step, list(one.alive), list(one.skew_L)) == (1, 0, [0], [4.0])
    assert (two.epoch, two.step, list(two.skew_L)) == (2, 7, [1.5])
    assert from_matrix(two.load_LE, "load").tolist() == [[1, 2, 3, 2]]
    assert list(two.routers) == ["run/0"]


@pytest.mark.parametrize("every_ms", [1, 99, 60_001])
def test_inspect_wants_a_pace_it_can_hold(service, every_ms):
    async def client(stub):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Inspect(pb.InspectRequest(every_ms=every_ms)).read()
        return refused.value.code(), refused.value.details()

    said = f"every_ms: got {every_ms}, want 100..60000, or 0 for 1000"
    assert talk(service, client) == (Code.INVALID_ARGUMENT, said)


def test_watchers_of_an_empty_service_starve_nobody():
    """Nothing is published yet, and each watcher says that it knows another epoch."""
    service = GatingService()

    async def client(stub):
        streams = [
            stub.WatchSnapshot(pb.WatchSnapshotRequest(after_epoch=known))
            for known in range(STREAMS)
        ]
        waits = [asyncio.ensure_future(stream.read()) for stream in streams]
        await asyncio.sleep(0.3)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Route(route(8), timeout=5)
        assert refused.value.code() is Code.FAILED_PRECONDITION
        publish(service, epoch=STREAMS)  # which none of them said
        return {(await wait).epoch for wait in waits}

    assert talk(service, client) == {STREAMS}


def test_calls_that_were_given_up_are_not_run(service, monkeypatch):
    """Each thread of routing is busy: what waits behind them past its deadline never begins, and
    heartbeats are answered all the same."""
    import threading

    go_on, begun = threading.Event(), []
    plain = service.route

    def held(*args):
        begun.append(1)
        go_on.wait(20)
        return plain(*args)

    monkeypatch.setattr(service, "route", held)

    async def client(stub):
        request = pb.RouteRequest(model="run", epoch=1, x_TD=to_matrix(torch.ones(1, 8)))
        asked = [asyncio.ensure_future(stub.Route(request, timeout=1.0).code()) for _ in range(100)]
        assert (await stub.Heartbeat(pb.HeartbeatRequest(rank=0), timeout=0.9)).epoch == 1
        codes = set(await asyncio.gather(*asked))
        kept = len(begun)
        await asyncio.sleep(0.2)
        go_on.set()
        assert (await stub.Route(request, timeout=10)).epoch == 1
        return codes, kept, len(begun)

    codes, kept, ran = talk(service, client)
    assert codes == {Code.DEADLINE_EXCEEDED}
    assert ran == kept + 1 < 50


def test_a_reader_that_never_reads_again_gives_its_place_up(service, monkeypatch, caplog):
    monkeypatch.setattr(grpc_guard, "MAX_STREAMS", 1)
    monkeypatch.setattr(grpc_guard, "SLOW_S", 0.2)
    large = pb.Snapshot(routers=[pb.RouterWeights(safetensors=bytes(8 << 20))])
    monkeypatch.setattr(
        "moe_router.serving.grpc_router.snapshot_message", lambda found, with_weights: large
    )

    async def client(stub):
        # 8 MiB are more than a client takes before it is asked to
        stuck = stub.WatchSnapshot(pb.WatchSnapshotRequest())
        await stuck.initial_metadata()
        began = time.monotonic()
        while time.monotonic() < began + 10:
            stream = stub.Inspect(pb.InspectRequest())
            try:
                epoch = (await stream.read()).epoch
            except grpc.aio.AioRpcError as error:
                assert error.code() is Code.RESOURCE_EXHAUSTED
                await asyncio.sleep(0.05)
            else:
                # here: grpc may say something of a stream that is open while its server stops
                assert not caplog.records
                return epoch
        pytest.fail("its place was never free")

    assert talk(service, client) == 1
