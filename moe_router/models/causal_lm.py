"""The causal language model: packed token ids in, fp32 logits of the next token out."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_router.config import Kernels, ModelConfig
from moe_router.dispatch import Dispatcher
from moe_router.models.block import Block
from moe_router.models.kv_cache import KVCache
from moe_router.models.norm import RMSNorm
from moe_router.models.packing import Packing
from moe_router.models.rope import turn_at
from moe_router.placement import Placement
from moe_router.routing import Context, PlanMemory
from moe_router.types import Routed


@dataclass(frozen=True, slots=True)
class LMOutput:
    """Attributes:
    logits_TV: fp32, of the token after each one.
    routed: what each block's routed layer did; None for a dense block.
    """

    logits_TV: Tensor
    routed: tuple[Routed | None, ...]


class CausalLM(nn.Module):
    """Args:
    config: sizes, and which blocks are routed.
    vocab: number of token ids V.
    dispatcher, placement, kernels: how tokens reach experts, and what computes them; see `MoE`.
    activation_checkpointing: keep only each block's input and routing decisions for the
        backward pass; the rest is computed again.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab: int,
        *,
        dispatcher: Dispatcher | None = None,
        placement: Placement | None = None,
        kernels: Kernels = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab = vocab
        self.activation_checkpointing = activation_checkpointing
        self.embed = nn.Embedding(vocab, config.dim)
        experts = (dispatcher, placement, kernels)
        blocks = [Block(config, i, *experts) for i in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        tied = config.tie_embeddings
        self.head = None if tied else nn.Linear(config.dim, vocab, bias=False)
        self.causal = all(block.moe is None or block.moe.causal for block in blocks)

    def forward(
        self,
        ids_T: Tensor,
        position_T: Tensor,
        offsets_B1: Tensor,
        *,
        cache: KVCache | None = None,
        context: Context | None = None,
    ) -> LMOutput:
        """Logits for every token.

        Args:
            ids_T: (T,) integers, packed sequences.
            position_T: (T,) integers, position inside the sequence.
            offsets_B1: (B + 1,) int32 cu_seqlens; on the CPU it saves a wait for the device.
            cache: holds the earlier tokens of the B sequences; the new ones are appended.
            context: noise, ledger, observer of the routed layers.
        """
        context = context or Context()
        packing = Packing(offsets_B1, ids_T.device)
        turn = turn_at(position_T, self.config.dim // self.config.heads, self.config.rope_theta)
        x_TD = self.embed(ids_T)
        # a cache would be written twice
        recompute = self.activation_checkpointing and torch.is_grad_enabled() and cache is None
        routed: list[Routed | None] = []
        for i, block in enumerate(self.blocks):
            if recompute:
                # one memory a block: the second run takes the decisions of the first
                remembering = replace(context, memory=PlanMemory())
                arguments = (block, x_TD, position_T, turn, packing, remembering)
                x_TD, layer_routed = checkpoint(
                    *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                layer_cache = None if cache is None else cache.layers[i]
                x_TD, layer_routed = block(x_TD, position_T, turn, packing, context, layer_cache)
            routed.append(layer_routed)
        return LMOutput(self._logits(x_TD), tuple(routed))

    def aux_loss(self, output: LMOutput) -> Tensor:
        """The routing losses of all layers times their coefficients: this rank's share."""
        terms = [
            block.moe.aux_loss(routed.choice)
            for block, routed in zip(self.blocks, output.routed, strict=True)
            if isinstance(block, Block) and block.moe is not None and routed is not None
        ]
        return torch.stack(terms).sum() if terms else output.logits_TV.new_zeros(())

    def _logits(self, x_TD: Tensor) -> Tensor:
        weight_VD = self.embed.weight if self.head is None else self.head.weight
        return F.linear(self.norm(x_TD), weight_VD).float()


def token_loss(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    """Cross-entropy in nats, fp32, summed over the tokens of this rank."""
    return F.cross_entropy(logits_TV.float(), target_T.long(), reduction="sum")
