"""The schema of data: what `data` holds in a run's config. `config.py` passes it on."""

from dataclasses import dataclass
from typing import Literal

from moe_router.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """How an image becomes tokens: its patches, row by row."""

    size: int  # pixels of a side
    channels: int = 3  # 3: colour, 1: grey
    patch: int = 4  # pixels of a patch's side

    def __post_init__(self) -> None:
        require(self.channels in (1, 3), "data.image.channels", self.channels, "1 or 3")
        require(self.patch >= 1, "data.image.patch", self.patch, "at least 1 pixel")
        whole = self.size >= self.patch and self.size % self.patch == 0
        require(whole, "data.image.size", self.size, f"a multiple of {self.patch} (patch)")

    @property
    def grid(self) -> int:
        """Patches of a side."""
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return self.grid**2

    @property
    def values(self) -> int:
        """Of a patch: pixels times channels."""
        return self.patch**2 * self.channels


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    source: Literal[
        "pydoc", "shakespeare", "enwik8", "text", "jsonl", "csv", "shards", "labelled", "images"
    ]
    path: str | None = None  # a file, a folder or a glob; shakespeare and enwik8 may download
    field: str = "text"  # the JSONL key or CSV column that holds the text
    label: str = "label"  # labelled: the one that holds the label
    labels: tuple[str, ...] = ()  # of labelled data: names as the file has them, in order of ids
    val_path: str | None = None  # labelled data: what is held out; null: val_fraction of data.path
    image: ImageConfig | None = None  # images: how they become tokens
    tokenizer: str = "bytes"  # or the path of a tokenizer.json
    seq_len: int = 128  # tokens in one row of a batch
    val_fraction: float = 0.1  # the last part of the documents, held out
    cache: str = "data"  # where downloads go

    def __post_init__(self) -> None:
        require(self.seq_len >= 2, "data.seq_len", self.seq_len, "at least 2 tokens")
        require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "0 < f < 1")
        if self.source in ("labelled", "images"):
            want = "at least 2 names of labels, each once, as the file writes them"
            known = len(set(self.labels)) == len(self.labels) >= 2
            require(known, "data.labels", list(self.labels), want)
        self._check_image()
        held_out = self.val_path is None or self.source in ("labelled", "images")
        want = f"null, for data.source={self.source}: data.val_fraction of it is held out"
        require(held_out, "data.val_path", self.val_path, want)
        own = ("text", "jsonl", "csv", "shards", "labelled", "images")
        if self.source in own and self.path is None:
            raise ConfigError(f"data.path is missing: data.source={self.source} reads your files")

    def _check_image(self) -> None:
        image, images = self.image, self.source == "images"
        if image is None:
            require(not images, "data.image", "null", "size, channels and patch of the images")
            return
        require(images, "data.image", "a section", f"null, for data.source={self.source}")
        want = f"{image.tokens}, the patches of an image (data.image)"
        require(self.seq_len == image.tokens, "data.seq_len", self.seq_len, want)
