"""Trains a small causal model on rows of tokens; on a GPU a step is one CUDA graph, in bf16."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention_controls import LinearAttention
from benchmarks.contest import tell, why
from benchmarks.timing import Run, capture
from moe_router.models import CausalLM
from moe_router.models.attention import Attention
from moe_router.models.packing import Packing

NONE = -100  # a target that does not count
DENSE = 4  # one step in so many, the first ones, is dense: who chooses has learned nothing yet
Batch = Callable[[int], tuple[Tensor, Tensor]]
"""By step: (R, n) ids, and the token wanted after each, or NONE."""


class Learner:
    """Args:
    model: on the CPU.
    rows, length: of a batch.
    """

    def __init__(
        self, model: CausalLM, rows: int, length: int, *, lr: float, device: torch.device
    ) -> None:
        self.model, self.device, self.highest = model.to(device), device, lr
        self.lr = torch.zeros((), device=device)  # read by the graph
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True,
            capturable=device.type == "cuda",
        )  # fmt: skip
        self.ids_RN = torch.zeros(rows, length, dtype=torch.int64, device=device)
        self.target_RN = torch.full_like(self.ids_RN, NONE)
        self.position_T = torch.arange(length, dtype=torch.int32, device=device).repeat(rows)
        bounds = torch.arange(rows + 1, dtype=torch.int32) * length
        self.packing = Packing(bounds, device)
        self.loss = torch.zeros((), device=device)
        self._routed = [
            (module, module.routed)
            for module in model.modules()
            if isinstance(module, Attention) and not isinstance(module, LinearAttention)
        ]

    def logits(self) -> Tensor:
        """(R, n, V) for the ids that were read last."""
        half = self.device.type == "cuda"
        # a graph must not hold on to weights that were cast outside of it
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            out = self.model(self.ids_RN.flatten(), self.position_T, self.packing)
        self.aux = self.model.aux_loss(out)
        logits_RNV: Tensor = out.logits_TV.view(*self.ids_RN.shape, -1)
        return logits_RNV

    def read(self, batch: tuple[Tensor, Tensor]) -> None:
        for held, new in zip((self.ids_RN, self.target_RN), batch, strict=True):
            held.copy_(new)

    def train(self, batch: Batch, steps: int, warmup: int, dense: int = 0) -> None:
        """Args:
        warmup: steps in which the rate comes up.
        dense: first steps, in which what is routed attends to everything.
        """
        self.model.train()
        run: Run = self._step
        for step in range(steps):
            if step in (0, dense):
                self._attend_to_all(step < dense)
            # up in a line, down to a tenth by a cosine
            down = torch.pi * min(1.0, max(0, step - warmup) / max(1, steps - warmup))
            share = 0.55 + 0.45 * float(torch.cos(torch.tensor(down)))
            self.lr.fill_(self.highest * min(1.0, (step + 1) / warmup) * share)
            self.read(batch(step))
            if step in (0, dense) and self.device.type == "cuda":
                run = self._graphed()
            else:
                run()
        self._attend_to_all(False)

    def _attend_to_all(self, all_: bool) -> None:
        for attention, routed in self._routed:
            attention.routed = None if all_ else routed

    def _graphed(self) -> Run:
        """Take one step, and have the others as a graph."""
        try:
            return capture(self._step)
        except Exception as problem:  # then it is trained with its launches
            torch.cuda.synchronize()
            self.optimizer.zero_grad(set_to_none=True)
            tell(f"no graph, {why(problem)}")
            return self._step

    def _step(self) -> None:
        logits_RNV = self.logits()
        wanted = self.target_RN.flatten()
        loss = F.cross_entropy(logits_RNV.flatten(0, 1), wanted, ignore_index=NONE)
        (loss + self.aux).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.copy_(loss.detach())

    @torch.no_grad()
    def held_out(self, batches: int, batch: Batch) -> tuple[float, float]:
        """Mean loss in nats, and accuracy, over the targets of so many batches."""
        self.model.eval()
        total = torch.zeros(3, dtype=torch.float64)
        for step in range(batches):
            self.read(batch(step))
            logits, wanted = self.logits().flatten(0, 1), self.target_RN.flatten()
            loss = F.cross_entropy(logits, wanted, ignore_index=NONE, reduction="sum")
            there = wanted != NONE
            right = ((logits.argmax(-1) == wanted) & there).sum()
            total += torch.stack([loss, right, there.sum()]).double().cpu()
        return float(total[0] / total[2]), float(total[1] / total[2])
