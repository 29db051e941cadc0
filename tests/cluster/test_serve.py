"""`moe-router serve` as a user types it: one Ray session, two ranks, HTTP and gRPC."""

import http.client
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import pytest

from moe_router.serving import router_pb2 as pb
from moe_router.serving.matrices import from_matrix, to_matrix
from moe_router.serving.router_messages import snapshot_of
from moe_router.serving.router_pb2_grpc import GenerationStub, RouterStub
from moe_router.training.loop import Trainer
from moe_router_cluster.run_folder import open_run
from tests.cluster.serving_calls import (
    GRPC_KEY,
    KEY,
    call,
    channel_of,
    complete,
    connection_to,
    serving,
    shards,
    start,
    wanted,
)
from tests.cluster.test_cli import marked
from tests.cluster.test_submit import free_ports
from tests.tls import certificate

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def run(tiny_of_module):
    """A run with a checkpoint: its folder."""
    config = tiny_of_module(actors=1)
    with open_run(config, restart=False) as folder:
        trainer = Trainer(config, run_dir=folder.path)
        for _ in range(3):
            trainer.train_step()
        trainer.save(folder.path, wait=True)
    return folder.path


@pytest.fixture(scope="module")
def server(run):
    """A served run behind TLS, until the end of the module."""
    (run.parent / "token").write_text("secret\n")
    pem, key = certificate(run.parent)
    (port,) = free_ports(1)
    options = ["--port", str(port), "--grpc-port", "0", "--token-file", "token", "--actors", "2"]
    options += ["--tls-certificate", pem.name, "--tls-key", key.name]
    more = ["--set", "cluster.timeout_s=20"]
    process, mark = start([str(run), *options, *more], run.parent)
    yield serving(process, mark, port, next(run.glob("step_*")), pem.read_bytes())
    process.kill()
    process.communicate()


def test_it_says_where_it_is_and_how_to_ask(server):
    text = "".join(server.said)
    assert f"https://127.0.0.1:{server.port}/v1/completions" in text
    assert "curl -N https://127.0.0.1:" in text and "Bearer $MOE_ROUTER_TOKEN" in text
    assert "secret" not in text and "on 2 actors; starting" in text


def test_without_tls_nobody_gets_through(server):
    plain = SimpleNamespace(port=server.port, trust=None)
    with pytest.raises((http.client.HTTPException, OSError)):
        call(plain, "GET", "/health")
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as refused:
        GenerationStub(channel).Health(pb.HealthRequest(), metadata=GRPC_KEY, timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_health_is_open_and_the_rest_is_not(server):
    assert json.loads(call(server, "GET", "/health", headers={})[1]) == {
        "status": "ok",
        "model": "tiny",
    }
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert call(server, "GET", "/v1/models", headers=headers)[0] == 401
        assert call(server, "POST", "/v1/completions", {"prompt": "a"}, headers)[0] == 401
    (model,) = json.loads(call(server, "GET", "/v1/models")[1])["data"]
    assert model["id"] == "tiny"


def test_completions_over_two_ranks_are_those_of_generate(server):
    asked = {"max_tokens": 12, "temperature": 0.9, "seed": 5}
    sampling = {"max_new_tokens": 12, "temperature": 0.9, "seed": 5}
    status, body = complete(server, ["The ", "a", "of"], **asked)
    assert status == 200
    texts = [choice["text"] for choice in body["choices"]]
    assert texts == [wanted(server, p, **sampling)[1] for p in ("The ", "a", "of")]


def test_the_rank_that_has_read_a_beginning_remembers_it(server):
    prompt, known = "The same words. " * 5, []
    for _ in range(2):
        _, body = complete(server, prompt, max_tokens=3, temperature=0)
        text = wanted(server, prompt, max_new_tokens=3, temperature=0.0)[1]
        assert body["choices"][0]["text"] == text
        known.append(body["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert known == [0, 64]  # alone, a request goes to the first rank


def test_a_stream_comes_in_pieces(server):
    body = {"prompt": "The ", "stream": True, "max_tokens": 20, "temperature": 0, "seed": 5}
    status, text, headers = call(server, "POST", "/v1/completions", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    *events, done, _ = [event.removeprefix("data: ") for event in text.split("\n\n")]
    assert done == "[DONE]" and len(events) > 2
    parts = [json.loads(event)["choices"][0]["text"] for event in events]
    assert "".join(parts) == wanted(server, max_new_tokens=20, temperature=0.0)[1]


def test_the_engine_tells_prometheus_what_it_did(server):
    before, after = {}, {}
    for found in (before, after):
        status, text = call(server, "GET", "/metrics")[:2]
        assert status == 200
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        found |= {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
        if found is before:
            complete(server, "The ", max_tokens=4)
    made = "moe_router_serving_generation_tokens_total"
    assert after[made] == before[made] + 4 and after["moe_router_serving_healthy"] == 1


def test_a_wrong_request_has_a_status_of_its_own(server):
    for more in ({}, {"stream": True}):
        status, body = complete(server, [1, 999], **more)
        assert status == 400
        assert body["error"]["message"].startswith("prompt 0 holds token 999: want 0..256")


def test_a_model_without_a_compute_budget_says_so(server):
    status, body = complete(server, compute_budget=0.5)
    assert status == 400
    assert body["error"]["message"].startswith("compute budget 0.5: want a model whose tokens skip")


def test_grpc_generate_is_generate(server):
    request = pb.GenerateRequest(text="The ", max_tokens=12, temperature=0.9, seed=5)
    with channel_of(server) as channel:
        stub = GenerationStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Generate(request))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        events = list(stub.Generate(request, metadata=GRPC_KEY))
        health = stub.Health(pb.HealthRequest(), metadata=GRPC_KEY)
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Generate(pb.GenerateRequest(), metadata=GRPC_KEY))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    made, text = wanted(server, max_new_tokens=12, temperature=0.9, seed=5)
    assert [token for event in events for token in event.tokens] == made
    assert "".join(event.text for event in events) == text
    assert health == pb.HealthReply(ok=True, model="tiny")


def test_the_routers_of_the_served_model_decide_for_outsiders(server):
    import torch

    from moe_router.types import Tokens

    x_TD = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    with channel_of(server) as channel:
        stub = RouterStub(channel)
        watch = stub.WatchSnapshot(pb.WatchSnapshotRequest(), metadata=GRPC_KEY)
        snapshot = snapshot_of(next(watch))
        watch.cancel()
        request = pb.RouteRequest(model="tiny", layer=1, epoch=1, x_TD=to_matrix(x_TD))
        reply = stub.Route(request, metadata=GRPC_KEY)
    assert snapshot.ranks == 2 and len(snapshot.routers) == 2
    moe = server.model.moes[1]
    tokens = Tokens(x_TD, torch.arange(7, dtype=torch.int32), torch.tensor([0, 7]).int())
    assert torch.equal(from_matrix(reply.target_TK, "t"), moe(tokens).choice.target_TK)


def test_a_stream_outlives_a_rank(server):
    body = {"prompt": "The ", "stream": True, "max_tokens": 120, "temperature": 0.9, "seed": 6}
    connection = connection_to(server)
    kind = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), kind | KEY)
    answer = connection.getresponse()
    text = answer.readline()
    before = shards(server)
    os.kill(before[0], signal.SIGKILL)
    text += answer.read()
    connection.close()
    events = [line.removeprefix("data: ") for line in text.decode().split("\n") if line]
    parts = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
    sampling = {"max_new_tokens": 120, "temperature": 0.9, "seed": 6}
    assert "".join(parts) == wanted(server, **sampling)[1] and events[-1] == "[DONE]"
    assert len(shards(server)) == 2 and shards(server) != before


MIX = [
    {"prompt": "x" * 3000, "max_tokens": 30, "temperature": 0},  # is read in two parts
    {"prompt": "The ", "max_tokens": 60, "temperature": 0.9, "seed": 1},
    {"prompt": "a", "max_tokens": 90, "temperature": 1.1, "seed": 2, "top_k": 20},
    {"prompt": "of", "max_tokens": 45, "temperature": 0.7, "seed": 3, "top_p": 0.8},
    {"prompt": "The ", "max_tokens": 120, "temperature": 0.9, "seed": 4},
    {"prompt": "def ", "max_tokens": 7, "temperature": 0},
]


@pytest.mark.parametrize("kill", [False, True], ids=["in peace", "over a loss"])
def test_every_text_of_a_mixed_batch_is_that_of_generate(server, kill):
    """On two ranks; one is killed while all are being answered."""
    body = {"prompt": "The ", "stream": True, "max_tokens": 150, "temperature": 0.9, "seed": 6}
    with ThreadPoolExecutor(len(MIX)) as pool:
        connection = connection_to(server)
        kind = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), kind | KEY)
        answer = connection.getresponse()
        calls = [pool.submit(complete, server, **asked) for asked in MIX]
        answer.readline()
        before = shards(server)
        if kill:
            os.kill(before[1], signal.SIGKILL)
        answer.read()
        connection.close()
        texts = [one.result()[1]["choices"][0]["text"] for one in calls]
    for asked, text in zip(MIX, texts, strict=True):
        more = {"max_new_tokens": asked["max_tokens"]}
        more |= {k: v for k, v in asked.items() if k in ("temperature", "seed", "top_k", "top_p")}
        assert text == wanted(server, asked["prompt"], **more)[1]
    assert (shards(server) != before) is kill


def test_a_rank_that_dies_while_nobody_asks_is_found(server):
    os.kill(shards(server)[1], signal.SIGKILL)
    deadline, statuses = time.monotonic() + 40, []
    while (time.monotonic() < deadline and statuses[-1:] != [200]) or 503 not in statuses:
        statuses.append(call(server, "GET", "/health", headers={})[0])
        time.sleep(0.05)
    assert 503 in statuses and statuses[-1] == 200
    sampling = {"max_new_tokens": 8, "temperature": 0.0}
    status, body = complete(server, max_tokens=8, temperature=0)
    assert (status, body["choices"][0]["text"]) == (200, wanted(server, **sampling)[1])


def test_ctrl_c_ends_it_cleanly(server):
    os.killpg(server.process.pid, signal.SIGINT)
    out, err = server.process.communicate(timeout=60)
    assert (server.process.returncode, out, err) == (0, "ended\n", "")
    assert marked(server.mark) == []
