"""Token pruning inside an encoder of transformers (BERT, ViT and their kin).

The model's own layers compute, on packed rows: padding is left out, and after a routed layer the
least important tokens leave for good. Who has left is zero in what the layers return, so pooling by
the first token or by a mean whose length does not matter works as before. Attention has no dropout
here. `hidden_states` and `attentions` of layers are not to be had: their rows differ.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from moe_router.config_routing import RoutingConfig
from moe_router.errors import ConfigError
from moe_router.layers.prune import Prune
from moe_router.models.packing import Packing
from moe_router.routing import Context
from moe_router.routing.context import PLAIN
from moe_router.types import Tokens
from moe_router_kernels import gather

IMAGES = ("vit", "deit")  # model_type


class Pruning(nn.Module):
    """Layers, and the routers between them.

    Args:
        layers: of the model; they keep their names.
        model: its config says the width.
        config: kind prune, decide top.

    Attributes:
        context: of the next passes: a Ledger counts what is executed, a step (of the optimizer)
            is what a `curriculum` goes by.
    """

    def __init__(self, layers: nn.ModuleList, model: Any, config: RoutingConfig) -> None:
        super().__init__()
        self.config = model
        routed = range(config.first, len(layers) - 1, config.every)  # after the last it saves none
        self.prunes = nn.ModuleDict({str(i): Prune(model.hidden_size, config) for i in routed})
        self.context: Context = PLAIN

    def run(
        self,
        layers: Iterable[nn.Module],
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        asked: dict[str, Any],
    ) -> Tensor:
        """(B, S, D) to the same; attention_mask is what transformers made of the padding."""
        for what in ("output_hidden_states", "output_attentions"):
            if asked.get(what) or getattr(self.config, what, False):
                raise ConfigError(f"{what}: after wrap each layer has other tokens; want it off")
        B, S, D = hidden_states.shape
        here_BS = _not_padding(attention_mask, B, S, hidden_states.device)
        place_R = here_BS.flatten().nonzero().squeeze(1)
        rows = Tokens(
            hidden_states.flatten(0, 1)[place_R],
            (here_BS.int().cumsum(1) - 1).flatten()[place_R].int(),
            torch.cat([torch.zeros(1, dtype=torch.int32), here_BS.sum(1).cpu().cumsum(0).int()]),
        )
        dense = Packing(rows.offsets_B1, hidden_states.device, causal=False)
        packing = dense
        for i, layer in enumerate(layers):
            worth_R = self._worth(rows)
            out_1RD: Tensor = layer(rows.x_TD[None], None, packing=packing, size_R=worth_R)
            rows = replace(rows, x_TD=out_1RD[0])
            self._account(layer, packing, dense)
            if str(i) in self.prunes:
                rows, packing, place_R = self._leave(self.prunes[str(i)], rows, packing, place_R)
        x_RD = rows.x_TD
        worth_R = self._worth(rows)
        if worth_R is not None:
            x_RD = x_RD * worth_R[:, None].to(x_RD.dtype)
        out_TD = x_RD.new_zeros(B * S, D).index_copy(0, place_R, x_RD)
        return out_TD.view(B, S, D)

    def _worth(self, rows: Tokens) -> Tensor | None:
        """(R,) ones, whose gradient tells routers how much others should see of each survivor."""
        mass_R = rows.size_T
        return 1 + mass_R - mass_R.detach() if self.training and mass_R is not None else None

    def _leave(
        self, prune: nn.Module, rows: Tokens, packing: Packing, place_R: Tensor
    ) -> tuple[Tokens, Packing, Tensor]:
        assert isinstance(prune, Prune)
        rows = replace(rows, offsets_B1=packing.offsets_B1)
        choice, kept = prune(rows, packing.lengths, self.context)
        src_R = kept.plan.src_R.long()
        bounds_B1 = kept.plan.offsets_G1
        packing = Packing(bounds_B1, rows.x_TD.device, lengths=kept.lengths, causal=False)
        size_R = prune.mass(rows, choice, kept)
        x_RD = gather(rows.x_TD, kept.plan.src_R, kept.plan.row_TK)
        survivors = Tokens(x_RD, rows.position_T[src_R], packing.offsets_B1, size_R)
        return survivors, packing, place_R[src_R]

    def _account(self, layer: nn.Module, packing: Packing, dense: Packing) -> None:
        ledger = self.context.ledger
        if ledger is None:
            return
        weights = [p for p in layer.parameters() if p.dim() == 2]
        matrices, D = 2 * sum(p.numel() for p in weights), weights[0].size(1)

        def flops(of: Packing) -> int:
            scores = sum(n * n for n in of.lengths)
            return int(matrices * of.tokens + 4 * D * scores)

        ledger.add("blocks", flops(packing), flops(dense))


class RoutedEncoder(Pruning):
    """In the place of a module with `layer`, as BERT has it."""

    def __init__(self, layers: nn.ModuleList, model: Any, config: RoutingConfig) -> None:
        super().__init__(layers, model, config)
        self.layer = layers

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **asked: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        out_BSD = self.run(self.layer, hidden_states, attention_mask, asked)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=out_BSD)


class RoutedLayers(Pruning):
    """In the place of a list of layers, as ViT has it: who loops over it finds one, this."""

    def __init__(self, layers: nn.ModuleList, model: Any, config: RoutingConfig) -> None:
        super().__init__(layers, model, config)
        self._count = len(layers)
        for i, layer in enumerate(layers):
            self.add_module(str(i), layer)

    def __iter__(self) -> Iterator[nn.Module]:
        yield self

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **asked: Any
    ) -> Tensor:
        layers = [self.get_submodule(str(i)) for i in range(self._count)]
        return self.run(layers, hidden_states, attention_mask, asked)


def layers_of(model: Any) -> tuple[Any, str] | None:
    """The module that has the layers of an encoder, and by what name; None: not known here."""
    if getattr(model.config, "is_decoder", False):
        return None
    for module in model.modules():
        encoder = getattr(module, "encoder", None)
        layers = getattr(encoder, "layer", None)
        if isinstance(layers, nn.ModuleList) and all(hasattr(x, "intermediate") for x in layers):
            return module, "encoder"
        stacked = isinstance(getattr(module, "layers", None), nn.ModuleList)
        if stacked and model.config.model_type in IMAGES:
            return module, "layers"
    return None


def route(owner: Any, name: str, model: Any, config: RoutingConfig) -> None:
    """Routers between the layers of `layers_of`."""
    layers = getattr(owner, name)
    made: Pruning
    if name == "encoder":
        made = RoutedEncoder(layers.layer, model.config, config)
    else:
        made = RoutedLayers(layers, model.config, config)
    setattr(owner, name, made.to(model.device).train(model.training))


def _not_padding(mask: Tensor | None, B: int, S: int, device: torch.device) -> Tensor:
    """(B, S) bool, from a (B, 1, S, S) mask: bool, True for a key that is seen."""
    if mask is None:
        return torch.ones(B, S, dtype=torch.bool, device=device)
    return mask[:, 0, 0].expand(B, S)
