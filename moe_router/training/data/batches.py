"""Rows of text, documents or images to batches, as pure functions of where the run is: a resume
needs no saved state.

Step, micro-step, rank and place inside the rank's share give a row's number in the whole run; its
epoch is that number over the rows of the stream, and the epoch's shuffle says which row it is.
Ranks take neighbouring shares of a micro-batch, so all W together hold the same rows in the same
order for any W.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from moe_router.errors import ConfigError, DataError
from moe_router.training.data.batch import Batch
from moe_router.training.data.dataset import Dataset
from moe_router.training.data.images import ImageDataset, pack_images
from moe_router.training.data.labelled import LabelledDataset, pack_documents
from moe_router.training.data.load import AnyDataset
from moe_router.training.data.permutation import permute


def train_batch(
    dataset: AnyDataset,
    *,
    batch: int,
    step: int,
    micro: int,
    accumulation: int,
    rank: int,
    ranks: int,
    seed: int,
) -> Batch:
    """The rows, or labelled documents or images, of one rank in one micro-step of training.

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
    share = _share(batch, accumulation, ranks)
    if step < 0 or not 0 <= micro < accumulation or not 0 <= rank < ranks:
        raise IndexError(
            f"step={step} micro={micro} rank={rank}: want step >= 0, micro in "
            f"0..{accumulation - 1}, rank in 0..{ranks - 1}"
        )
    first = step * batch + micro * ranks * share
    index_B = _shuffled(first, ranks * share, dataset.train.rows, seed)
    return _pack(dataset, index_B, slice(rank * share, (rank + 1) * share))


def val_batches(
    dataset: AnyDataset, *, rows: int, batch: int, rank: int, ranks: int
) -> Iterator[Batch]:
    """The first held-out rows, documents or images, in order, each exactly once over all ranks
    and batches.

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
        if isinstance(dataset, Dataset):
            what = "rows (data.val_fraction, train.eval_rows)"
        else:
            what = f"{dataset.val.noun} (train.eval_rows)"
        raise DataError(
            f"{rows} held-out {what}, want at least {ranks}, one for each of cluster.actors"
        )
    count = max(1, min(-(-rows // batch), rows // ranks))
    for i in range(count):
        start, stop = i * rows // count, (i + 1) * rows // count
        bounds = [r * (stop - start) // ranks for r in (rank, rank + 1)]
        yield _pack(dataset, np.arange(start, stop), slice(*bounds), val=True)


def _share(batch: int, accumulation: int, ranks: int) -> int:
    """Rows of one rank in one micro-step."""
    share, rest = divmod(batch, accumulation * ranks)
    if share < 1 or rest:
        raise ConfigError(
            f"train.batch={batch}: want a multiple of {accumulation * ranks}, "
            "train.accumulation * cluster.actors"
        )
    return share


def _shuffled(first: int, count: int, rows: int, seed: int) -> NDArray[np.int64]:
    """Rows number first : first + count of the run, which may lie in several epochs."""
    number_B = np.arange(first, first + count)
    epoch_B, index_B = np.divmod(number_B, rows)
    if epoch_B[0] == epoch_B[-1]:  # nearly always
        return permute(index_B, rows, seed=seed, epoch=int(epoch_B[0]))
    for epoch in np.unique(epoch_B).tolist():
        inside = epoch_B == epoch
        index_B[inside] = permute(index_B[inside], rows, seed=seed, epoch=epoch)
    return index_B


def _pack(
    dataset: AnyDataset, index_B: NDArray[np.int64], mine: slice, *, val: bool = False
) -> Batch:
    """One rank's part of a micro-batch of all ranks.

    Args:
        index_B: of the whole micro-batch.
        val: of what is held out, not of what is trained on.
    """
    if isinstance(dataset, ImageDataset):
        return pack_images(dataset.val if val else dataset.train, index_B, mine)
    if isinstance(dataset, LabelledDataset):
        return pack_documents(dataset.val if val else dataset.train, index_B, mine)
    part = dataset.val if val else dataset.train
    return _pack_rows(
        part.rows_at(index_B[mine].tolist()),
        dataset.tokenizer.document_id,
        first_token=mine.start * part.seq_len,
        tokens=len(index_B) * part.seq_len,
    )


def _pack_rows(
    rows_BS: NDArray[np.int32], separator: int, *, first_token: int, tokens: int
) -> Batch:
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
