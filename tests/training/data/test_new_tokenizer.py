"""Tokenizers made of a run's own texts."""

import pytest

from moe_router.config import DataConfig
from moe_router.errors import ConfigError, DataError
from moe_router.training.data import load_tokenizer, make_tokenizer

TEXTS = ["the router routes", "the expert learns", "čas, 時間 and the rest"] * 20


@pytest.mark.parametrize("labelled", [False, True])
def test_it_round_trips_and_is_shorter_than_bytes(tmp_path, labelled):
    path, output = tmp_path / "t.txt", tmp_path / "tok.json"
    path.write_text("\n".join(f"0 {text}" if labelled else text for text in TEXTS))
    more = {"source": "labelled", "labels": ("0", "1")} if labelled else {"source": "text"}
    config = DataConfig(path=str(path), **more)
    made = make_tokenizer(config, 300, output)
    loaded = load_tokenizer(str(output))
    assert made == loaded.vocab <= 300
    for text in (*TEXTS[:3], "never seen: ß\n"):
        assert loaded.decode(loaded.encode(text)).strip() == text.strip()
    assert len(loaded.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2
    assert loaded.document_id not in loaded.encode("<|endoftext|>")


def test_what_cannot_be_made_is_said(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a text")
    config = DataConfig(source="text", path=str(path))
    with pytest.raises(ConfigError, match="--vocab=256: want at least 257"):
        make_tokenizer(config, 256, tmp_path / "tok.json")
    with pytest.raises(DataError, match="cannot be written"):
        make_tokenizer(config, 257, tmp_path / "no" / "tok.json")
