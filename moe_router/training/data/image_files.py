"""Images and their labels: a folder for each label, IDX files, or JPEGs packed into one .npz.

What a path is says how it is read: a folder; a file that ends in .npz; any other file is IDX.
"""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from moe_router.config import DataConfig, ImageConfig
from moe_router.errors import DataError
from moe_router.training.data.files import Text, near, read_content

Pixels = NDArray[np.uint8]  # (size, size, channels)
Labelled = tuple[NDArray[np.int64], Callable[[int], Pixels]]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_IMAGES, _LABELS = 0x803, 0x801  # IDX: unsigned bytes in three dimensions, in one


def open_images(path: str, part: str, config: DataConfig) -> Labelled:
    """The label of each image, and a function that reads one.

    Args:
        part: "train" is data.path, "test" is data.val_path: what an .npz calls its arrays.

    Raises:
        DataError: nothing is there, or not what data.labels and data.image say.
    """
    root, key = Path(path).expanduser(), "data.path" if part == "train" else "data.val_path"
    assert config.image is not None
    if root.is_dir():
        label_N, read = _folders(root, key, config)
    elif not root.is_file():
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise DataError(
            f"{key}={path}: no such file, want a folder of folders, an IDX file or an .npz"
            + near(root.name, siblings)
        )
    elif root.suffix.lower() == ".npz":
        label_N, read = _packed(root, part, config.image)
    else:
        label_N, read = _idx(root, config.image)
    if len(label_N) == 0:
        raise DataError(f"{key}={path}: no image in there, want at least one")
    if label_N.max() >= len(config.labels):
        n = int(label_N.argmax())
        raise DataError(
            f"{key}={path}: image {n} has label {label_N[n]}, want one of the "
            f"{len(config.labels)} of data.labels, counted from 0; add its name"
        )
    return label_N, read


def _folders(root: Path, key: str, config: DataConfig) -> Labelled:
    """The folder's name is the label of every image in it, however deep."""
    assert config.image is not None
    shape, known = config.image, {name: i for i, name in enumerate(config.labels)}
    files: list[Path] = []
    labels: list[int] = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if folder.name not in known:
            raise DataError(
                f"{folder}: a folder of no label, want one of data.labels: {', '.join(known)}"
                + near(folder.name, known)
            )
        found = sorted(p for p in folder.rglob("*") if _is_image(p, folder))
        files += found
        labels += [known[folder.name]] * len(found)
    if not files:
        raise DataError(f"{key}={root}: no images, want a folder for each label with images in it")
    return np.array(labels, np.int64), lambda n: _decode(files[n], str(files[n]), shape)


def _is_image(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in _SUFFIXES and path.is_file() and not hidden


def _idx(file: Path, shape: ImageConfig) -> Labelled:
    """Source: Y. LeCun et al., "The MNIST database": big-endian sizes, then the bytes."""
    labels = file.with_name(file.name.replace("images", "labels").replace("idx3", "idx1"))
    if labels == file or not labels.is_file():
        raise DataError(
            f"{file}: no labels beside it, want NAME-images-idx3-ubyte and NAME-labels-idx1-ubyte"
        )
    pixel_NHW, label_N = _array(file, _IMAGES), _array(labels, _LABELS)
    height, width = pixel_NHW.shape[1:]
    if (height, width, 1) != (shape.size, shape.size, shape.channels):
        raise DataError(
            f"{file}: {height} x {width} pixels in grey, want data.image.size={shape.size} and "
            f"data.image.channels={shape.channels}; change data.image"
        )
    if len(label_N) != len(pixel_NHW):
        raise DataError(f"{labels}: {len(label_N)} labels for {len(pixel_NHW)} images of {file}")
    return label_N.astype(np.int64), lambda n: pixel_NHW[n, :, :, None]


def _array(file: Path, magic: int) -> Text:
    content = read_content(file)
    dimensions = magic & 0xFF
    start = 4 + 4 * dimensions  # of the bytes, after the sizes
    head = np.frombuffer(content[: min(start, len(content) // 4 * 4)].tobytes(), ">u4")
    if len(head) != 1 + dimensions or head[0] != magic:
        raise DataError(
            f"{file}: not an IDX file of bytes in {dimensions} dimensions; want a folder of "
            "folders, an IDX file or an .npz"
        )
    shape, body = tuple(map(int, head[1:])), content[start:]
    if len(body) != np.prod(shape):
        raise DataError(f"{file}: {len(body):,} bytes for {shape}, want {np.prod(shape):,}: broken")
    return body.reshape(shape)


def _packed(file: Path, part: str, shape: ImageConfig) -> Labelled:
    """`PART_jpeg`, all files end to end; `PART_offsets`, where each begins; `PART_labels`."""
    names = [f"{part}_{name}" for name in ("jpeg", "offsets", "labels")]
    try:
        # opened here: np.load leaves a file open that is no zip
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:
            missing = [name for name in names if name not in arrays]
            if missing:
                raise DataError(f"{file}: no array {missing[0]}, want {', '.join(names)}")
            jpeg, offset_N1, label_N = (arrays[name] for name in names)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: cannot be read ({error}), want an .npz") from error
    bounds = offset_N1.astype(np.int64).tolist()
    whole = bounds[:1] == [0] and bounds[-1] == len(jpeg) and sorted(bounds) == bounds
    if not whole or len(bounds) != len(label_N) + 1:
        raise DataError(f"{file}: {names[1]} are no bounds of {len(label_N)} files in {names[0]}")

    def read(n: int) -> Pixels:
        content = io.BytesIO(jpeg[bounds[n] : bounds[n + 1]].tobytes())
        return _decode(content, f"{file}, image {n} of {names[0]}", shape)

    return label_N.astype(np.int64), read


def _decode(file: Path | IO[bytes], where: str, shape: ImageConfig) -> Pixels:
    """The middle square of an image, at the wanted size."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError(
            "data.source=images: Pillow is not installed, and reads JPEG, PNG and the like: "
            "pip install 'moe-router[images]'"
        ) from error
    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if shape.channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{where}: no image that can be read ({reason}); take it out") from error
    wanted = (shape.size, shape.size)
    if image.size != wanted:
        image = ImageOps.fit(image, wanted, Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(*wanted, shape.channels)
