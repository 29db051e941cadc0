"""One rank of a training run: batches in, committed steps out.

Every rank runs the same code on its rows of the batch. The loss is a global sum over a global
token count, so W ranks follow the curve of one.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_router.config import Config
from moe_router.dispatch import AllToAll, Dispatcher, Local
from moe_router.errors import NonFiniteError
from moe_router.models import CausalLM, LMOutput, init_parameters
from moe_router.models.causal_lm import token_loss
from moe_router.observability.records import EvalRecord, StepRecord
from moe_router.observability.trace import Recorder
from moe_router.routing import Context
from moe_router.training.checkpoint import CheckpointWriter, restore
from moe_router.training.data import Batch, Dataset, load_dataset, train_batch
from moe_router.training.diagnose import BadActivation, first_bad_gradient, first_bad_weight
from moe_router.training.evaluate import evaluate
from moe_router.training.optimizer import (
    clip_by_global_norm,
    learning_rate,
    make_optimizer,
    set_step,
)
from moe_router.training.parallel import Ownership, moe_layers, shard_dense, sum_gradients
from moe_router.training.state import named_state
from moe_router.training.tally import StepTotals, Tally
from moe_router.types import NoiseKey


@dataclass(frozen=True, slots=True)
class _Micro:
    """One micro-step's batch on the device, and what its forward pass carries."""

    batch: Batch
    context: Context


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
        dataset: Dataset | None = None,
        run_dir: Path | None = None,
    ) -> None:
        self.config, self.rank, self.ranks = config, rank, ranks
        self.device = torch.device(device)
        self.dataset = dataset or load_dataset(config.data)
        self.step = 0
        self._run_dir = run_dir
        if self.device.type == "cuda":
            # bitwise repeatable steps; unwritten memory is never read, so it needs no filling
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        dispatcher: Dispatcher = AllToAll() if ranks > 1 else Local()
        self.model = CausalLM(
            config.model,
            self.dataset.tokenizer.vocab,
            dispatcher=dispatcher,
            kernels=config.kernels,
            activation_checkpointing=config.train.activation_checkpointing,
        )
        init_parameters(self.model, config.run.seed)
        self.model.to(self.device)
        if config.train.dense == "fsdp" and ranks > 1:
            shard_dense(self.model, ranks)
        self._optimizer = make_optimizer(self.model, config.train)
        self._owned = Ownership.of(self.model)
        self._moes = moe_layers(self.model)
        self._writer = CheckpointWriter(rank, ranks, config)

    def train_step(self) -> StepRecord:
        """Take the next optimizer step.

        Returns:
            The record, identical on all ranks.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; the weights are unchanged.
        """
        began = time.perf_counter()
        train = self.config.train
        self.model.train()
        experts = self.config.model.moe.experts if self.config.model.moe else 0
        tally = Tally(len(self._moes), experts, train.accumulation, self.device)
        micros = [self._micro(micro, tally) for micro in range(train.accumulation)]
        for micro in micros:
            self._forward_backward(micro, tally)
        if self.ranks > 1:
            sum_gradients(self._owned.replicated)
        norm = clip_by_global_norm(
            self._owned.sharded, self._owned.replicated, train.clip_norm, self.ranks
        )
        totals = tally.total(self.ranks)
        tokens = sum(micro.batch.tokens for micro in micros)
        loss, norm_value = totals.cross_entropy / tokens, float(norm)
        if not (torch.isfinite(torch.tensor([loss, norm_value])).all()):
            self._explain_non_finite(micros, loss, norm_value)
        lr = self._commit(totals)
        return StepRecord(
            step=self.step,
            loss=loss,
            losses=totals.losses,
            grad_norm=norm_value,
            lr=lr,
            tokens=tokens,
            seconds=time.perf_counter() - began,
            load_LE=totals.load_LE.int().tolist(),
            rows=totals.rows,
            dropped=totals.dropped,
            executed_flops=totals.executed_flops,
            dense_flops=totals.dense_flops,
        )

    def evaluate(self) -> EvalRecord:
        """Held-out quality, identical on all ranks."""
        return evaluate(
            self.model, self.dataset, self.config, self.step, self.rank, self.ranks, self.device
        )

    def save(self, run_dir: Path, *, wait: bool = False) -> None:
        """Write run_dir/step_N in the background; on all ranks.

        Args:
            wait: return only when it is in place.

        Raises:
            CheckpointError: this write (wait) or the one before it failed.
        """
        state = named_state(self.model, self._optimizer)
        self._writer.save(run_dir, self.step, state, wait=wait)

    def restore(self, step_dir: Path) -> None:
        """Go on from a checkpoint, whatever number of ranks wrote it.

        Raises:
            CheckpointError: truncated, foreign, or of another model.
        """
        state = named_state(self.model, self._optimizer)
        about = restore(step_dir, state, rank=self.rank, ranks=self.ranks)
        self.step = about["step"]
        set_step(self._optimizer, self.step)

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        self._writer.wait()

    def _micro(self, micro: int, tally: Tally) -> _Micro:
        config = self.config
        batch = train_batch(
            self.dataset,
            batch=config.train.batch,
            step=self.step,
            micro=micro,
            accumulation=config.train.accumulation,
            rank=self.rank,
            ranks=self.ranks,
            seed=config.run.seed,
        )
        batch = batch.to(self.device)
        number = self.step * config.train.accumulation + micro
        key = NoiseKey(config.run.seed, number, batch.first_token)
        recorder = self._recorder(micro, batch)
        return _Micro(batch, Context(key, ledger=tally.ledger, observe=recorder))

    def _forward_backward(self, micro: _Micro, tally: Tally) -> None:
        batch = micro.batch
        output = self._forward(micro)
        cross_entropy = token_loss(output.logits_TV, batch.target_T)
        loss = cross_entropy / batch.tokens + self.model.aux_loss(output)
        (loss / self.config.train.accumulation).backward()  # type: ignore[no-untyped-call]
        tally.add(cross_entropy, output.routed)
        if isinstance(micro.context.observe, Recorder):
            micro.context.observe.save()

    def _forward(self, micro: _Micro) -> LMOutput:
        batch = micro.batch
        bf16 = self.config.train.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            output: LMOutput = self.model(
                batch.ids_T, batch.position_T, batch.offsets_B1, context=micro.context
            )
        return output

    def _commit(self, totals: StepTotals) -> float:
        """Change the weights: from here on the step counts."""
        lr = learning_rate(self.step, self.config.train)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for moe, load_E in zip(self._moes, totals.load_LE, strict=True):
            if moe.config.bias_rate > 0:
                moe.router.update_bias(load_E.to(self.device))
        self.step += 1
        return lr

    def _recorder(self, micro: int, batch: Batch) -> Recorder | None:
        run = self.config.run
        due = (self.step + 1) % run.record_every == 0 and micro == 0
        if not (run.record and due and self._run_dir):
            return None
        name = f"step_{self.step + 1}.rank_{self.rank}.safetensors"
        recorder = Recorder(self._run_dir / "routing" / name)
        recorder.begin(batch.ids_T, batch.position_T, batch.first_token)
        return recorder

    def _explain_non_finite(self, micros: list[_Micro], loss: float, norm: float) -> None:
        """Find the first cause, the same way on all ranks, and raise."""
        where: str | None = first_bad_weight(self.model, self.ranks)
        cause = f"weight {where}" if where else None
        if cause is None:
            with torch.no_grad(), BadActivation(self.model) as watch:
                for micro in micros:
                    self._forward(_Micro(micro.batch, Context(micro.context.key)))
            where = watch.first(self.ranks)
            cause = f"output of {where}" if where else None
        if cause is None:
            cause = f"gradient of {first_bad_gradient(self.model, self.ranks)}"
        self._optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}; the first that is not "
            f"finite is the {cause}; the weights are those of step {self.step}: lower train.lr or "
            "raise train.warmup and run from the last checkpoint"
        )
