"""Tiny image files of every format, made by the tests that read them."""

import gzip
import io

import numpy as np
from PIL import Image

NAMES = ("ant", "bee", "cow")


def pixels(count, size=6, channels=1):
    """Images that say which one they are: smooth, so that JPEG keeps them."""
    base = np.arange(count)[:, None, None, None] * 7 % 200
    slope = np.arange(size)[None, :, None, None] * 2 + np.arange(channels) * 9
    return np.broadcast_to(base + slope, (count, size, size, channels)).astype(np.uint8)


def labels(count):
    return np.arange(count) % len(NAMES)


def write_idx(folder, part, count, *, size=6, packed=False, noise=False):
    """NAME-images-idx3-ubyte and its labels; the path of the images."""
    image_N, label_N = pixels(count, size)[..., 0], labels(count).astype(np.uint8)
    if noise:  # no two patches alike
        image_N = np.random.default_rng(0).integers(0, 256, image_N.shape).astype(np.uint8)
    ending, write = (".gz", gzip.compress) if packed else ("", bytes)
    for kind, magic, array in (("images-idx3", 0x803, image_N), ("labels-idx1", 0x801, label_N)):
        head = np.array([magic, *array.shape], ">u4").tobytes()
        (folder / f"{part}-{kind}-ubyte{ending}").write_bytes(write(head + array.tobytes()))
    return folder / f"{part}-images-idx3-ubyte{ending}"


def encoded(image, kind):
    out = io.BytesIO()
    grey = image.shape[-1] == 1
    Image.fromarray(image[..., 0] if grey else image).save(out, kind, quality=95)
    return out.getvalue()


def write_npz(path, counts, *, size=8):
    """PART_jpeg, PART_offsets and PART_labels of each part."""
    arrays = {}
    for part, count in counts.items():
        files = [encoded(image, "JPEG") for image in pixels(count, size, 3)]
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{part}_labels"] = labels(count).astype(np.uint8)
    np.savez(path, **arrays)
    return path


def write_folders(root, count, *, size=6, channels=3, kind="png"):
    """A folder for each label; the label of an image is n % 3."""
    for n, image in enumerate(pixels(count, size, channels)):
        file = root / NAMES[n % 3] / f"{n:03}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(image, "PNG" if kind == "png" else "JPEG"))
    return root
