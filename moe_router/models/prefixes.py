"""Beginnings of texts that stay in the cache, so that a text that begins so is not read again.

A tree of full pages: a node is the page of every layer for so many tokens, which follow those of
its parent. Sequences hold pages together with the tree, and a full page is never written to.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from moe_router.config import ModelConfig
from moe_router.models.kv_cache import KVCache

_ROOT = 0


def obstacle(config: ModelConfig) -> str:
    """Why a model's beginnings cannot be kept; empty if they can."""
    if config.routing is not None:
        return f"model.routing.kind={config.routing.kind}: layers hold different tokens"
    if config.attention is not None:
        return f"model.attention.kind={config.attention.kind} keeps more than keys and values"
    return ""


@dataclass(frozen=True, slots=True)
class _Node:
    """Attributes:
    pages: of each layer.
    """

    number: int
    pages: tuple[int, ...]


_Key = tuple[int, tuple[int, ...]]  # the parent's number, and the tokens


class Prefixes:
    """Args:
    cache: of a model each of whose layers holds every token, and nothing but keys and values.
    most: tokens to keep; fewer while the cache needs their pages.
    """

    def __init__(self, cache: KVCache, most: int) -> None:
        self._cache, self._most = cache, most
        cache.pool.spare = self._spare
        # the one that was used last stands last, and a parent behind its children: what stands
        # first is a leaf
        self._nodes: OrderedDict[_Key, _Node] = OrderedDict()
        self._numbers = _ROOT

    @property
    def tokens(self) -> int:
        return len(self._nodes) * self._cache.pool.slots

    def lend(self, row: int, tokens: Sequence[int]) -> int:
        """Begin an empty sequence of the cache with the pages of the longest known beginning.

        Args:
            tokens: of the text; at least one is left to be read.

        Returns:
            How many tokens it holds now.
        """
        found = self._path(tokens[:-1])
        if not found:
            return 0
        nodes = [self._nodes[key] for key in found]
        for number, layer in enumerate(self._cache.layers):
            layer.begin(row, [node.pages[number] for node in nodes])
        self._used(found)
        return len(found) * self._cache.pool.slots

    def remember(self, row: int, tokens: Sequence[int]) -> None:
        """Keep the full pages of a sequence beyond its end; the ones that were used longest ago go.

        Args:
            tokens: that it holds.
        """
        slots, pool = self._cache.pool.slots, self._cache.pool
        path = self._path(tokens)
        parent = self._nodes[path[-1]].number if path else _ROOT
        for page in range(len(path), len(tokens) // slots):
            key = (parent, tuple(tokens[page * slots : (page + 1) * slots]))
            pages = tuple(layer.pages[row][page] for layer in self._cache.layers)
            pool.share(pages)
            self._numbers = parent = self._numbers + 1
            self._nodes[key] = _Node(parent, pages)
            path.append(key)
        self._used(path)
        while self.tokens > self._most:
            self._forget()

    def _spare(self, pages: int) -> None:
        want = self._cache.pool.free + pages
        while self._nodes and self._cache.pool.free < want:
            self._forget()

    def _forget(self) -> None:
        self._cache.pool.give(self._nodes.popitem(last=False)[1].pages)

    def _path(self, tokens: Sequence[int]) -> list[_Key]:
        """The known pages that a text begins with."""
        slots, parent, path = self._cache.pool.slots, _ROOT, []
        for first in range(0, len(tokens) - slots + 1, slots):
            key = (parent, tuple(tokens[first : first + slots]))
            if key not in self._nodes:
                break
            path.append(key)
            parent = self._nodes[key].number
        return path

    def _used(self, path: Sequence[_Key]) -> None:
        for key in reversed(path):
            self._nodes.move_to_end(key)
