"""Trainings as Ray Jobs on a cluster that runs elsewhere: submitted, listed, stopped.

The package travels with the job, so that the cluster runs the very code of who submits; what it
depends on must be installed there. Data does not travel: paths are those of the cluster.
"""

import contextlib
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import yaml

import moe_router
import moe_router_cluster
import moe_router_kernels
from moe_router.config import Config
from moe_router.config_file import config_to_dict
from moe_router.errors import ClusterError, ConfigError
from moe_router.training.remote import is_remote

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

_PACKAGES = (moe_router, moe_router_kernels, moe_router_cluster)
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_TOKEN_FILE = Path("~/.ray/auth_token")  # where Ray itself looks
_ANNOUNCE_UPLOADS = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
_STOP_S = 60  # seconds that a stopped run has for its checkpoint; Ray's own default is 3
_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class Job:
    """Attributes:
    state: PENDING | RUNNING | SUCCEEDED | FAILED | STOPPED.
    message: Ray's own word on the state, in one line.
    run: run.name of its config; "" of a job that was not submitted here.
    began: Unix seconds; None while it waits.
    ended: Unix seconds; None until then.
    """

    id: str
    state: str
    message: str
    run: str
    began: float | None
    ended: float | None

    @property
    def over(self) -> bool:
        return self.state in _ENDED


class Jobs:
    """The job server of one cluster.

    Args:
        address: http://HOST:PORT of its dashboard.

    Raises:
        ClusterError: nobody answers there, it is no Ray, or it refuses the token.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        _require_server(self.address)
        _prepare_environment()
        from ray.job_submission import JobSubmissionClient

        for name in _ANNOUNCE_UPLOADS:
            logging.getLogger(name).setLevel(logging.ERROR)
        with self.explained():
            self.client = JobSubmissionClient(self.address)

    def submit(self, config: Config, *, restart: bool = False) -> str:
        """Send a training; its id.

        Args:
            restart: move an older run of this name aside.

        Raises:
            ConfigError: the config has a path that means nothing on a cluster.
            ClusterError: the server refuses it.
        """
        there = for_cluster(config)
        with _packed(there) as folder, self.explained():
            sent: str = self.client.submit_job(
                entrypoint="python -m moe_router_cluster.keep - train config.yaml"
                + " --restart" * restart,
                submission_id=new_id(config.run.name),
                metadata={"run": config.run.name},
                runtime_env={
                    "working_dir": str(folder),
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)},
                },
            )
        return sent

    def all(self) -> list[Job]:
        """Every submitted job that the cluster remembers, the newest last."""
        with self.explained():
            found = [_job(each) for each in self.client.list_jobs() if each.submission_id]
        return sorted(found, key=lambda job: job.began or float("inf"))

    def get(self, id: str) -> Job:
        with self.explained(id):
            return _job(self.client.get_job_info(id))

    def stop(self, id: str) -> bool:
        """Ask a job to end, which writes its checkpoint first; False if it had ended already."""
        if self.get(id).over:
            return False
        with self.explained(id):
            return bool(self.client.stop_job(id))

    def tail(self, id: str) -> AsyncIterator[str]:
        """The log from its beginning, as it grows, until the job is over or the line breaks."""
        log: AsyncIterator[str] = self.client.tail_job_logs(id)
        return log

    @property
    def option(self) -> str:
        """What `moe-router jobs` wants to find this cluster."""
        return f" --address {self.address}"

    @contextlib.contextmanager
    def explained(self, id: str = "") -> Iterator[None]:
        """What Ray's client raises, as one line of ours."""
        from ray.exceptions import AuthenticationError

        at = f"--address={self.address}"
        try:
            yield
        except AuthenticationError as error:
            what = "refuses this token" if "failed" in str(error)[:30] else "wants a token"
            raise ClusterError(
                f"{at}: the cluster {what}; `ray get-auth-token` on its head prints it, put it "
                f"into RAY_AUTH_TOKEN or {_TOKEN_FILE}"
            ) from error
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            if id and "status code 404" in str(error):
                raise ClusterError(
                    f"{id}: no such job at {self.address}; `moe-router jobs {at}` lists them"
                ) from error
            raise ClusterError(
                f"{at}: {_first_line(error).rstrip('.')}; want the dashboard of a Ray cluster "
                "whose head is up"
            ) from error


def new_id(run: str) -> str:
    """Of a job that trains this run."""
    name = re.sub(r"[^\w.-]+", "-", run)
    return f"{name}-{secrets.token_hex(3)}"


def for_cluster(config: Config) -> Config:
    """The config as the job reads it: on the cluster it runs on, with the cluster's own paths.

    Raises:
        ConfigError: a relative path. A job's working folder goes when the job does.
    """
    paths = {"run.dir": config.run.dir, "run.storage": config.run.storage}
    paths |= {"data.path": config.data.path, "data.val_path": config.data.val_path}
    if config.data.tokenizer != "bytes":
        paths["data.tokenizer"] = config.data.tokenizer
    paths["train.init_from"] = config.train.init_from
    for key, path in paths.items():
        if path is not None and not (is_remote(path) or PurePosixPath(path).is_absolute()):
            raise ConfigError(
                f"{key}={path}: relative, and the folder of a job goes with the job; want a path "
                f"that every node of the cluster sees, such as --set {key}=/mnt/{path}"
            )
    return replace(config, cluster=replace(config.cluster, address="auto"))


@contextlib.contextmanager
def _packed(config: Config) -> Iterator[Path]:
    """A folder with the config and our packages; the job starts in a copy of it."""
    with tempfile.TemporaryDirectory(prefix="moe-router-") as name:
        folder = Path(name)
        for package in _PACKAGES:
            source = Path(next(iter(package.__path__)))
            hidden = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / source.name, ignore=hidden)
        text = yaml.safe_dump(config_to_dict(config), sort_keys=False)
        (folder / "config.yaml").write_text(text)
        yield folder


def _prepare_environment() -> None:
    """Settings that Ray reads when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # Ray would prefer them to --address
    if os.environ.keys() & set(_TOKENS) or _TOKEN_FILE.expanduser().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # else the token is not sent


def _require_server(address: str) -> None:
    """Ray's client has no timeout of its own."""
    want = "want http://HOST:PORT of the cluster's dashboard, such as http://127.0.0.1:8265"
    try:
        parts = urlsplit(address)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ClusterError(f"--address={address}: {error}; {want}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(f"--address={address}: no address of a job server; {want}")
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ClusterError(
            f"--address={address}: no job server there ({error.strerror or error}); {want}, and "
            "leave `ray dashboard CLUSTER.yaml` running: it brings that port here"
        ) from error


def _job(details: "JobDetails") -> Job:
    began, ended = details.start_time, details.end_time  # milliseconds, or None
    return Job(
        id=str(details.submission_id),
        state=str(details.status.value),
        message=_first_line(details.message or "").removesuffix(
            ", last available logs (truncated to 20,000 chars):"
        ),
        run=(details.metadata or {}).get("run", ""),
        began=began and began / 1000,
        ended=ended and ended / 1000,
    )


def _first_line(said: object) -> str:
    return next(iter(str(said).splitlines()), type(said).__name__)
