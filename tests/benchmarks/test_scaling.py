"""The tables of docs/scaling.md are what the cost model says, and that is what it must be."""

from pathlib import Path

import pytest
import torch

from benchmarks import scaling

ROOT = Path(__file__).parents[2]


def of(table):
    head, *rows = table
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def number(text):
    return float(text.replace(",", "").rstrip("x%"))


@pytest.mark.parametrize("table", [scaling.traffic, scaling.times])
def test_the_page_shows_them(table):
    assert scaling.markdown(table()) in (ROOT / "docs/scaling.md").read_text()


def test_what_a_token_sends_by_a_drawing_of_experts():
    """4096 tokens of eight different experts each, on 16 ranks of two machines."""
    target_TK = torch.rand(4096, 256, generator=torch.Generator().manual_seed(0)).topk(8).indices
    rank_TK = target_TK // 16
    visits = torch.nn.functional.one_hot(rank_TK, 16).amax(1).sum(1).double().mean()
    machines = torch.nn.functional.one_hot(rank_TK // 8, 2).amax(1).sum(1).double().mean()
    row = of(scaling.traffic())["16"]
    assert number(row["rows of a token"]) == pytest.approx(float(visits), rel=0.01)
    assert scaling.machines_of_token(16) == pytest.approx(float(machines), rel=0.01)
    sent = 4096 * (7168 * 2 + 64) / 1e6 * float(visits) / 16
    assert number(row["NVLink, MB"]) == pytest.approx(7 * sent, rel=0.02)
    assert number(row["network, MB"]) == pytest.approx(8 * sent, rel=0.02)
    assert number(row["network, once a machine"]) < number(row["network, MB"]) / 3


def test_copies_of_experts_spread_a_token_as_one_expert_a_rank_does():
    _, problem, load = scaling.even(512)
    assert float(load.rows_WW[0].sum()) == problem.tokens * problem.top_k
    assert scaling.machines_of_token(512) < 8


def test_a_spare_slot_holds_balance_where_a_placement_alone_cannot():
    row = of(scaling.balance())["64"]
    assert number(row["balanced"]) > 2 > 1.2 > number(row["balanced, a spare slot"])
