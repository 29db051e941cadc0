"""The transformer block: attention, then a dense or a routed feed-forward layer."""

from torch import Tensor, nn

from moe_router.config import Kernels, ModelConfig
from moe_router.dispatch import Dispatcher
from moe_router.layers.moe import MoE
from moe_router.layers.swiglu import SwiGLU
from moe_router.models.attention import Attention
from moe_router.models.kv_cache import LayerCache
from moe_router.models.norm import RMSNorm
from moe_router.models.packing import Packing
from moe_router.models.rope import Turn
from moe_router.placement import Placement
from moe_router.routing import Context
from moe_router.types import Routed, Tokens


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
        self.attention = Attention(config)
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

    def forward(
        self,
        x_TD: Tensor,
        position_T: Tensor,
        turn: Turn,
        packing: Packing,
        context: Context,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Routed | None]:
        """The next x_TD, and what the routed layer did if there is one.

        x_TD is an argument of its own, not a field of Tokens, so that FSDP2 finds its gradient.
        """
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), turn, packing, cache)
        normed_TD = self.mlp_norm(x_TD)
        if self.moe is None:
            assert self.mlp is not None
            return x_TD + self.mlp(normed_TD), None
        routed: Routed = self.moe(Tokens(normed_TD, position_T, packing.offsets_B1), context)
        return x_TD + routed.delta_TD, routed
