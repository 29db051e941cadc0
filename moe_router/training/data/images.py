"""Labelled images: each one cut into square patches, row by row, which are its tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from moe_router.config import DataConfig, ImageConfig
from moe_router.training.data.batch import Batch
from moe_router.training.data.image_files import Pixels, open_images
from moe_router.training.data.labelled import held_out
from moe_router.training.data.permutation import permute

_MEASURED = 5000  # training images that mean and spread are taken over, at most


@dataclass(frozen=True, slots=True)
class Images:
    """Attributes:
    label_N: int64.
    read: the pixels of image n; from a file, if they lie in files.
    shape: of every image.
    """

    label_N: NDArray[np.int64]
    read: Callable[[int], Pixels]
    shape: ImageConfig
    noun: ClassVar[str] = "images"

    @property
    def rows(self) -> int:
        return len(self.label_N)

    def some(self, index_N: NDArray[np.int64]) -> "Images":
        """Those of these numbers, in this order."""
        where = index_N.tolist()
        return Images(self.label_N[index_N], lambda n: self.read(where[n]), self.shape)


@dataclass(frozen=True, slots=True)
class ImageDataset:
    """Attributes:
    train, val: images by index; `val` is held out.
    labels: names, in order of their ids.
    mean, std: fp32, of the values 0..255 of each channel of the training images.
    """

    train: Images
    val: Images
    labels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    vocab: ClassVar[int] = 0  # patches have no ids


def load_images(config: DataConfig) -> ImageDataset:
    """Find what `config` names. The same config gives the same dataset.

    Raises:
        DataError: a file is missing, damaged or of another size or label; images in folders are
            read, and may be found damaged, when a batch wants them.
    """
    assert config.path is not None and config.image is not None
    train = Images(*open_images(config.path, "train", config), config.image)
    if config.val_path is None:
        is_val_N = held_out(train.rows, config, Images.noun)
        train, val = (train.some(np.flatnonzero(mask)) for mask in (~is_val_N, is_val_N))
    else:
        val = Images(*open_images(config.val_path, "test", config), config.image)
    # the first train.eval_rows are measured: files are often sorted by label
    val = val.some(permute(np.arange(val.rows), val.rows, seed=0, epoch=0))
    return ImageDataset(train, val, config.labels, *_mean_and_std(train))


def _mean_and_std(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact: sums of whole numbers."""
    index_N = np.unique(np.linspace(0, images.rows - 1, min(images.rows, _MEASURED)).astype(int))
    total, squares = np.zeros((2, images.shape.channels), np.int64)
    for n in index_N.tolist():
        pixels = images.read(n).astype(np.int64)
        total += pixels.sum((0, 1))
        squares += (pixels * pixels).sum((0, 1))
    count = len(index_N) * images.shape.size**2
    mean = total / count
    # at least one step of 255: a channel that never changes stays finite
    std = np.sqrt(np.maximum(squares / count - mean * mean, 1.0))
    return tuple(mean.tolist()), tuple(std.tolist())


def pack_images(images: Images, index_N: NDArray[np.int64], mine: slice) -> Batch:
    """One rank's images, index[mine], of a micro-batch of all ranks, as flat tensors."""
    ours = images.some(index_N[mine])
    shape, tokens = images.shape, images.shape.tokens
    patch_TP = patches([ours.read(n) for n in range(ours.rows)], shape)
    position_T = np.tile(np.arange(tokens, dtype=np.int32), ours.rows)
    return Batch(
        ids_T=torch.from_numpy(patch_TP),
        target_N=torch.from_numpy(ours.label_N),
        position_T=torch.from_numpy(position_T),
        offsets_B1=torch.arange(0, len(position_T) + 1, tokens, dtype=torch.int32),
        first_token=mine.start * tokens,
        tokens=len(index_N) * tokens,
        targets=len(index_N),
    )


def patches(images: list[Pixels], shape: ImageConfig) -> NDArray[np.uint8]:
    """(T, P): the P values of each patch, row by row, the channels of a pixel side by side."""
    g, p = shape.grid, shape.patch
    if not images:
        return np.zeros((0, shape.values), np.uint8)
    cut = np.stack(images).reshape(-1, g, p, g, p, shape.channels)
    return np.ascontiguousarray(cut.transpose(0, 1, 3, 2, 4, 5)).reshape(-1, shape.values)
