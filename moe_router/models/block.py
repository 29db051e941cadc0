"""The transformer block: attention, then a dense or a routed feed-forward layer; for every token,
or for those that a router keeps."""

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from moe_router.config import Kernels, ModelConfig
from moe_router.dispatch import Dispatcher, Local
from moe_router.layers.leap import Leap
from moe_router.layers.merge import Merge, Merged
from moe_router.layers.moe import MoE
from moe_router.layers.skip import Skip
from moe_router.layers.swiglu import SwiGLU
from moe_router.models.attend_routed import Executed
from moe_router.models.attention import Attended, Attention
from moe_router.models.cached import CachedLayer
from moe_router.models.norm import RMSNorm
from moe_router.models.packing import Packing
from moe_router.models.rope import Turn
from moe_router.models.stream import Stream
from moe_router.placement import Placement
from moe_router.routing import Context
from moe_router.routing.depth import Kept, scatter
from moe_router.types import Choice, Routed, Tokens


class BlockOutput(NamedTuple):
    """Attributes:
    x_TD: the next residual stream.
    routed: what the experts did with the tokens that came to them; None for a dense block.
    choice, kept: which tokens the block computed; None: every one.
    merged, stream: how tokens merged on the way, and their slots as they go on, but for x_TD;
        None: they did not.
    received_T: how much attention came to each token; None: nobody asks.
    attended: what routed attention computed; None: it was dense.
    losses: of its choice; None: it has none.
    """

    x_TD: Tensor
    routed: Routed | None
    choice: Choice | None = None
    kept: Kept | None = None
    merged: Merged | None = None
    stream: Stream | None = None
    received_T: Tensor | None = None
    attended: Executed | None = None
    losses: dict[str, Tensor] | None = None


class Block(nn.Module):
    """Pre-norm residual block; it alone adds the residual, once for each half.

    Args:
        config: of the model.
        layer: index of the block; decides whether it is routed, and names its noise.
        dispatcher, placement, kernels: of the experts; see `MoE`.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        dispatcher: Dispatcher | None = None,
        placement: Placement | None = None,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        total = (dispatcher or Local()).total
        self.attention = Attention(config, layer, kernels, total=total)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp: SwiGLU | None = None
        self.moe: MoE | None = None
        if config.moe is not None and config.is_moe(layer):
            self.moe = MoE(
                config.dim,
                config.moe,
                layer=layer,
                dispatcher=dispatcher,
                placement=placement,
                kernels=kernels,
            )
        else:
            self.mlp = SwiGLU(config.dim, config.hidden)
        self.skip: Skip | None = None
        if config.routing is not None and config.routes(layer, "skip"):
            self.skip = Skip(config.dim, config.routing, total=total)
        self.leap: Leap | None = None
        if config.routing is not None and config.routes(layer, "leap"):
            self.leap = Leap(config.dim, config.routing)
        self.weighs = config.routing is not None and config.routing.weighs
        self.counts_received = (
            config.routing is not None
            and config.routing.router == "attention"
            and config.routes(layer, "prune")
        )
        self.merge: Merge | None = None
        if config.routing is not None and config.routes(layer, "merge"):
            self.merge = Merge(config.dim, self.attention.channels, config.routing)

    def forward(
        self,
        x_TD: Tensor,
        position_T: Tensor,
        turn: Turn,
        packing: Packing,
        context: Context,
        cache: CachedLayer | None = None,
        size_T: Tensor | None = None,
        asked_TD: Tensor | None = None,
    ) -> BlockOutput:
        """x_TD is an argument of its own, not in a Stream, so that FSDP2 finds its gradient.

        Args:
            asked_TD: earlier states of the tokens, by which the router decides; None: x_TD.
        """
        stream = Stream(x_TD, position_T, turn, packing, size_T)
        if self.merge is not None:
            return self._merging(self.merge, stream, context)
        chooser = self.skip or self.leap
        if chooser is None:
            attended = self._attend(stream, cache, context)
            x_TD = x_TD + attended.out_TD
            delta_TD, routed = self._feed(x_TD, stream, context)
            out = BlockOutput(x_TD + delta_TD, routed, received_T=attended.received_T)
            return out._replace(attended=attended.executed, losses=attended.losses)
        asked = Tokens(x_TD if asked_TD is None else asked_TD, position_T, packing.offsets_B1)
        if packing.fixed:
            return self._in_place(stream, *chooser.decide(asked, context), cache, context)
        choice, kept = chooser.choose(asked, packing.lengths, context)
        rows = stream.take(kept)
        attended = self._attend(rows, cache, context)
        attention_RD = attended.out_TD
        inside = context.part("block").within(kept.plan)
        delta_RD, routed = self._feed(rows.x_TD + attention_RD, rows, inside)
        delta_TD = scatter(attention_RD + delta_RD, choice, kept)
        out = BlockOutput(x_TD + delta_TD, routed, choice, kept, attended=attended.executed)
        return out._replace(losses=attended.losses)

    def _in_place(
        self,
        stream: Stream,
        kept_T: Tensor,
        weight_T: Tensor,
        cache: CachedLayer | None,
        context: Context,
    ) -> BlockOutput:
        """Every token stays where it is, and layers do nothing for those that are not kept: how
        many they are is never asked. See `Packing.fixed`."""
        assert self.mlp is not None
        stream = replace(stream, packing=stream.packing.only(kept_T))
        attention_TD = self._attend(stream, cache, context).out_TD
        mlp_TD = self.mlp(self.mlp_norm(stream.x_TD + attention_TD), kept_T)
        delta_TD = weight_T[:, None] * (attention_TD + mlp_TD)
        return BlockOutput(stream.x_TD + delta_TD.to(stream.x_TD.dtype), None)

    def _merging(self, merge: Merge, stream: Stream, context: Context) -> BlockOutput:
        """Attention for every token, feed-forward for what they merge into."""
        attended = self._attend(stream, None, context)
        stream = replace(stream, x_TD=stream.x_TD + attended.out_TD)
        lengths = stream.packing.lengths
        merged = merge(stream.tokens, attended.key_TJC, lengths, context.part("merge"))
        slots = stream.at(merged.kept, *merged.mean(stream.tokens))
        inside = context.part("block").within(merged.kept.plan)
        delta_MD, routed = self._feed(slots.x_TD, slots, inside)
        return BlockOutput(slots.x_TD + delta_MD, routed, merged=merged, stream=slots)

    def _attend(self, stream: Stream, cache: CachedLayer | None, context: Context) -> Attended:
        normed_TD = self.attention_norm(stream.x_TD)
        size_T = stream.size_T if self.weighs else None  # else it is for the pooling alone
        here = (stream.turn, stream.packing, cache, size_T)
        attended: Attended = self.attention(
            normed_TD, *here, count_received=self.counts_received, context=context
        )
        return attended

    def _feed(self, x_TD: Tensor, stream: Stream, context: Context) -> tuple[Tensor, Routed | None]:
        normed_TD = self.mlp_norm(x_TD)
        if self.moe is None:
            assert self.mlp is not None
            return self.mlp(normed_TD), None
        tokens = Tokens(normed_TD, stream.position_T, stream.packing.offsets_B1)
        routed: Routed = self.moe(tokens, context)
        return routed.delta_TD, routed
