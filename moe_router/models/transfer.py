"""Copies between host and device that nobody waits for."""

from dataclasses import dataclass

import torch
from torch import Tensor


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that nobody waits for; host may change at once."""
    if device.type != "cuda":
        return host.clone().to(device)
    return host.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Download:
    """Integers on their way to the host."""

    host_N: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, x_N: Tensor) -> "Download":
        """x_N may change once this has returned."""
        if not x_N.is_cuda:
            return cls(x_N.clone(), None)
        host_N = torch.empty(x_N.shape, dtype=x_N.dtype, pin_memory=True)
        host_N.copy_(x_N, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return cls(host_N, arrived)

    def tolist(self) -> list[int]:
        """Waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        numbers: list[int] = self.host_N.tolist()
        return numbers
