"""Router weights on their way: what comes out is the router that went in, or a refusal."""

import dataclasses

import pytest
import torch

from moe_router.config import MoEConfig, RouterConfig
from moe_router.errors import GatingError
from tests.gating import E, router, weights


@pytest.mark.parametrize("given", [b"", b"no safetensors", weights(router(dim=5)).safetensors])
def test_weights_that_do_not_fit_are_refused_in_one_line(given):
    with pytest.raises(GatingError, match="router run/0: its weights do not fit: ") as said:
        dataclasses.replace(weights(router()), safetensors=given).build()
    assert "\n" not in str(said.value)


def test_weights_rebuild_the_router_and_draw_nothing():
    own = router(MoEConfig(experts=E, top_k=2, hidden=16, bias_rate=0.1), layer=5)
    torch.manual_seed(1)
    built = weights(own).build()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert built.layer == 5 and type(built.config) is RouterConfig
    assert built.state_dict().keys() == own.state_dict().keys() == {"score.weight", "bias_E"}
    assert all(torch.equal(x, built.state_dict()[name]) for name, x in own.state_dict().items())
