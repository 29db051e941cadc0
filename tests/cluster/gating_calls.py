"""Waiting for a gating actor, and finding its process."""

import os
import time

import ray


def until(holds, seconds=60.0):
    """The first true value of `holds()`."""
    give_up_at = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.05)
    return found


def pid_of(service) -> int:
    return ray.get(service.__ray_call__.remote(lambda self: os.getpid()))
