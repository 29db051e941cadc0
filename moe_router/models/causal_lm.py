"""The causal language model: packed token ids in, fp32 logits of the next token out."""

from dataclasses import dataclass
from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from moe_router.config import ModelConfig
from moe_router.models.backbone import Backbone, Running
from moe_router.models.cached import Cache
from moe_router.models.packing import Packing
from moe_router.routing import Context
from moe_router.routing.context import PLAIN
from moe_router.types import HaltState, Routed


@dataclass(frozen=True, slots=True)
class LMOutput:
    """Attributes:
    logits_TV: fp32, of the token after each one, or each that was asked for.
    routed: what each block's experts did; None for a dense block.
    depth: the losses of each router in depth, unscaled; this rank's share.
    halted: how each token halted; None without halting.
    """

    logits_TV: Tensor
    routed: tuple[Routed | None, ...]
    depth: tuple[dict[str, Tensor], ...] = ()
    halted: HaltState | None = None

    @property
    def logits(self) -> Tensor:
        return self.logits_TV


class CausalLM(Backbone):
    """Args:
    config: of kind `causal_lm`.
    vocab: number of token ids V.
    running: how it is computed.
    """

    def __init__(self, config: ModelConfig, vocab: int, **running: Unpack[Running]) -> None:
        self.embed: nn.Embedding
        super().__init__(config, nn.Embedding(vocab, config.dim), **running)
        self.vocab = vocab
        self.causal = all(moe is None or moe.causal for moe in self.moes)
        tied = config.tie_embeddings
        self.head = None if tied else nn.Linear(config.dim, vocab, bias=False)

    def forward(
        self,
        ids_T: Tensor,
        position_T: Tensor,
        offsets_B1: Tensor | Packing,
        *,
        cache: Cache | None = None,
        context: Context | None = None,
        asked_R: Tensor | None = None,
    ) -> LMOutput:
        """Logits for every token, or for those asked for.

        Args:
            ids_T: (T,) integers, packed sequences.
            position_T: (T,) integers, position inside the sequence.
            offsets_B1: (B + 1,) int32 cu_seqlens; on the CPU it saves a wait for the device. Or a
                Packing of them, for a CUDA graph.
            cache: holds the earlier tokens of the B sequences; the new ones are appended.
            context: noise, ledger, observer of the routed layers.
            asked_R: int64, the tokens whose logits are wanted; None: all.
        """
        passed = self.through_blocks(ids_T, position_T, offsets_B1, context or PLAIN, cache)
        x_TD = passed.stream.x_TD if passed.halted is None else passed.halted.output_TD
        x_TD = x_TD if asked_R is None else x_TD[asked_R]
        return LMOutput(
            self._logits(x_TD), tuple(passed.routed), tuple(passed.depth), passed.halted
        )

    def _logits(self, x_TD: Tensor) -> Tensor:
        weight_VD = self.embed.weight if self.head is None else self.head.weight
        return F.linear(self.norm(x_TD), weight_VD).float()


def token_loss(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    """Cross-entropy in nats, fp32, summed over the tokens of this rank."""
    return F.cross_entropy(logits_TV.float(), target_T.long(), reduction="sum")
