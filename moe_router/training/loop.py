"""One rank of a training run: batches in, committed steps out.

Every rank runs the same code on its rows of the batch. The loss is a global sum over a global
token count, so W ranks follow the curve of one.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_router.config import Config
from moe_router.models import ClassifierOutput, LMOutput, token_loss
from moe_router.observability.records import EvalRecord, StepRecord
from moe_router.observability.trace import Recorder
from moe_router.routing import Context
from moe_router.training.build import build_model, repeat_bitwise
from moe_router.training.checkpoint import CheckpointWriter, read_about, read_checkpoint
from moe_router.training.checkpoint_files import drop_leftovers
from moe_router.training.data import AnyDataset, Batch, load_dataset
from moe_router.training.diagnose import first_cause, not_finite
from moe_router.training.evaluate import evaluate
from moe_router.training.micro import Micro
from moe_router.training.migrate import Placements, move_all
from moe_router.training.optimizer import clip, learning_rate, make_optimizer, set_rate, set_step
from moe_router.training.parallel import Ownership, local_gradients, moe_layers, share_gradients
from moe_router.training.peers import peers_may_be_lost
from moe_router.training.probe import watched
from moe_router.training.rebalance import Rebalanced, Rebalancer
from moe_router.training.state import named_state
from moe_router.training.tally import StepTotals, Tally

REBALANCE = "rebalance"  # in state.json


class Trainer:
    """Args:
    config: of the run.
    rank, ranks: in the default process group, which must exist when ranks > 1.
    device: of the model.
    dataset: loaded from config.data if not given.
    run_dir: where routing records go; None records nothing.
    """

    def __init__(
        self,
        config: Config,
        *,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | str = "cpu",
        dataset: AnyDataset | None = None,
        run_dir: Path | None = None,
    ) -> None:
        self.config, self.rank, self.ranks = config, rank, ranks
        self.device = torch.device(device)
        self.dataset = dataset or load_dataset(config.data)
        self.step = 0
        self.repeated = 0  # steps that were taken again by host splits: see dispatch/bounded.py
        self._run_dir = run_dir
        repeat_bitwise(self.device)
        with peers_may_be_lost(f"rank {rank}, setting up"):
            self.model = build_model(
                config, self.dataset, ranks=ranks, device=self.device, run_dir=run_dir
            )
            self._writer = CheckpointWriter(rank, ranks, config)
        self._optimizer = make_optimizer(self.model, config.train)
        self._owned = Ownership.of(self.model)
        self._moes = moe_layers(self.model)
        self.own_load_LE = torch.zeros(0, 0)  # choices of this rank's tokens in the last step
        self._rebalancer: Rebalancer | None = None
        if (rebalance := config.cluster.rebalance) is not None:
            self._rebalancer = Rebalancer(rebalance, self._moes, self.move_experts)
        self.rebalanced: Rebalanced | None = None  # of the last step

    def train_step(self) -> StepRecord:
        """Take the next optimizer step.

        Returns:
            The record, equal on all ranks but for `seconds` and what dispatch took.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; the weights are unchanged.
            WorkerLostError: another rank is gone; the weights are unchanged.
        """
        with peers_may_be_lost(f"rank {self.rank}, step {self.step + 1}"):
            return self._train_step()

    def evaluate(self) -> EvalRecord:
        """Held-out quality, equal on all ranks. Raises WorkerLostError."""
        doing = f"rank {self.rank}, evaluation at step {self.step}"
        where = (self.rank, self.ranks, self.device)
        with peers_may_be_lost(doing), self.model.dispatcher.exactly():
            return evaluate(self.model, self.dataset, self.config, self.step, *where)

    def save(self, run_dir: Path, *, wait: bool = False) -> None:
        """Write run_dir/step_N, on all ranks, in the background; see `CheckpointWriter.save`."""
        self._writer.save(run_dir, self.step, self.state(), wait=wait, more=self.about())

    def about(self) -> dict[str, Any]:
        """What a checkpoint's state.json says beside the tensors."""
        return {} if self._rebalancer is None else {REBALANCE: self._rebalancer.state()}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by global name: views, each on the rank that writes it."""
        return named_state(self.model, self._optimizer, once=True)

    def restore(self, step_dir: Path) -> None:
        """Go on from a checkpoint, whatever number of ranks wrote it.

        Raises:
            CheckpointError: damaged, foreign, or of another model.
        """
        self._writer.wait()
        if self._rebalancer is not None:
            self._rebalancer.restore(read_about(step_dir).get(REBALANCE))
            self._owned = Ownership.of(self.model)
        about = read_checkpoint(step_dir, named_state(self.model, self._optimizer))
        self.step = about["step"]
        set_step(self._optimizer, self.step)
        if self.rank == 0:
            drop_leftovers(step_dir.parent)

    def move_experts(self, placements: Placements) -> int:
        """Have the experts of each MoE layer where these say, with their moments, between two
        steps; all ranks together. `cluster.rebalance` does it by the load.

        Returns:
            Slots that got another expert, over all layers and ranks.

        Raises:
            WorkerLostError: another rank is gone; go on from a checkpoint.
        """
        with peers_may_be_lost(f"rank {self.rank}, moving experts after step {self.step}"):
            moved = move_all(self._moes, placements, self._optimizer)
        self._owned = Ownership.of(self.model)
        return moved

    def close(self) -> None:
        """Wait for the checkpoint that is being written. Raises what `save` would."""
        self._writer.wait()

    def _train_step(self) -> StepRecord:
        began = time.perf_counter()
        self.model.train()
        micros = [self._micro(i) for i in range(self.config.train.accumulation)]
        tally, totals, recorder = self._gradients(micros)
        if totals.overflows:  # rows were lost: nothing of that pass counts
            self.repeated += 1
            self._optimizer.zero_grad(set_to_none=True)
            with self.model.dispatcher.exactly():
                tally, totals, recorder = self._gradients(micros)
        tokens = sum(micro.batch.tokens for micro in micros)
        loss = totals.cross_entropy / sum(micro.batch.targets for micro in micros)
        if not (math.isfinite(loss) and math.isfinite(totals.grad_norm)):
            self._refuse(micros, loss, totals.grad_norm)
        lr = self._commit(totals)
        if recorder is not None:
            recorder.save()
        self.own_load_LE = tally.own_load_LE
        if self._rebalancer is not None:
            times_L = tally.probe.expert_us_L
            self.rebalanced = self._rebalancer.after_step(self.step, totals.load_LE, times_L)
        return totals.record(
            step=self.step,
            loss=loss,
            lr=lr,
            tokens=tokens,
            seconds=time.perf_counter() - began,
            probe=tally.probe,
        )

    def _gradients(self, micros: list[Micro]) -> tuple[Tally, StepTotals, Recorder | None]:
        """Forward and backward of the whole step, summed over all ranks."""
        experts = self.config.model.moe.experts if self.config.model.moe else 0
        tally = Tally(len(self._moes), experts, len(micros), self.device)
        recorder = Recorder.due(self.config.run, self.step + 1, self._run_dir, self.rank)
        for micro in micros:
            self._forward_backward(micro, tally, recorder)
        return tally, self._sum_over_ranks(tally), recorder

    def _micro(self, index: int) -> Micro:
        where = {"rank": self.rank, "ranks": self.ranks}
        return Micro.of(
            self.config, self.dataset, step=self.step, index=index, device=self.device, **where
        )

    def _forward_backward(self, micro: Micro, tally: Tally, recorder: Recorder | None) -> None:
        batch = micro.batch
        if recorder is not None:
            # tokens are counted through the whole step
            before = micro.key.step % self.config.train.accumulation * batch.tokens
            recorder.begin(batch.shown_T, batch.position_T, before + batch.first_token)
        with watched(self._moes, tally.probe):
            context = Context(micro.key, tally.ledger, recorder, step=self.step)
            output = self._forward(batch, context)
        cross_entropy = token_loss(output.logits, batch.target_N)
        loss = cross_entropy / batch.targets + self.model.aux_loss(output)
        (loss / self.config.train.accumulation).backward()  # type: ignore[no-untyped-call]
        tally.add(cross_entropy, output.routed, output.depth)

    def _forward(self, batch: Batch, context: Context) -> LMOutput | ClassifierOutput:
        bf16 = self.config.train.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            output: LMOutput | ClassifierOutput = self.model(
                batch.ids_T, batch.position_T, batch.offsets_B1, context=context
            )
        return output

    def _sum_over_ranks(self, tally: Tally) -> StepTotals:
        owned = self._owned
        owned.fill_gradients()
        if self.ranks > 1:
            share_gradients(self.model, owned)
        return tally.total(self.ranks, *owned.squares(self.device))

    def _commit(self, totals: StepTotals) -> float:
        """Change the weights: from here on the step counts."""
        train, owned = self.config.train, self._owned
        clip(local_gradients(owned.apart + owned.alike), totals.grad_norm, train.clip_norm)
        lr = learning_rate(self.step, train)
        set_rate(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for moe, load_E in zip(self._moes, totals.load_LE, strict=True):
            if moe.config.bias_rate > 0:
                moe.router.update_bias(load_E.to(self.device))
        if self.model.budget is not None:
            share = totals.executed_flops / totals.dense_flops
            self.model.budget.update(share, totals.losses["cost"], self.step)
        self.step += 1
        return lr

    def _refuse(self, micros: list[Micro], loss: float, norm: float) -> None:
        def forward_again() -> None:
            for micro in micros:
                self._forward(micro.batch, Context(micro.key, step=self.step))

        cause = first_cause(self.model, self.ranks, forward_again)
        self._optimizer.zero_grad(set_to_none=True)
        raise not_finite(self.step, loss, norm, cause)
