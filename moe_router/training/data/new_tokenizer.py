"""A tokenizer.json made of the texts that a run trains on: byte-level BPE."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_router.config import DataConfig, require
from moe_router.errors import DataError
from moe_router.training.data.labelled import texts_of
from moe_router.training.data.sources import read_corpus

_LEAST = 257  # every byte and the separator: then any text has ids


def make_tokenizer(config: DataConfig, vocab: int, output: Path) -> int:
    """Learn merges from all documents that `config` names, held-out ones of the same file too.

    Args:
        vocab: ids to make, at most: bytes, merges and the separator.
        output: the tokenizer.json to write, for data.tokenizer.

    Returns:
        Ids made.

    Raises:
        ConfigError: vocab is less than every byte and the separator.
        DataError: as `load_dataset`; or the file cannot be written.
    """
    require(vocab >= _LEAST, "--vocab", vocab, f"at least {_LEAST}: every byte and the separator")
    import tokenizers  # on first use: it takes a while, and only this command needs it

    library: Any = tokenizers  # its stubs lag behind
    level = library.pre_tokenizers.ByteLevel
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = level(add_prefix_space=True)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(level.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(_texts(config), trainer)
    try:
        output.write_text(made.to_str(pretty=True), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror}); name another") from error
    size: int = made.get_vocab_size()
    return size


def _texts(config: DataConfig) -> Iterator[str]:
    if config.source == "labelled":
        yield from texts_of(config)
        return
    for document in read_corpus(config).documents:
        yield document.tobytes().decode("utf-8")
