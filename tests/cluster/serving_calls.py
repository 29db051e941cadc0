"""What tests of `moe-router serve` share: a process that serves, and calls to it."""

import http.client
import json
import os
import ssl
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from moe_router.models import Sampling, generate
from moe_router.training.inference import load_for_inference

ROOT = Path(__file__).resolve().parents[2]
ROOTS = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "cluster")]
KEY = {"Authorization": "Bearer secret"}
GRPC_KEY = (("authorization", "Bearer secret"),)


def start(arguments, folder, command="serve", **more):
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_router_cluster.cli", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        start_new_session=True,  # Ctrl-C reaches every process of a terminal's group
        env={**os.environ, "PYTHONPATH": os.pathsep.join(ROOTS), "MARK": mark, **more},
    )
    return process, mark


def serving(process, mark, port, step, trust=None):
    """Wait until it serves: what it printed, its ports, and the model that it serves.

    trust: the certificate that it shows; None: it speaks plain text.
    """
    said = []
    for line in process.stdout:
        said.append(line)
        if "Ctrl-C" in line:
            break
    else:
        pytest.fail(f"{said} {process.stderr.read()}")
    (address,) = [line.split()[1] for line in said if line.startswith("gRPC")]
    model, _, tokenizer = load_for_inference(step)
    return SimpleNamespace(
        port=port, grpc=address, mark=mark, process=process, said=said, model=model, tok=tokenizer,
        trust=trust,
    )  # fmt: skip


def connection_to(server):
    if server.trust is None:
        return http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    trust = ssl.create_default_context(cadata=server.trust.decode())
    return http.client.HTTPSConnection("127.0.0.1", server.port, timeout=60, context=trust)


def call(server, method, path, body=None, headers=KEY):
    """Status, body, headers."""
    connection = connection_to(server)
    kind = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, path, None if body is None else json.dumps(body), kind | headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, answer.headers


def channel_of(server):
    return grpc.secure_channel(server.grpc, grpc.ssl_channel_credentials(server.trust))


def complete(server, prompt="The ", **asked):
    status, text, _ = call(server, "POST", "/v1/completions", {"prompt": prompt, **asked})
    return status, json.loads(text)


def wanted(server, prompt="The ", **sampling):
    """(tokens, text) of `generate`, all experts in one process."""
    ids = [server.tok.document_id, *server.tok.encode(prompt)]
    sampling = Sampling(**sampling)
    made = generate(server.model, [ids], sampling, stop_id=server.tok.document_id)[0]
    return made, server.tok.decode(made)


def shards(server):
    """Process ids of the ranks."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if server.mark.encode() in (place / "environ").read_bytes():
                found[int(place.name)] = (place / "cmdline").read_bytes()
        except OSError:  # it ended, or is somebody else's
            continue
    return [pid for pid, line in found.items() if b"ray::ExpertShard" in line]
