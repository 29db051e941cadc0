"""The only source of "compute saved": FLOPs that were executed, beside those of the dense layer."""

from collections import defaultdict

import torch
from torch import Tensor


class Ledger:
    """Adds up on the device; reading it is the only synchronisation."""

    def __init__(self) -> None:
        self._executed: dict[str, list[Tensor | int]] = defaultdict(list)
        self._dense: dict[str, list[Tensor | int]] = defaultdict(list)

    def add(self, op: str, executed_flops: Tensor | int, dense_flops: Tensor | int) -> None:
        """Count one call of `op`.

        Args:
            executed_flops: what ran, 2 per multiply-add; a scalar tensor stays on its device.
            dense_flops: what the layer costs when every token takes it; likewise.
        """
        self._executed[op].append(executed_flops)
        self._dense[op].append(dense_flops)

    def by_op(self) -> dict[str, tuple[int, int]]:
        """(executed, dense) FLOPs of each op. Waits for the device."""
        return {op: (_sum(ran), _sum(self._dense[op])) for op, ran in self._executed.items()}

    def totals(self) -> tuple[int, int]:
        """(executed, dense) FLOPs of all ops. Waits for the device."""
        pairs = self.by_op().values()
        return sum(e for e, _ in pairs), sum(d for _, d in pairs)

    def reset(self) -> None:
        self._executed.clear()
        self._dense.clear()


def _sum(parts: list[Tensor | int]) -> int:
    tensors = [p for p in parts if isinstance(p, Tensor)]
    on_device = int(torch.stack(tensors).sum()) if tensors else 0
    return on_device + sum(p for p in parts if not isinstance(p, Tensor))
