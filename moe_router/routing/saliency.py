"""What a router learns of tokens by: how the loss would change if each stayed, or left.

While training computes everybody (`soft_steps`), those who would leave count as next to nothing, so
that the loss is that of the pruned model, and still has a gradient in the mass of every token: for
whoever stays, to the first order, what leaving would cost; for whoever left, what staying would be
worth. That gradient, of the mass and by the mass, is the token's saliency. It reaches the router by
a sigmoid around the place where the token's sequence is cut, so those near it learn the most.
"""

import torch
from torch import Tensor

from moe_router_kernels import reference

LEAST = 1e-20  # mass of a token that nobody sees; its logarithm is finite


def counted(
    logit_T: Tensor,
    taken_T: Tensor,
    asked_T: Tensor,
    offsets_B1: Tensor,
    temperature: float,
) -> Tensor:
    """(T,) 1 for whoever is taken and LEAST for the others, with the gradient of a sigmoid.

    Args:
        logit_T: by which tokens were chosen.
        taken_T, asked_T: bool, who was, and of whom it was a choice.
        temperature: width of the sigmoid, in logits.
    """
    cut_B = _cuts(logit_T.detach(), taken_T, asked_T, offsets_B1)
    cut_T = cut_B[reference.sequence_of(offsets_B1, logit_T.numel())]
    soft_T = ((logit_T - cut_T) / temperature).sigmoid().masked_fill(~asked_T, 0.0)
    hard_T = torch.full_like(soft_T, LEAST).masked_fill(taken_T, 1.0)
    return hard_T + (soft_T - soft_T.detach())  # in this order LEAST is not rounded away


def _cuts(logit_T: Tensor, taken_T: Tensor, asked_T: Tensor, offsets_B1: Tensor) -> Tensor:
    """(B,) halfway between the least logit that was taken and the greatest that was not; beyond
    all logits where all or none were."""
    T, B = logit_T.numel(), offsets_B1.numel() - 1
    if T == 0:
        return logit_T.new_zeros(B)
    sequence_T = reference.sequence_of(offsets_B1, T)
    asked_BT = asked_T & (sequence_T == torch.arange(B, device=logit_T.device)[:, None])
    low_B = torch.where(asked_BT & taken_T, logit_T, torch.inf).amin(1)
    high_B = torch.where(asked_BT & ~taken_T, logit_T, -torch.inf).amax(1)
    return ((low_B + high_B) / 2).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
