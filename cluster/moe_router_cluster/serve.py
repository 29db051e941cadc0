"""`moe-router serve`: a run answers HTTP and gRPC until Ctrl-C."""

import logging
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

from rich.console import Console

from moe_router.config import ClusterConfig
from moe_router.errors import ClusterError, ConfigError
from moe_router_cluster.interrupts import Interrupts
from moe_router_cluster.resources import Resources, pick_device, shortage
from moe_router_cluster.serve_plan import ServeArguments, ServePlan, make_plan
from moe_router_cluster.session import prepare_environment, ray_session

APP = "moe-router"
_START_S = 600.0  # placing actors, importing torch, reading a checkpoint
_OURS = re.compile(r"^(?:.*\s)?moe_router\.errors\.\w+: (.+)$", re.MULTILINE)


def serve(
    arguments: ServeArguments,
    port: int,
    console: Console,
    ready: Callable[[str], object] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        port: of HTTP.
        ready: called with the address, http://HOST:PORT, once it answers.

    Raises:
        MoeRouterError: one line for the user.
        KeyboardInterrupt: the user ended it.
    """
    plan = make_plan(arguments)
    for asked, option in ((port, "--port"), (plan.grpc_port, "--grpc-port")):
        _require_free(plan.host, asked, option)
    prepare_environment(plan.config.cluster)
    actors = plan.config.cluster.actors
    console.print(
        f"{plan.model}: {plan.step_dir.name} on {actors} actor{'s' * (actors > 1)}; starting",
        highlight=False,
    )
    with Interrupts() as interrupts, ray_session(plan.config.cluster):
        interrupts.take_over()  # Ray has put its own handler on SIGTERM
        from ray import serve as ray_serve  # reads the environment

        _serve: Any = ray_serve  # half of its functions have no types
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # we say what there is to say

        try:
            grpc_port = _deploy(plan, port)
            _greet(plan, port, grpc_port, console)
            if ready is not None:
                ready(_address(plan, port))
            threading.Event().wait()
        finally:
            _serve.shutdown()


def _deploy(plan: ServePlan, port: int) -> int:
    """Start the application and wait until it answers. Returns the port of gRPC."""
    from ray import serve as ray_serve

    from moe_router_cluster.serve_app import application

    _require_room(plan.config.cluster)
    _serve: Any = ray_serve
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    options: dict[str, Any] = {"host": plan.host, "port": port}
    if plan.tls is not None:
        options["ssl_certfile"] = str(plan.tls.certificate)
        options["ssl_keyfile"] = str(plan.tls.key)
    _serve.start(proxy_location="HeadOnly", http_options=options, logging_config=quiet)
    try:
        handle = _serve.run(application(plan), name=APP, route_prefix="/", logging_config=quiet)
        return int(handle.grpc_port.remote().result(timeout_s=_START_S))
    except (RuntimeError, TimeoutError) as error:
        raise ClusterError(_reason(_serve.status(), error)) from error


def _require_room(cluster: ClusterConfig) -> None:
    """Said at once where no node can join; Serve would try twice."""
    import ray

    _ray: Any = ray
    have = Resources.of(_ray.cluster_resources())
    lacks = shortage(cluster, pick_device(cluster, have), have)
    if lacks is not None and cluster.address is None:
        raise ClusterError(lacks)


def _reason(status: Any, error: Exception) -> str:
    """The first line of ours in what Serve says about a deployment that did not start."""
    told = [str(error)]
    for app in status.applications.values():
        told += [app.message, *(deployment.message for deployment in app.deployments.values())]
    for text in told:
        found = _OURS.search(text)
        if found is not None:
            return found.group(1)
    first = next((line for text in told for line in text.splitlines() if line.strip()), "")
    return f"Ray Serve did not start the application: {first}"


def _greet(plan: ServePlan, port: int, grpc_port: int, console: Console) -> None:
    address = _address(plan, port)
    key = ' -H "Authorization: Bearer $MOE_ROUTER_TOKEN"' if plan.token else ""
    key += "" if plan.tls is None else f" --cacert {plan.tls.certificate}"
    lines = [
        *([f"page  {address}"] if plan.page else []),
        f"HTTP  {address}/v1/completions",
        f"gRPC  {_host(plan)}:{grpc_port} moe_router.v1.Generation, moe_router.v1.Router",
        f"curl -N {address}/v1/completions -H 'Content-Type: application/json'{key} "
        """-d '{"prompt": "The ", "max_tokens": 60, "stream": true}'""",
        "Ctrl-C ends it",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _host(plan: ServePlan) -> str:
    return f"[{plan.host}]" if ":" in plan.host else plan.host


def _address(plan: ServePlan, port: int) -> str:
    return f"http{'' if plan.tls is None else 's'}://{_host(plan)}:{port}"


def _require_free(host: str, port: int, option: str) -> None:
    """Serve itself would try for a minute."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"{option} {port}: cannot listen on {host} ({error}); choose a free port"
            ) from error
