"""A causal language model built from the block."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_router.config import ModelConfig
from moe_router.dispatch import Dispatcher
from moe_router.models.block import Block, RMSNorm
from moe_router.models.kv_cache import KVCache
from moe_router.models.layout import Layout
from moe_router.placement import Placement
from moe_router.routing import Context
from moe_router.types import Routed, Tokens


@dataclass(frozen=True, slots=True)
class LMOutput:
    """Attributes:
    logits_TV: fp32.
    routed: of each block, None for a dense one.
    """

    logits_TV: Tensor
    routed: tuple[Routed | None, ...]


class CausalLM(nn.Module):
    """Args:
    config: sizes and routing.
    vocab: tokens V.
    dispatcher, placement: how tokens reach experts on other ranks, and which rank holds which.
    activation_checkpointing: compute each block again in backward instead of keeping it.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab: int,
        *,
        dispatcher: Dispatcher | None = None,
        placement: Placement | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embed = nn.Embedding(vocab, config.dim)
        self.blocks = nn.ModuleList(
            Block(config, layer, dispatcher, placement) for layer in range(config.layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, vocab, bias=False)

    @property
    def causal(self) -> bool:
        """Whether no token's logits depend on later tokens."""
        return all(block.moe is None or block.moe.causal for block in self._blocks)

    def forward(
        self,
        ids_T: Tensor,
        position_T: Tensor,
        offsets_B1: Tensor,
        *,
        cache: KVCache | None = None,
        context: Context | None = None,
    ) -> LMOutput:
        """Logits of the next token, for every token.

        Args:
            ids_T: int64, packed sequences.
            position_T: int32, position inside the sequence, cached tokens counted.
            offsets_B1: int32, bounds of the sequences in T.
            cache: holds the tokens before these; it grows by these.
            context: noise, ledger, observer of the pass.
        """
        context = context or Context()
        layout = Layout.of(offsets_B1)
        x_TD = self.embed(ids_T)
        routed = []
        for layer, block in enumerate(self._blocks):
            tokens = Tokens(x_TD, position_T, offsets_B1)
            if self.activation_checkpointing and self.training and cache is None:
                x_TD, out = block.recomputed(tokens, layout, context)
            else:
                held = None if cache is None else cache.layers[layer]
                x_TD, out = block(tokens, layout, context, held)
            routed.append(out)
        weight_VD = self.embed.weight if self.head is None else self.head.weight
        logits_TV = F.linear(self.norm(x_TD), weight_VD)
        return LMOutput(logits_TV.float(), tuple(routed))

    def aux_loss(self, output: LMOutput) -> Tensor:
        """The scaled routing losses of all layers: this rank's share of a global sum."""
        terms = [
            block.moe.aux_loss(routed.choice)
            for block, routed in zip(self._blocks, output.routed, strict=True)
            if block.moe is not None and routed is not None
        ]
        return torch.stack(terms).sum() if terms else output.logits_TV.new_zeros(())

    @property
    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]


def cross_entropy_sum(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    """Nats summed over this rank's tokens, fp32."""
    return F.cross_entropy(logits_TV.float(), target_T, reduction="sum")
