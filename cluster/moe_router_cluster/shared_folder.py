"""Whether the nodes of a group share a folder for checkpoints: what one writes, all must see."""

import contextlib
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_router.config import Config
from moe_router.errors import ClusterError
from moe_router.observability.files import explained
from moe_router.training.remote import is_remote


def require_shared(
    config: Config, run_dir: Path, nodes: Sequence[str], ask: Callable[..., list[Any]]
) -> None:
    """Refuse a folder of one node's own for ranks of several: half a checkpoint would lie on each.

    Args:
        run_dir: of the run, on this node.
        nodes: of each rank.
        ask: a method of every rank; see `ShardGroup.ask`.

    Raises:
        ClusterError: a node does not see what was written here.
    """
    storage = config.run.storage
    if len(set(nodes)) == 1 or (storage is not None and is_remote(storage)):
        return
    key, folder = ("run.dir", run_dir)
    if storage is not None:
        key, folder = "run.storage", Path(storage) / config.run.name
    mark = folder / f".seen-{secrets.token_hex(8)}"  # a new name: NFS remembers absent ones
    with explained(mark):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    try:
        blind = [rank for rank, sees in enumerate(ask("sees", str(mark))) if not sees]
    finally:
        with contextlib.suppress(OSError):
            mark.unlink()
    if blind:
        raise ClusterError(
            f"{key}={folder}: a folder of one node, which the nodes of ranks "
            f"{', '.join(map(str, blind))} do not see, so a checkpoint would lie in pieces; want a "
            "folder that all nodes share, such as NFS, or set run.storage=s3://BUCKET/PREFIX"
        )
