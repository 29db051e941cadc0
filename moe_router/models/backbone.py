"""What every model is built on: embedding, blocks, and which tokens take which block."""

from dataclasses import replace
from typing import Protocol, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_router.config import Kernels, ModelConfig
from moe_router.dispatch import Dispatcher, Local
from moe_router.layers.halt import Halt, begin, finish, gated, halting_losses
from moe_router.layers.moe import MoE
from moe_router.layers.prune import Prune
from moe_router.models.account import Account, flops_of_blocks
from moe_router.models.block import Block, BlockOutput
from moe_router.models.budget import Budget, ExpectedCost
from moe_router.models.cached import Cache, CachedLayer
from moe_router.models.norm import RMSNorm
from moe_router.models.packing import Packing
from moe_router.models.passed import Passed, tell
from moe_router.models.rope import Turn, turn_at
from moe_router.models.stream import Stream
from moe_router.placement import Placement
from moe_router.routing import Context, PlanMemory
from moe_router.routing.depth import Kept, Shifted, every_token
from moe_router.types import Routed


class Output(Protocol):
    """What a model says of its routing, beside its logits."""

    @property
    def routed(self) -> tuple[Routed | None, ...]: ...
    @property
    def depth(self) -> tuple[dict[str, Tensor], ...]: ...


class Running(TypedDict, total=False):
    """How a model is computed, whatever it computes.

    Attributes:
        dispatcher, placement, kernels: how tokens reach experts, and what computes them; see `MoE`.
        activation_checkpointing: keep only each block's input and routing decisions for the
            backward pass; the rest is computed again.
    """

    dispatcher: Dispatcher | None
    placement: Placement | None
    kernels: Kernels
    activation_checkpointing: bool


class Backbone(nn.Module):
    """Args:
    config: sizes, and which blocks are routed.
    embed: what comes in, to (T, D).
    dispatcher, placement, kernels, activation_checkpointing: see `Running`.
    """

    def __init__(
        self,
        config: ModelConfig,
        embed: nn.Module,
        *,
        dispatcher: Dispatcher | None = None,
        placement: Placement | None = None,
        kernels: Kernels = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embed = embed
        experts = (dispatcher, placement, kernels)
        self.blocks = nn.ModuleList(Block(config, i, *experts) for i in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.dispatcher = dispatcher or Local()
        # by the block after which tokens leave; after the last step they leave anyway
        self.halts, self.prunes = nn.ModuleDict(), nn.ModuleDict()
        for i in range(min(config.layers, config.steps - 1)):
            if config.routing is not None and config.routes(i, "halt"):
                self.halts[str(i)] = Halt(config.dim, config.routing)
            if config.routing is not None and config.routes(i, "prune"):
                self.prunes[str(i)] = Prune(config.dim, config.routing)
        self.budget: Budget | None = None
        if config.routing is not None and config.routing.costs:
            self.budget = Budget(config.routing)

    def through_blocks(
        self,
        input_T: Tensor,
        position_T: Tensor,
        offsets_B1: Tensor | Packing,
        context: Context,
        cache: Cache | None = None,
    ) -> Passed:
        """Embed the tokens and run the blocks; each computes the tokens that are routed to it."""
        packing = self.packing(offsets_B1, input_T.device)
        stream = Stream(self.embed(input_T), position_T, self.turn(position_T), packing)
        passed, routing = self._begin(stream, context), self.config.routing
        for step in range(self.config.steps):
            layer_cache = None if cache is None else cache.layers[step]
            before, x_TD = packing.lengths, passed.stream.x_TD
            out = self._run(step, passed, context, layer_cache)
            if out.merged is not None and out.stream is not None:
                passed.merge(out.stream, out.merged)
            if passed.halted is not None and routing is not None and routing.halting == "tsa":
                out = out._replace(x_TD=gated(x_TD, out.x_TD, passed.halted))
            passed.advance(out)
            if passed.account is not None:
                ran = before if out.kept is None else out.kept.lengths
                fed = None if out.merged is None else out.merged.kept.lengths
                passed.account.block(step, ran, layer_cache, fed, out.attended)
            if routing is not None and out.routed is None:
                tell(step, passed, out, context)
            left = self._leave(step, passed, out.received_T, context)
            packing = passed.stream.packing
            if passed.cost is not None:
                experts = None if out.routed is None else out.routed.choice
                passed.cost.block(step, out.kept, experts)
                passed.cost.leave(left)
        return self._end(passed)

    def _begin(self, stream: Stream, context: Context) -> Passed:
        config, packing = self.config, stream.packing
        passed, routing = Passed(stream), config.routing
        if context.ledger is not None and not (routing is None and config.attention is None):
            here = (packing.lengths, stream.position_T)
            passed.account = Account(config, context.ledger, *here, causal=packing.causal)
        if routing is None:
            return passed
        if self.training and self.budget is not None:
            flops = flops_of_blocks(config, packing.lengths, causal=packing.causal)
            passed.cost = ExpectedCost(flops, packing.tokens)
        if context.observe is not None and routing.tokens_leave:
            passed.plan = every_token(packing.tokens, packing.offsets_B1)
        if self.halts:
            passed.halted = begin(stream.x_TD, packing.offsets_B1)
        return passed

    def _end(self, passed: Passed) -> Passed:
        """Whoever still goes on halts; the losses of the whole pass."""
        routing, tokens = self.config.routing, passed.tokens
        if routing is None:
            return passed
        if passed.halted is not None:
            passed.halted = finish(passed.stream.x_TD, passed.halted, routing)
        if self.training and (passed.cost is not None or passed.halted is not None):
            # new_full, not new_tensor: a fill does not wait for the device
            count = self.dispatcher.total(self.norm.weight.new_full((), tokens).float())
            if passed.halted is not None:
                passed.depth.append(halting_losses(passed.halted, routing, count))
            if passed.cost is not None:
                passed.depth.append({"cost": passed.cost.loss(count)})
        return passed

    def packing(self, offsets_B1: Tensor | Packing, device: torch.device) -> Packing:
        """Of the sequences of a pass. One that was made before is taken as it is: a CUDA graph
        cannot hold what making it copies to the device."""
        if isinstance(offsets_B1, Packing):
            return offsets_B1
        return Packing(offsets_B1, device, causal=self.config.kind == "causal_lm")

    def turn(self, position_T: Tensor) -> Turn:
        """By what queries and keys at these positions turn."""
        return turn_at(position_T, self.config.channels, self.config.rope_theta)

    def _run(
        self, step: int, passed: Passed, context: Context, cache: CachedLayer | None
    ) -> BlockOutput:
        stream, block = passed.stream, self.blocks[step % self.config.layers]
        context = context if passed.plan is None else context.within(passed.plan)
        arguments = (block, stream.x_TD, stream.position_T, stream.turn, stream.packing)
        asked_TD = passed.asked(self.config.routing)
        # a cache would be written twice
        if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
            # one memory a block: the second run takes the decisions of the first
            remembering = replace(context, memory=PlanMemory())
            more = (remembering, None, stream.size_T, asked_TD)
            out = checkpoint(*arguments, *more, use_reentrant=False, preserve_rng_state=False)
        else:
            out = block(*arguments[1:], context, cache, stream.size_T, asked_TD)
        result: BlockOutput = out
        return result

    def _leave(
        self, step: int, passed: Passed, received_T: Tensor | None, context: Context
    ) -> Kept | None:
        """Let tokens go after a block, if it is one where they may; returns who goes on."""
        stream, kept, block = passed.stream, None, str(step % self.config.layers)
        if step == self.config.steps - 1:
            return None  # they leave anyway
        here = (stream.tokens, stream.packing.lengths)
        if block in self.halts:
            assert passed.halted is not None
            passed.halted, kept = self.halts[block](*here, passed.halted, context)
            passed.go_on(kept)
        if block in self.prunes:
            prune = cast(Prune, self.prunes[block])
            choice, kept = prune(*here, context, received_T)
            mass_R = prune.mass(stream.tokens, choice, kept)
            passed.go_on(kept)
            passed.stream = replace(passed.stream, size_T=mass_R)
        return kept

    def shift_routers(self, shift: float) -> None:
        """Add to the logits of all routers in depth, in evaluation: more tokens, or fewer."""
        for module in self.modules():
            if isinstance(module, Shifted):
                module.shift = shift

    def soften_routers(self, soft: bool) -> None:
        """Have no token leave in evaluation: what training saw before thresholds were hard."""
        for module in self.modules():
            if isinstance(module, Shifted):
                module.soft = soft

    @property
    def moes(self) -> list[MoE | None]:
        """The experts of each block; None where it is dense."""
        return [block.moe for block in self.blocks if isinstance(block, Block)]

    def aux_loss(self, output: Output) -> Tensor:
        """The routing losses of all layers times their coefficients: this rank's share."""
        terms = [
            moe.aux_loss(out.choice)
            for moe, out in zip(self.moes * self.config.loops, output.routed, strict=True)
            if moe is not None and out is not None
        ]
        scale: dict[str, Tensor | float] = {}
        if self.config.attention is not None:
            scale["cluster_balance"] = self.config.attention.balance_loss
        if self.config.routing is not None:
            scale |= self.config.routing.loss_scale
        if self.budget is not None:
            scale["cost"] = self.budget.weight
        terms += [scale[name] * loss for losses in output.depth for name, loss in losses.items()]
        return torch.stack(terms).sum() if terms else self.norm.weight.new_zeros(())
