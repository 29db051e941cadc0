"""What computed each token of a pass, for those who asked to see it."""

import itertools
from collections.abc import Sequence

from torch import Tensor

from moe_router.routing import Context, Ledger
from moe_router.serving.requests import Path, Trace
from moe_router.types import Choice, Plan


class Tracer:
    """Of one pass; give `context` to the model.

    Args:
        blocks: of the model.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks, self._ledger = blocks, Ledger()
        self._target_TK: dict[int, Tensor] = {}
        self.context = Context(ledger=self._ledger, observe=self._observe)

    def _observe(self, layer: int, choice: Choice, plan: Plan) -> None:
        self._target_TK[layer] = choice.target_TK

    def traces(self, bounds: Sequence[int]) -> list[Trace]:
        """One for each sequence of the pass. Waits for the device.

        Args:
            bounds: of the sequences in the tokens of the pass.
        """
        paths = self._paths(bounds[-1])
        flops = self._ledger.totals()
        return [Trace(tuple(paths[a:b]), *flops) for a, b in itertools.pairwise(bounds)]

    def _paths(self, tokens: int) -> list[Path]:
        columns: list[list[tuple[int, ...] | None]] = []
        for block in range(self._blocks):
            target_TK = self._target_TK.get(block)
            if target_TK is None:
                columns.append([()] * tokens)
                continue
            rows = target_TK.tolist()
            columns.append([tuple(i for i in row if i >= 0) or None for row in rows])
        return list(zip(*columns, strict=True))


def joined(first: Trace | None, then: Trace | None) -> Trace | None:
    """Of two passes that read parts of a prompt."""
    if first is None or then is None:
        return then
    flops = first.executed + then.executed, first.dense + then.dense
    return Trace(first.paths + then.paths, *flops)
