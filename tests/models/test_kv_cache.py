import pytest
import torch

from moe_router.errors import ConfigError
from moe_router.models import KVCache
from moe_router.models.packing import Packing
from moe_router.models.rope import Turn

STILL = torch.tensor(1.0), torch.tensor(0.0)  # a turn by nothing


def packing_of(lengths):
    return Packing(torch.tensor([0, *lengths]).cumsum(0), torch.device("cpu"))


def write(layer, first, lengths):
    """Keys that say which token they are; values are their negatives."""
    k_TJC = torch.arange(first, first + sum(lengths)).float()[:, None, None].expand(-1, 2, 4)
    turn = Turn(*(x.expand(len(k_TJC), 1, 4) for x in STILL))
    return layer.append(k_TJC, k_TJC, -k_TJC, turn, packing_of(lengths))[2]


def held(layer):
    k_BJSC, v_BJSC = layer.read()
    assert torch.equal(k_BJSC, -v_BJSC) and layer.length_B.tolist() == layer.lengths
    return [row[0, :n, 0].int().tolist() for row, n in zip(k_BJSC, layer.lengths, strict=True)]


@pytest.mark.parametrize("reserve", [0, 100])
@pytest.mark.parametrize("page", [1, 2, 64])
def test_tokens_are_appended_to_their_own_sequence(reserve, page):
    (layer,) = KVCache(1, 3, reserve, page).layers
    assert write(layer, 0, [2, 0, 1]).tolist() == [0, 1, 0]
    assert write(layer, 3, [1, 3, 0]).tolist() == [2, 0, 1, 2]
    assert held(layer) == [[0, 1, 3], [4, 5, 6], [2]]


def test_layers_have_lengths_of_their_own_and_share_the_pool():
    cache = KVCache(layers=2, sequences=2, page=2)
    first, second = cache.layers
    write(first, 0, [3, 1])
    write(second, 10, [0, 1])
    assert held(first) == [[0, 1, 2], [3]] and held(second) == [[], [10]]
    assert cache.pool.used == 4


def test_a_page_is_taken_when_it_is_written_and_given_back():
    cache = KVCache(layers=1, sequences=3, page=4)
    (layer,) = cache.layers
    write(layer, 0, [4, 1, 8])
    assert cache.pool.used == 4
    write(layer, 13, [1, 3, 0])
    assert cache.pool.used == 5
    cache.keep(torch.tensor([2, 0]))
    assert cache.pool.used == 4 and held(layer) == [[5, 6, 7, 8, 9, 10, 11, 12], [0, 1, 2, 3, 13]]
    size = cache.pool.kv_2NJSC.size(1)
    cache.join(1)
    write(layer, 20, [0, 0, 4])
    assert cache.pool.kv_2NJSC.size(1) == size  # the page of the one that left
    assert held(layer)[2] == [20, 21, 22, 23]
    cache.keep(torch.tensor([], dtype=torch.int64))
    assert cache.pool.used == 0


def test_keep_drops_sequences_and_the_rest_goes_on():
    cache = KVCache(layers=1, sequences=3, page=1)
    (layer,) = cache.layers
    write(layer, 0, [1, 1, 2])
    cache.keep(torch.tensor([2, 0]))
    write(layer, 4, [1, 1])
    assert held(layer) == [[2, 3, 4], [0, 5]]


def test_what_another_sequence_left_in_a_page_is_not_read():
    cache = KVCache(layers=1, sequences=1, page=4)
    (layer,) = cache.layers
    write(layer, 0, [4])
    cache.pool.kv_2NJSC.fill_(torch.nan)
    cache.keep(torch.tensor([], dtype=torch.int64))
    cache.join(1)
    write(layer, 0, [2])
    k_BJSC, v_BJSC = layer.read()
    assert k_BJSC.isfinite().all() and v_BJSC.isfinite().all() and held(layer) == [[0, 1]]


def test_room_for_the_reserve_is_there_from_the_start():
    cache = KVCache(layers=2, sequences=2, reserve=100, page=8)
    write(cache.layers[0], 0, [1, 0])
    storage = cache.pool.kv_2NJSC.data_ptr()
    for layer in cache.layers:
        write(layer, 0, [49, 50])
    assert cache.pool.kv_2NJSC.data_ptr() == storage


def test_another_number_of_sequences_is_refused():
    (layer,) = KVCache(layers=1, sequences=2).layers
    with pytest.raises(ConfigError, match="cache holds 2 sequences, offsets_B1 has 3: want one"):
        write(layer, 0, [1, 1, 1])


def test_sequences_join_those_that_are_there():
    cache = KVCache(layers=1, sequences=0, page=2)
    (layer,) = cache.layers
    write(layer, 0, [])
    cache.join(2)
    write(layer, 0, [2, 1])
    cache.join(1)
    write(layer, 3, [1, 0, 3])
    assert held(layer) == [[0, 1, 3], [2], [4, 5, 6]]
