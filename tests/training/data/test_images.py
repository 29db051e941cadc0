"""Images: what is read, what is refused, how they are cut, and which of them a batch holds."""

import itertools
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moe_router.config import DataConfig, ImageConfig
from moe_router.errors import ConfigError, DataError
from moe_router.training.data import load_dataset, train_batch, val_batches
from moe_router.training.data.images import patches
from tests.training.data.images_work import (
    NAMES,
    labels,
    pixels,
    write_folders,
    write_idx,
    write_npz,
)


def config(path, size=6, channels=1, patch=2, **keys):
    image = ImageConfig(size=size, channels=channels, patch=patch)
    known = {
        "source": "images",
        "path": path and str(path),
        "labels": NAMES,
        "seq_len": image.tokens,
    }
    return DataConfig(**known | {"image": image} | keys)


def content(part):
    """The label and the corner's value of each image, which says which one it is."""
    return [(int(label), int(part.read(n)[0, 0, 0])) for n, label in enumerate(part.label_N)]


def wanted(count):
    return [(int(label), n * 7 % 200) for n, label in enumerate(labels(count))]


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_hold_out_a_second_file_or_a_part_of_the_first(tmp_path, packed):
    train = write_idx(tmp_path, "train", 20, packed=packed)
    test = write_idx(tmp_path, "t10k", 9, packed=packed)
    data = load_dataset(config(train, val_path=str(test)))
    assert content(data.train) == wanted(20)
    assert sorted(content(data.val)) == sorted(wanted(9)) and content(data.val) != wanted(9)
    assert np.array_equal(data.train.read(3), pixels(20)[3])
    data = load_dataset(config(train, val_fraction=0.2))
    assert (data.train.rows, data.val.rows) == (16, 4)
    assert sorted(content(data.train) + content(data.val)) == sorted(wanted(20))


def test_an_npz_holds_both_parts(tmp_path):
    path = str(write_npz(tmp_path / "small.npz", {"train": 12, "test": 6}))
    data = load_dataset(config(path, size=8, channels=3, patch=4, val_path=path))
    assert (data.train.rows, data.val.rows) == (12, 6)
    for n in range(12):  # JPEG is lossy
        assert np.abs(data.train.read(n).astype(int) - pixels(12, 8, 3)[n]).max() < 12
    assert data.train.label_N.tolist() == labels(12).tolist()


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_the_folder_is_the_label(tmp_path, kind):
    write_folders(tmp_path / "all", 12, kind=kind)
    (tmp_path / "all" / "ant" / ".hidden.png").write_bytes(b"no image")
    (tmp_path / "all" / "ant" / "notes.txt").write_text("no image")
    data = load_dataset(config(tmp_path / "all", channels=3, val_fraction=0.25))
    found = content(data.train) + content(data.val)
    assert [label for label, _ in sorted(found)] == sorted(labels(12).tolist())
    if kind == "png":
        assert sorted(found) == sorted(wanted(12))
    assert set(data.val.label_N.tolist()) == {0, 1, 2}  # files are sorted by label


def test_images_of_another_size_keep_their_middle_and_grey_is_the_luminance(tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "bee").mkdir()
    wide = np.zeros((12, 36, 3), np.uint8)
    wide[:, 12:24] = (255, 0, 0)
    Image.fromarray(wide).save(tmp_path / "ant" / "wide.png")
    Image.fromarray(np.full((6, 6), 9, np.uint8)).save(tmp_path / "bee" / "grey.png")
    colour = load_dataset(config(tmp_path, channels=3, val_fraction=0.5))
    by_label = {p.label_N[0]: p.read(0) for p in (colour.train, colour.val)}
    assert (by_label[0][:, 1:-1] == (255, 0, 0)).all()  # the filter looks past the crop's edge
    assert (by_label[1] == 9).all()
    grey = load_dataset(config(tmp_path, channels=1, val_fraction=0.5))
    assert {int(p.read(0)[3, 3, 0]) for p in (grey.train, grey.val)} == {76, 9}  # 0.299 * 255


def test_mean_and_spread_are_those_of_the_training_images(tmp_path):
    data = load_dataset(config(write_idx(tmp_path, "train", 20), val_fraction=0.2))
    values = np.stack([data.train.read(n) for n in range(16)]).astype(float)
    assert data.mean == pytest.approx([values.mean()]) and data.std == pytest.approx([values.std()])


def test_a_patch_is_a_square_of_the_image():
    image = np.arange(6 * 6 * 3, dtype=np.uint8).reshape(6, 6, 3)
    cut = patches([image, image[::-1]], ImageConfig(size=6, patch=2))
    assert cut.shape == (18, 12)
    for t in range(18):
        row, column = t % 9 // 3 * 2, t % 3 * 2
        of = image if t < 9 else image[::-1]
        assert np.array_equal(cut[t].reshape(2, 2, 3), of[row : row + 2, column : column + 2])
    assert patches([], ImageConfig(size=6, patch=2)).shape == (0, 12)


PLACE = {"micro": 0, "rank": 0, "ranks": 1, "batch": 12, "accumulation": 1}


def sequences(batch):
    bounds = batch.offsets_B1.tolist()
    parts = (batch.ids_T[a:b].flatten() for a, b in itertools.pairwise(bounds))
    return list(zip(batch.target_N.tolist(), (tuple(p.tolist()) for p in parts), strict=True))


@settings(max_examples=12, deadline=None)
@given(
    step=st.integers(0, 9),
    seed=st.integers(0, 3),
    ranks=st.sampled_from([1, 2, 3]),
    accumulation=st.sampled_from([1, 2]),
)
def test_any_number_of_ranks_reads_the_same_images(
    tmp_path_factory, step, seed, ranks, accumulation
):
    file = write_idx(tmp_path_factory.mktemp("data"), "train", 40)
    data = load_dataset(config(file))
    whole = train_batch(data, **PLACE | {"step": step, "seed": seed})
    assert (whole.ids_T.shape, whole.tokens, whole.targets) == ((108, 4), 108, 12)
    assert whole.ids_T.dtype == torch.uint8 and whole.position_T.dtype == torch.int32
    assert whole.position_T.tolist() == list(range(9)) * 12
    got = []
    for micro in range(accumulation):
        where = {"step": step, "micro": micro, "accumulation": accumulation, "seed": seed}
        parts = [
            train_batch(data, **PLACE | where | {"rank": r, "ranks": ranks}) for r in range(ranks)
        ]
        sizes = [len(part.ids_T) for part in parts]
        assert [part.first_token for part in parts] == np.cumsum([0, *sizes[:-1]]).tolist()
        assert {part.tokens for part in parts} == {sum(sizes)}
        got += [each for part in parts for each in sequences(part)]
    assert got == sequences(whole)


def test_an_epoch_reads_each_image_once_and_each_anew(tmp_path):
    data = load_dataset(config(write_idx(tmp_path, "train", 40), val_fraction=0.1))
    place = PLACE | {"seed": 1, "batch": 4}
    epochs = [
        [
            each
            for step in range(9 * e, 9 * e + 9)
            for each in sequences(train_batch(data, **place | {"step": step}))
        ]
        for e in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert len(set(epochs[0])) == 36


@pytest.mark.parametrize("ranks", [1, 3])
def test_held_out_images_are_read_once_over_all_ranks(tmp_path, ranks):
    data = load_dataset(config(write_idx(tmp_path, "train", 40), val_fraction=0.3))
    parts = [list(val_batches(data, rows=99, batch=4, rank=r, ranks=ranks)) for r in range(ranks)]
    found = [each[0] for part in parts for batch in part for each in sequences(batch)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(found) == sorted(data.val.label_N.tolist()) and len(found) == 12
    with pytest.raises(DataError, match=r"2 held-out images .* want at least 3"):
        next(val_batches(data, rows=2, batch=4, rank=0, ranks=3))


def broken_idx(folder, change):
    file = write_idx(folder, "train", 8)
    change(folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte")
    return file


BAD = {
    "no labels": (lambda _, file: file.unlink(), "no labels beside it"),
    "short": (lambda file, _: file.write_bytes(file.read_bytes()[:-3]), "want 288: broken"),
    "text": (lambda file, _: file.write_bytes(b"hello"), "not an IDX file of bytes in 3"),
    "swapped": (
        lambda file, other: file.write_bytes(other.read_bytes()),
        "not an IDX file of bytes in 3",
    ),
    "a label too many": (
        lambda _, file: file.write_bytes(file.read_bytes()[:-1] + b"\x03"),
        "image 7 has label 3, want one of the 3 of data.labels",
    ),
    "few labels": (
        lambda _, file: file.write_bytes(np.array([0x801, 2], ">u4").tobytes() + b"\0\1"),
        "2 labels for 8 images",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_idx_file_ends_in_one_line(tmp_path, name):
    change, message = BAD[name]
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(config(broken_idx(tmp_path, change)))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_other_sizes_and_missing_or_strange_files_are_refused(tmp_path):
    file = write_idx(tmp_path, "train", 8)
    with pytest.raises(DataError, match=r"6 x 6 pixels in grey, want data\.image\.size=8"):
        load_dataset(config(file, size=8))
    with pytest.raises(DataError, match=r"data\.path=.*trian-images.* no such file.*did you mean"):
        load_dataset(config(tmp_path / "trian-images-idx3-ubyte"))
    with pytest.raises(DataError, match=r"^data\.val_path=.*: no such file"):
        load_dataset(config(file, val_path=str(tmp_path / "none")))
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(DataError, match=r"bad\.npz: cannot be read"):
        load_dataset(config(tmp_path / "bad.npz"))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(DataError, match=r"no array train_jpeg, want train_jpeg, train_offsets"):
        load_dataset(config(tmp_path / "other.npz"))
    np.savez(
        tmp_path / "bounds.npz",
        train_jpeg=np.zeros(5, np.uint8), train_offsets=[0, 4], train_labels=[0],
    )  # fmt: skip
    with pytest.raises(DataError, match=r"train_offsets are no bounds of 1 files in train_jpeg"):
        load_dataset(config(tmp_path / "bounds.npz"))


def test_folders_of_no_label_without_images_or_with_a_broken_one_are_refused(tmp_path):
    root = write_folders(tmp_path / "all", 9)
    (root / "bees").mkdir()
    with pytest.raises(DataError, match=r"bees: a folder of no label.*did you mean 'bee'"):
        load_dataset(config(root, channels=3))
    (root / "bees").rmdir()
    (root / "bee" / "001.png").write_bytes((root / "bee" / "001.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"001\.png: no image that can be read") as caught:
        load_dataset(config(root, channels=3, val_fraction=0.1))
    assert "\n" not in str(caught.value)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no images, want a folder for each label"):
        load_dataset(config(tmp_path / "none"))


def test_without_pillow_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    write_folders(tmp_path / "all", 6)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=re.escape("pip install 'moe-router[images]'")):
        load_dataset(config(tmp_path / "all", channels=3))
    load_dataset(config(write_idx(tmp_path, "train", 8), val_fraction=0.25))  # needs none


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"image": None}, r"^data\.image=null: want size, channels and patch"),
        ({"seq_len": 10}, r"^data\.seq_len=10: want 9, the patches of an image"),
        ({"labels": ("one",)}, r"^data\.labels="),
        ({"path": None}, r"^data\.path is missing"),
        ({"source": "labelled"}, r"^data\.image=a section: want null, for data\.source=labelled"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        config(**{"path": "x"} | keys)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"size": 7, "patch": 2}, r"^data\.image\.size=7: want a multiple of 2"),
        ({"size": 8, "channels": 2}, r"^data\.image\.channels=2: want 1 or 3"),
        ({"size": 8, "patch": 0}, r"^data\.image\.patch=0: want at least 1"),
    ],
)
def test_a_shape_that_cannot_be_cut_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        ImageConfig(**keys)
