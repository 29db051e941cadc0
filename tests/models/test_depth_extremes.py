"""Routing in depth at its ends: no token kept, all of them, one alone; and no noise."""

import pytest
import torch

from moe_router import Context, Ledger
from moe_router.config import RoutingConfig
from moe_router.errors import ConfigError
from moe_router.models import KVCache
from moe_router.types import NoiseKey
from tests.models.helpers import packed, small_model
from tests.models.test_depth import LENGTHS, VARIANTS, depth_model, sequences

T = sum(LENGTHS)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "shift", "rows"),
    [
        ("skip_all_blocks", -60.0, 0),
        ("skip_all_blocks", 60.0, 4 * T),
        ("halt", -60.0, T),  # all halt after the first block
        ("halt", 60.0, 4 * T),
        ("tsa", -60.0, T),
        ("leap", -60.0, 4 * len(LENGTHS)),  # the protected ones
        ("leap", 60.0, 4 * T),
    ],
)
def test_no_token_kept_or_all_with_caches_that_stay_empty_too(name, shift, rows):
    model = depth_model(name).double().eval()
    model.shift_routers(shift)
    ids_T, position_T, offsets_B1 = packed(LENGTHS)
    ledger, decoding = Ledger(), Ledger()
    wanted = model(ids_T, position_T, offsets_B1, context=Context(ledger=ledger)).logits_TV
    assert ledger.by_op()["mlp"][0] == rows * 6 * 16 * 24
    for ids_S, wanted_SV in zip(
        sequences(ids_T, offsets_B1), sequences(wanted, offsets_B1), strict=True
    ):
        cache = KVCache(model.config.steps, 1)
        for n, token in enumerate(ids_S):
            where = (torch.tensor([n], dtype=torch.int32), torch.tensor([0, 1]))
            out = model(token[None], *where, cache=cache, context=Context(ledger=decoding))
            torch.testing.assert_close(out.logits_TV[0], wanted_SV[n], rtol=1e-5, atol=1e-5)
    assert decoding.by_op()["mlp"][0] == rows * 6 * 16 * 24


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_no_noise_is_drawn_and_the_experts_own_is_refused(name):
    for training in (False, True):
        model = depth_model(name).train(training)
        one, other = (
            model(*packed(LENGTHS), context=Context(NoiseKey(seed, 0, 0))).logits_TV
            for seed in (1, 2)
        )
        assert torch.equal(one, other)
    with pytest.raises(ConfigError, match=r"model\.moe\.jitter=0\.5: want 0 beside model\.routing"):
        small_model({"jitter": 0.5}, routing=RoutingConfig(**VARIANTS[name][0]), layers=4)
