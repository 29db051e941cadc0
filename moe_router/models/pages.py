"""The memory that keys and values of a cache lie in: pages that sequences take and give back."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Pages:
    """A pool of pages; where nobody can spare one it grows by doubling. Page 0 is nobody's: what is
    computed for no sequence may be written there.

    Args:
        slots: of a page.
        reserve: pages to hold from the start.

    Attributes:
        spare: asked for so many pages before the pool grows; gives back what it can.
        kv_2NJSC: keys, values: J heads of C channels in S slots of N pages; empty until a token
            says what they are like.
    """

    def __init__(self, slots: int, reserve: int = 0) -> None:
        self.slots = slots
        self.kv_2NJSC = torch.zeros(0)
        self._held, self._reserve = 1, reserve
        self._free: list[int] = []
        self._more: Counter[int] = Counter()  # holders of a page beyond the first
        self.spare: Callable[[int], None] | None = None

    @property
    def free(self) -> int:
        """Pages that can be had before it grows."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self._held - 1 - len(self._free)

    def take(self, count: int) -> list[int]:
        """Pages with anything in them."""
        if self.spare is not None and count > len(self._free):
            self.spare(count - len(self._free))
        if count > len(self._free):
            held = max(2 * self._held, self._held + count, self._reserve + 1)
            self._free = [*range(held - 1, self._held - 1, -1), *self._free]
            self._held = held
        return [self._free.pop() for _ in range(count)]

    def share(self, pages: Sequence[int]) -> None:
        """One more holds these pages, and will give them back."""
        self._more.update(pages)

    def give(self, pages: Sequence[int]) -> None:
        """Whoever was the last holder of a page leaves it to others."""
        for page in pages:
            if self._more[page]:
                self._more[page] -= 1
            else:
                del self._more[page]
                self._free.append(page)

    def fit(self, like_TJC: Tensor) -> None:
        """Have storage for every page that was taken."""
        old = self.kv_2NJSC
        if old.dim() == 5 and old.size(1) >= self._held:
            return
        _, J, C = like_TJC.shape
        # zeros: page 0 is read before anything is written there
        kv = like_TJC.new_zeros(2, self._held, J, self.slots, C)
        if old.dim() == 5:
            kv[:, : old.size(1)] = old
        self.kv_2NJSC = kv
