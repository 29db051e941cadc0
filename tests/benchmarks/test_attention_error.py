"""How many pairs an output error takes: errors and pairs against loops, in a tiny form."""

import json

import pytest
import torch

from benchmarks import attention_error, attention_table, results
from benchmarks.attention_error import Layer, exponent, random_tensors
from moe_router.config import AttentionConfig
from moe_router.routing.blocks import BlockRouter, Blocks

CPU = torch.device("cpu")


def layer_of(tokens=32, block=4, scale=1.0):
    q, k, v = random_tensors(tokens, 0, CPU)[0]
    return Layer(q * scale, k, v, block), (q * scale, k, v)


def masked(qkv, mask_HTT):
    q, k, v = (x.transpose(0, 1).double() for x in qkv)
    k, v = (x.repeat_interleave(2, 0) for x in (k, v))
    score = (q @ k.mT * q.size(-1) ** -0.5).masked_fill(~mask_HTT, -torch.inf)
    return score.softmax(-1) @ v


@pytest.mark.parametrize("way", ["chosen", "best blocks", "window"])
def test_errors_and_pairs_of_blocks_are_those_of_a_mask(way):
    layer, qkv = layer_of()
    rank, dense = layer.rank(way), masked(qkv, layer.causal_TT)
    for top_k in (1, 3, 8):
        seen = (rank < top_k).repeat_interleave(4, 1).repeat_interleave(4, 2) & layer.causal_TT
        seen = seen.repeat_interleave(2, 0)
        wanted = (masked(qkv, seen) - dense).norm() / dense.norm()
        error, pairs = layer.by_blocks(rank, top_k)
        assert error == pytest.approx(float(wanted), abs=1e-5)
        assert pairs == int(seen.sum()) / 4


def test_chosen_are_the_blocks_of_the_router():
    layer, (q, k, _) = layer_of()
    how = AttentionConfig(kind="routed", block=4, top_k=3, window=0)
    target = BlockRouter(how).lists(q, k, Blocks.of([32], 4, CPU)).target_NJK
    rank = layer.rank("chosen")
    for n in range(8):
        for j in range(2):
            best = [m for m in range(n + 1) if rank[j, n, m] < 3]
            assert [m for m in target[n, j].tolist() if m >= 0] == best


def test_the_pairs_are_the_least_that_keep_the_error():
    layer, _ = layer_of(scale=4.0)
    for way in ("chosen", "best blocks", "window"):
        rank = layer.rank(way)
        fits = [k for k in range(1, 9) if layer.by_blocks(rank, k)[0] <= 0.1]
        assert layer.pairs_for(way, 0.1) in [layer.by_blocks(rank, k)[1] for k in fits]
    keys = layer.pairs_for("best keys", 0.1)
    share = layer.share_HTT.flatten().sort(descending=True).values
    for least, holds in ((share[5 * keys], True), (share[3 * keys], False)):
        assert (layer.by_keys(float(least))[0] <= 0.1) == holds
    assert keys < layer.pairs_for("best blocks", 0.1) <= layer.pairs_for("window", 0.1)


def test_what_is_dropped_bounds_the_error():
    """docs/results/attention.md: out - kept = d (dropped - kept), d the share that is dropped."""
    layer, qkv = layer_of()
    seen = (layer.rank("chosen") < 3).repeat_interleave(4, 1).repeat_interleave(4, 2)
    seen = (seen & layer.causal_TT).repeat_interleave(2, 0)
    wrong = (masked(qkv, seen) - masked(qkv, layer.causal_TT)).norm(dim=-1)
    dropped = (layer.share_HTT * ~seen).sum(-1)
    assert (wrong <= 2 * dropped * layer.v.norm(dim=-1).amax() + 1e-6).all()


def test_rows_are_saved_with_an_exponent(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    sizes = {"layers": 2, "dim": 16, "heads": 4, "kv_heads": 2, "hidden": 16}
    monkeypatch.setattr(attention_error, "SIZES", sizes)
    (tmp_path / "text").write_bytes(bytes(range(100)) * 40)
    attention_error.main([
        "--data", str(tmp_path / "text"), "--lengths", "16,32,64", "--block", "4", "--steps", "2",
        "--seeds", "2", "--save",
    ])  # fmt: skip
    rows = json.loads((tmp_path / "results/attention_error.json").read_text())
    assert len(rows) == 2 * 4 * 2
    for row in rows:
        assert 0 < row["value"] <= 2.01 and len(row["pairs"]) == 3 and row["std"] is not None
        assert all(0 < share <= 1 for share in row["share"])
    lines = attention_table.errors(rows).splitlines()
    assert lines[0].startswith("| pairs of | chosen by | error | share at 16 |")
    assert len(lines) == 2 + len(rows) and lines[2].startswith("| random | chosen | 0.1 | ")
    assert exponent([10, 100, 1000], [7, 700, 70000]) == pytest.approx(2)
