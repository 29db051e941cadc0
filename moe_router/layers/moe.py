"""The mixture-of-experts layer. START HERE: the whole path of a token is `MoE.forward`."""

import torch
from torch import Tensor, nn

from moe_router.config import Kernels, MoEConfig
from moe_router.dispatch import Dispatcher, Local
from moe_router.errors import ConfigError
from moe_router.layers.experts import Experts, autocast
from moe_router.layers.swiglu import SwiGLU
from moe_router.placement import Placement
from moe_router.routing import Context, Router, make_plan
from moe_router.routing.context import PLAIN
from moe_router.routing.decide import capacity
from moe_router.types import Choice, Plan, Routed, Tokens


class MoE(nn.Module):
    """Each token is processed by the experts its router chooses, and by a shared one if there is.

    Args:
        dim: hidden size D.
        config: experts, top_k, hidden, and how to route; see `MoEConfig`.
        layer: index in the model: names the noise and the observed choices.
        dispatcher: how tokens reach experts on other ranks; default: all experts are here.
        placement: which rank holds which expert, or a copy; default: the dispatcher's `place`.
        kernels: `auto` is the fastest that runs here, `triton` insists on the Triton kernels,
            `reference` is the specification.
    """

    def __init__(
        self,
        dim: int,
        config: MoEConfig,
        *,
        layer: int = 0,
        dispatcher: Dispatcher | None = None,
        placement: Placement | None = None,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__()
        self.config = config
        self.dim = dim
        self.layer = layer
        self.dispatcher = dispatcher or Local()
        ranks = self.dispatcher.ranks
        self.placement = placement or self.dispatcher.place(config.experts)
        if (self.placement.experts, self.placement.ranks) != (config.experts, ranks):
            raise ConfigError(
                f"placement of {self.placement.experts} experts on {self.placement.ranks} ranks: "
                f"want {config.experts} on {ranks}"
            )
        self.router = Router(dim, config, layer=layer, kernels=kernels)
        held = len(self.placement.experts_of_rank[self.dispatcher.rank])
        self.experts = Experts(held, dim, config.hidden, kernels)
        self.shared = SwiGLU(dim, config.shared_hidden) if config.shared_hidden else None
        self.causal = config.policy != "expert_choice"

    def forward(self, x: Tensor | Tokens, context: Context | None = None) -> Routed:
        """Route, compute, combine.

        Args:
            x: (..., S, D), each S a sequence, or packed Tokens.
            context: noise, ledger, observer, memory; default: none.

        Returns:
            Routed; `delta_TD` has the shape of x and does not include the residual.
        """
        context = context or PLAIN
        tokens = x if isinstance(x, Tokens) else _packed(x)
        x_TD, recomputing = tokens.x_TD, context.recomputing
        choice = self.router(tokens, context, self.dispatcher.total)
        plan = context.recall("plan", lambda: self._plan(choice, tokens))
        if not recomputing:
            self._account(choice, plan, context)

        first_token = context.key.first_token
        sent = (autocast(x_TD), choice, plan)  # as experts compute: half the bytes on the link
        received = self.dispatcher.dispatch(*sent, self.placement, first_token)
        # while rows travel: they are waited for where x_ND is asked for
        shared_TD = None if self.shared is None else self.shared(x_TD)
        y_ND = self.experts(received.x_ND, received.choice, received.plan)
        delta_TD = self.dispatcher.combine(y_ND, received)
        if shared_TD is not None:
            delta_TD = delta_TD + shared_TD
        if not isinstance(x, Tokens):
            delta_TD = delta_TD.view(x.shape)
        return Routed(delta_TD, choice, plan, received.overflow)

    def aux_loss(self, choice: Choice) -> Tensor:
        """The routing losses times their coefficients: this rank's share of a global sum."""
        config = self.config
        scale = {
            "balance": config.balance_loss,
            "z": config.z_loss,
            "sequence_balance": config.sequence_balance_loss,
        }
        terms = [scale[name] * loss for name, loss in choice.losses.items()]
        return torch.stack(terms).sum() if terms else choice.weight_TK.new_zeros(())

    def _plan(self, choice: Choice, tokens: Tokens) -> Plan:
        config = self.config
        # capacity depends on the batch, so it is for training only
        bounded = self.training and config.policy == "top_k" and config.capacity_factor is not None
        limit = capacity(tokens.x_TD.size(0), config) if bounded else None
        return make_plan(
            choice, config.experts, capacity=limit, drop=config.drop, position_T=tokens.position_T
        )

    def _account(self, choice: Choice, plan: Plan, context: Context) -> None:
        if context.ledger is not None:
            row_flops = 6 * self.dim * self.config.hidden
            asked = choice.target_TK.size(0) * self.config.top_k
            context.ledger.add("experts", plan.offsets_G1[-1] * row_flops, asked * row_flops)
        if context.observe is not None:
            context.observe(self.layer, choice, plan)


def _packed(x: Tensor) -> Tokens:
    """(..., S, D) as packed sequences of S tokens."""
    x_TD = x.reshape(-1, x.size(-1))
    T, S = x_TD.size(0), x.size(-2) if x.dim() > 1 else 1
    position_T = torch.arange(T, device=x.device, dtype=torch.int32) % max(S, 1)
    offsets_B1 = torch.arange(0, T + 1, max(S, 1), device=x.device, dtype=torch.int32)
    return Tokens(x_TD, position_T, offsets_B1)
