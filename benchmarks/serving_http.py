"""What HTTP costs: tokens/s of streams over server-sent events, beside the engine alone.

    python -m benchmarks.serving_http [--only PATTERN] [--rounds N] [--together S] [--save]

N streams of equal length begin together, greedy, random weights and prompts. `http/streamsN` of a
tiny model, `http/middle/streamsN` of a larger one, counts tokens from when the last of them has its
first one until the first of them ends, as a client in a process of its own reads them from
`/v1/completions`; `engine` is the same of `Engine.stream` in the server's process while nobody asks
over HTTP. The two take turns, so that a busy machine is
busy for both, and `share` is the median of the rounds' shares. Server, engine and model share a
process, whose torch has one thread: client and server have a core each. `goal` is 80% of `engine`.
`cpu_us` and `engine_cpu_us` are the process's own seconds per token, and `cpu_share` their ratio:
what `share` is where no other program runs, for a thread of the server is always busy.

Before it counts, the text over HTTP is held against the engine's. Needs neither a GPU nor Ray.
"""

import argparse
import asyncio
import fnmatch
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
import uvicorn

from benchmarks.contest import WrongResult, tell, why
from benchmarks.results import Row, provenance, save
from benchmarks.serving_answers import Answers, ask_all, spread
from benchmarks.serving_cases import CASES, Case, Words, new_model, prompts_of
from moe_router.serving.engine import Engine
from moe_router.serving.group import OneRank
from moe_router.serving.openai import make_app
from moe_router.serving.scheduler import Limits
from moe_router.serving.waiting import TOGETHER_S

SHARE = 0.8
_START_S = 120.0


def new_engine(case: Case, streams: int, together_s: float) -> Engine:
    torch.set_num_threads(1)
    total = streams * (case.prompt + case.new)
    limits = Limits(slots=streams, tokens=total, prefill=8192, queue=max(streams, 256))
    how: dict[str, Any] = {"limits": limits, "together_s": together_s}
    return Engine(OneRank(new_model(case), None), Words(case.vocab), "random", **how)


def server(case: Case, streams: int, together_s: float, pipe: Connection) -> None:
    """In a process of its own: serves, and runs the engine alone when asked, until it is ended."""

    async def run() -> None:
        async with new_engine(case, streams, together_s) as engine:
            config = uvicorn.Config(make_app(engine), port=0, log_level="critical", ws="none")
            front = uvicorn.Server(config)
            task = asyncio.ensure_future(front.serve())
            while not front.started:
                await asyncio.sleep(0.01)
            pipe.send(front.servers[0].sockets[0].getsockname()[1])
            while new := await asyncio.to_thread(pipe.recv):
                before = time.process_time()
                answers = await ask_all(engine, prompts_of(case, streams), new)
                took = time.process_time() - before
                text = Words(case.vocab).decode(answers.tokens[0])
                pipe.send((answers.decode()[0], took, text, time.process_time()))
                await asyncio.to_thread(pipe.recv)
                pipe.send(time.process_time())
            front.should_exit = True
            await task

    asyncio.run(run())


async def one_stream(port: int, prompt: tuple[int, ...], new: int) -> tuple[str, list[float]]:
    """The text, and when each of its tokens came."""
    body = {"prompt": list(prompt), "max_tokens": new, "temperature": 0, "stream": True}
    raw = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    text, times = "", list[float]()
    while (line := await reader.readline()) != b"data: [DONE]\n":
        if not line:
            raise WrongResult("the server closed a stream before its end")
        if line.startswith(b"data: "):
            new_text = json.loads(line[6:])["choices"][0]["text"]
            text += new_text
            spread(times, new_text.count(" "))
    writer.close()
    await writer.wait_closed()
    return text, times


async def over_http(port: int, case: Case, streams: int, new: int) -> tuple[float, str]:
    """Tokens/s, and the text of the first stream."""
    began = time.perf_counter()
    calls = (one_stream(port, prompt, new) for prompt in prompts_of(case, streams))
    both = await asyncio.gather(*calls)
    return Answers([], began, [times for _, times in both]).decode()[0], both[0][0]


def receive(pipe: Connection) -> Any:
    if not pipe.poll(_START_S):
        raise WrongResult(f"no answer of a process within {_START_S:g} s")
    return pipe.recv()


def measure(name: str, case: Case, streams: int, rounds: int, together_s: float) -> Row:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=server, args=(case, streams, together_s, theirs))
    process.start()
    theirs.close()
    alone, http = [], []
    try:
        port = receive(pipe)
        for turn in range(rounds + 1):
            new = case.new if turn else 8  # the first warms both up
            tell(f"{name}: round {turn} of {rounds}")
            pipe.send(new)
            rate, took, text, before = receive(pipe)
            rate_http, text_http = asyncio.run(over_http(port, case, streams, new))
            pipe.send("read")
            took_http = receive(pipe) - before
            if text != text_http:
                raise WrongResult("the text over HTTP is not the engine's")
            each = streams * new / 1e6
            alone.append((rate, took / each))
            http.append((rate_http, took_http / each))
        pipe.send(0)
    finally:
        process.join(10)
        process.kill()
    del alone[0], http[0]
    engine, engine_cpu = (statistics.median(of) for of in zip(*alone, strict=True))
    value, cpu = (statistics.median(of) for of in zip(*http, strict=True))
    share = statistics.median(h / e for (h, _), (e, _) in zip(http, alone, strict=True))
    return {
        "name": name, "value": round(value, 1), "unit": "tokens/s",
        "p90": round(min(rate for rate, _ in http), 1), "engine": round(engine, 1),
        "ceiling": round(engine, 1), "share": round(share, 3), "cpu_us": round(cpu, 1),
        "engine_cpu_us": round(engine_cpu, 1), "cpu_share": round(engine_cpu / cpu, 3),
        "goal": round(SHARE * engine, 1), "correct": True,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="rows by shell pattern")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--together", type=float, default=TOGETHER_S, help="seconds of an event")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    origin = provenance("cuda" if torch.cuda.is_available() else "cpu")
    for kind, prefix in (("http_tiny", "http"), ("http_middle", "http/middle")):
        case = CASES[kind]
        for streams in case.streams:
            name = f"{prefix}/streams{streams}"
            if not fnmatch.fnmatch(name, args.only):
                continue
            try:
                row = measure(name, case, streams, args.rounds, args.together)
            except Exception as problem:  # one row must not cost the others
                row = {"name": name, "value": None, "correct": False, "reason": why(problem)}
            print(row, flush=True)
            if args.save:
                save("serving_http", [row | origin])


if __name__ == "__main__":
    main()
