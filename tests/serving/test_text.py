"""Text that grows by tokens: whole characters, and nothing of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_router.serving.text import TextStream
from moe_router.training.data import ByteTokenizer

BYTES = ByteTokenizer()


def pieces(tokens, stop=(), prompt=(256, 97)):
    """The text after each token, what the end adds, and whether a stop string was met."""
    stream, told = TextStream(BYTES, prompt, stop), []
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
    assert "".join(told) == text and not any("\ufffd" in piece for piece in told if text.isascii())
    assert all(piece == "" or piece in text for piece in told)


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
