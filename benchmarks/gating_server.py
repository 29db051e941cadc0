"""A gating service behind gRPC in a process of its own: what benchmarks and tests ask from outside.

    python -m benchmarks.gating_server [--experts E] [--dim D] [--epochs-every-ms MS] [--token T]

Prints its port and ends when its standard input does. With `--epochs-every-ms` it publishes a new
epoch as often as that.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_router.config import RouterConfig
from moe_router.gating import GatingService
from moe_router.gating_records import RouterWeights
from moe_router.placement import Placement
from moe_router.routing import Router
from moe_router.serving.grpc_router import InProcess, router_adder
from moe_router.serving.grpc_server import serve_grpc

MODEL, RANKS, TOP_K = "bench", 4, 2


@dataclass(frozen=True, slots=True)
class Serving:
    """A running server: where it listens, and what it takes."""

    address: str
    pid: int

    def resident_mib(self) -> float:
        return self._status("VmRSS") / 1024

    def threads(self) -> int:
        return int(self._status("Threads"))

    def sockets(self) -> int:
        links = Path(f"/proc/{self.pid}/fd").iterdir()
        return sum(os.readlink(link).startswith("socket:") for link in links)

    def _status(self, key: str) -> float:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


@contextmanager
def serving(**options: int | str) -> Iterator[Serving]:
    """The server in a process; options as on its command line."""
    more = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "benchmarks.gating_server", *more]
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            port = int(process.stdout.readline())
            yield Serving(f"127.0.0.1:{port}", process.pid)
        finally:
            process.stdin.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--epochs-every-ms", type=float, default=0.0, help="0: one epoch")
    parser.add_argument("--token")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    router = Router(args.dim, RouterConfig(experts=args.experts, top_k=TOP_K), layer=0).eval()
    weights = RouterWeights.of(MODEL, args.dim, router, router.state_dict())
    asyncio.run(_serve(weights, args.epochs_every_ms / 1000, args.token))


async def _serve(weights: RouterWeights, every_s: float, token: str | None) -> None:
    service = GatingService()
    _publish(service, weights, 1)
    server, port = await serve_grpc([router_adder(InProcess(service))], token=token)
    print(port, flush=True)
    ended = threading.Event()
    if every_s > 0:
        threading.Thread(target=_keep_publishing, args=(service, weights, every_s, ended)).start()
    await asyncio.to_thread(sys.stdin.read)
    ended.set()
    await server.stop(None)


def _keep_publishing(
    service: GatingService, weights: RouterWeights, every_s: float, ended: threading.Event
) -> None:
    epoch = 1
    while not ended.wait(every_s):
        epoch += 1
        _publish(service, weights, epoch)


def _publish(service: GatingService, weights: RouterWeights, epoch: int) -> None:
    service.publish(
        epoch=epoch,
        step=epoch,
        placements=[Placement.contiguous(weights.config.experts, RANKS)],
        capacity_factor=None,
        routers=[weights],
    )


if __name__ == "__main__":
    main()
