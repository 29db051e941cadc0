"""One way in for every kind of data."""

from moe_router.config import DataConfig
from moe_router.training.data.dataset import Dataset, load_text
from moe_router.training.data.images import ImageDataset, load_images
from moe_router.training.data.labelled import LabelledDataset, load_labelled
from moe_router.training.remote import with_local_data

AnyDataset = Dataset | LabelledDataset | ImageDataset


def load_dataset(config: DataConfig) -> AnyDataset:
    """Read and split what `config` names. The same config gives the same dataset.

    Raises:
        DataError: data is missing, empty, damaged, cannot be downloaded, or too little.
    """
    config = with_local_data(config)
    match config.source:
        case "labelled":
            return load_labelled(config)
        case "images":
            return load_images(config)
        case _:
            return load_text(config)
