"""What one step measured, added up on the device and over all ranks in one message."""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.routing import Ledger
from moe_router.types import Routed


class Tally:
    """Args:
    layers, experts: of the MoE layers; 0, 0 without any.
    micro_steps: of the step.
    """

    def __init__(self, layers: int, experts: int, micro_steps: int, device: torch.device) -> None:
        self.ledger = Ledger()
        self._layers, self._experts, self._micro_steps = layers, experts, micro_steps
        self._load = torch.zeros(layers, experts, dtype=torch.float64, device=device)
        self._cross_entropy = torch.zeros((), dtype=torch.float64, device=device)
        self._rows = torch.zeros(2, dtype=torch.float64, device=device)  # asked, kept
        self._losses: dict[str, Tensor] = {}

    def add(self, cross_entropy: Tensor, routed: tuple[Routed | None, ...]) -> None:
        """One micro-step: nats summed over this rank's tokens, and what each layer chose."""
        self._cross_entropy += cross_entropy.detach()
        for layer, out in enumerate(out for out in routed if out is not None):
            ids_E = torch.arange(self._experts, device=self._load.device)
            chosen_E = (out.choice.target_TK.flatten()[:, None] == ids_E).sum(0)
            self._load[layer] += chosen_E
            self._rows += torch.stack([chosen_E.sum(), out.plan.offsets_G1[-1].long()])
            for name, loss in out.choice.losses.items():
                share = loss.detach().double() / (self._layers * self._micro_steps)
                self._losses[name] = self._losses.get(name, torch.zeros_like(share)) + share

    def total(self, ranks: int) -> "StepTotals":
        """Everything summed over all ranks, read by the host once."""
        names = sorted(self._losses)
        executed, dense = self.ledger.totals()
        flops = torch.tensor([executed, dense], dtype=torch.float64, device=self._load.device)
        losses = [self._losses[name] for name in names]
        flat = torch.cat(
            [self._cross_entropy[None], self._rows, flops, self._load.flatten()]
            + [loss[None] for loss in losses]
        )
        if ranks > 1:
            dist.all_reduce(flat)
        return StepTotals(flat.cpu(), (self._layers, self._experts), names)


class StepTotals:
    """Host numbers of one step, all ranks together."""

    def __init__(self, flat: Tensor, shape: tuple[int, int], names: list[str]) -> None:
        self.cross_entropy, asked, kept, executed, dense = flat[:5].tolist()
        self.rows, self.dropped = int(asked), int(asked - kept)
        self.executed_flops, self.dense_flops = int(executed), int(dense)
        cells = shape[0] * shape[1]
        self.load_LE = flat[5 : 5 + cells].view(shape)
        self.losses = dict(zip(names, flat[5 + cells :].tolist(), strict=True))
