"""One way in for every kind of data."""

from moe_router.config import DataConfig
from moe_router.training.data.dataset import Dataset, load_text
from moe_router.training.data.labelled import LabelledDataset, load_labelled

AnyDataset = Dataset | LabelledDataset


def load_dataset(config: DataConfig) -> AnyDataset:
    """Read, tokenise and split what `config` names. The same config gives the same dataset.

    Raises:
        DataError: data is missing, empty, damaged, cannot be downloaded, or too little.
    """
    return load_labelled(config) if config.source == "labelled" else load_text(config)
