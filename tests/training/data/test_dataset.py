import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moe_router.config import DataConfig
from moe_router.errors import DataError
from moe_router.training.data import Segments, dataset, load_dataset, write_shard


def text(folder: Path, *documents: str, **keys: object) -> DataConfig:
    for i, document in enumerate(documents):
        (folder / f"{i:03}.txt").write_text(document)
    return DataConfig(source="text", path=str(folder), **{"seq_len": 4, **keys})


def flat(line: Segments) -> list[int]:
    return [int(t) for piece in line.pieces(0, len(line)) for t in piece]


def test_the_last_documents_are_held_out_each_after_a_separator(tmp_path: Path) -> None:
    data = load_dataset(text(tmp_path, *["abcd"] * 7, "wxyz", val_fraction=0.1))
    assert flat(data.train.tokens) == [256, *b"abcd"] * 7
    assert flat(data.val.tokens) == [256, *b"wxyz"]
    data = load_dataset(text(tmp_path, *["abcd"] * 7, "wxyz", val_fraction=0.99))
    assert flat(data.train.tokens) == [256, *b"abcd"]


def test_one_document_is_cut(tmp_path: Path) -> None:
    data = load_dataset(text(tmp_path, "0123456789" * 10, val_fraction=0.2))
    assert len(data.train.tokens) == 81 and len(data.val.tokens) == 20
    assert flat(data.train.tokens)[:2] == [256, 48]
    assert 256 not in flat(data.val.tokens)


@pytest.mark.parametrize("long", [3, 10**6])
def test_long_documents_stay_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: int
) -> None:
    monkeypatch.setattr(dataset, "_LONG", long)
    data = load_dataset(text(tmp_path, "ab", "abcdef", "ab", "uvwxyz", val_fraction=0.3))
    assert flat(data.train.tokens) == [256, *b"ab", 256, *b"abcdef", 256, *b"ab"]
    assert flat(data.val.tokens) == [256, *b"uvwxyz"]
    types = [piece.dtype for piece in data.train.tokens.pieces(0, 99)]
    assert (np.dtype(np.uint8) in types) == (long == 3)


@pytest.mark.parametrize(("n", "part"), [(2, "the held-out part has 5"), (1, "the training part")])
def test_too_little_text_is_refused(tmp_path: Path, n: int, part: str) -> None:
    with pytest.raises(DataError, match=rf"data.path=.*: {part}.* tokens, want at least 9 for one"):
        load_dataset(
            text(tmp_path, *["abcd" * (3 if i < n - 1 else 1) for i in range(n)], seq_len=8)
        )


def test_unigram_entropy_is_that_of_the_held_out_bytes(tmp_path: Path) -> None:
    data = load_dataset(text(tmp_path, "zzzz", "aabb", "abcdefgh" * 3, val_fraction=0.4))
    assert math.isclose(data.unigram_bits_per_byte, 3.0)
    data = load_dataset(text(tmp_path, "zzzz", "aaab", "aaabaaab", val_fraction=0.4))
    want = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert math.isclose(data.unigram_bits_per_byte, want)


def tokenizer_file(folder: Path) -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "ab"])}, merges=[("a", "b")])
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def test_a_tokenizer_file_and_bits_per_byte_not_per_token(tmp_path: Path) -> None:
    name = tokenizer_file(tmp_path)
    config = text(tmp_path, "cdcdcd", "abcab" * 2, tokenizer=name, seq_len=2, val_fraction=0.5)
    data = load_dataset(config)
    assert data.tokenizer.decode(flat(data.val.tokens)) == "abcab" * 2
    assert flat(data.val.tokens)[0] == data.tokenizer.document_id == 257
    tokens = -(4 * math.log2(4 / 6) + 2 * math.log2(2 / 6))  # ab 4 times, c twice
    assert math.isclose(data.unigram_bits_per_byte, tokens / 10)


@pytest.mark.parametrize("piece", [1, 2, 5, 7, 1000])
def test_a_long_document_is_encoded_in_whole_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    words = "one\ntwo ☃☃☃ three\n\N{GRINNING FACE} four"
    monkeypatch.setattr(dataset, "_PIECE", max(piece, 4))  # a character has four bytes at most
    config = text(tmp_path, "x" * 20, words, tokenizer=tokenizer_file(tmp_path))
    data = load_dataset(config)
    assert data.tokenizer.decode(flat(data.val.tokens)) == words


def test_pieces_end_after_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_PIECE", 8)
    document = np.frombuffer("ab\ncd\nefghijklmn☃\n".encode(), np.uint8)
    pieces = list(dataset._pieces(document))
    assert b"".join(pieces) == document.tobytes()
    assert pieces[0] == b"ab\ncd\n"
    assert all(piece.decode() for piece in pieces)


def test_shards_make_the_dataset_that_their_text_makes(tmp_path: Path) -> None:
    documents = ["abcd" * (i + 1) for i in range(9)] + ["wxyz" * 5]
    (tmp_path / "texts").mkdir()
    direct = load_dataset(text(tmp_path / "texts", *documents))
    ids = (direct.tokenizer.encode(d) for d in documents)
    write_shard(tmp_path / "a.bin", ids, document_id=256, vocab=257)
    shards = load_dataset(DataConfig(source="shards", path=str(tmp_path / "a.bin"), seq_len=4))
    assert flat(shards.train.tokens) == flat(direct.train.tokens)
    assert flat(shards.val.tokens) == flat(direct.val.tokens)
    assert shards.unigram_bits_per_byte == direct.unigram_bits_per_byte


def test_held_out_separators_alone_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.npy", [[1, 2, 3]] * 20 + [[]] * 20, document_id=256, vocab=257)
    config = DataConfig(source="shards", path=str(tmp_path / "a.npy"), seq_len=4)
    with pytest.raises(DataError, match="the held-out part has no text"):
        load_dataset(config)


def test_pydoc_loads_and_is_the_same_twice() -> None:
    one, two = (load_dataset(DataConfig(source="pydoc")) for _ in range(2))
    assert one.train.rows > 1500 and one.val.rows > 64
    assert np.array_equal(one.train.row(17), two.train.row(17))
    assert 4 < one.unigram_bits_per_byte == two.unigram_bits_per_byte < 5.5
