"""What the commands print, as rich tables."""

from collections.abc import Sequence
from itertools import groupby
from typing import Literal
from unicodedata import category

from rich import box
from rich.table import Table
from rich.text import Text

from moe_router.cost import Cost
from moe_router.cost_parts import Part
from moe_router.doctor import Finding, Status
from moe_router.observability.records import EvalRecord

_STYLE: dict[Status, str] = {"ok": "green", "weak": "yellow", "missing": "bold red"}
_SPLIT = {
    "attention": ("attention",),
    "router": ("router",),
    "MLP": ("experts", "shared", "mlp"),
}


def short(number: float, unit: str = "") -> str:
    """1234567 as 1.23M; with a unit, as 1.23 Munit."""
    scales = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    size, letter = next(((s, c) for s, c in scales if number >= s), (1.0, ""))
    return f"{number / size:.3g}{' ' if unit else ''}{letter}{unit}"


def visible(text: str) -> str:
    """Text for a terminal: what a model wrote may hold its escape sequences."""
    return "".join(c if c in "\n\t" or category(c) != "Cc" else "\ufffd" for c in text)


def cost_table(cost: Cost, title: str) -> Table:
    """One row per layer, equal neighbours in one; FLOPs are split by part."""
    table = Table(
        title=title,
        box=box.SIMPLE,
        pad_edge=False,
        caption="attention to dense: FLOPs per token, forward, 2 per multiply-add; dense: if every "
        "expert processed every token; bytes: of fp32 weights; a range of layers: each of them",
        caption_justify="left",
    )
    for name in ("layer", "params", "active", "bytes", *_SPLIT, "routed", "dense"):
        justify: Literal["left", "right"] = "left" if name == "layer" else "right"
        table.add_column(name, justify=justify, style="dim" if name in _SPLIT else None)
    rows = [(layer, _sums(cost.of_layer(layer))) for layer in cost.layers]
    for sums, group in groupby(rows, key=lambda row: row[1]):
        names = [layer for layer, _ in group]
        table.add_row(names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}", *sums)
    table.add_section()
    table.add_row("total", *_sums(cost.parts), style="bold")
    return table


def _sums(parts: Sequence[Part]) -> list[str]:
    split = [sum(p.flops for p in parts if p.name in names) for names in _SPLIT.values()]
    held, active = sum(p.parameters for p in parts), sum(p.active for p in parts)
    flops, dense = sum(p.flops for p in parts), sum(p.dense_flops for p in parts)
    numbers = [held, active, sum(p.bytes for p in parts), *split, flops, dense]
    return [short(n) if n else "" for n in numbers]


def cost_facts(cost: Cost) -> list[str]:
    """What the table does not show, a line each."""
    lines = [
        f"router: {cost.router_parameter_share:.2%} of the parameters, "
        f"{cost.router_flop_share:.2%} of the FLOPs",
        f"routed: {cost.flops / cost.dense_flops:.1%} of the dense FLOPs",
        f"one step: {short(cost.tokens_per_step)} tokens, "
        f"{short(cost.flops_per_step, 'FLOP')} forward and backward",
        f"memory: {short(cost.bytes_per_rank, 'B')} on the fullest rank for weights, gradients and "
        "optimizer state",
    ]
    if cost.equal_width:
        same = f"a dense SwiGLU of width {cost.equal_width} costs as much as an MoE layer's experts"
        lines.insert(2, same)
    return lines


def doctor_table(findings: Sequence[Finding]) -> Table:
    """What was found; what to do about it where it is not ok."""
    table = Table("", "what", "found", "fix")
    for finding in findings:
        status = Text(finding.status, _STYLE[finding.status])
        table.add_row(status, finding.name, Text(finding.found), Text(finding.fix))
    return table


def eval_table(record: EvalRecord, title: str) -> Table:
    """Held-out quality; of text beside what letter frequencies alone reach."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("held-out tokens", f"{record.tokens:,}")
    table.add_row("loss, nats", f"{record.loss:.4f}")
    if record.accuracy is not None:
        table.add_row("accuracy", f"{record.accuracy:.2%}", style="bold")
        table.add_row("Matthews correlation", f"{record.matthews or 0:.4f}")
    if record.bits_per_byte is not None and record.unigram_bits_per_byte:
        share = record.bits_per_byte / record.unigram_bits_per_byte
        table.add_row("bits per byte", f"{record.bits_per_byte:.4f}", style="bold")
        table.add_row("unigram entropy, bits per byte", f"{record.unigram_bits_per_byte:.4f}")
        table.add_row("of the unigram entropy", f"{share:.3f}")
    if record.executed is not None:
        table.add_row("executed, of the dense model's FLOPs", f"{record.executed:.1%}")
    return table
