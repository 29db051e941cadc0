"""The image classifier: packed patches in, logits per image out; the blocks and the head are those
of the text classifier.

Patches carry their place as rotary positions in two dimensions, not as learned vectors: the blocks
turn queries and keys anyway, there is no table to learn or to resize for another image size, and a
patch keeps its place in whatever smaller batch it goes on. What is classified is the mean of the
patches by mass, so there is no class token that must never be pruned.

Source: Dosovitskiy et al. 2020, arXiv:2010.11929; rotary positions in two dimensions: Heo et al.
2024, arXiv:2403.13298, the axial form.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_router.config import ImageConfig, ModelConfig
from moe_router.models.backbone import Running
from moe_router.models.encoder import Classifier
from moe_router.models.rope import Turn, turn_in_grid


class PatchEmbedding(nn.Linear):
    """Values 0..255 of a patch, normalised, to D. Mean and spread of the training images are kept
    among the weights: a checkpoint sees images as it did in training.

    Args:
        image: how images are cut; P values a patch.
        dim: hidden size D.
    """

    mean_P: Tensor
    std_P: Tensor

    def __init__(self, image: ImageConfig, dim: int) -> None:
        super().__init__(image.values, dim)
        self.register_buffer("mean_P", torch.zeros(image.values))
        self.register_buffer("std_P", torch.full((image.values,), 255.0))

    def normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take mean and standard deviation of each channel, of values 0..255."""
        for buffer_P, channels in ((self.mean_P, mean), (self.std_P, std)):
            # the channels of a pixel lie side by side
            buffer_P.copy_(torch.tensor(channels).repeat(buffer_P.numel() // len(channels)))

    def forward(self, patch_TP: Tensor) -> Tensor:
        """(T, P) uint8 to (T, D)."""
        normal_TP = (patch_TP.to(self.mean_P.dtype) - self.mean_P) / self.std_P
        return F.linear(normal_TP, self.weight, self.bias)


class ImageClassifier(Classifier):
    """Args:
    config: of kind `vit`.
    image: how images are cut.
    classes: number of labels C.
    running: how it is computed.
    """

    def __init__(
        self, config: ModelConfig, image: ImageConfig, classes: int, **running: Unpack[Running]
    ) -> None:
        self.embed: PatchEmbedding
        super().__init__(config, PatchEmbedding(image, config.dim), classes, **running)
        self.image = image

    def turn(self, position_T: Tensor) -> Turn:
        """position_T counts patches row by row."""
        channels = self.config.channels
        return turn_in_grid(position_T, self.image.grid, channels, self.config.rope_theta)
