"""One story with the real programs: train on two actors and lose one, serve on two actors,
ask by HTTP and gRPC, route from outside, inspect."""

import json
import os
import re
import signal
import subprocess
import sys

import grpc
import pytest
import torch
import yaml

from moe_router.config_file import config_to_dict
from moe_router.models import Sampling, generate
from moe_router.serving import router_pb2 as pb
from moe_router.serving.matrices import from_matrix, to_matrix
from moe_router.serving.router_messages import snapshot_of
from moe_router.serving.router_pb2_grpc import GenerationStub, RouterStub
from moe_router.training.inference import load_for_inference
from tests.cluster.serving_calls import GRPC_KEY, ROOTS, call, serving, start
from tests.cluster.test_cli import marked
from tests.cluster.test_submit import free_ports

pytestmark = pytest.mark.timeout(240)
ASKED = {"max_tokens": 16, "temperature": 0.8, "seed": 4}


def moe_router(*arguments, cwd):
    """Run the command to its end; what it said."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(ROOTS), "COLUMNS": "200"}
    command = [sys.executable, "-m", "moe_router_cluster.cli", *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def hidden_states(model, ids, layer):
    """What the experts of a layer are shown of a text."""
    seen = []
    hook = model.moes[layer].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids_T = torch.tensor(ids)
    with torch.no_grad():
        model(ids_T, torch.arange(len(ids)).int(), torch.tensor([0, len(ids)]).int())
    hook.remove()
    return seen[0]


def ask_by_grpc(server, run):
    """The generated text, and which experts the service chose for a text's hidden states."""
    model, ids = server.model, server.tok.encode("The router")
    tokens = hidden_states(model, ids, layer=1)
    with grpc.insecure_channel(server.grpc) as channel:
        request = pb.GenerateRequest(text="The ", **ASKED)
        events = list(GenerationStub(channel).Generate(request, metadata=GRPC_KEY))
        routers = RouterStub(channel)
        watch = routers.WatchSnapshot(pb.WatchSnapshotRequest(), metadata=GRPC_KEY)
        snapshot = snapshot_of(next(watch))
        watch.cancel()
        x_TD = to_matrix(tokens.x_TD)
        request = pb.RouteRequest(model=run, layer=1, epoch=snapshot.epoch, x_TD=x_TD)
        reply = routers.Route(request, metadata=GRPC_KEY)
    return "".join(event.text for event in events), tokens, reply


def test_train_lose_recover_serve_generate_route_inspect(tiny, tmp_path):
    room = tmp_path
    config = tiny(name="card", steps=12)
    (room / "card.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config_to_dict(config)))))

    said = moe_router("train", "card.yaml", "--kill", "1@0.8", cwd=room)
    assert re.search(r"actor 1 killed at step \d+, recovered in \d+\.\d s", said)
    run = room / "runs" / "card"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["recoveries"], summary["actors"]) == (12, 1, 2)

    (room / "token").write_text("secret\n")
    (port,) = free_ports(1)
    options = ["--port", str(port), "--grpc-port", "0", "--token-file", "token", "--actors", "2"]
    process, mark = start([str(run), *options], room)
    try:
        server = serving(process, mark, port, run / "step_12")
        body = {"prompt": "The ", **ASKED}
        status, whole, _ = call(server, "POST", "/v1/completions", body)
        assert status == 200
        status, stream, _ = call(server, "POST", "/v1/completions", body | {"stream": True})
        *events, done, _ = [event.removeprefix("data: ") for event in stream.split("\n\n")]
        by_grpc, tokens, reply = ask_by_grpc(server, "card")
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=60)[0].endswith("ended\n")
    finally:
        process.kill()
    assert marked(mark) == []

    model, _, tokenizer = load_for_inference(run / "step_12")
    ids = [tokenizer.document_id, *tokenizer.encode("The ")]
    sampling = Sampling(max_new_tokens=16, temperature=0.8, seed=4)
    text = tokenizer.decode(generate(model, [ids], sampling, stop_id=tokenizer.document_id)[0])
    assert json.loads(whole)["choices"][0]["text"] == text == by_grpc
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == text
    assert done == "[DONE]"
    choice = model.moes[1](tokens).choice
    assert torch.equal(from_matrix(reply.target_TK, "target"), choice.target_TK)
    torch.testing.assert_close(from_matrix(reply.weight_TK, "weight"), choice.weight_TK.detach())

    report = moe_router("inspect", str(run), cwd=room).strip()
    assert report.endswith("report.html") and "card" in (room / report).read_text()
