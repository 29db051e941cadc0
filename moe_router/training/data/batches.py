"""Rows to batches, as pure functions of where the run is: a resume needs no saved state.

Step, micro-step, rank and place inside the rank's share give a row's number in the whole run; its
epoch is that number over the rows of the stream, and the epoch's shuffle says which row it is.
Ranks take neighbouring shares of a micro-batch, so all W together hold the same rows in the same
order for any W.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_router.errors import ConfigError, DataError
from moe_router.training.data.dataset import Dataset
from moe_router.training.data.permutation import permute


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of one micro-batch: rows end to end, no padding.

    Attributes:
        ids_T: int64, the inputs.
        target_N: int64, what is to be predicted: for text N is T, the token after each in the
            stream; for labelled documents N is B, the label of each.
        position_T: int32, position inside its document or, if it began in an earlier row, its row.
        offsets_B1: int32, sequence b is tokens offsets[b] : offsets[b + 1]; one starts at every
            row and every separator, and attention stays inside.
        first_token: index of this rank's first token in the micro-batch of all ranks.
        tokens: of the micro-batch, all ranks.
        targets: likewise.
    """

    ids_T: Tensor
    target_N: Tensor
    position_T: Tensor
    offsets_B1: Tensor
    first_token: int
    tokens: int
    targets: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; the offsets stay, the model reads them on the host."""
        tensors = (self.ids_T, self.target_N, self.position_T)
        ids_T, target_N, position_T = (x.to(device, non_blocking=True) for x in tensors)
        return replace(self, ids_T=ids_T, target_N=target_N, position_T=position_T)


def train_batch(
    dataset: Dataset,
    *,
    batch: int,
    step: int,
    micro: int,
    accumulation: int,
    rank: int,
    ranks: int,
    seed: int,
) -> Batch:
    """The rows of one rank in one micro-step of training.

    Args:
        batch: rows of one optimizer step, all micro-steps and ranks together.
        step: optimizer steps done before this one, from 0.
        micro: micro-step inside the step, 0..accumulation-1.
        rank: 0..ranks-1.
        seed: names the shuffles.

    Raises:
        ConfigError: `batch` cannot be shared out evenly.
        IndexError: step, micro or rank is out of range.
    """
    share = share_of(batch, accumulation, ranks)
    check_place(step, micro, accumulation, rank, ranks)
    first = step * batch + (micro * ranks + rank) * share
    index_B = shuffled(first, share, dataset.train.rows, seed)
    length = dataset.train.seq_len
    return _pack(
        dataset.train.rows_at(index_B.tolist()),
        dataset.tokenizer.document_id,
        first_token=rank * share * length,
        tokens=ranks * share * length,
    )


def val_batches(
    dataset: Dataset, *, rows: int, batch: int, rank: int, ranks: int
) -> Iterator[Batch]:
    """The first held-out rows in order, each exactly once over all ranks and batches.

    Rows are spread as evenly as they go, so every rank gets as many batches as the others and none
    of them is empty; to that end a batch may be a few rows larger than asked for.

    Args:
        rows: how many; all there are if there are fewer.
        batch: rows of one batch, all ranks together.
        rank: 0..ranks-1.

    Raises:
        DataError: there is not one row for each rank.
    """
    rows = min(rows, dataset.val.rows)
    if rows < ranks:
        raise DataError(
            f"{rows} held-out rows (data.val_fraction, train.eval_rows), want at least {ranks}, "
            "one for each of cluster.actors"
        )
    length = dataset.val.seq_len
    count = max(1, min(-(-rows // batch), rows // ranks))
    for i in range(count):
        start, stop = i * rows // count, (i + 1) * rows // count
        mine = [start + r * (stop - start) // ranks for r in (rank, rank + 1)]
        yield _pack(
            dataset.val.rows_at(range(*mine)),
            dataset.tokenizer.document_id,
            first_token=(mine[0] - start) * length,
            tokens=(stop - start) * length,
        )


def check_place(step: int, micro: int, accumulation: int, rank: int, ranks: int) -> None:
    """Raises IndexError where no batch lies."""
    if step < 0 or not 0 <= micro < accumulation or not 0 <= rank < ranks:
        raise IndexError(
            f"step={step} micro={micro} rank={rank}: want step >= 0, micro in "
            f"0..{accumulation - 1}, rank in 0..{ranks - 1}"
        )


def share_of(batch: int, accumulation: int, ranks: int) -> int:
    """Rows of one rank in one micro-step."""
    share, rest = divmod(batch, accumulation * ranks)
    if share < 1 or rest:
        raise ConfigError(
            f"train.batch={batch}: want a multiple of {accumulation * ranks}, "
            "train.accumulation * cluster.actors"
        )
    return share


def shuffled(first: int, count: int, rows: int, seed: int) -> NDArray[np.int64]:
    """Rows number first : first + count of the run, which may lie in several epochs."""
    number_B = np.arange(first, first + count)
    epoch_B, index_B = np.divmod(number_B, rows)
    if epoch_B[0] == epoch_B[-1]:  # nearly always
        return permute(index_B, rows, seed=seed, epoch=int(epoch_B[0]))
    for epoch in np.unique(epoch_B).tolist():
        inside = epoch_B == epoch
        index_B[inside] = permute(index_B[inside], rows, seed=seed, epoch=epoch)
    return index_B


def _pack(rows_BS: NDArray[np.int32], separator: int, *, first_token: int, tokens: int) -> Batch:
    """Rows of S - 1 inputs and one token more, to flat tensors and their boundaries."""
    starts_BS = rows_BS[:, :-1] == separator
    starts_BS[:, 0] = True
    offset_B = np.flatnonzero(starts_BS)
    offsets_B1 = np.append(offset_B, starts_BS.size).astype(np.int32)
    position_T = np.arange(starts_BS.size, dtype=np.int32)
    position_T -= np.repeat(offsets_B1[:-1], np.diff(offsets_B1))
    wide_BS = rows_BS.astype(np.int64)
    return Batch(
        ids_T=torch.from_numpy(wide_BS[:, :-1].reshape(-1)),
        target_N=torch.from_numpy(wide_BS[:, 1:].reshape(-1)),
        position_T=torch.from_numpy(position_T),
        offsets_B1=torch.from_numpy(offsets_B1),
        first_token=first_token,
        tokens=tokens,
        targets=tokens,
    )
