"""Routing inside an encoder of transformers (BERT, ViT and their kin).

The model's own layers compute, on packed rows: padding is left out, and tokens that have left, have
halted or merged into another are not computed. Padding is zero in what the layers return, and so is
who was pruned, so pooling by the first token or by a mean whose length does not matter works as
before. Attention has no dropout here. `hidden_states` and `attentions` of layers are not to be had:
their rows differ.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_router.config_routing import RoutingConfig
from moe_router.integrations.leaving import Halting, Merging, Pruning
from moe_router.integrations.packed import Asked, require_ours
from moe_router.integrations.rows import Rows, not_padding, refuse_states, weights_of
from moe_router.integrations.stacked import Stacked
from moe_router.routing import Context
from moe_router.routing.context import PLAIN

IMAGES = ("vit", "deit")  # model_type


class EncoderLayer:
    """A layer of the model, in one pass.

    Args:
        module: of transformers.
        dense: all rows, which it would compute without routing.
    """

    def __init__(self, module: Any, dense: Rows, context: Context) -> None:
        self.module, self.dense, self.context = module, dense, context
        self.norms_first = hasattr(module, "layernorm_before")  # ViT, else BERT

    def __call__(
        self, rows: Rows, size_T: Tensor | None = None, asked: Asked | None = None
    ) -> Tensor:
        self._account(rows, rows)
        if rows.packing.tokens == 0:  # transformers' layers take no empty batch
            return rows.x_TD
        packed = {"packing": rows.packing, "size_R": size_T, "asked": asked}
        out_1TD: Tensor = self.module(rows.x_TD[None], None, **packed)
        return out_1TD[0]

    def attend(self, rows: Rows, size_T: Tensor | None, asked: Asked) -> Tensor:
        """(T, D) the residual stream after attention; BERT's has been through its norm."""
        layer, x_1TD = self.module, rows.x_TD[None]
        packed = {"packing": rows.packing, "size_R": size_T, "asked": asked}
        if not self.norms_first:
            out_1TD: Tensor = layer.attention(x_1TD, None, **packed)[0]
            return out_1TD[0]
        out_1TD = layer.attention(layer.layernorm_before(x_1TD), None, **packed)[0]
        delta_1TD: Tensor = layer.dropout(out_1TD)
        return rows.x_TD + delta_1TD[0]

    def feed(self, rows: Rows, attended: Rows) -> Tensor:
        """(T, D) after the feed-forward half.

        Args:
            attended: the rows of the half before.
        """
        self._account(attended, rows)
        layer, x_1TD = self.module, rows.x_TD[None]
        if not self.norms_first:
            out_1TD: Tensor = layer.feed_forward_chunk(x_1TD)
            return out_1TD[0]
        delta_1TD: Tensor = layer.dropout(layer.mlp(layer.layernorm_after(x_1TD)))
        return rows.x_TD + delta_1TD[0]

    def flops(self, rows: Rows, fed: Rows) -> int:
        """Of attention for some rows, and of what comes after it for others."""
        attention = weights_of(self.module.attention)
        rest = weights_of(self.module) - attention
        scores = 4 * rows.x_TD.size(1) * rows.packing.pairs
        return 2 * (rows.packing.tokens * attention + fed.packing.tokens * rest) + scores

    def _account(self, rows: Rows, fed: Rows) -> None:
        if self.context.ledger is not None:
            dense = self.flops(self.dense, self.dense)
            self.context.ledger.add("blocks", self.flops(rows, fed), dense)


class RoutedLayers(Stacked):
    """In the place of an encoder's list of layers: they, and how tokens leave between them.

    Args:
        model: its config.
        depth: by which tokens leave.

    Attributes:
        context: of the next passes: a Ledger counts what is executed, a step (of the optimizer)
            is what `curriculum` and `soft_steps` go by.
    """

    def __init__(
        self, layers: nn.ModuleList, model: Any, depth: Pruning | Halting | Merging
    ) -> None:
        super().__init__(layers)
        self.config, self.depth = model, depth
        self.context: Context = PLAIN

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **asked: Any,
    ) -> Tensor:
        """(B, S, D) to the same; attention_mask is what transformers made of the padding."""
        assert encoder_hidden_states is None  # a decoder's
        require_ours(self.config)
        refuse_states(self.config, asked)
        B, S, D = hidden_states.shape
        here_BS = not_padding(attention_mask, (B, S), hidden_states.device, causal=False, past=0)
        rows = Rows.of(hidden_states, here_BS, here_BS.int().cumsum(1) - 1, causal=False)
        if rows.packing.tokens == 0:  # transformers' layers take no empty batch
            return torch.zeros_like(hidden_states)
        layers = [EncoderLayer(layer, rows, self.context) for layer in self.layers]
        x_TD = self.depth.run(layers, rows, self.context)
        out_SD = x_TD.new_zeros(B * S, D).index_copy(0, rows.place_T, x_TD)
        return out_SD.view(B, S, D)


def layers_of(model: Any) -> tuple[Any, str] | None:
    """The module that has the layers of an encoder, and by what name; None: not known here."""
    if getattr(model.config, "is_decoder", False) or not hasattr(model.config, "num_hidden_layers"):
        return None  # the second is of two models in one
    for module in model.modules():
        layers = getattr(module, "layer", None)
        if isinstance(layers, nn.ModuleList) and all(hasattr(x, "intermediate") for x in layers):
            return module, "layer"
        stacked = isinstance(getattr(module, "layers", None), nn.ModuleList)
        if stacked and model.config.model_type in IMAGES:
            return module, "layers"
    return None


def route(owner: Any, name: str, model: Any, config: RoutingConfig) -> None:
    """Routers between the layers of `layers_of`."""
    layers, own = getattr(owner, name), model.config
    sizes = (own.hidden_size, len(layers), config)
    depth: Pruning | Halting | Merging
    match config.kind:
        case "prune":
            depth = Pruning(*sizes)
        case "halt":
            depth = Halting(*sizes)
        case _:
            depth = Merging(*sizes, channels=own.hidden_size // own.num_attention_heads)
    made = RoutedLayers(layers, own, depth)
    setattr(owner, name, made.to(model.device).train(model.training))
