"""Encoders with a classifier on top: packed tokens in, logits per sequence out; of texts here, of
images in `vit.py`.

Tokens attend to their whole sequence. What is classified is the mean of its tokens by mass, so a
pruned token takes no part, and a router that prunes learns from what its tokens weigh.
"""

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn

from moe_router.config import ModelConfig
from moe_router.models.backbone import Backbone, Running
from moe_router.models.packing import Packing
from moe_router.models.passed import Passed
from moe_router.routing import Context
from moe_router.routing.context import PLAIN
from moe_router.types import HaltState, Routed
from moe_router_kernels import reference


@dataclass(frozen=True, slots=True)
class ClassifierOutput:
    """Attributes:
    logits_BC: fp32, of each sequence and label.
    routed, depth, halted: as in `LMOutput`.
    slot_T: int64, which row of the last block each token merged into, for `unmerge`; None without
        merging.
    """

    logits_BC: Tensor
    routed: tuple[Routed | None, ...]
    depth: tuple[dict[str, Tensor], ...] = ()
    halted: HaltState | None = None
    slot_T: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        return self.logits_BC


class Classifier(Backbone):
    """Args:
    config: of a kind that is not causal.
    embed: what comes in, to (T, D).
    classes: number of labels C.
    running: how it is computed.
    """

    def __init__(
        self, config: ModelConfig, embed: nn.Module, classes: int, **running: Unpack[Running]
    ) -> None:
        super().__init__(config, embed, **running)
        self.classes = classes
        self.head = nn.Linear(config.dim, classes)

    def forward(
        self,
        input_T: Tensor,
        position_T: Tensor,
        offsets_B1: Tensor | Packing,
        *,
        context: Context | None = None,
    ) -> ClassifierOutput:
        """Logits for every sequence.

        Args:
            input_T, position_T: T tokens of packed sequences, and positions inside them.
            offsets_B1: (B + 1,) int32 cu_seqlens; on the CPU it saves a wait for the device. Or a
                Packing of them, for a CUDA graph.
            context: noise, ledger, observer of the routed layers.
        """
        packing = self.packing(offsets_B1, input_T.device)
        passed = self.through_blocks(input_T, position_T, packing, context or PLAIN)
        pooled_BD = self._pool(passed, packing.offsets_B1)
        with torch.autocast(input_T.device.type, enabled=False):
            logits_BC = self.head(pooled_BD.to(self.head.weight.dtype))
        return ClassifierOutput(
            logits_BC.float(),
            tuple(passed.routed),
            tuple(passed.depth),
            passed.halted,
            passed.slot_T,
        )

    def _pool(self, passed: Passed, offsets_B1: Tensor) -> Tensor:
        """(B, D): the mean of each sequence's tokens by mass; 0 for an empty sequence."""
        stream = passed.stream
        if passed.halted is None:
            x_TD, size_T, offsets_B1 = stream.x_TD, stream.size_T, stream.packing.offsets_B1
        else:
            x_TD, size_T = passed.halted.output_TD, None
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = reference.wide(self.norm(x_TD))
            size_T1 = torch.ones_like(x_TD[:, :1]) if size_T is None else size_T[:, None].to(x_TD)
            # a sum by segments: in a fixed order on every device, and rows of no token are in none
            sums_BD, mass_B1 = (_sums(x, offsets_B1) for x in (x_TD * size_T1, size_T1))
            return sums_BD / mass_B1.clamp(min=1e-20)


def _sums(x_TN: Tensor, offsets_B1: Tensor) -> Tensor:
    """(B, N): of the rows of each sequence, in their order."""
    bounds = offsets_B1.long()
    return torch.segment_reduce(x_TN, "sum", offsets=bounds, axis=0, unsafe=True, initial=0)


class TextClassifier(Classifier):
    """Args:
    config: of kind `encoder`.
    vocab: number of token ids.
    classes: number of labels C.
    running: how it is computed.
    """

    def __init__(
        self, config: ModelConfig, vocab: int, classes: int, **running: Unpack[Running]
    ) -> None:
        super().__init__(config, nn.Embedding(vocab, config.dim), classes, **running)
