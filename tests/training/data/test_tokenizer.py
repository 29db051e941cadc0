from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moe_router.errors import DataError
from moe_router.training.data import ByteTokenizer, load_tokenizer

ALPHABET = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_level(folder: Path, *special: str) -> str:
    """A tokenizer of 256 single bytes and one merge, "th"."""
    library = Tokenizer(models.BPE(vocab=ALPHABET | {"th": 256}, merges=[("t", "h")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True) for name in special])
    library.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_of[ids].sum() == len(text.encode())


def test_byte_separator_and_broken_text() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab, tokenizer.document_id, tokenizer.bytes_of[256]) == (257, 256, 0)
    assert tokenizer.decode([256, 104, 105, 256, 0xC3]) == "hi\N{REPLACEMENT CHARACTER}"


@given(st.text())
@settings(max_examples=25, deadline=None)
def test_byte_level_file_round_trips_and_counts_bytes_exactly(text: str) -> None:
    tokenizer = _shared()
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.document_id, *ids]) == text
    assert tokenizer.bytes_of[ids].sum() == len(text.encode())


_cache: list = []


@pytest.fixture(scope="module", autouse=True)
def _make(tmp_path_factory: pytest.TempPathFactory) -> None:
    _cache[:] = [load_tokenizer(byte_level(tmp_path_factory.mktemp("tok"), "<|endoftext|>"))]


def _shared():
    return _cache[0]


def test_end_of_text_is_the_separator_and_text_cannot_forge_it() -> None:
    tokenizer = _shared()
    assert (tokenizer.vocab, tokenizer.document_id) == (258, 257)
    assert tokenizer.bytes_of[257] == 0
    text = "the <|endoftext|> mark"
    assert 257 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 256 in tokenizer.encode(text)  # the merge


@pytest.mark.parametrize(
    ("special", "document", "vocab"),
    [
        (("<s>", "</s>"), 258, 259),
        (("<pad>", "<bos>"), 258, 259),
        (("<pad>",), 258, 259),
        ((), 257, 258),
    ],
)
def test_separator_is_eos_then_bos_then_a_new_id(
    tmp_path: Path, special: tuple[str, ...], document: int, vocab: int
) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path, *special))
    assert (tokenizer.document_id, tokenizer.vocab) == (document, vocab)
    assert len(tokenizer.bytes_of) == vocab
    assert tokenizer.decode([tokenizer.document_id, *tokenizer.encode("hi")]) == "hi"


def test_other_tokenizers_count_bytes_of_their_pieces(tmp_path: Path) -> None:
    vocab = [("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("é", -2.0), ("<0x41>", -3.0)]
    library = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert tokenizer.bytes_of.tolist() == [5, 4, 1, 2, 1, 0]


def test_a_bad_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(DataError, match=r"data.tokenizer=.*t.json: not a tokenizer"):
        load_tokenizer(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"no such file, want bytes or .*did you mean 'bytes'\?"):
        load_tokenizer("byte")
