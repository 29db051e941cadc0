"""Mixture-of-Depths around layers of a decoder of transformers (Llama and its kin).

A routed layer computes some tokens of each text, the others pass by it: in training the best by
their logit, in evaluation those whose predictor says so, so that text can be generated. What a
layer adds to a token counts in full, as the model was trained; its gradient tells the router how
much it was worth. A token that passes by leaves no key in the layer's cache.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_router.config_routing import RoutingConfig
from moe_router.integrations.packed import Slots
from moe_router.layers.skip import Skip
from moe_router.models.packing import Packing
from moe_router.routing import Context
from moe_router.routing.context import PLAIN
from moe_router.routing.depth import Kept
from moe_router.types import Choice, Tokens

KINDS = ("llama", "mistral", "qwen2", "qwen3")  # model_type


class RoutedLayer(nn.Module):
    """Mixed into the class of a layer by `route`.

    Attributes:
        skip: decides.
        context: of the next passes: a Ledger counts what is executed, a step (of the optimizer)
            is what a `curriculum` goes by.
    """

    skip: Skip
    self_attn: Any
    context: Context

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **more: Any,
    ) -> Tensor:
        """(B, S, D) to the same; the arguments are those of a layer of transformers."""
        (B, S, D), device = hidden_states.shape, hidden_states.device
        x_SD = hidden_states.flatten(0, 1)  # of all slots of the grid
        past = 0
        if past_key_values is not None:
            past = int(past_key_values.get_seq_length(self.self_attn.layer_idx))
        here_BS = _here(attention_mask, B, S, past, device)
        place_T = here_BS.flatten().nonzero().squeeze(1)
        lengths = here_BS.sum(1).tolist()
        bounds_B1 = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
        assert position_ids is not None and position_embeddings is not None
        position_T = position_ids.expand(B, S).flatten()[place_T].int()
        choice, kept = self.skip.choose(
            Tokens(x_SD[place_T], position_T, bounds_B1), lengths, self.context
        )
        place_R = place_T[kept.plan.src_R]
        packing = Packing(kept.plan.offsets_G1, device, lengths=kept.lengths)
        self._account(packing, Packing(bounds_B1, device, lengths=lengths), (B, S, past))
        if past_key_values is not None:
            slots = Slots(past_key_values, place_R, (B, S), attention_mask, past)
            more |= {"past_key_values": slots, "slots": slots}
        if packing.tokens == 0:  # transformers' layers take no empty batch
            return self._nothing(hidden_states, more.get("slots"))
        turn = tuple(x.expand(B, -1, -1).flatten(0, 1)[place_R][None] for x in position_embeddings)
        rows_RD = x_SD[place_R]
        layer: Any = super()
        out_1RD: Tensor = layer.forward(
            rows_RD[None], None, position_embeddings=turn, packing=packing, **more
        )
        out_RD = self._teach(out_1RD[0], rows_RD, choice, kept)
        return x_SD.index_copy(0, place_R, out_RD).view(B, S, D)

    def _nothing(self, hidden_states: Tensor, slots: Slots | None) -> Tensor:
        """Every token passes by; its slots in the cache stay empty."""
        if slots is not None:
            attention = self.self_attn
            J = attention.k_proj.out_features // attention.head_dim
            none = hidden_states.new_empty(1, J, 0, attention.head_dim)
            slots.update(none, none, attention.layer_idx)
        return hidden_states

    def _teach(self, out_RD: Tensor, rows_RD: Tensor, choice: Choice, kept: Kept) -> Tensor:
        """The same numbers, whose gradient tells the router what its choices were worth, and the
        predictor what they were."""
        if not self.training:
            return out_RD
        weight_R1 = choice.weight_TK[kept.plan.src_R]
        delta_RD = (out_RD - rows_RD).detach()
        out_RD = out_RD + ((weight_R1 - weight_R1.detach()) * delta_RD).to(out_RD.dtype)
        if "predictor" in choice.losses:
            loss = choice.losses["predictor"] * self.skip.config.predictor_loss
            out_RD = _AlsoLoss.apply(out_RD, loss)  # type: ignore[no-untyped-call]
        return out_RD

    def _account(self, packing: Packing, dense: Packing, grid: tuple[int, int, int]) -> None:
        """With a past, all slots of the grid are scored, as transformers does it."""
        ledger, (B, S, past) = self.context.ledger, grid
        if ledger is None:
            return
        own = {id(p) for p in self.skip.parameters()}
        matrices = 2 * sum(
            p.numel() for p in self.parameters() if p.dim() == 2 and id(p) not in own
        )
        scores = 4 * self.self_attn.o_proj.in_features
        executed, all_of_them = (
            of.tokens * matrices + scores * (B * S * (past + S) if past else of.pairs)
            for of in (packing, dense)
        )
        ledger.add("blocks", executed, all_of_them)


class _AlsoLoss(torch.autograd.Function):
    """A loss that the caller of the model does not see is minimised with the one it does: whatever
    loop trains, the gradient of the loss is added in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x_RD.view_as(x_RD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad_RD, torch.ones_like(loss)


def route(model: Any, config: RoutingConfig) -> None:
    """Routers into the decoder layers of a model that `routes` knows, where config says."""
    layers = decoder_of(model).layers
    for i in range(config.first, len(layers), config.every):
        layer = layers[i]
        kind = type(layer)
        layer.__class__ = type(f"Routed{kind.__name__}", (RoutedLayer, kind), {})
        layer.context = PLAIN
        layer.skip = Skip(model.config.hidden_size, config).to(model.device).train(model.training)


def decoder_of(model: Any) -> Any:
    """The module that has the decoder layers; None: not one of KINDS, or one with windows."""
    if model.config.model_type not in KINDS or not all_seen(model.config):
        return None
    return model.base_model


def all_seen(config: Any) -> bool:
    """Whether attention goes as far back as the text does, in each layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None


def _here(mask_B1SL: Tensor | None, B: int, S: int, past: int, device: torch.device) -> Tensor:
    """(B, S) bool: what is no padding, for a token sees its own slot."""
    if mask_B1SL is None:
        return torch.ones(B, S, dtype=torch.bool, device=device)
    own = past + torch.arange(S, device=device)
    return mask_B1SL[:, 0, torch.arange(S, device=device), own]
