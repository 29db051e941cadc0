"""Records every routing decision of some forward passes."""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from moe_router.config import RunConfig
from moe_router.errors import MoeRouterError
from moe_router.observability.trace_data import LayerTrace, Trace, TraceRow
from moe_router.observability.trace_file import export_csv, load_trace, save_trace
from moe_router.types import Choice, Plan

__all__ = ["LayerTrace", "Recorder", "Trace", "TraceRow", "export_csv", "load_trace", "save_trace"]

_Chunk = tuple[Tensor, Tensor, Tensor]  # target_TK, weight_TK, kept_TK of one pass


class Recorder:
    """An `Observe` callable that keeps what it sees, for `Context(observe=recorder)`.

    Call `begin` before each forward pass, or, where the passes are out of reach (inside
    `generate`), never, and `label` at the end. Copies to the host: a recorded pass synchronises.

    Args:
        path: where `save` writes; usually runs/NAME/routing/SOMETHING.safetensors.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._passes: list[tuple[Tensor, Tensor, Tensor]] = []  # token_T, ids_T, position_T
        self._chunks: dict[int, list[_Chunk]] = {}
        self._groups: dict[int, int] = {}
        self._label: tuple[Tensor, Tensor] | None = None

    @classmethod
    def due(cls, run: RunConfig, step: int, run_dir: Path | None, rank: int) -> Self | None:
        """A rank's recorder of a training step, where that is to be recorded."""
        if not run.record or step % run.record_every or run_dir is None:
            return None
        return cls(run_dir / "routing" / f"step_{step}.rank_{rank}.safetensors")

    def begin(self, ids_T: Tensor, position_T: Tensor, first_token: int = 0) -> None:
        """The tokens of the forward pass that comes now.

        Args:
            ids_T, position_T: (T,) integers.
            first_token: global index of the first one.
        """
        ids_T, position_T = ids_T.detach().cpu().long(), position_T.detach().cpu().int()
        token_T = torch.arange(first_token, first_token + ids_T.numel())
        self._passes.append((token_T, ids_T, position_T))

    def label(self, ids_T: Tensor, position_T: Tensor | None = None) -> None:
        """Name all recorded tokens afterwards.

        Args:
            ids_T: (>= T,) ids in the order of the passes; what came out last never went in, so
                there may be more ids than recorded tokens.
            position_T: default: 0, 1, 2, ...
        """
        if position_T is None:
            position_T = torch.arange(ids_T.numel())
        self._label = (ids_T.detach().cpu().long(), position_T.detach().cpu().int())

    def __call__(self, layer: int, choice: Choice, plan: Plan) -> None:
        """Keep one layer's decision. In a pass that was begun, only the first of each layer
        counts: activation checkpointing runs layers again."""
        chunks = self._chunks.setdefault(layer, [])
        if self._passes:
            if len(chunks) == len(self._passes):
                return
            want, got = self._passes[-1][0].numel(), choice.target_TK.size(0)
            if len(chunks) != len(self._passes) - 1 or want != got:
                raise MoeRouterError(
                    f"recorder, layer {layer}: got {got} tokens in pass {len(chunks) + 1}, want "
                    f"{want} in pass {len(self._passes)}: call begin() before each forward pass"
                )
        self._groups[layer] = plan.offsets_G1.numel() - 1
        chunks.append(
            (
                choice.target_TK.detach().cpu().int(),
                choice.weight_TK.detach().cpu().float(),
                (plan.row_TK >= 0).cpu(),
            )
        )

    def trace(self) -> Trace:
        """What was recorded so far.

        Raises:
            MoeRouterError: the layers saw different numbers of tokens, or fewer were labelled.
        """
        layers = {}
        for layer in sorted(self._chunks):
            target, weight, kept = (torch.cat(c) for c in zip(*self._chunks[layer], strict=True))
            layers[layer] = LayerTrace(self._groups[layer], target, weight, kept)
        sizes = {t.target_TK.size(0) for t in layers.values()}
        if len(sizes) > 1:
            raise MoeRouterError(
                f"recorder: layers saw {sorted(sizes)} tokens, want equally many: save between "
                "forward passes, not within one"
            )
        return Trace(*self._tokens(sizes.pop() if sizes else 0), layers)

    def _tokens(self, T: int) -> tuple[Tensor, Tensor, Tensor]:
        if self._passes:
            token_T, ids_T, position_T = (torch.cat(p)[:T] for p in zip(*self._passes, strict=True))
        else:
            token_T = torch.arange(T)
            ids_T, position_T = torch.full((T,), -1), torch.arange(T).int()
        if self._label is not None:
            ids_T, position_T = (x[:T] for x in self._label)
            if ids_T.numel() < T or position_T.numel() < T:
                raise MoeRouterError(
                    f"recorder: label() got {ids_T.numel()} ids, want at least {T}, one for each "
                    "recorded token: pass the prompt and what was generated"
                )
        return token_T, ids_T, position_T

    def save(self) -> Path:
        """Write everything recorded so far in one piece; recording may go on.

        Raises:
            MoeRouterError: as `trace`; or the disk refused.
        """
        save_trace(self.trace(), self.path)
        return self.path
