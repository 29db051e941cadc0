"""A rank that is gone: how the ranks that are left see it, and what they say."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from moe_router.errors import WorkerLostError

# gloo raises bare RuntimeErrors: their text is all that tells a lost peer from a bug of ours
_GLOO = (
    "gloo/transport",
    "gloo/rendezvous",
    "connectFullMesh",
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
)
# NCCL has one class for all it raises: these are ours
_NCCL_BUGS = ("invalid usage", "invalid argument", "unhandled cuda error")


def is_peer_loss(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or silent, not because we err."""
    text = str(error)
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    if isinstance(error, dist.DistBackendError):
        return not any(bug in text for bug in _NCCL_BUGS)
    return isinstance(error, RuntimeError) and any(mark in text for mark in _GLOO)


@contextmanager
def peers_may_be_lost(doing: str) -> Iterator[None]:
    """Around code that waits for other ranks.

    Args:
        doing: what it is, for the message: "rank 1, step 30".

    Raises:
        WorkerLostError: another rank died or did not answer in time. Other errors pass.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, WorkerLostError) or not is_peer_loss(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise WorkerLostError(
            f"{doing}: another rank is gone or silent ({reason}); form the group anew and go on "
            "from the newest checkpoint"
        ) from error
