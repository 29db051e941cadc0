"""A MoE layer with a shared expert on a timeline: what runs while rows travel."""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from moe_router import MoE, MoEConfig
from moe_router.dispatch.ranks import run_here
from moe_router.dispatch.transports import NAMES, make_transport

Event = dict[str, Any]
SHARED = "shared expert"
# what autograd calls the departure of rows and the place where they are waited for
WAYS = {
    "forward": (("Send", "_Share"), ("_Arrive",), SHARED),
    "backward": (("_ArriveBackward",), ("SendBackward", "_ShareBackward"), f"{SHARED}, backward"),
}
LINK = ("nccl", "_put_kernel")  # kernels that move rows


def record(device: torch.device, shape: tuple[int, ...], folder: str) -> None:
    """Profile one forward and backward by each transport on this rank: folder/RANK.json.

    Args:
        shape: tokens of a rank, D, F, E, K; the shared expert is as wide as the K together.
    """
    T, D, F, E, K = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = MoEConfig(experts=E, top_k=K, hidden=F, shared_hidden=K * F)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    runs = {}
    for name in NAMES:
        with device:
            moe = MoE(D, config, dispatcher=make_transport(name, T, 2.0, timeout_s=20)).to(dtype)
        assert moe.shared is not None
        _mark(moe.shared)
        x_TD = torch.randn(T, D, device=device, dtype=dtype, requires_grad=True)
        runs[name] = partial(_step, moe, x_TD)
        for _ in range(3):  # kernels compile, inboxes grow
            runs[name]()
    with profile(activities=kinds) as profiler:
        for name, run in runs.items():
            dist.barrier()
            with record_function(name):
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(Path(folder) / f"{dist.get_rank()}.json"))


def _step(moe: MoE, x_TD: Tensor) -> None:
    loss = moe(x_TD).delta_TD.sum()
    loss.backward()


def _mark(shared: nn.Module) -> None:
    """Ranges of the timeline around a module's forward and backward."""
    open_ranges: list[Any] = []
    opened: Any = record_function  # its methods have no types

    def begin(name: str) -> None:
        open_ranges.append(opened(name))
        open_ranges[-1].__enter__()

    def end() -> None:
        open_ranges.pop().__exit__(None, None, None)

    shared.register_forward_pre_hook(lambda *_: begin(WAYS["forward"][2]))
    shared.register_forward_hook(lambda *_: end())
    shared.register_full_backward_pre_hook(lambda *_: begin(WAYS["backward"][2]))
    shared.register_full_backward_hook(lambda *_: end())


def merged(folder: Path) -> dict[str, Any]:
    """The ranks' traces as one, each rank with processes of its own."""
    events: list[Event] = []
    for rank, file in enumerate(sorted(folder.glob("*.json"), key=lambda f: int(f.stem))):
        for event in json.loads(file.read_text())["traceEvents"]:
            if isinstance(event.get("pid"), int):
                event["pid"] += rank * 10_000_000
            if event.get("name") == "process_name":
                event["args"]["name"] = f"rank {rank}: {event['args']['name']}"
            events.append(event | {"rank": rank})
    return {"traceEvents": events}


def overlaps(events: Iterable[Event]) -> Iterator[dict[str, Any]]:
    """For each rank, transport and way: microseconds of the shared expert, and those of them that
    lie between departure and arrival; on a GPU also of the kernels that move rows beside others."""
    spans = [event for event in events if event.get("ph") == "X" and event.get("dur", 0) > 0]
    for rank in sorted({event["rank"] for event in spans}):
        own = [event for event in spans if event["rank"] == rank]
        for name in NAMES:
            whole = next(e for e in own if e["name"] == name and e["cat"] == "user_annotation")
            inside = [e for e in own if whole["ts"] <= e["ts"] < whole["ts"] + whole["dur"]]
            for way, marks in WAYS.items():
                found = _between(inside, *marks)
                yield {"rank": rank, "transport": name, "way": way} | found | _beside(inside)


def _between(spans: list[Event], leave: Any, arrive: Any, shared: str) -> dict[str, float]:
    host = [e for e in spans if e["cat"] in ("cpu_op", "user_annotation")]
    left = next(e["ts"] for e in host if e["name"] in leave)
    asked = next(e["ts"] for e in host if e["name"] in arrive and e["ts"] > left)
    runs = [(e["ts"], e["ts"] + e["dur"]) for e in host if e["name"] == shared]
    meanwhile = sum(max(0.0, min(end, asked) - max(begin, left)) for begin, end in runs)
    total = sum(end - begin for begin, end in runs)
    return {"travel_us": asked - left, "shared_us": total, "meanwhile_us": meanwhile}


def _beside(spans: list[Event]) -> dict[str, float]:
    """Of the device: how long kernels moved rows, and how long another one ran meanwhile."""
    kernels = [e for e in spans if e["cat"] == "kernel"]
    if not kernels:
        return {}
    link = [e for e in kernels if any(word in e["name"] for word in LINK)]
    busy = sorted((e["ts"], e["ts"] + e["dur"]) for e in kernels if e not in link)
    both = 0.0
    for event in link:
        at, end = event["ts"], event["ts"] + event["dur"]
        for begin, until in busy:  # kernels of one stream follow each other
            both += max(0.0, min(end, until) - max(at, begin))
            at = max(at, min(end, until))
    return {"link_us": sum(e["dur"] for e in link), "link_beside_others_us": both}


def draw_timeline(file: Path, ranks: int, kind: str, shape: tuple[int, ...], folder: str) -> None:
    """Record, write the chrome trace, and print what it shows of rank 0."""
    run_here(ranks, kind, record, shape, folder)
    trace = merged(Path(folder))
    file.write_text(json.dumps(trace))
    for found in overlaps(trace["traceEvents"]):
        if found["rank"] == 0:
            print(shown(found))
    print(f"{file}: open it in ui.perfetto.dev or chrome://tracing")


def shown(found: dict[str, Any]) -> str:
    said = (
        f"{found['transport']}, {found['way']}: shared expert {found['shared_us']:,.0f} us, "
        f"{found['meanwhile_us']:,.0f} of them in the {found['travel_us']:,.0f} us between "
        "departure and arrival"
    )
    if "link_us" not in found:
        return said
    beside = f"{found['link_beside_others_us']:,.0f} beside other kernels"
    return f"{said}; link kernels of both ways {found['link_us']:,.0f} us, {beside}"
