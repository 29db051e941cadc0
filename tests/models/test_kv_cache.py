import pytest
import torch

from moe_router.errors import ConfigError
from moe_router.models import KVCache
from moe_router.models.kv_cache import LayerCache
from moe_router.models.packing import Packing


def packing_of(lengths):
    return Packing(torch.tensor([0, *lengths]).cumsum(0), torch.device("cpu"))


def numbered(first, tokens):
    """Keys that say which token they are; values are their negatives."""
    k_TJC = torch.arange(first, first + tokens).float()[:, None, None].expand(-1, 2, 3)
    return k_TJC, -k_TJC


def held(cache):
    k_BJSC, v_BJSC = cache.read()
    assert torch.equal(k_BJSC, -v_BJSC)
    return [
        row[0, :n, 0].int().tolist() for row, n in zip(k_BJSC, cache.length_B.tolist(), strict=True)
    ]


@pytest.mark.parametrize("reserve", [0, 100])
def test_tokens_are_appended_to_their_own_sequence(reserve):
    cache = LayerCache(sequences=3, reserve=reserve)
    slots = cache.write(*numbered(0, 3), packing_of([2, 0, 1]))
    assert slots.tolist() == [0, 1, 0]
    slots = cache.write(*numbered(3, 4), packing_of([1, 3, 0]))
    assert slots.tolist() == [2, 0, 1, 2]
    assert held(cache) == [[0, 1, 3], [4, 5, 6], [2]]


def test_layers_have_lengths_of_their_own():
    cache = KVCache(layers=2, sequences=2)
    cache.layers[0].write(*numbered(0, 4), packing_of([3, 1]))
    cache.layers[1].write(*numbered(0, 1), packing_of([0, 1]))
    assert held(cache.layers[0]) == [[0, 1, 2], [3]]
    assert held(cache.layers[1]) == [[], [0]]


def test_keep_drops_sequences_and_the_rest_goes_on():
    cache = KVCache(layers=1, sequences=3)
    (layer,) = cache.layers
    layer.write(*numbered(0, 4), packing_of([1, 1, 2]))
    cache.keep(torch.tensor([2, 0]))
    layer.write(*numbered(4, 2), packing_of([1, 1]))
    assert held(layer) == [[2, 3, 4], [0, 5]]


def test_unused_slots_are_finite():
    cache = LayerCache(sequences=2, reserve=50)
    cache.write(*numbered(0, 3), packing_of([3, 0]))
    assert cache.kv_2BSJC.size(2) == 50 and cache.kv_2BSJC.isfinite().all()


def test_another_number_of_sequences_is_refused():
    cache = LayerCache(sequences=2, reserve=0)
    with pytest.raises(ConfigError, match="cache holds 2 sequences, offsets_B1 has 3: want one"):
        cache.write(*numbered(0, 3), packing_of([1, 1, 1]))


def test_sequences_join_those_that_are_there():
    cache = KVCache(layers=1, sequences=0)
    (layer,) = cache.layers
    layer.write(*numbered(0, 0), packing_of([]))
    cache.join(2)
    layer.write(*numbered(0, 3), packing_of([2, 1]))
    cache.join(1)
    layer.write(*numbered(3, 4), packing_of([1, 0, 3]))
    assert held(layer) == [[0, 1, 3], [2], [4, 5, 6]]


def test_slots_of_a_long_sequence_leave_with_it():
    cache = KVCache(layers=1, sequences=2)
    (layer,) = cache.layers
    layer.write(*numbered(0, 9), packing_of([8, 1]))
    assert layer.bound == 8
    cache.keep(torch.tensor([1]))
    assert layer.bound == 1 and layer.kv_2BSJC.size(2) == 1
    layer.write(*numbered(9, 1), packing_of([1]))
    assert held(layer) == [[8, 9]]
