"""10,000 `Route` calls of a gRPC client to a gating service in a process of its own.

    python -m benchmarks.gating [--only PATTERN] [--calls N] [--save]

One token, or 256, of D 1024 in fp32, 64 experts, top-2, bearer token, loopback; one call after the
other, eight at once, and with 200 open streams of load beside them. A row is the time that the
client waits: median, p90 and p99, calls per second, and the server's resident memory before and
after. Every row's first answer is compared with the router itself. `ceiling` is the median of
`Heartbeat`, which asks the service next to nothing: what gRPC for Python takes.
"""

import argparse
import fnmatch
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import torch

from benchmarks.gating_server import MODEL, Serving, serving
from benchmarks.results import Row, provenance, save
from moe_router.gating import GatingService
from moe_router.serving import router_pb2 as pb
from moe_router.serving.matrices import from_matrix, to_matrix
from moe_router.serving.router_messages import snapshot_of
from moe_router.serving.router_pb2_grpc import RouterStub

EXPERTS, DIM, TOKEN = 64, 1024, "benchmark"
KEY = (("authorization", f"Bearer {TOKEN}"),)
_WARM = 200  # calls before the first that counts


@dataclass(frozen=True, slots=True)
class Case:
    """Attributes:
    tokens: of each call; 0 is a heartbeat.
    at_once: calls in flight.
    streams: of load, read beside them by another client.
    """

    name: str
    tokens: int
    at_once: int = 1
    streams: int = 0


CASES = (
    Case("grpc/heartbeat", 0),
    Case("grpc/route/T1", 1),
    Case("grpc/route/T256", 256),
    Case("grpc/route/T1/8 at once", 1, at_once=8),
    Case("grpc/route/T1/200 streams", 1, streams=200),
)


def measure(case: Case, server: Serving, calls: int) -> Row:
    """One row, without where it comes from."""
    with grpc.insecure_channel(server.address) as channel:
        stub = RouterStub(channel)  # type: ignore[no-untyped-call]
        ask, correct = prepare(case, stub)
        with _streams(case.streams, server.address):
            _calls(ask, _WARM, case.at_once)
            before = server.resident_mib()
            waited, seconds = _calls(ask, calls, case.at_once)
            after = server.resident_mib()
    return {
        "name": case.name,
        "value": round(statistics.median(waited), 1),
        "unit": "us",
        "p90": round(_part(waited, 0.9), 1),
        "p99": round(_part(waited, 0.99), 1),
        "calls": len(waited),
        "calls_per_s": round(len(waited) / seconds),
        "server_mib": [round(before, 1), round(after, 1)],
        "best_peer": None,
        "correct": correct,
    }


def prepare(case: Case, stub: Any) -> tuple[Callable[[], Any], bool]:
    """A call, and whether it answers what the router itself does."""
    if case.tokens == 0:
        beat = pb.HeartbeatRequest(rank=0)
        known = stub.Heartbeat(beat, metadata=KEY).epoch == 1
        return lambda: stub.Heartbeat(beat, metadata=KEY), known
    torch.manual_seed(case.tokens)
    x_TD = torch.randn(case.tokens, DIM)
    request = pb.RouteRequest(model=MODEL, epoch=1, x_TD=to_matrix(x_TD))
    stream = stub.WatchSnapshot(pb.WatchSnapshotRequest(with_weights=True), metadata=KEY)
    held = snapshot_of(next(stream))
    stream.cancel()
    here = GatingService()
    here.publish(
        epoch=1,
        step=0,
        placements=held.placements,
        capacity_factor=held.capacity_factor,
        routers=held.routers,
    )
    reply, want = stub.Route(request, metadata=KEY), here.route(MODEL, 0, 1, x_TD)
    correct = (
        torch.equal(from_matrix(reply.target_TK, "target"), want.choice.target_TK)
        and torch.equal(from_matrix(reply.position_TK, "position"), want.position_TK)
        and torch.allclose(from_matrix(reply.weight_TK, "weight"), want.choice.weight_TK)
    )
    return lambda: stub.Route(request, metadata=KEY), correct


def _calls(ask: Callable[[], Any], calls: int, at_once: int) -> tuple[list[float], float]:
    """Microseconds of each call, and seconds of all."""

    def some(count: int) -> list[float]:
        waited = []
        for _ in range(count):
            began = time.perf_counter()
            ask()
            waited.append((time.perf_counter() - began) * 1e6)
        return waited

    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        parts = list(pool.map(some, [calls // at_once] * at_once))
    return [us for part in parts for us in part], time.perf_counter() - began


@contextmanager
def _streams(count: int, address: str) -> Iterator[None]:
    """So many streams of load, ten messages a second each, read by threads of one client."""
    if count == 0:
        yield
        return
    with grpc.insecure_channel(address) as channel:
        stub = RouterStub(channel)  # type: ignore[no-untyped-call]
        request = pb.InspectRequest(every_ms=100)
        opened = [stub.Inspect(request, metadata=KEY) for _ in range(count)]
        threads = [threading.Thread(target=_read, args=(stream,)) for stream in opened]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            alive = sum(stream.is_active() for stream in opened)
            for stream in opened:
                stream.cancel()
            for thread in threads:
                thread.join()
    if alive < count:
        raise RuntimeError(f"{alive} of {count} streams were left at the end")


def _read(stream: Any) -> None:
    try:
        for _ in stream:
            pass
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.CANCELLED:
            raise


def _part(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def rows(pattern: str, calls: int) -> Iterator[Row]:
    origin, ceiling = provenance("cpu"), None
    with serving(experts=EXPERTS, dim=DIM, token=TOKEN) as server:
        for case in CASES:
            if not fnmatch.fnmatch(case.name, pattern):
                continue
            row = measure(case, server, calls)
            if case.tokens == 0:
                ceiling = row["value"]
            yield row | {"ceiling": ceiling, "grpcio": grpc.__version__} | origin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="rows by shell pattern")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    for row in rows(args.only, args.calls):
        before, after = row["server_mib"]
        print(
            f"{row['name']}: p50 {row['value']} us, p99 {row['p99']} us, {row['calls_per_s']} "
            f"calls/s, server {before} -> {after} MiB, correct {row['correct']}",
            flush=True,
        )
        if args.save:
            save("gating", [row])


if __name__ == "__main__":
    main()
