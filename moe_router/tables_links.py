"""What the commands about links and machines print, as rich tables."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from moe_router.dispatch.cost_model import Link
from moe_router.dispatch.probe import Probe
from moe_router.simulation import Simulated
from moe_router.tables import short


def links_table(link: Link, probes: Sequence[Probe]) -> Table:
    """One row per problem and transport, with what the prediction missed by; the chooser's is
    marked."""
    rates = ", ".join(f"{name} {short(rate, 'B/s')}" for name, rate in link.bytes_per_s.items())
    table = Table(
        title=f"{link.ranks} ranks on {link.device}: {rates}",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        caption="microseconds of a dispatch and a combine of a rank's tokens, without experts; "
        "the slowest rank counts; * is what cluster.transport: auto would take",
        caption_justify="left",
    )
    for name in ("tokens", "transport", "predicted", "measured", "error"):
        table.add_column(name, justify="left" if name in ("tokens", "transport") else "right")
    for found in probes:
        for name, took in found.measured.items():
            mark = " *" if name == found.chosen else ""
            predicted = found.predicted[name]
            times = (f"{seconds * 1e6:,.0f}" for seconds in (predicted, took))
            table.add_row(str(found.problem), name + mark, *times, f"{predicted / took - 1:+.0%}")
        table.add_section()
    return table


def simulated_table(found: Simulated, title: str) -> Table:
    """One row per transport; the one that is taken is marked."""
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        caption="milliseconds of a step, mean of the recorded ones; experts and dispatch on the "
        "busiest rank of each layer; * is the transport that is taken",
        caption_justify="left",
    )
    names = ("transport", "step", "dispatch + combine", "experts", "gradients", "rest", "tokens/s")
    for name in names:
        table.add_column(name, justify="left" if name == "transport" else "right")
    rest = [f"{part * 1e3:,.2f}" for part in (found.expert_s, found.gradient_s, found.rest_s)]
    for name, took in found.step_s.items():
        mark = " *" if name == found.transport else ""
        times = (f"{seconds * 1e3:,.2f}" for seconds in (took, found.moving_s[name]))
        table.add_row(name + mark, *times, *rest, f"{found.tokens / took:,.0f}")
    return table


def simulated_facts(found: Simulated) -> list[str]:
    """What the table does not show, a line each."""
    worst = max(range(len(found.imbalance_L)), key=found.imbalance_L.__getitem__)
    mean = sum(found.imbalance_L) / len(found.imbalance_L)
    return [
        f"{found.tokens:,} tokens a rank and step; tokens/s are of one rank",
        f"busiest rank: {mean:.2f} times the mean load, {found.imbalance_L[worst]:.2f} in MoE "
        f"layer {worst}, the worst",
        f"a token has {found.rows_per_token:.2f} rows in a layer; {short(found.sent_bytes, 'B')} "
        "leave the busiest rank in a dispatch",
        f"dropped by capacity: {found.dropped:.2%} of the choices; without room in a static "
        f"transport: {found.overflows:.0%} of the layers",
    ]
