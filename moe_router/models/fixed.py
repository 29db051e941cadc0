"""One token for each sequence of a batch, in a step whose shapes never change: a CUDA graph holds
it, whatever its routers decide. A block that a token skips or leaps over reads no weights for it,
and leaves nothing in its cache.

Source of the pages: `kv_cache.py`; here each layer has all of its pages from the start.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_router.config import ModelConfig
from moe_router.errors import ConfigError
from moe_router.models.causal_lm import CausalLM
from moe_router.models.kv_cache import PAGE
from moe_router.models.packing import Packing
from moe_router.models.rope import Turn
from moe_router.routing.context import PLAIN
from moe_router_kernels import paged_op


@dataclass(frozen=True, slots=True)
class FixedLayer:
    """The cache of one layer in one step. Nothing grows before the step is over.

    Attributes:
        pages_2NJSC: of all layers; page 0 is nobody's.
        table_XM: int32, the pages of each of the B sequences; the last row is nobody's.
        row_B: int32, 0, 1, 2, ...
        length_B: int32, slots in use.
        seen_B: int32, one more.
        kept_B: int32, 1; where a block does not compute a token, 0 is written.
    """

    pages_2NJSC: Tensor
    table_XM: Tensor
    row_B: Tensor
    length_B: Tensor
    seen_B: Tensor
    kept_B: Tensor

    def attend(
        self, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, turn: Turn, packing: Packing
    ) -> tuple[Tensor, Tensor]:
        """Append one token to each sequence, or only where `packing.kept_T`; the others write to
        nobody's page and read one slot of it."""
        row_B, seen_B = self.row_B, self.seen_B
        if packing.kept_T is not None:
            self.kept_B.copy_(packing.kept_T)
            row_B = torch.where(packing.kept_T, row_B, self.table_XM.size(0) - 1)
            seen_B = torch.where(packing.kept_T, seen_B, 1)
        where = (self.pages_2NJSC, self.table_XM, row_B)
        q_THC, k_TJC = paged_op.store(q_THC, k_TJC, v_TJC, *turn, *where, self.length_B)
        return paged_op.attend_pages(q_THC, *where, seen_B), k_TJC


def obstacle(config: ModelConfig) -> str:
    """Why steps of a model do not keep their shapes; empty if they do."""
    routing = config.routing
    if routing is not None and routing.kind not in ("skip", "leap"):
        return f"model.routing.kind={routing.kind}: tokens leave"
    if routing is not None and config.moe is not None:
        return "model.moe beside model.routing: experts see how many tokens come"
    if config.attention is not None:
        return f"model.attention.kind={config.attention.kind}: what is attended to is chosen"
    return ""


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
        if why := obstacle(config):
            raise ConfigError(f"{why}; want skip, leap or null, for steps of fixed shapes")
        self._model = model
        each = -(-slots // PAGE)
        channels = config.channels
        pages = 1 + config.steps * sequences * each
        pages_2NJSC = weight.new_zeros(2, pages, config.kv_heads, PAGE, channels)
        ids = torch.arange(1, pages, dtype=torch.int32, device=weight.device)
        row_B = torch.arange(sequences, dtype=torch.int32, device=weight.device)
        self.length_LB = row_B.new_zeros(config.steps, sequences)
        self._seen_LB, self._kept_LB = (torch.ones_like(self.length_LB) for _ in range(2))
        tables_LXM = F.pad(ids.view(config.steps, sequences, each), (0, 0, 0, 1))
        places = (self.length_LB, self._seen_LB, self._kept_LB)
        self.layers = [
            FixedLayer(pages_2NJSC, table_XM, row_B, *own)
            for table_XM, *own in zip(tables_LXM, *places, strict=True)
        ]
        bounds = torch.arange(sequences + 1, dtype=torch.int32)
        self._packing = Packing(bounds, weight.device, fixed=True)

    @torch.no_grad()
    def __call__(self, ids_B: Tensor, position_B: Tensor) -> Tensor:
        """(B, V) fp32 logits after one more token of each sequence; nothing waits, and nothing but
        the tensors it is given and the cache is read."""
        torch.add(self.length_LB, 1, out=self._seen_LB)
        output = self._model(ids_B, position_B, self._packing, cache=self, context=PLAIN)
        self.length_LB.add_(self._kept_LB)
        logits_BV: Tensor = output.logits_TV
        return logits_BV
