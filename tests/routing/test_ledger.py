import torch

from moe_router.routing import Ledger


def test_totals_add_what_ran_beside_what_a_dense_layer_costs():
    ledger = Ledger()
    ledger.add("experts", torch.tensor(2**40), 2**41)
    ledger.add("experts", torch.tensor(1), 1)
    ledger.add("skip", 5, 10)
    assert ledger.by_op() == {"experts": (2**40 + 1, 2**41 + 1), "skip": (5, 10)}
    assert ledger.totals() == (2**40 + 6, 2**41 + 11)
    ledger.reset()
    assert ledger.totals() == (0, 0)
