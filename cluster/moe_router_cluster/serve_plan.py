"""What is to be served, where, and to whom: from a run and a few words to one checked record."""

import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from moe_router.config import Config, require
from moe_router.config_file import config_from_dict, config_to_dict, override
from moe_router.errors import ConfigError
from moe_router.models import CausalLM
from moe_router.models.generate import require_causal
from moe_router.run_path import find_run
from moe_router.serving.exposure import Tls, is_loopback, require_guarded
from moe_router.training.checkpoint_files import STATE, read_about
from moe_router.training.data import load_tokenizer

TOKEN_VARIABLE = "MOE_ROUTER_TOKEN"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeArguments:
    """The `args` of `cluster/serve.yaml`, and the options of `moe-router serve`.

    Attributes:
        run: runs/NAME, or one of its steps; a path that every node knows.
        actors: ranks; None takes as many as the run was trained on.
        set: "a.b=value" over the run's config: `cluster` and `serve` alone.
        host: where the gRPC server listens; anything but loopback needs a token, and TLS.
        grpc_port: 0 lets the system choose.
        token_file: holds the bearer token; None reads MOE_ROUTER_TOKEN.
        page: a page for people at /.
        chaos: whoever sees it may kill shards; on loopback alone.
        tls_certificate, tls_key: PEM files of HTTP and gRPC, the chain and its private key; None
            is plain text. A file for `serve deploy` names them in `http_options` as well.
        insecure: other addresses than loopback without TLS, for something else encrypts.
    """

    run: str
    actors: int | None = None
    set: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    token_file: str | None = None
    page: bool = False
    chaos: bool = False
    tls_certificate: str | None = None
    tls_key: str | None = None
    insecure: bool = False

    @classmethod
    def of(cls, args: dict[str, Any]) -> "ServeArguments":
        """Raises ConfigError: a key is unknown or missing."""
        known = [f.name for f in fields(cls)]
        for key in args:
            require(key in known, "args", key, f"one of {', '.join(known)}")
        require("run" in args, "args", "no run", "run: the path of a run or of one of its steps")
        return cls(**{**args, "set": tuple(args.get("set") or ())})


@dataclass(frozen=True, kw_only=True, slots=True)
class ServePlan:
    """Attributes:
    step_dir: the checkpoint, absolute.
    folder: where relative paths of `data` start.
    token: never shown; None lets only this machine in.
    tls: of HTTP and gRPC; None is plain text.
    insecure: the address needs no TLS.
    """

    config: Config
    step_dir: Path
    folder: str
    host: str
    grpc_port: int
    token: str | None = field(repr=False)
    page: bool = False
    chaos: bool = False
    tls: Tls | None = None
    insecure: bool = False

    @property
    def model(self) -> str:
        """The name that clients know."""
        return self.config.run.name


def make_plan(arguments: ServeArguments) -> ServePlan:
    """Check everything that can be checked before an actor starts.

    Raises:
        NotCausalError: the model looks at later tokens.
        MoeRouterError: no run, no checkpoint, a wrong override, or a host open to strangers.
    """
    token, tls = read_token(arguments.token_file), _tls(arguments)
    require_guarded("host", arguments.host, token=token, tls=tls, insecure=arguments.insecure)
    local = is_loopback(arguments.host) or not arguments.chaos
    require(local, "chaos", f"host {arguments.host}", "a loopback host: the page can kill shards")
    step_dir = find_run(Path(arguments.run)).step.absolute()
    config = _serving_config(step_dir, arguments)
    with torch.device("meta"):  # shapes alone
        require_causal(CausalLM(config.model, load_tokenizer(config.data.tokenizer).vocab))
    return ServePlan(
        config=config,
        step_dir=step_dir,
        folder=os.getcwd(),
        host=arguments.host,
        grpc_port=arguments.grpc_port,
        token=token,
        page=arguments.page,
        chaos=arguments.chaos,
        tls=tls,
        insecure=arguments.insecure,
    )


def _tls(arguments: ServeArguments) -> Tls | None:
    certificate, key = arguments.tls_certificate, arguments.tls_key
    if certificate is None or key is None:
        half = certificate or key
        require(half is None, "tls", half, "a certificate and its key, or neither")
        return None
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except OSError as error:  # ssl's own are among them
        raise ConfigError(
            f"tls: {certificate} and {key}: {error.strerror or error}; want PEM files of a "
            "certificate and of its key"
        ) from error
    return Tls(Path(certificate).absolute(), Path(key).absolute())


def read_token(file: str | None) -> str | None:
    """The token in a file, else in MOE_ROUTER_TOKEN, else None. Never from the command line,
    which every user of the machine can read.

    Raises:
        ConfigError: it cannot be read, or is no token.
    """
    source, found = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE)
    if file is not None:
        source = file
        try:
            found = Path(file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{file}: cannot be read ({error}); want a file with a token"
            ) from error
    if found is None:
        return None
    sound = bool(found) and found.isascii() and found.isprintable() and " " not in found
    require(sound, f"token in {source}", f"{len(found)} characters", "printable ASCII, no spaces")
    return found


def _serving_config(step_dir: Path, arguments: ServeArguments) -> Config:
    source = str(step_dir / STATE)
    saved = read_about(step_dir)["config"]
    sets: Sequence[str] = arguments.set
    for text in sets:
        key = text.partition("=")[0]
        free = key.startswith(("cluster.", "serve."))
        require(free, "--set", text, "a key of cluster or serve: the rest is the checkpoint's")
    if arguments.actors is not None:
        sets = (*sets, f"cluster.actors={arguments.actors}")
    trained = config_from_dict(saved, source)
    changed = override(config_to_dict(trained), sets, source)
    actors = changed["cluster"]["actors"]
    if isinstance(actors, int) and actors > 0:
        # a batch is dealt to the ranks that train; those that serve may be any number
        changed["train"]["batch"] = trained.train.accumulation * actors
    return config_from_dict(changed, source)
