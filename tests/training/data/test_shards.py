import json
from pathlib import Path

import numpy as np
import pytest

from moe_router.errors import DataError
from moe_router.training.data import ByteTokenizer, write_shard
from moe_router.training.data.shards import open_shards

BYTES = ByteTokenizer()


def write(path: Path, *texts: bytes) -> int:
    return write_shard(path, map(list, texts), document_id=BYTES.document_id, vocab=BYTES.vocab)


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_written_shards_come_back_mapped_and_in_order(tmp_path: Path, suffix: str) -> None:
    assert write(tmp_path / f"a{suffix}", b"one", b"", b"three") == 3 + 8
    write(tmp_path / f"b{suffix}", b"four" * 5)
    train, val = open_shards(str(tmp_path), BYTES, 0.5)
    parts = [*train.pieces(0, 99), *val.pieces(0, 99)]
    assert all(isinstance(part, np.memmap) and part.dtype == np.uint16 for part in parts)
    flat = np.concatenate(parts).tolist()
    assert flat == [256, *b"one", 256, 256, *b"three", 256, *b"four" * 5]


def test_npy_is_numpys_own_and_the_sidecar_is_documented(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.npy", [[1, 2], [70000]], document_id=0, vocab=70001)
    loaded = np.load(tmp_path / "x.npy", allow_pickle=False)
    assert loaded.dtype == np.uint32 and loaded.tolist() == [0, 1, 2, 0, 70000]
    assert json.loads((tmp_path / "x.npy.json").read_text()) == {
        "format": "moe-router-shard",
        "version": 1,
        "dtype": "uint32",
        "tokens": 5,
        "documents": 2,
        "document_id": 0,
        "vocab": 70001,
    }


def test_a_users_own_npy_needs_no_sidecar(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", np.arange(100, dtype=np.uint16))
    train, val = open_shards(str(tmp_path / "mine.npy"), BYTES, 0.25)
    assert (len(train), len(val)) == (75, 25)  # no document starts near: cut at the token


def test_the_cut_is_the_nearest_start_of_a_document(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", *[b"x" * 9] * 7)
    write(tmp_path / "b.bin", *[b"x" * 9] * 3)
    for fraction, want in ((0.1, 10), (0.14, 10), (0.16, 20), (0.34, 30), (0.001, 10)):
        train, val = open_shards(str(tmp_path / "*"), BYTES, fraction)
        assert (len(train), len(val)) == (100 - want, want), fraction


def test_ids_outside_the_vocabulary_are_not_written(tmp_path: Path) -> None:
    for ids in ([257], [-1]):
        with pytest.raises(DataError, match=r"x.bin: document 2 has ids outside 0..256"):
            write_shard(tmp_path / "x.bin", [[1], ids], document_id=256, vocab=257)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=r"x.pt: a shard ends in .npy or .bin"):
        write(tmp_path / "x.pt", b"a")


def spoil(path: Path, key: str, value: object) -> None:
    note = json.loads(path.read_text())
    path.write_text(json.dumps(note | {key: value}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab", 50257, "vocab is 50257, want 257, that of data.tokenizer"),
        ("document_id", 0, "document_id is 0, want 256"),
        ("dtype", "object", "dtype is object, want uint16 or uint32"),
        ("tokens", 99, "4 tokens, want 99 by its sidecar; the shard is truncated"),
        ("format", "other", 'want "format": "moe-router-shard"'),
    ],
)
def test_a_foreign_sidecar_is_refused(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    write(tmp_path / "x.bin", b"abc")
    spoil(tmp_path / "x.bin.json", key, value)
    with pytest.raises(DataError, match=message):
        open_shards(str(tmp_path), BYTES, 0.1)


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write(path, b"abc")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"x.bin: 3 tokens, want 4 by its sidecar"):
        open_shards(str(path), BYTES, 0.1)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"x.bin: is empty"):
        open_shards(str(path), BYTES, 0.1)
    (tmp_path / "x.bin.json").write_text("[")
    with pytest.raises(DataError, match=r"x.bin.json: not JSON"):
        open_shards(str(path), BYTES, 0.1)
    (tmp_path / "x.bin.json").unlink()
    with pytest.raises(DataError, match=r"x.bin: no x.bin.json beside it"):
        open_shards(str(path), BYTES, 0.1)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(9, np.int64), r"holds int64 \(9,\), want one dimension of uint16 or uint32"),
        (np.zeros((3, 3), np.uint16), r"holds uint16 \(3, 3\)"),
        (np.array([{}], object), "not a whole .npy file"),
        (np.zeros(0, np.uint16), "has no tokens"),
    ],
)
def test_other_arrays_are_refused_and_never_unpickled(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        open_shards(str(tmp_path / "x.npy"), BYTES, 0.1)


def test_a_truncated_npy_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.npy", b"abc" * 100)
    for size in (300, 40, 0):
        (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:size])
        with pytest.raises(DataError, match=r"x.npy: not a whole .npy file .*write it again"):
            open_shards(str(tmp_path / "x.npy"), BYTES, 0.1)
