"""The tokens of a padded batch, packed: what is padding, or has left, has no row."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_router.errors import ConfigError
from moe_router.models.packing import Packing
from moe_router.routing.depth import Kept
from moe_router.types import Tokens
from moe_router_kernels import gather


@dataclass(frozen=True, slots=True)
class Rows:
    """Attributes:
    x_TD: the residual stream.
    position_T: int32, in the text.
    packing: of the texts, as they are now.
    place_T: int64, of each row in the flat (B, S) grid.
    size_T: fp32 mass of each token; None is one each.
    """

    x_TD: Tensor
    position_T: Tensor
    packing: Packing
    place_T: Tensor
    size_T: Tensor | None = None

    @classmethod
    def of(cls, x_BSD: Tensor, here_BS: Tensor, position_BS: Tensor, *, causal: bool) -> "Rows":
        """Waits for the device: how many tokens are here is a value.

        Args:
            here_BS: bool, what is no padding.
        """
        place_T = here_BS.flatten().nonzero().squeeze(1)
        lengths = here_BS.sum(1).tolist()
        bounds_B1 = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        packing = Packing(bounds_B1, x_BSD.device, lengths=lengths, causal=causal)
        position_T = position_BS.flatten()[place_T].int()
        return cls(x_BSD.flatten(0, 1)[place_T], position_T, packing, place_T)

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.x_TD, self.position_T, self.packing.offsets_B1, self.size_T)

    def take(self, kept: Kept) -> "Rows":
        """Only the kept tokens; gradients of x_TD flow back to where they came from."""
        src_R = kept.plan.src_R
        size_R = None if self.size_T is None else self.size_T[src_R]
        return self.at(kept, gather(self.x_TD, src_R, kept.plan.row_TK), size_R)

    def at(self, kept: Kept, x_RD: Tensor, size_R: Tensor | None) -> "Rows":
        """Other states in the places of the kept tokens."""
        src_R, causal = kept.plan.src_R.long(), self.packing.causal
        bounds_B1 = kept.plan.offsets_G1
        packing = Packing(bounds_B1, x_RD.device, lengths=kept.lengths, causal=causal)
        return Rows(x_RD, self.position_T[src_R], packing, self.place_T[src_R], size_R)

    def to(self, x_TD: Tensor) -> "Rows":
        """The same tokens with other states."""
        return replace(self, x_TD=x_TD)


def not_padding(
    mask_B1SL: Tensor | None,
    grid: tuple[int, int],
    device: torch.device,
    *,
    causal: bool,
    past: int,
) -> Tensor:
    """(B, S) bool, from the mask that transformers made of the padding: who is none sees itself.

    Args:
        grid: B, S of the new tokens.
        causal: whether, without a past, a token sees the earlier ones alone.
        past: slots before the new tokens; with one, the mask itself says who sees whom.

    Raises:
        ConfigError: it says something that packed rows do not: waits for the device.
    """
    B, S = grid
    if mask_B1SL is None:
        return torch.ones(B, S, dtype=torch.bool, device=device)
    mask_BHSL = mask_B1SL.expand(B, -1, S, -1)
    new = torch.arange(S, device=device)
    here_BS = mask_BHSL[:, 0, new, past + new]
    fits = mask_BHSL.dtype is torch.bool
    if fits and not past:
        seen_BSS = here_BS[:, None].expand(B, S, S)
        seen_BSS = seen_BSS.tril() if causal else seen_BSS
        other_BHSS = mask_BHSL[..., :S] != seen_BSS[:, None]
        fits = not bool((other_BHSS & here_BS[:, None, :, None]).any())
    if not fits:
        raise ConfigError(
            "attention_mask: after wrap it tells padding alone; want (B, S) of 1 and 0, and one "
            "text a row: position_ids that do not begin again"
        )
    return here_BS


def weights_of(module: nn.Module, *, without: nn.Module | None = None) -> int:
    """Numbers in the matrices of a module; 2 FLOPs each for a token.

    Args:
        without: a router in it, which is counted elsewhere.
    """
    own = set() if without is None else {id(p) for p in without.parameters()}
    return sum(p.numel() for p in module.parameters() if p.dim() == 2 and id(p) not in own)


def refuse_states(config: Any, asked: dict[str, Any]) -> None:
    """Raises:
    ConfigError: states of single layers are asked for.
    """
    for what in ("output_hidden_states", "output_attentions"):
        if asked.get(what) or getattr(config, what, False):
            raise ConfigError(f"{what}: after wrap each layer has other tokens; want it off")


class _AlsoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x_RD.view_as(x_RD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad_RD, torch.ones_like(loss)


def also_minimise(x_RD: Tensor, loss: Tensor) -> Tensor:
    """x_RD. A loss that the caller of the model does not see is minimised with the one it does:
    whatever loop trains, the gradient of the loss is added in the backward pass."""
    out_RD: Tensor = _AlsoLoss.apply(x_RD, loss)  # type: ignore[no-untyped-call]
    return out_RD
