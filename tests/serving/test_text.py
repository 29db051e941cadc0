"""Text that grows by tokens: whole characters, and nothing of a stop string."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from moe_router.serving.text import TextStream
from moe_router.training.data import ByteTokenizer, FileTokenizer

BYTES = ByteTokenizer()


def file_tokenizer(folder, model, pre, decoder):
    """A tokenizer.json as it comes with a model."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoder
    tokenizer.save(str(folder / "tokenizer.json"))
    return FileTokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module", params=["byte level", "byte fallback"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte level":
        vocab = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
        return file_tokenizer(
            folder,
            tokenizers.models.BPE(vocab, []),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            tokenizers.decoders.ByteLevel(),
        )
    words = ["<unk>", "▁", "▁one", "▁two", *"abcdehinotw", *(f"<0x{n:02X}>" for n in range(256))]
    return file_tokenizer(
        folder,
        tokenizers.models.BPE(
            {word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True
        ),
        tokenizers.pre_tokenizers.Metaspace(),
        tokenizers.decoders.Sequence(
            [
                tokenizers.decoders.ByteFallback(),
                tokenizers.decoders.Metaspace(),
                tokenizers.decoders.Fuse(),
            ]
        ),
    )


def pieces(tokens, stop=(), prompt=(256, 97), tokenizer=BYTES):
    """The text after each token, what the end adds, and whether a stop string was met."""
    stream, told = TextStream(tokenizer, prompt, stop), []
    for token in tokens:
        text, stopped = stream.push(token)
        told.append(text)
        if stopped:
            return told, True
    return [*told, stream.end()], False


@given(st.lists(st.integers(0, 256), max_size=200))
def test_the_pieces_are_the_text(tokens):
    assert "".join(pieces(tokens)[0]) == BYTES.decode(tokens)


@given(st.text(max_size=120))
def test_a_piece_is_whole_characters(text):
    told, _ = pieces(text.encode())
    assert "".join(told) == text
    assert all("\ufffd" not in piece for piece in told) or "\ufffd" in text


def test_a_character_comes_with_its_last_byte():
    assert pieces("a€b".encode())[0] == ["a", "", "", "€", "b", ""]
    assert pieces("😀".encode()[:3])[0] == ["", "", "", "\ufffd"]


def test_a_character_may_begin_in_the_prompt():
    first, *rest = "€".encode()
    assert pieces(rest, prompt=(97, first))[0] == ["", "€", ""]


@pytest.mark.parametrize(
    ("text", "stop", "want", "met"),
    [
        ("one two", ("wo",), "one t", True),
        ("one two", ("tx", "o"), "", True),
        ("aab", ("ab",), "a", True),
        ("abcabd", ("abd",), "abc", True),
        ("one tw", ("two",), "one tw", False),
        ("one", ("e", "one"), "", True),
        ("x€y", ("€",), "x", True),
    ],
)
def test_a_stop_string_is_never_shown(text, stop, want, met):
    told, stopped = pieces(text.encode(), stop)
    assert ("".join(told), stopped) == (want, met)


def test_what_may_become_a_stop_string_waits():
    assert pieces(b"atwx", ("two",))[0] == ["a", "", "", "twx", ""]


@pytest.mark.parametrize("text", ["one two", "€ and 😀" * 40, "é", "a  b"])
def test_files_of_tokens_stream_as_they_decode(tokenizer, text):
    prompt, tokens = tokenizer.encode("the one"), tokenizer.encode(text)
    told, _ = pieces(tokens, prompt=prompt, tokenizer=tokenizer)
    whole, before = (tokenizer.decode(ids) for ids in ([*prompt, *tokens], prompt))
    assert before + "".join(told) == whole
    assert not any("\ufffd" in piece for piece in told)
    assert all(len(piece) <= 4 for piece in told)
