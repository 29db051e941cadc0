"""Text and images to batches: sources, tokenizers, packing, exact resume. Formats: docs/data.md."""

from moe_router.training.data.batch import Batch
from moe_router.training.data.batches import train_batch, val_batches
from moe_router.training.data.dataset import Dataset
from moe_router.training.data.images import ImageDataset
from moe_router.training.data.labelled import LabelledDataset
from moe_router.training.data.load import AnyDataset, load_dataset
from moe_router.training.data.new_tokenizer import make_tokenizer
from moe_router.training.data.permutation import permute
from moe_router.training.data.shards import write_shard
from moe_router.training.data.stream import Segments, TokenStream
from moe_router.training.data.tokenizer import (
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    load_tokenizer,
)

__all__ = [
    "AnyDataset",
    "Batch",
    "ByteTokenizer",
    "Dataset",
    "FileTokenizer",
    "ImageDataset",
    "LabelledDataset",
    "Segments",
    "TokenStream",
    "Tokenizer",
    "load_dataset",
    "load_tokenizer",
    "make_tokenizer",
    "permute",
    "train_batch",
    "val_batches",
    "write_shard",
]
