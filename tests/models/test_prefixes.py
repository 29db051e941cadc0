"""Beginnings that stay in the cache: whose pages, for how long, and what is in them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.config import AttentionConfig, ModelConfig, RoutingConfig
from moe_router.models import KVCache
from moe_router.models.prefixes import Prefixes, obstacle
from tests.models.test_kv_cache import held, write

PAGE = 2
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


class Reader:
    """Reads one text after another, by a cache whose keys say which tokens came before them."""

    def __init__(self, most, room=None, layers=2):
        self.cache = KVCache(layers, 0, most if room is None else room, PAGE)
        self.prefixes = Prefixes(self.cache, most)

    def read(self, tokens):
        """Returns how many tokens were known."""
        self.cache.join(1)
        known = self.prefixes.lend(0, tokens)
        for layer in self.cache.layers:
            assert layer.lengths == [known] and layer.length_B.tolist() == [known]
            for n in range(known, len(tokens)):
                write(layer, self.key(tokens[: n + 1]), [1])
            assert held(layer) == [[self.key(tokens[: n + 1]) for n in range(len(tokens))]]
        self.prefixes.remember(0, tokens)
        for layer in self.cache.layers:
            layer.keep(layer.length_B[:0].long(), [])
        return known

    @staticmethod
    def key(tokens):
        return int("1" + "".join(map(str, tokens)), 2)


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=12), st.sampled_from([0, 3, 6, 100]))
def test_what_is_known_is_the_longest_beginning_and_pages_come_back(texts, most):
    reader, before = Reader(most), []
    for text in texts:
        known = reader.read(text)
        same = [n for n in range(0, len(text), PAGE) if any(b[:n] == text[:n] for b in before)]
        assert known in (0, *same)
        assert known == max(same, default=0) or most < 100
        assert reader.prefixes.tokens <= most
        assert reader.cache.pool.used == len(reader.cache.layers) * reader.prefixes.tokens // PAGE
        before.append(text)


def test_what_was_used_longest_ago_goes_first_and_never_a_beginning_before_its_ends():
    reader, common = Reader(most=8, room=100), [0, 0, 0, 0]
    reader.read([*common, 0, 1, 1])
    reader.read([*common, 1, 1, 1])
    assert reader.read([*common, 0, 1, 1]) == 6
    assert reader.read([1, 0, 1]) == 0  # and the second end is forgotten
    assert reader.read([*common, 1, 1, 1]) == 4


def test_two_sequences_hold_the_same_page_until_the_last_lets_go():
    reader = Reader(most=100, layers=1)
    reader.read([0, 1, 1])
    (layer,), pool = reader.cache.layers, reader.cache.pool
    reader.cache.join(2)
    assert [reader.prefixes.lend(row, [0, 1, 0]) for row in (0, 1)] == [2, 2]
    assert layer.pages[0] == layer.pages[1] and pool.used == 1
    write(layer, 8, [1, 1])
    assert held(layer) == [[2, 5, 8], [2, 5, 9]]
    layer.keep(layer.length_B.new_tensor([1]).long(), [1])
    assert held(layer) == [[2, 5, 9]] and pool.used == 2
    layer.keep(layer.length_B[:0].long(), [])
    assert pool.used == 1 and reader.prefixes.tokens == 2


def test_running_texts_take_the_room_of_remembered_ones_before_the_pool_grows():
    reader = Reader(most=8, layers=1)
    (layer,), pool = reader.cache.layers, reader.cache.pool
    reader.read([0, 1, 0, 1])
    reader.read([1, 1, 1, 1])
    assert (pool.used, pool.free) == (4, 0)
    reader.cache.join(1)
    assert reader.prefixes.lend(0, [1, 1, 0]) == 2
    write(layer, 0, [3])  # two pages more: those of the first text
    assert (pool.used, pool.free) == (4, 0) and reader.prefixes.tokens == 4
    write(layer, 0, [6])
    assert reader.prefixes.tokens == 0 and pool.used == 6 and len(held(layer)[0]) == 11


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({}, ""),
        ({"routing": RoutingConfig(kind="skip")}, "layers hold different tokens"),
        ({"attention": AttentionConfig(kind="routed")}, "keeps more than keys and values"),
    ],
)
def test_models_whose_beginnings_cannot_be_kept_say_why(more, why):
    config = ModelConfig(layers=2, dim=8, heads=2, kv_heads=1, hidden=8, **more)
    assert why in obstacle(config) and bool(why) == bool(obstacle(config))
