"""One token for each sequence of a batch, in a step whose shapes never change: a CUDA graph holds
it, whatever its routers decide. A block that a token skips or leaps over reads no weights for it,
and leaves nothing in its cache.

Source of the pages: `kv_cache.py`; here each layer has all of its pages from the start.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_router.config import require
from moe_router.models.causal_lm import CausalLM
from moe_router.models.kv_cache import PAGE
from moe_router.models.packing import Packing
from moe_router.models.rope import Turn
from moe_router.routing.context import PLAIN
from moe_router_kernels import paged_op


@dataclass(frozen=True, slots=True)
class FixedLayer:
    """The cache of one layer.

    Attributes:
        pages_2NJSC: of all layers; page 0 is nobody's.
        table_XM: int32, the pages of each of the B sequences, and a row more, of page 0.
        length_B: int32, slots in use; changed in its place.
        row_B: int32, 0, 1, 2, ...
    """

    pages_2NJSC: Tensor
    table_XM: Tensor
    length_B: Tensor
    row_B: Tensor

    def attend(
        self, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, turn: Turn, packing: Packing
    ) -> tuple[Tensor, Tensor]:
        """Append one token to each sequence, or only where `packing.kept_T`; the others write to
        nobody's page and read one slot of it."""
        row_B, slot_B = self.row_B, self.length_B.clone()
        if packing.kept_T is None:
            self.length_B.add_(1)
            seen_B = self.length_B
        else:
            row_B = row_B.masked_fill(~packing.kept_T, row_B.numel())
            slot_B = slot_B.masked_fill(~packing.kept_T, 0)
            self.length_B.add_(packing.kept_T)
            seen_B = slot_B + 1
        where = (self.pages_2NJSC, self.table_XM, row_B)
        q_THC, k_TJC = paged_op.store(q_THC, k_TJC, v_TJC, *turn, *where, slot_B)
        return paged_op.attend_pages(q_THC, *where, seen_B), k_TJC


class FixedStep:
    """Args:
    model: causal, dense or routed by skip or leap; in eval mode.
    sequences: B.
    slots: tokens that a sequence may have.

    Attributes:
        layers: the cache of each step.
        length_LB: int32, slots in use of each of them.

    Raises:
        ConfigError: a model whose steps have other shapes from time to time.
    """

    def __init__(self, model: CausalLM, sequences: int, slots: int) -> None:
        config, weight = model.config, model.embed.weight
        routing = config.routing
        fits = routing is None or routing.kind in ("skip", "leap")
        kind = routing and routing.kind
        require(fits, "model.routing.kind", kind, "skip or leap, for steps of fixed shapes")
        attention = config.attention and config.attention.kind
        require(attention is None, "model.attention", attention, "null, for steps of fixed shapes")
        require(config.moe is None, "model.moe", "a section", "null, for steps of fixed shapes")
        self._model = model
        each = -(-slots // PAGE)
        channels = config.channels
        pages = 1 + config.steps * sequences * each
        pages_2NJSC = weight.new_zeros(2, pages, config.kv_heads, PAGE, channels)
        ids = torch.arange(1, pages, dtype=torch.int32, device=weight.device)
        row_B = torch.arange(sequences, dtype=torch.int32, device=weight.device)
        self.length_LB = row_B.new_zeros(config.steps, sequences)
        tables_LBM = ids.view(config.steps, sequences, each)
        self.layers = [
            FixedLayer(pages_2NJSC, F.pad(table_BM, (0, 0, 0, 1)), length_B, row_B)
            for table_BM, length_B in zip(tables_LBM, self.length_LB, strict=True)
        ]
        bounds = torch.arange(sequences + 1, dtype=torch.int32)
        self._packing = Packing(bounds, weight.device, fixed=True)

    @torch.no_grad()
    def __call__(self, ids_B: Tensor, position_B: Tensor) -> Tensor:
        """(B, V) fp32 logits after one more token of each sequence; nothing waits, and nothing but
        the tensors it is given and the cache is read."""
        output = self._model(ids_B, position_B, self._packing, cache=self, context=PLAIN)
        logits_BV: Tensor = output.logits_TV
        return logits_BV
