"""Routing inside a decoder of transformers (Llama and its kin): tokens skip layers, or halt.

Skip (Mixture-of-Depths): a routed layer computes some tokens of each text, the others pass by it:
in training the best by their logit, in evaluation those whose predictor says so, so that text can
be generated. What a layer adds to a token counts in full, as the model was trained; its gradient
tells the router how much it was worth. Halt: a token that has come far enough takes no further
layer; each token decides for itself. A token that a layer does not compute leaves no key in the
layer's cache.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moe_router.config_routing import RoutingConfig
from moe_router.integrations.leaving import Halting
from moe_router.integrations.packed import Asked, Slots, require_ours
from moe_router.integrations.rows import (
    Rows,
    also_minimise,
    not_padding,
    refuse_states,
    weights_of,
)
from moe_router.integrations.stacked import Stacked
from moe_router.layers.skip import Skip
from moe_router.routing import Context
from moe_router.routing.context import PLAIN
from moe_router.routing.depth import Kept
from moe_router.types import Choice

KINDS = ("llama", "mistral", "qwen2", "qwen3")  # model_type


class Call:
    """What transformers calls a layer with, for all slots of the (B, S) grid of new tokens.

    Args:
        x_BSD: hidden states.
        layer: index of the one that is called.
        arguments: the others, by name, as layers of transformers have them.

    Attributes:
        past: slots before the new tokens.
        rows: of all that is no padding.
    """

    def __init__(self, x_BSD: Tensor, layer: int, arguments: dict[str, Any]) -> None:
        B, S, _ = x_BSD.shape
        self.more = dict(arguments)
        self.mask_B1SL: Tensor | None = self.more.pop("attention_mask", None)
        self.cache = self.more.pop("past_key_values", None)
        self.turn_BSC: tuple[Tensor, Tensor] = self.more.pop("position_embeddings")
        position_BS: Tensor = self.more.pop("position_ids").expand(B, S)
        self.grid = (B, S)
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length(layer))
        here_BS = not_padding(self.mask_B1SL, self.grid, x_BSD.device, causal=True, past=self.past)
        self.rows = Rows.of(x_BSD, here_BS, position_BS, causal=True)


class DecoderLayer:
    """A layer of the model, in one pass.

    Args:
        module: of transformers.
        run: its forward.
        call: of this pass.
        router: of the module, no part of what it executes.
    """

    def __init__(
        self, module: Any, run: Callable[..., Tensor], call: Call, context: Context,
        router: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.module, self.run, self.call, self.context = module, run, call, context
        self.router = router

    def __call__(
        self, rows: Rows, size_T: Tensor | None = None, asked: Asked | None = None
    ) -> Tensor:
        assert size_T is None and asked is None  # what is causal weighs no token
        call, more = self.call, dict(self.call.more)
        if self.context.ledger is not None:
            dense = self.flops(call.rows, call.rows)
            self.context.ledger.add("blocks", self.flops(rows, rows), dense)
        if call.cache is not None:
            slots = Slots(call.cache, rows.place_T, call.grid, call.mask_B1SL, call.past)
            more |= {"past_key_values": slots, "slots": slots}
            if rows.packing.tokens == 0:
                self._leave_empty(slots, rows.x_TD)
        if rows.packing.tokens == 0:  # transformers' layers take no empty batch
            return rows.x_TD
        turn = tuple(
            x.expand(call.grid[0], -1, -1).flatten(0, 1)[rows.place_T][None] for x in call.turn_BSC
        )
        here = {"position_embeddings": turn, "packing": rows.packing}
        return self.run(rows.x_TD[None], None, **here, **more)[0]

    def flops(self, rows: Rows, fed: Rows) -> int:
        """With a past, all slots of the grid are scored, as transformers does it."""
        (B, S), past = self.call.grid, self.call.past
        pairs = B * S * (past + S) if past else rows.packing.pairs
        matrices = weights_of(self.module, without=self.router)
        scores: int = 4 * self.module.self_attn.o_proj.in_features
        return 2 * fed.packing.tokens * matrices + scores * pairs

    def _leave_empty(self, slots: Slots, x_TD: Tensor) -> None:
        """No token is computed: their slots in the cache stay empty."""
        attention = self.module.self_attn
        J = attention.k_proj.out_features // attention.head_dim
        none = x_TD.new_empty(1, J, 0, attention.head_dim)
        slots.update(none, none, attention.layer_idx)


class RoutedLayer(nn.Module):
    """Mixed into the class of a layer by `route`: tokens skip it.

    Attributes:
        skip: decides.
        context: of the next passes: a Ledger counts what is executed, a step (of the optimizer)
            is what a `curriculum` goes by.
    """

    skip: Skip
    self_attn: Any
    context: Context

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **more: Any) -> Tensor:
        """(B, S, D) to the same; the arguments are those of a layer of transformers."""
        require_ours(self.self_attn.config)
        x_SD = hidden_states.flatten(0, 1)
        more["attention_mask"] = attention_mask
        call = Call(hidden_states, self.self_attn.layer_idx, more)
        lengths = call.rows.packing.lengths
        choice, kept = self.skip.choose(call.rows.tokens, lengths, self.context)
        rows = call.rows.take(kept)
        layer: Any = super()
        compute = DecoderLayer(self, layer.forward, call, self.context, router=self.skip)
        out_RD = compute(rows)
        if rows.packing.tokens == 0:
            return hidden_states
        out_RD = self._teach(out_RD, rows.x_TD, choice, kept)
        return x_SD.index_copy(0, rows.place_T, out_RD).view(hidden_states.shape)

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
            out_RD = also_minimise(out_RD, loss)
        return out_RD


class RoutedStack(Stacked):
    """All layers, and who halts between them.

    Attributes:
        context: as of `RoutedLayer`; its step is what `soft_steps` goes by.
    """

    def __init__(self, layers: nn.ModuleList, model: Any, depth: Halting) -> None:
        super().__init__(layers)
        self.config, self.depth = model, depth
        self.context: Context = PLAIN

    def forward(self, hidden_states: Tensor, **more: Any) -> Tensor:
        """(B, S, D) to the same; the arguments are those of a layer of transformers."""
        require_ours(self.config)
        refuse_states(self.config, more)
        call = Call(hidden_states, 0, more)
        layers = [DecoderLayer(layer, layer, call, self.context) for layer in self.layers]
        out_TD = self.depth.run(layers, call.rows, self.context)
        x_SD = hidden_states.flatten(0, 1)
        return x_SD.index_copy(0, call.rows.place_T, out_TD).view(hidden_states.shape)


def route(model: Any, config: RoutingConfig) -> None:
    """Routers into the decoder layers of a model that `routes` knows, where config says."""
    owner = decoder_of(model)
    layers, dim = owner.layers, model.config.hidden_size
    if config.kind == "halt":
        stack = RoutedStack(layers, model.config, Halting(dim, len(layers), config))
        owner.layers = stack.to(model.device).train(model.training)
        return
    for i in range(config.first, len(layers), config.every):
        layer = layers[i]
        kind = type(layer)
        layer.__class__ = type(f"Routed{kind.__name__}", (RoutedLayer, kind), {})
        layer.context = PLAIN
        layer.skip = Skip(dim, config).to(model.device).train(model.training)


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
