"""One way in for every kind of data: what to load, and the batches of a place in the run."""

from collections.abc import Iterator

from moe_router.config import DataConfig
from moe_router.training.data import batches, labelled
from moe_router.training.data.batches import Batch
from moe_router.training.data.dataset import Dataset, load_text
from moe_router.training.data.labelled import LabelledDataset, load_labelled

AnyDataset = Dataset | LabelledDataset


def load_dataset(config: DataConfig) -> AnyDataset:
    """Read, tokenise and split what `config` names. The same config gives the same dataset.

    Raises:
        DataError: data is missing, empty, damaged, cannot be downloaded, or too little.
    """
    return load_labelled(config) if config.source == "labelled" else load_text(config)


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
    """What one rank trains on in one micro-step: a pure function of its arguments.

    Args:
        batch: rows (of text) or documents of one optimizer step, all micro-steps and ranks.
        step: optimizer steps done before this one, from 0.
        micro: micro-step inside the step, 0..accumulation-1.
        rank: 0..ranks-1.
        seed: names the shuffles.

    Raises:
        ConfigError: `batch` cannot be shared out evenly.
        IndexError: step, micro or rank is out of range.
    """
    where = {
        "batch": batch,
        "step": step,
        "micro": micro,
        "accumulation": accumulation,
        "rank": rank,
        "ranks": ranks,
        "seed": seed,
    }
    if isinstance(dataset, LabelledDataset):
        return labelled.labelled_batch(dataset, **where)
    return batches.train_batch(dataset, **where)


def val_batches(
    dataset: AnyDataset, *, rows: int, batch: int, rank: int, ranks: int
) -> Iterator[Batch]:
    """The first held-out rows or documents in order, each exactly once over all ranks.

    Args:
        rows: how many; all there are if there are fewer.
        batch: of them in one batch, all ranks together; it may come out a few larger.
        rank: 0..ranks-1.

    Raises:
        DataError: there is not one for each rank.
    """
    where = {"rows": rows, "batch": batch, "rank": rank, "ranks": ranks}
    if isinstance(dataset, LabelledDataset):
        return labelled.labelled_val_batches(dataset, **where)
    return batches.val_batches(dataset, **where)
