"""transformers' own expert parallelism, with our experts on each rank."""

import dataclasses

import pytest

transformers = pytest.importorskip("transformers")
from transformers.distributed import DistributedConfig  # noqa: E402

from tests.gloo import run_ranks  # noqa: E402
from tests.integrations import ep_work, hf_models  # noqa: E402

KEYS = {field.name for field in dataclasses.fields(DistributedConfig)}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("ep_size" not in KEYS, reason="this transformers spreads experts otherwise"),
]


@pytest.mark.parametrize("how", ["all_reduce", "all_to_all"])
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_logits_and_gradients_over_two_ranks_are_those_of_eager_on_one(kind, how, tmp_path):
    hf_models.small(kind, initializer_range=0.3).save_pretrained(tmp_path)
    for apart, experts in run_ranks(2, ep_work.distances, tmp_path, how):
        assert experts == {2}  # of 4
        assert len(apart) > 10 and max(apart.values()) < 1e-4, apart
