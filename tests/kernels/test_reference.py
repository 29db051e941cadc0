"""The specification, checked against its own definitions: loops and hand-made cases."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router_kernels import reference
from tests.strategies import targets

few = settings(max_examples=25, deadline=None)


@few
@given(targets())
def test_every_choice_has_exactly_one_row_and_row_TK_inverts_src_R(routing):
    target_TK, groups = routing
    src_R, choice_R, offsets_G1, row_TK = reference.plan(target_TK, groups)
    chosen = target_TK.flatten() >= 0
    rows = row_TK.flatten()[chosen]
    assert sorted(rows.tolist()) == list(range(int(chosen.sum())))
    assert offsets_G1[-1] == chosen.sum()
    assert (row_TK.flatten()[~chosen] == -1).all()
    K = target_TK.size(1)
    for t in range(len(target_TK)):
        for k in range(K):
            row = row_TK[t, k]
            if row >= 0:
                group = target_TK[t, k]
                assert (src_R[row], choice_R[row]) == (t, t * K + k)
                assert offsets_G1[group] <= row < offsets_G1[group + 1]
    assert (src_R[offsets_G1[-1] :] == -1).all() and (choice_R[offsets_G1[-1] :] == -1).all()


@few
@given(targets())
def test_rows_keep_token_order_inside_a_group(routing):
    target_TK, groups = routing
    src_R, _, offsets_G1, _ = reference.plan(target_TK, groups)
    for a, b in itertools.pairwise(offsets_G1):
        assert (src_R[a:b].diff() >= 0).all()


@few
@given(targets(), st.sampled_from(["position", "score"]), st.data())
def test_rank_in_group_counts_those_served_before(routing, order, data):
    target_TK, groups = routing
    T, K = target_TK.shape
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    if order == "position":
        position_T = torch.randint(0, 5, (T,), generator=generator)
        served = reference.serve_by_position(position_T, K)
        assert (position_T[served // K].diff() >= 0).all()
    else:
        weight_TK = torch.rand(T, K, generator=generator)
        served = reference.serve_by_score(weight_TK)
        assert (weight_TK.flatten()[served].diff() <= 0).all()
    rank_TK = reference.rank_in_group(target_TK, groups, served)
    seen: dict[int, int] = {}
    for choice in served.tolist():
        t, k = divmod(choice, K)
        group = int(target_TK[t, k])
        if group >= 0:
            assert rank_TK[t, k] == seen.get(group, 0)
            seen[group] = seen.get(group, 0) + 1


@few
@given(targets(), st.integers(1, 5))
def test_gather_then_combine_with_unit_weights_is_K_times_the_identity(routing, dim):
    target_TK, groups = routing
    K = target_TK.size(1)
    target_TK = target_TK.clamp(min=0)  # nothing dropped
    x_TD = torch.randn(len(target_TK), dim, dtype=torch.float64)
    src_R, _, _, row_TK = reference.plan(target_TK, groups)
    rows_RD = reference.gather(x_TD, src_R)
    unit_TK = torch.ones(target_TK.shape, dtype=torch.float64)
    torch.testing.assert_close(reference.combine(rows_RD, unit_TK, row_TK), K * x_TD)


def test_combine_never_reads_rows_that_nobody_wrote():
    target_TK = torch.tensor([[-1, 0], [-1, -1]], dtype=torch.int32)
    _, _, _, row_TK = reference.plan(target_TK, 2)
    y_RD = torch.full((4, 3), float("nan"))
    y_RD[0] = 2.0
    out_TD = reference.combine(y_RD, torch.full((2, 2), 0.5), row_TK)
    assert out_TD.tolist() == [[1.0] * 3, [0.0] * 3]


def test_group_limited_choice_stays_in_the_best_groups():
    score_TE = torch.tensor([[0.9, 0.0, 0.5, 0.6, 0.3, 0.2, 0.8, 0.0]])
    limited = reference.limit_groups(score_TE, expert_groups=4, top_groups=2)
    # pairs are worth 0.9, 1.1, 0.5, 0.8: the second and the first win
    assert reference.top_k(limited, 3).tolist() == [[0, 3, 2]]


def test_ties_go_to_the_lower_id():
    assert reference.top_k(torch.zeros(1, 5), 3).tolist() == [[0, 1, 2]]


@few
@given(st.data(), st.integers(1, 3))
def test_each_group_takes_the_best_of_each_segment(data, G):
    lengths = data.draw(st.lists(st.integers(0, 6), max_size=4))
    counts = [data.draw(st.integers(0, 7)) for _ in lengths]
    T = sum(lengths)
    # few values, so that there are ties; some are NaN
    levels = torch.tensor([0.0, -0.0, 1.0, -2.0, float("nan")])
    score_TG = levels[torch.randint(5, (T, G), generator=torch.Generator().manual_seed(T))]
    offsets = [0, *itertools.accumulate(lengths)]
    taken_TG = reference.select_top_c(
        score_TG, torch.tensor(offsets, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32)
    )
    for (a, b), count in zip(itertools.pairwise(offsets), counts, strict=True):
        for g in range(G):
            worth = [-1e30 if math.isnan(v) else v for v in score_TG[a:b, g].tolist()]
            best = sorted(range(b - a), key=lambda i, w=worth: (-w[i], i))[:count]
            assert taken_TG[a:b, g].nonzero().flatten().tolist() == sorted(best)


def test_balance_loss_is_one_when_uniform_and_E_when_all_choose_one():
    uniform = torch.full((6, 4), 0.25)
    tokens = torch.tensor(6)
    assert reference.balance_loss(uniform.sum(0), torch.full((4,), 3.0), tokens) == pytest.approx(
        1.0
    )
    one = torch.tensor([1.0, 0, 0, 0])
    assert reference.balance_loss(6 * one, 6 * one, tokens) == pytest.approx(4.0)


def test_sequence_balance_loss_is_the_mean_of_each_sequence_alone():
    torch.manual_seed(0)
    score_TG = torch.rand(7, 3).softmax(-1)
    target_TK = reference.top_k(score_TG, 2)
    offsets = [0, 2, 2, 7]  # one sequence is empty
    whole = reference.sequence_balance_loss(
        score_TG, target_TK, torch.tensor(offsets, dtype=torch.int32), torch.tensor(3)
    )
    alone = [
        reference.balance_loss(
            score_TG[a:b].sum(0), reference.count(target_TK[a:b], 3).float(), torch.tensor(b - a)
        )
        for a, b in itertools.pairwise(offsets)
        if b > a
    ]
    assert whole == pytest.approx(float(sum(alone)) / 3)


def test_noise_is_a_function_of_the_global_token_and_looks_uniform():
    cpu = torch.device("cpu")
    whole = reference.uniform_noise(7, 3, 1, 0, 4096, 8, cpu)
    part = reference.uniform_noise(7, 3, 1, 1000, 50, 8, cpu)
    assert torch.equal(whole[1000:1050], part)
    assert not torch.equal(whole, reference.uniform_noise(7, 4, 1, 0, 4096, 8, cpu))
    assert (whole >= 0).all() and (whole < 1).all()
    assert whole.mean() == pytest.approx(0.5, abs=0.01)
    assert whole.var() == pytest.approx(1 / 12, abs=0.002)
    neighbours = torch.corrcoef(torch.stack([whole[1:].flatten(), whole[:-1].flatten()]))[0, 1]
    assert abs(neighbours) < 0.02
