"""What one step measured, added up on the device and over all ranks in one message."""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.observability.records import StepRecord
from moe_router.routing import Ledger
from moe_router.training.probe import Probe
from moe_router.types import Routed
from moe_router_kernels import reference

_SCALARS = 7  # cross-entropy, asked, kept, overflows, FLOPs: see `Tally.total`


class Tally:
    """Args:
    layers, experts: of the MoE layers; 0, 0 without any.
    micro_steps: of the step.
    """

    def __init__(self, layers: int, experts: int, micro_steps: int, device: torch.device) -> None:
        self.ledger, self.probe = Ledger(), Probe(device, layers)
        self._layers, self._experts, self._micro_steps = layers, experts, micro_steps
        # fp64 holds counts to 2**53 and lets one message carry them beside the losses
        self._load_LE = torch.zeros(layers, experts, dtype=torch.float64, device=device)
        self._cross_entropy = torch.zeros((), dtype=torch.float64, device=device)
        self._kept = torch.zeros((), dtype=torch.float64, device=device)
        self._overflows = torch.zeros((), dtype=torch.float64, device=device)
        self._losses: dict[str, Tensor] = {}

    def add(
        self,
        cross_entropy: Tensor,
        routed: tuple[Routed | None, ...],
        depth: tuple[dict[str, Tensor], ...] = (),
    ) -> None:
        """One micro-step.

        Args:
            cross_entropy: nats, summed over this rank's tokens.
            routed: what the experts of each block chose.
            depth: the losses of each router in depth.
        """
        self._cross_entropy += cross_entropy.detach()
        for layer, out in enumerate(out for out in routed if out is not None):
            self._load_LE[layer] += reference.count(out.choice.target_TK, self._experts)
            self._kept += out.plan.offsets_G1[-1]
            if out.overflow is not None:
                self._overflows += out.overflow != 0
            self._add_losses(out.choice.losses, self._layers)
        routers = Counter(name for losses in depth for name in losses)
        for losses in depth:
            for name, loss in losses.items():
                self._add_losses({name: loss}, routers[name])

    @property
    def own_load_LE(self) -> Tensor:
        """fp64, on the device: choices of this rank's tokens alone."""
        return self._load_LE

    def _add_losses(self, losses: dict[str, Tensor], routers: int) -> None:
        for name, loss in losses.items():
            share = loss.detach().double() / (routers * self._micro_steps)
            self._losses[name] = self._losses.get(name, torch.zeros_like(share)) + share

    def total(self, ranks: int, apart: Tensor, alike: Tensor) -> "StepTotals":
        """Everything summed over all ranks, read by the host once.

        Args:
            apart, alike: fp64 scalars, squares of the gradients that lie here alone, and of those
                that are equal on every rank, which count once.
        """
        names = sorted(self._losses)
        flops = self._load_LE.new_tensor(self.ledger.totals())
        rows = [self._load_LE.sum(), self._kept, self._overflows]
        scalars = [self._cross_entropy, *rows, *flops, apart]
        losses = [self._losses[name] for name in names]
        flat = torch.cat([torch.stack([*scalars, *losses]), self._load_LE.flatten()])
        if ranks > 1:
            dist.all_reduce(flat)
        host = torch.cat([flat, alike[None]]).cpu()
        return StepTotals(host, (self._layers, self._experts), names)


class StepTotals:
    """Numbers of one step on the host, all ranks together; equal on every rank.

    Attributes:
        cross_entropy: nats, summed over tokens.
        overflows: passes of a layer on a rank whose static bounds were too small; if there is
            one, the rest is not true.
        grad_norm: L2, of the global gradient.
        load_LE: fp64, rows chosen for each expert.
    """

    def __init__(self, host: Tensor, shape: tuple[int, int], names: list[str]) -> None:
        scalars = host[:_SCALARS].tolist()
        self.cross_entropy, asked, kept, overflows, executed, dense, square = scalars
        self.overflows = int(overflows)
        self.grad_norm = (square + float(host[-1])) ** 0.5
        self.rows, self.dropped = int(asked), int(asked - kept)
        self.executed_flops, self.dense_flops = int(executed), int(dense)
        after = _SCALARS + len(names)
        self.losses = dict(zip(names, host[_SCALARS:after].tolist(), strict=True))
        self.load_LE = host[after:-1].view(shape)

    def record(
        self, *, step: int, loss: float, lr: float, tokens: int, seconds: float, probe: Probe
    ) -> StepRecord:
        """What a run reports of it."""
        return StepRecord(
            step=step,
            loss=loss,
            losses=self.losses,
            grad_norm=self.grad_norm,
            lr=lr,
            tokens=tokens,
            seconds=seconds,
            load_LE=self.load_LE.int().tolist(),
            rows=self.rows,
            dropped=self.dropped,
            executed_flops=self.executed_flops,
            dense_flops=self.dense_flops,
            dispatch_us=probe.microseconds,
            dispatch_bytes=probe.bytes,
        )
