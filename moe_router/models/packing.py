"""How packed sequences are cut into few attention calls on devices without a packed kernel.

A long sequence is a call of its own. Neighbouring short ones share a grid of rows: a call
costs more than the work that a block-diagonal mask wastes in a narrow row. Rows of a language
model's batch come out as they went in, whatever documents lie in them.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from moe_router.models.transfer import upload
from moe_router.routing.blocks import Blocks

# tokens; forward and backward on 2 CPU cores, one masked grid against a call per document: half
# the time in rows of 128 with 5 documents each, twice the time in rows of 512 with 3 each
NARROW = 256


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring sequences that one attention call computes as a (rows, width) grid.

    Attributes:
        tokens: how many tokens it takes, in packed order.
        cell_T: int64, where each token lies in the flat grid; None: the tokens fill it in order.
        mask_R1WW: bool, which key (last) a query may see; None: a row is one sequence.
    """

    tokens: int
    rows: int
    width: int
    cell_T: Tensor | None = None
    mask_R1WW: Tensor | None = None


class Packing:
    """The sequences of one forward pass, known to the host and the device; made once a pass.

    Args:
        offsets_B1: int32 cu_seqlens. On the CPU it costs no wait for the device; on the device it
            is read once.
        device: of the tokens.
        lengths: of the sequences, where the host knows them already: then nothing is read.

    Attributes:
        fixed: nothing may depend on how many tokens a router keeps, for the pass is a CUDA graph;
            one token a sequence, which keeps its place whether a block computes it or not.
        kept_T: bool, on the device: which tokens a block of such a pass computes; None: all.
        causal: whether a token attends to the earlier ones alone, or to its whole sequence.
        is_bounded: see `bounded`; then `lengths` is empty.
    """

    def __init__(
        self,
        offsets_B1: Tensor,
        device: torch.device,
        *,
        lengths: Sequence[int] | None = None,
        causal: bool = True,
        fixed: bool = False,
    ) -> None:
        self.causal, self.fixed = causal, fixed
        self.kept_T: Tensor | None = None
        self.is_bounded = False
        if lengths is None:
            lengths = [b - a for a, b in pairwise(offsets_B1.tolist())]
        self.lengths = list(lengths)
        self.longest = max(self.lengths, default=0)
        self.tokens = sum(self.lengths)
        self.sequences = len(self.lengths)
        self.device = device
        self._blocks: dict[int, Blocks] = {}
        self.ways: dict[tuple[int, ...], Any] = {}  # of attending to a cache, by what it holds
        self.offsets_B1 = offsets_B1.to(device, torch.int32, non_blocking=True)

    @classmethod
    def bounded(
        cls, offsets_B1: Tensor, rows: int, longest: int, *, causal: bool = True
    ) -> "Packing":
        """Of sequences whose lengths only the device knows, in so many rows; those that are left
        over belong to no token, and may hold anything.

        Args:
            offsets_B1: on the device.
            longest: no sequence is longer.
        """
        packing = cls(offsets_B1, offsets_B1.device, lengths=(), causal=causal)
        packing.tokens, packing.sequences = rows, offsets_B1.numel() - 1
        packing.longest, packing.is_bounded = longest, True
        return packing

    def only(self, kept_T: Tensor) -> "Packing":
        """The same of a block that computes these tokens alone, in their places."""
        other = copy(self)
        other.kept_T = kept_T
        return other

    @cached_property
    def pieces(self) -> list[Piece]:
        lengths = self.offsets_B1.diff().tolist() if self.is_bounded else self.lengths
        return cut([n for n in lengths if n], self.device, causal=self.causal)

    @cached_property
    def sequence_T(self) -> Tensor:
        """int64, the sequence of each token."""
        token_T = torch.arange(self.tokens, device=self.device, dtype=torch.int32)
        return torch.searchsorted(self.offsets_B1[1:], token_T, right=True)

    @property
    def pairs(self) -> int:
        """Queries and the keys they may see."""
        return sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)

    def blocks(self, size: int) -> Blocks:
        """The sequences in blocks of so many tokens; cut once."""
        if size not in self._blocks:
            blocks = Blocks.of(self.lengths, size, self.device, causal=self.causal)
            self._blocks[size] = blocks
        return self._blocks[size]

    @cached_property
    def rank_T(self) -> Tensor:
        """int64, how many tokens of its sequence stand before each token in this pass."""
        token_T = torch.arange(self.tokens, device=self.device)
        return token_T - self.offsets_B1[self.sequence_T]


def cut(lengths: list[int], device: torch.device, *, causal: bool = True) -> list[Piece]:
    """Pieces that cover sequences of these lengths (each at least 1) in order."""
    pieces = []
    for is_long, run in groupby(lengths, key=lambda n: n > NARROW):
        if is_long:
            pieces += [_alike(list(same)) for _, same in groupby(run)]
        else:
            pieces.append(_share_rows(list(run), device, causal))
    return pieces


def _alike(lengths: list[int]) -> Piece:
    return Piece(sum(lengths), len(lengths), lengths[0])


def _share_rows(lengths: list[int], device: torch.device, causal: bool) -> Piece:
    if len(set(lengths)) == 1:
        return _alike(lengths)
    width = _full_width(lengths)
    exact = width is not None
    width = width or max(lengths)
    first, end = [], 0  # cells
    for n in lengths:
        # a sequence that would cross the end of its row begins the next
        start = end if end % width + n <= width else (end // width + 1) * width
        first.append(start)
        end = start + n
    rows = -(-end // width)
    length_B = torch.tensor(lengths)
    shift_B = torch.tensor(first) - (length_B.cumsum(0) - length_B)
    cell_T = torch.arange(sum(lengths)) + shift_B.repeat_interleave(length_B)
    mask = None
    # a causal row of one sequence needs none: what follows it is not seen
    if rows < len(lengths) or not (causal or exact):
        owner = torch.full((rows * width,), -1)
        owner[cell_T] = torch.arange(len(lengths)).repeat_interleave(length_B)
        owner_RW = upload(owner.view(rows, width), device)
        # unused cells see each other, so that no softmax is over nothing
        same_RWW = owner_RW[:, :, None] == owner_RW[:, None, :]
        mask = (same_RWW.tril() if causal else same_RWW)[:, None]
    cells = None if exact else upload(cell_T, device)
    return Piece(sum(lengths), rows, width, cells, mask)


def _full_width(lengths: list[int]) -> int | None:
    """The least width at which rows are exactly full of whole sequences, if there is one."""
    ends = list(accumulate(lengths))
    bounds, total, longest = set(ends), ends[-1], max(lengths)
    widest = min(NARROW, 4 * longest)  # a wider row would be masked for the most part
    wide_enough = (end for end in ends if longest <= end <= widest and total % end == 0)
    fitting = (width for width in wide_enough if bounds.issuperset(range(width, total, width)))
    return next(fitting, None)
