"""The tables of docs/scaling.md: bytes, messages, memory and time of a dispatch up to 1,024 GPUs.

    python -m benchmarks.scaling

Nothing is measured here: the cost model of the chooser, under even routing, with the rates of
`MACHINE`. Beyond as many ranks as experts, each expert has several copies. `hierarchical` is what
a dispatch would take that sends a token once to each machine, to the GPU of the sender's place
there, which hands it on over NVLink; there is no such transport.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moe_router.dispatch.cost_model import Link, Load, Problem, crossing_s, even_load
from moe_router.dispatch.cost_model import seconds_by_rank as seconds_of
from moe_router.placement import Placement
from moe_router.simulation.replay import replay

NODE = 8
RANKS = (2, 8, 16, 64, 256, 1024)
PROBLEM = Problem(tokens=4096, top_k=8, experts=256, ranks=2, dim=7168, itemsize=2)
FACTOR = 2.0
HIDDEN = 2048  # width of an expert
# inside a machine: rounded from the baselines of two H200 by NCCL, and for peer memory from what
# its kernels are predicted to do; the network is 400 Gb/s a GPU at 90%. Transports of this project
# have measured none of it
MACHINE = Link(
    2, "cuda",
    {
        "all_to_all": 2.6e11, "all_gather": 2.2e11, "reduce_scatter": 1.2e11, "put": 3.8e11,
        "gather": 2.4e12, "combine": 2.4e12, "plan": 2e10,
    },
    {"all_to_all": 3e-4, "padded": 1e-4, "gather_scatter": 9e-5, "peer_memory": 6e-5},
    per_node=NODE, far_bytes_per_s=4.5e10, message_s=2e-6,
)  # fmt: skip


def even(ranks: int) -> tuple[Link, Problem, Load]:
    """So many ranks, and the rows between them; with one expert a rank, copies share its tokens."""
    link, problem = replace(MACHINE, ranks=ranks), replace(PROBLEM, ranks=ranks)
    if ranks <= problem.experts:
        return link, problem, even_load(problem, FACTOR)
    rows = torch.full((ranks, ranks), problem.tokens * problem.top_k / ranks, dtype=torch.float64)
    return link, problem, Load(rows, (FACTOR * rows).ceil())


def machines_of_token(ranks: int) -> float:
    """Machines that a token goes to, its own one among them."""
    nodes = max(ranks // NODE, 1)
    E, K = PROBLEM.experts, PROBLEM.top_k
    if ranks > E:  # a machine's experts are all different, and have `ranks / E` copies
        return nodes * (1 - (1 - NODE / ranks) ** K)
    return nodes * (1 - math.comb(E - E // nodes, K) / math.comb(E, K))


def hierarchical_s(link: Link, problem: Problem, load: Load) -> float:
    """Out and back: to the GPU of one's own place on each machine, and on from there."""
    W = problem.ranks
    place_W, node_W = torch.arange(W) % NODE, torch.arange(W) // NODE
    chance = machines_of_token(W) / (W // NODE)
    far_WW = (place_W[:, None] == place_W) * (problem.tokens * chance)
    near_WW = (node_W[:, None] == node_W) * (load.rows_WW[:, :1].sum(0) / NODE)
    rate = link.bytes_per_s["all_to_all"]
    out, home = problem.row + problem.ids, problem.row
    ways = [(far_WW, out), (near_WW, out), (near_WW.T, home), (far_WW.T, home)]
    crossed_s = sum(float(crossing_s(link, *way, rate).max()) for way in ways)
    handled = 2 * float(load.rows_WW[0].sum()) * problem.row / link.bytes_per_s["gather"]
    return 2 * link.fixed_s["padded"] + crossed_s + handled


def traffic() -> Iterator[tuple[str, ...]]:
    """What leaves a rank in a dispatch, and what it must have room for."""
    yield (
        "GPUs", "rows of a token", "saved", "NVLink, MB", "network, MB", "network, once a machine",
        "messages", "rows, MB", "slots, MB", "all of all, MB", "experts, GB",
    )  # fmt: skip
    for ranks in RANKS:
        _, problem, load = even(ranks)
        row_W = load.rows_WW[0] * (problem.row + problem.ids) / 1e6
        near = float(row_W[: min(NODE, ranks)].sum() - row_W[0])
        far = float(row_W[NODE:].sum())
        visits = float(load.rows_WW[0].sum()) / problem.tokens
        machines = machines_of_token(ranks)
        once = machines * (1 - NODE / ranks) * problem.tokens * problem.row / 1e6
        held = float(load.rows_WW[:, 0].sum()) * problem.row / 1e6
        slots = float(load.slots_WW[:, 0].sum()) * problem.row / 1e6
        everything = ranks * problem.tokens * problem.row / 1e6
        numbers = (near, far, once if ranks > NODE else 0.0)
        yield (
            f"{ranks:,}", f"{visits:.2f}", f"{problem.top_k / visits:.2f}x",
            *(f"{n:,.0f}" for n in numbers), f"{ranks - 1:,}",
            *(f"{n:,.0f}" for n in (held, slots, everything)), f"{_experts_gb(ranks):.2f}",
        )  # fmt: skip


def _experts_gb(ranks: int) -> float:
    """Of one layer: fp32 weights, gradients and two moments of the experts of a rank."""
    held = math.ceil(PROBLEM.experts / ranks)
    return held * 3 * PROBLEM.dim * HIDDEN * 16 / 1e9


def times() -> Iterator[tuple[str, ...]]:
    """Microseconds of a dispatch and a combine, by transport."""
    names = tuple(MACHINE.fixed_s)
    yield "GPUs", *names, "hierarchical"
    for ranks in RANKS:
        link, problem, load = even(ranks)
        took = {name: float(s_W.max()) for name, s_W in seconds_of(link, problem, load).items()}
        known = (f"{took[name] * 1e6:,.0f}" if name in took else "-" for name in names)
        two = f"{hierarchical_s(link, problem, load) * 1e6:,.0f}" if ranks > NODE else "-"
        yield f"{ranks:,}", *known, two


def balance(tokens: int = 256) -> Iterator[tuple[str, ...]]:
    """A routing with popular experts: the busiest rank's rows over the mean, and slots too few."""
    yield "GPUs", "contiguous", "balanced", "balanced, a spare slot", "pairs without slots enough"
    E, K = PROBLEM.experts, PROBLEM.top_k
    likely_E = 1 / torch.arange(1.0, E + 1) ** 0.5
    for ranks in (rank for rank in RANKS if rank <= 64):
        generator = torch.Generator().manual_seed(ranks)
        drawn = likely_E[torch.randperm(E, generator=generator)].expand(ranks * tokens, -1)
        target = torch.multinomial(drawn, K, generator=generator).view(ranks, tokens, K)
        load_E = torch.bincount(target.flatten(), minlength=E).tolist()
        slots = E // ranks
        ways = (
            Placement.contiguous(E, ranks),
            Placement.balanced(load_E, ranks, slots),
            Placement.balanced(load_E, ranks, slots + 1),
        )
        found = [replay(target, placement, FACTOR, None) for placement in ways]
        of_mean = (f"{_busiest(each.choices_W):.2f}" for each in found)
        few = (found[0].load.rows_WW > found[0].load.slots_WW).double().mean()
        yield f"{ranks:,}", *of_mean, f"{float(few):.1%}"


def _busiest(choices_W: Tensor) -> float:
    return float(choices_W.max() / choices_W.mean())


def markdown(rows: Iterator[tuple[str, ...]]) -> str:
    head, *rest = rows
    lines = [head, tuple("---" for _ in head), *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    for table in (traffic(), times(), balance()):
        print(markdown(table), end="\n\n")


if __name__ == "__main__":
    main()
