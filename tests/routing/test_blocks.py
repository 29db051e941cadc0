"""Which key blocks a query block attends to: by the keys' means, without looking ahead."""

import pytest
import torch

from moe_router.config_attention import AttentionConfig
from moe_router.errors import ConfigError
from moe_router.routing.blocks import BlockRouter, Blocks

CPU = torch.device("cpu")


def route_blocks(q, k, blocks, **how):
    config = AttentionConfig(kind="routed", block=blocks.size, **{"window": 0, **how})
    return BlockRouter(config)(q, k, blocks)


def by(router):
    return {"branch": 2} if router == "tree" else {"router": router}


def draw(T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(T, heads, 8, generator=generator) for heads in (4, 2))


def test_empty_and_short_sequences_have_their_blocks():
    blocks = Blocks.of([5, 0, 2], 4, CPU)
    assert blocks.first_N.tolist() == [0, 4, 5] and blocks.last_N.tolist() == [4, 5, 7]
    assert blocks.low_N.tolist() == [0, 0, 2] and blocks.high_N.tolist() == [1, 2, 3]
    assert blocks.most == 2 and blocks.first_N.dtype == torch.int32
    assert Blocks.of([5, 3], 4, CPU, causal=False).high_N.tolist() == [2, 2, 3]
    assert Blocks.of([], 4, CPU).first_N.shape == (0,)


def test_a_block_goes_where_its_first_query_points():
    q, k = draw(32)
    q[20] = 0
    q[20, :2] = k[4:8, 0].mean(0) * 10  # heads 0 and 1 share KV head 0
    q[20, 2:] = k[8:12, 1].mean(0) * 10
    choice = route_blocks(q, k, Blocks.of([32], 4, CPU), top_k=2)
    target = choice.target_TK.view(8, 2, 2)
    assert target[5].tolist() == [[1 * 2 + 0, 5 * 2 + 0], [2 * 2 + 1, 5 * 2 + 1]]
    assert target[0].tolist() == [[0, -1], [1, -1]]


@pytest.mark.parametrize("router", ["keys", "tree"])
@pytest.mark.parametrize("gated", [False, True])
def test_autocast_does_not_touch_scores(router, gated):
    q, k = draw(256)
    blocks, how = Blocks.of([256], 4, CPU), {"top_k": 9, "gated": gated, **by(router)}
    wanted = route_blocks(q, k, blocks, **how)
    with torch.autocast("cpu", torch.bfloat16):
        got = route_blocks(q, k, blocks, **how)
    assert torch.equal(got.target_TK, wanted.target_TK)
    assert torch.equal(got.weight_TK, wanted.weight_TK)


@pytest.mark.parametrize("router", ["keys", "tree", "position", "random"])
def test_no_choice_sees_a_later_token(router):
    q, k = draw(32)
    blocks, how = Blocks.of([13, 19], 4, CPU), {"top_k": 3, "window": 4, **by(router)}
    before = route_blocks(q, k, blocks, **how, gated=True)
    for cut in (6, 14, 25):
        changed_q, changed_k = q.clone(), k.clone()
        changed_q[cut:], changed_k[cut:] = torch.randn(32 - cut, 4, 8), torch.randn(32 - cut, 2, 8)
        after = route_blocks(changed_q, changed_k, blocks, **how, gated=True)
        units = 2 * int((blocks.first_N < cut).sum())
        assert torch.equal(after.target_TK[:units], before.target_TK[:units])


@pytest.mark.parametrize("router", ["keys", "tree", "position", "random"])
def test_a_sequence_chooses_the_same_in_any_batch(router):
    q, k = draw(32)
    how = {"top_k": 3, "window": 4, **by(router)}
    together = route_blocks(q, k, Blocks.of([13, 0, 19], 4, CPU), **how)
    alone = route_blocks(q[13:], k[13:], Blocks.of([19], 4, CPU), **how)
    shifted = together.target_TK[8:]  # four blocks of two heads come before
    assert torch.equal(torch.where(shifted < 0, -1, shifted - 8), alone.target_TK)


def test_gates_are_of_the_scores_and_teach_queries_and_keys():
    q, k = (x.requires_grad_() for x in draw(32))
    blocks = Blocks.of([32], 4, CPU)
    choice = route_blocks(q, k, blocks, top_k=4, window=3, gated=True)
    target, weight = choice.target_TK.view(8, 2, 4), choice.weight_TK.view(8, 2, 4)
    query = q[blocks.first_N].view(8, 2, 2, 8).mean(2)
    score = torch.einsum("njd,mjd->njm", query, k.view(8, 4, 2, 8).mean(1)) * 8**-0.5
    for n in range(8):
        for j in range(2):
            for group, p in zip(target[n, j].tolist(), weight[n, j], strict=True):
                m = group // 2
                near = group >= 0 and n - m <= 1
                wanted = 1.0 if near else score[n, j, m].sigmoid() if group >= 0 else 0.0
                torch.testing.assert_close(p, torch.as_tensor(wanted))
    grads = torch.autograd.grad(weight.sum(), (q, k))
    assert grads[0][blocks.first_N[4:].long()].norm(dim=-1).min() > 0
    assert grads[0][1:4].norm() == 0 and grads[1].norm() > 0
    plain = route_blocks(q, k, blocks, top_k=4, window=3).weight_TK.view(8, 2, 4)
    assert torch.equal(plain, (target >= 0).float())


def test_an_encoder_chooses_on_both_sides():
    q, k = draw(32)
    blocks = Blocks.of([13, 19], 4, CPU, causal=False)
    target = route_blocks(q, k, blocks, top_k=3, window=2).target_TK.view(9, 2, 3) // 2
    assert target[0].tolist() == [[0, 1, target[0, 0, 2]], [0, 1, target[0, 1, 2]]]
    assert (target[:4] < 4).all() and (target[4:] >= 4).all()


def test_controls_see_no_content():
    blocks = Blocks.of([40], 4, CPU)
    for router in ("position", "random"):
        drawn = [route_blocks(*draw(40, seed), blocks, top_k=3, router=router) for seed in (1, 2)]
        assert torch.equal(drawn[0].target_TK, drawn[1].target_TK)
        if router == "position":
            assert drawn[0].target_TK.view(10, 2, 3)[9, 1].tolist() == [1, 3, 19]
        else:
            heads = drawn[0].target_TK.view(10, 2, 3).transpose(0, 1) // 2
            assert not torch.equal(*heads)


def test_the_curriculum_comes_down_from_all_blocks():
    config = AttentionConfig(kind="routed", block=4, top_k=3, window=0, curriculum=10)
    assert [config.eased(13, step) for step in (0, 5, 9, 10, None)] == [13, 8, 4, 3, 3]
    assert config.eased(2, 0) == 3  # as many as there are
    choice = BlockRouter(config)(*draw(52), Blocks.of([52], 4, CPU), 5)
    assert choice.target_TK.shape == (26, 8) and (choice.target_TK[-1] >= 0).all()


def test_a_tree_that_opens_every_node_finds_what_scores_of_all_find():
    q, k = draw(150, 3)
    blocks = Blocks.of([97, 0, 53], 4, CPU)
    for branch in (2, 3, 8):
        # of 24 earlier blocks it keeps 23 at each level
        how = {"top_k": 26, "window": 7, "gated": True}
        flat, tree = (route_blocks(q, k, blocks, **how, branch=b) for b in (0, branch))
        assert torch.equal(tree.target_TK, flat.target_TK)
        torch.testing.assert_close(tree.weight_TK, flat.weight_TK)


@pytest.mark.parametrize("branch", [2, 3])
def test_a_tree_chooses_its_own_blocks_and_the_best_that_it_meets(branch):
    q, k = draw(160, 4)
    k = k.view(5, 32, 2, 8).mean(1, keepdim=True).expand(5, 32, 2, 8).reshape(160, 2, 8)
    # keys change every 8 blocks: what is best above is best below
    blocks, how = Blocks.of([160], 4, CPU), {"top_k": 3, "window": 4}
    target = route_blocks(q, k, blocks, **how, branch=branch).target_TK.view(40, 2, 3) // 2
    query = q[blocks.first_N].view(40, 2, 2, 8).mean(2)
    score = torch.einsum("njd,mjd->njm", query, k.view(40, 4, 2, 8).mean(1))
    found = 0
    for n in range(40):
        for j in range(2):
            chosen = [m for m in target[n, j].tolist() if m >= 0]
            assert chosen == sorted(set(chosen)) and len(chosen) == min(3, n + 1)
            assert set(chosen[-2:]) == {n, n - 1} if n else chosen == [0]
            found += n > 1 and score[n, j, chosen[0]] >= score[n, j, : n - 1].max() - 1e-5
    assert found >= 50  # of 76; a node may hold keys of two kinds


def test_a_tree_is_scored_in_n_log_n():
    how = AttentionConfig(kind="routed", top_k=16, window=64, branch=8)
    work = [how.choosing(n, n, 1, n) for n in (2**10, 2**14)]
    assert [how.levels(n) for n in (1, 8, 9, 2**10, 2**14)] == [1, 1, 2, 4, 5]
    assert work[1] / work[0] == 16 * 5 / 4
    flat = AttentionConfig(kind="routed", top_k=16, window=64)
    assert flat.choosing(2**14, 2**14, 1, 2**14) > 20 * work[1]


def test_a_tree_is_of_keys():
    with pytest.raises(ConfigError, match=r"model\.attention\.router=random: want keys, or"):
        AttentionConfig(kind="routed", router="random", branch=8)
