"""Ray for as long as a run lasts: started here and ended with it, or one that runs already."""

import contextlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from typing import Any

from moe_router.config import ClusterConfig
from moe_router.errors import ClusterError

# Ray's own word on an actor that died, printed over the progress bar; the supervisor says it. And
# Serve's on its controller, which it ends itself
_HIDDEN = "A worker died or was killed|Task ServeController"
_OBJECT_STORE = 100 << 20  # bytes; Ray's least is 75 MiB, and only records pass through it


def prepare_environment(cluster: ClusterConfig) -> None:
    """Settings that Ray reads when it is imported: call this before anything imports it."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _HIDDEN)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a FutureWarning
    if cluster.address is not None:
        return  # the user's cluster, with the user's token
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.pop("RAY_ADDRESS", None)  # null means here, whatever else runs on this machine
    if not os.environ.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        # a local Ray is guarded by a token; one that dies with it leaves no file in the home folder
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[None]:
    """Ray for the body of a `with`; nothing of it is left afterwards. One that runs is kept.

    Raises:
        ClusterError: no cluster answers at cluster.address, or this process is in another one.
    """
    prepare_environment(cluster)
    import ray  # reads the environment

    if ray.is_initialized():
        _require_same(cluster.address, ray.get_runtime_context().gcs_address)
        yield
        return
    try:
        _start(cluster)
        yield
    finally:
        with _undisturbed():
            ray.shutdown()


def _start(cluster: ClusterConfig) -> None:
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if cluster.address is None:
        # "local": without an address, Ray would join any cluster it finds on this machine
        ray.init("local", include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet)
        return
    import moe_router
    import moe_router_cluster
    import moe_router_kernels

    # sent to every node, so that actors run the very code of the driver; as paths, for inside a
    # job Ray copies them, which it cannot do with modules
    packages = (moe_router, moe_router_kernels, moe_router_cluster)
    modules = [next(iter(package.__path__)) for package in packages]
    _require_somebody(cluster.address)
    try:
        ray.init(cluster.address, runtime_env={"py_modules": modules}, **quiet)
    except (ConnectionError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise _nobody(cluster.address, first) from error


def _require_same(address: str | None, here: str) -> None:
    # by port alone: a host has several names and addresses
    if address not in (None, "auto") and address.rpartition(":")[2] != here.rpartition(":")[2]:
        raise ClusterError(
            f"cluster.address={address}: this process is in the Ray cluster at {here}; leave that "
            "by ray.shutdown(), or set cluster.address=auto to stay"
        )


def _require_somebody(address: str) -> None:
    """Ray itself would look for a minute before it says that nobody is there."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit() or "://" in address:
        raise _nobody(address, "want HOST:PORT of its head, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _nobody(address, error.strerror or str(error)) from error


def _nobody(address: str, why: str) -> ClusterError:
    return ClusterError(
        f"cluster.address={address}: no Ray cluster there ({why}); start one by `ray start "
        "--head`, or set cluster.address=null to start Ray here"
    )


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C while Ray ends would leave processes behind; it takes two seconds."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread: no signal arrives here
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
