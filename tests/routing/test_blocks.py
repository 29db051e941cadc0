"""Which key blocks a query block attends to: by the keys' means, without looking ahead."""

import torch

from moe_router.routing.blocks import Blocks, block_scores, route_blocks

CPU = torch.device("cpu")


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


def test_no_choice_sees_a_later_token():
    q, k = draw(32)
    blocks = Blocks.of([13, 19], 4, CPU)
    before = route_blocks(q, k, blocks, top_k=3, window=4, gated=True)
    for cut in (6, 14, 25):
        changed_q, changed_k = q.clone(), k.clone()
        changed_q[cut:], changed_k[cut:] = torch.randn(32 - cut, 4, 8), torch.randn(32 - cut, 2, 8)
        after = route_blocks(changed_q, changed_k, blocks, top_k=3, window=4, gated=True)
        units = 2 * int((blocks.first_N < cut).sum())
        assert torch.equal(after.target_TK[:units], before.target_TK[:units])


def test_a_sequence_chooses_the_same_in_any_batch():
    q, k = draw(32)
    together = route_blocks(q, k, Blocks.of([13, 0, 19], 4, CPU), top_k=3, window=4)
    alone = route_blocks(q[13:], k[13:], Blocks.of([19], 4, CPU), top_k=3, window=4)
    shifted = together.target_TK[8:]  # four blocks of two heads come before
    assert torch.equal(torch.where(shifted < 0, -1, shifted - 8), alone.target_TK)


def test_gates_are_of_the_scores_and_teach_queries_and_keys():
    q, k = (x.requires_grad_() for x in draw(32))
    blocks = Blocks.of([32], 4, CPU)
    choice = route_blocks(q, k, blocks, top_k=4, window=3, gated=True)
    target, weight = choice.target_TK.view(8, 2, 4), choice.weight_TK.view(8, 2, 4)
    score = block_scores(q, k, blocks)
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
