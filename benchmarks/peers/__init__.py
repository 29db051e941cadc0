"""Other people's kernels behind one interface, a file each; only calls of the installed packages.

A peer is imported when it is measured: what is not installed costs a line in the table, no more.
"""

import importlib

from benchmarks.peers.base import Peer

NAMES = (
    "triton_kernels",
    "sonicmoe",
    "moe_ops",
    "scattermoe",
    "grouped_mm",
    "transformers",
    "liger",
    "vllm",  # last: imported, it has tuners made after it keep their results on disk
)


def load(name: str) -> Peer:
    """The adapter of a peer. Raises ImportError if the peer is not installed."""
    peer: Peer = importlib.import_module(f"benchmarks.peers.{name}").PEER
    return peer
