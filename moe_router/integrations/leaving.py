"""Tokens that leave between the layers of a model of transformers: pruned, halted or merged.

Layers come as `Layer`s, of an encoder or of a decoder; the decisions are those of our own models
(`moe_router/layers`), and are taken between layers, so recomputing a layer takes none again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from moe_router.config_routing import RoutingConfig
from moe_router.integrations.packed import Asked
from moe_router.integrations.rows import Rows, also_minimise
from moe_router.layers.halt import Halt, begin, finish, gated, halting_losses
from moe_router.layers.merge import Merge, unmerge
from moe_router.layers.prune import Prune
from moe_router.models.budget import ExpectedCost
from moe_router.routing import Context
from moe_router.types import HaltState


class Layer(Protocol):
    """A layer of the model, in one pass; it counts what it executes."""

    def __call__(
        self, rows: Rows, size_T: Tensor | None = None, asked: Asked | None = None
    ) -> Tensor:
        """(T, D) states after the layer.

        Args:
            size_T: fp32, as how many each token is seen; None: 1 each.
            asked: to be filled in.
        """

    def flops(self, rows: Rows, fed: Rows) -> int:
        """Of attention for some rows, and of what comes after it for others."""


class HalvedLayer(Layer, Protocol):
    """One that can be computed by halves."""

    def attend(self, rows: Rows, size_T: Tensor | None, asked: Asked) -> Tensor:
        """(T, D) the residual stream after attention."""

    def feed(self, rows: Rows, attended: Rows) -> Tensor:
        """(T, D) after the feed-forward half.

        Args:
            attended: the rows of the half before.
        """


class Pruning(nn.Module):
    """After a routed layer the least important tokens leave for good; they are 0 at the end.

    Args:
        dim: hidden size D.
        layers: of the model.
        config: kind prune, decide top.
    """

    def __init__(self, dim: int, layers: int, config: RoutingConfig) -> None:
        super().__init__()
        routed = range(config.first, layers - 1, config.every)  # after the last it saves none
        self.config = config
        self.prunes = nn.ModuleDict({str(i): Prune(dim, config) for i in routed})

    def run(self, layers: Sequence[Layer], rows: Rows, context: Context) -> Tensor:
        """(T, D) states of all tokens that came in."""
        first, own_T = rows, torch.arange(rows.packing.tokens, device=rows.x_TD.device)
        for i, layer in enumerate(layers):
            asks = str(i) in self.prunes and self.config.router == "attention"
            asked = Asked(received=True) if asks else None
            rows = rows.to(layer(rows, self._worth(rows), asked))
            if str(i) not in self.prunes:
                continue
            prune = cast(Prune, self.prunes[str(i)])
            received_T = None if asked is None else asked.received_T
            choice, kept = prune(rows.tokens, rows.packing.lengths, context, received_T)
            mass_R = prune.mass(rows.tokens, choice, kept)
            own_T = own_T[kept.plan.src_R.long()]
            rows = replace(rows.take(kept), size_T=mass_R)
        x_RD, worth_R = rows.x_TD, self._worth(rows)
        if worth_R is not None:
            x_RD = x_RD * worth_R[:, None].to(x_RD.dtype)
        return torch.zeros_like(first.x_TD).index_copy(0, own_T, x_RD)

    def _worth(self, rows: Rows) -> Tensor | None:
        """(R,) ones, whose gradient tells routers how much others should see of each survivor."""
        mass_R = rows.size_T
        return 1 + mass_R - mass_R.detach() if self.training and mass_R is not None else None


class Halting(nn.Module):
    """After a routed layer some tokens have come far enough, and take no further layer.

    Args:
        dim: hidden size D.
        layers: of the model.
        config: kind halt.
    """

    def __init__(self, dim: int, layers: int, config: RoutingConfig) -> None:
        super().__init__()
        routed = range(config.first, layers - 1, config.every)  # after the last all halt
        self.config = config
        self.halts = nn.ModuleDict({str(i): Halt(dim, config) for i in routed})

    def run(self, layers: Sequence[Layer], rows: Rows, context: Context) -> Tensor:
        """(T, D) outputs of all tokens that came in."""
        config, tokens = self.config, rows.packing.tokens
        state = begin(rows.x_TD, rows.packing.offsets_B1)
        cost = ExpectedCost([(float(layer.flops(rows, rows)), 0.0) for layer in layers], tokens)
        for i, layer in enumerate(layers):
            x_RD = layer(rows)
            if config.halting == "tsa":
                x_RD = gated(rows.x_TD, x_RD, state)
            rows = rows.to(x_RD)
            cost.block(i, None)
            if str(i) in self.halts:
                halt = self.halts[str(i)]
                state, kept = halt(rows.tokens, rows.packing.lengths, state, context)
                rows = rows.take(kept)
                cost.leave(kept)
        state = finish(rows.x_TD, state, config)
        return self._teach(state, cost, tokens) if self.training else state.output_TD

    def _teach(self, state: HaltState, cost: ExpectedCost, tokens: int) -> Tensor:
        """The outputs, which teach routers what they spend, too."""
        count = state.cumulative_T.new_full((), tokens)
        losses = halting_losses(state, self.config, count)
        terms = [self.config.loss_scale[name] * loss for name, loss in losses.items()]
        terms.append(self.config.cost_loss * cost.loss(count))
        return also_minimise(state.output_TD, torch.stack(terms).sum())


class Merging(nn.Module):
    """In the middle of a routed layer similar tokens become one; at the end each token gets what
    the one that it merged into has.

    Args:
        channels: of a key.
        dim, layers, config: as above; kind merge.
    """

    def __init__(self, dim: int, layers: int, config: RoutingConfig, channels: int) -> None:
        super().__init__()
        routed = range(config.first, layers, config.every)
        self.merges = nn.ModuleDict({str(i): Merge(dim, channels, config) for i in routed})

    def run(self, layers: Sequence[HalvedLayer], rows: Rows, context: Context) -> Tensor:
        """(T, D) states of all tokens that came in."""
        slot_T = torch.arange(rows.packing.tokens, device=rows.x_TD.device)
        for i, layer in enumerate(layers):
            if str(i) not in self.merges:
                rows = rows.to(layer(rows, rows.size_T))
                continue
            asked = Asked()
            rows = rows.to(layer.attend(rows, rows.size_T, asked))
            merge = cast(Merge, self.merges[str(i)])
            assert asked.key_TJC is not None
            merged = merge(rows.tokens, asked.key_TJC, rows.packing.lengths, context)
            slots = rows.at(merged.kept, *merged.mean(rows.tokens))
            rows = slots.to(layer.feed(slots, rows))
            slot_T = merged.slot_T[slot_T]
        return unmerge(rows.x_TD, slot_T)
