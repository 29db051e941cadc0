"""The gate as an operation: its gradient, its fake, its errors, and what it logs."""

import logging

import pytest
import torch

from moe_router_kernels import choose, gate, gate_op, ops, plan_from_ids, plan_op, reference

RULES = {
    "softmax": {"experts": 6},
    "plain": {"experts": 6, "renormalise": False},
    "sigmoid": {"experts": 6, "score": "sigmoid"},
    "null": {"experts": 4},
    "groups": {"experts": 6, "expert_groups": 3, "top_groups": 2, "score": "sigmoid"},
}


def logits(T=9, G=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(T, G, generator=generator, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("given", [False, True])
def test_gradients_are_those_of_the_definition(name, given):
    rule = RULES[name]
    logits_TG = logits()
    chosen_TK = gate(logits_TG, 2, **rule).raw_TK if given else None

    def weigh(leaf):
        made = gate(leaf, 2, sums=True, given_TK=chosen_TK, **rule)
        return made.weight_TK, made.share_G, made.z

    made = gate(logits_TG, 2, sums=True, given_TK=chosen_TK, **rule)
    score_TG = reference.score(logits_TG, rule.get("score", "softmax"))
    target_TK = plan_op.real(made.raw_TK, rule["experts"])
    renormalise = rule.get("renormalise", True)
    wanted = (
        reference.choice_weights(score_TG, target_TK, renormalise),
        (score_TG / score_TG.sum(-1, keepdim=True)).sum(0),
        logits_TG.logsumexp(-1).square().sum()[None],
    )
    torch.testing.assert_close(weigh(logits_TG), wanted)
    assert torch.autograd.gradcheck(weigh, logits_TG)


def test_an_operation_keeps_to_what_its_fake_says():
    made = gate_op._gate.op
    args = (logits(dtype=torch.float32), 2, 6, "softmax", True, True, False, None, 1, 1)
    torch.library.opcheck(made, args)
    given_TK = torch.zeros(9, 2, dtype=torch.int32)
    torch.library.opcheck(gate_op._weigh.op, (args[0], given_TK, 6, "softmax", True, True, False))
    torch.library.opcheck(plan_op._plan_from_ids.op, (given_TK, 3, False))
    order_R = torch.arange(18)
    torch.library.opcheck(plan_op._within_capacity.op, (given_TK, 3, order_R, 2, False))
    bounds, count = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([1, 2])
    torch.library.opcheck(plan_op._select_top_c.op, (torch.randn(9, 6), bounds, count, False))
    src_R, choice_R, _, row_TK = reference.plan(given_TK, 3)
    x_TD, weight_TK = torch.randn(9, 4, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    torch.library.opcheck(ops._gather.op, (x_TD, src_R, row_TK))
    y_RD = torch.randn(18, 4, requires_grad=True)
    torch.library.opcheck(ops._combine.op, (y_RD, weight_TK, src_R, choice_R, row_TK))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"logits_TG": torch.zeros(3)},
            r"logits: got \(3,\) float32 on cpu, want \(tokens",
        ),
        ({"logits_TG": torch.zeros(3, 4, dtype=torch.int32)}, "want .* of a float dtype"),
        ({"k": 5}, "k=5 of 4 groups: want 1 to 4"),
        ({"experts": 5}, "experts=5 of 4 groups: want 1 to 4; the rest are null"),
        ({"score": "tanh"}, "score=tanh: want softmax or sigmoid"),
        ({"bias_E": torch.zeros(3)}, r"bias_E: got \(3,\) float32 on cpu, want \(4,\) float32"),
        ({"given_TK": torch.zeros(3, 2)}, r"given_TK: got \(3, 2\) float32 .* want .* int32"),
        ({"given_TK": torch.zeros(2, 2, dtype=torch.int32)}, "given_TK: got .* want 3 tokens"),
    ],
)
def test_what_does_not_fit_is_one_line(change, message):
    arguments = {"logits_TG": torch.zeros(3, 4), "k": 2, "experts": 4} | change
    with pytest.raises(ValueError, match=message) as raised:
        gate(**arguments)
    assert "\n" not in str(raised.value)


def test_what_is_no_group_gets_no_row():
    target_TK = torch.tensor([[0, 7], [-5, 1]], dtype=torch.int32)
    src_R, _, offsets_G1, row_TK = plan_from_ids(target_TK, 2)
    assert src_R.tolist() == [0, 1, -1, -1] and offsets_G1.tolist() == [0, 1, 2]
    assert row_TK.tolist() == [[0, -1], [-1, 1]]


def test_why_a_kernel_is_not_taken_is_logged_once(caplog):
    choose._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="moe_router_kernels"):
        for _ in range(2):
            gate(torch.zeros(3, 4), 2, experts=4)
            gate(torch.zeros(3, 4), 2, experts=4, kernels="reference")
    assert [record.getMessage() for record in caplog.records] == [
        "kernels=auto: gate takes plain torch: Triton does not run on cpu"
    ]
