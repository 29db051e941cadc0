"""What a recorded routing would cost on other ranks, links, placements and capacities."""

from moe_router.simulation.predict import Simulated, simulate
from moe_router.simulation.recording import Recording, load_recording, save_recording
from moe_router.simulation.topology import Topology, load_topology

__all__ = [
    "Recording",
    "Simulated",
    "Topology",
    "load_recording",
    "load_topology",
    "save_recording",
    "simulate",
]
