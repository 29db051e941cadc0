import dataclasses
import gzip
import hashlib
import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from moe_router.config import DataConfig
from moe_router.errors import DataError
from moe_router.training.data import sources
from moe_router.training.data.download import SHAKESPEARE


def read(source: str, path: Path | str, **keys: str) -> list[bytes]:
    config = DataConfig(source=source, path=str(path), **keys)
    return [document.tobytes() for document in sources.read_corpus(config).documents]


def refuse(message: str, source: str, path: Path, **keys: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(source, path, **keys)
    assert "\n" not in str(error.value)


def test_text_is_one_document_per_file(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_bytes(b"second")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst, after a byte order mark")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("fourth ☃".encode()))
    (tmp_path / "e.py").write_bytes(b"not text")
    want = [b"first, after a byte order mark", b"second", "fourth ☃".encode()]
    assert read("text", tmp_path) == want
    assert read("text", tmp_path / "*.py") == [b"not text"]


def test_bad_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    refuse(r"data.path=.*empty.txt: is empty, want text", "text", tmp_path / "empty.txt")
    refuse("are 2 empty files", "text", _also(tmp_path, "other.txt", b""))
    refuse("a.txt: byte 0xe9 at offset 3 is not", "text", _also(tmp_path, "a.txt", b"caf\xe9"))
    refuse("no such file", "text", tmp_path / "none.txt")


def _also(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder


def lines(folder: Path, *rows: object) -> Path:
    path = folder / "x.jsonl"
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def test_jsonl_reads_its_key(tmp_path: Path) -> None:
    path = lines(tmp_path, {"text": "a☃"}, "\n", {"text": ""}, {"text": "b", "body": "no"})
    assert read("jsonl", path) == ["a☃".encode(), b"b"]
    assert read("jsonl", lines(tmp_path, {"body": "c"}), field="body") == [b"c"]


def test_bad_jsonl_names_file_and_line(tmp_path: Path) -> None:
    good = {"text": "a"}
    for row, message in (
        ("{'text': 1}\n", r"x.jsonl:2: not JSON \(Expecting .* column 2\), want one object a line"),
        ([1], "x.jsonl:2: got list, want one JSON object"),
        ({"txt": "a"}, r"x.jsonl:2: no key 'text' \(data.field\), has 'txt'; did you mean 'txt'\?"),
        ({"text": 3}, "x.jsonl:2: 'text' is int, want text"),
        ('{"text": "\\ud800"}\n', "x.jsonl:2: surrogates not allowed, want text"),
    ):
        refuse(message, "jsonl", lines(tmp_path, good, row))
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\xff"}\n')
    refuse("x.jsonl:1: invalid start byte, want UTF-8", "jsonl", tmp_path / "x.jsonl")
    refuse("x.jsonl: is empty", "jsonl", lines(tmp_path))


def test_csv_reads_its_column(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    long = "z" * 200_000  # above the csv module's own limit
    path.write_text(f'id,text\n1,"a ""quoted""\nline"\n\n2,\n3,{long}\n')
    assert read("csv", path) == [b'a "quoted"\nline', long.encode()]
    (tmp_path / "y.tsv").write_text("text\tlabel\na, b\t1\n")
    assert read("csv", tmp_path / "y.tsv") == [b"a, b"]


def test_bad_csv_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    for content, message in (
        (b"id,texts\n1,a\n", r"x.csv:1: no column 'text' \(data.field\), has 'id', 'texts'; did"),
        (b"id,text\n1,a\n2\n", "x.csv:3: 1 columns, want at least 2 to reach 'text'"),
        (b"id,text\n1,\xff\n", r"x.csv: not UTF-8 after line \d"),
        (b"", "x.csv:1: no column 'text' .*has none"),
        (b"text\n", "x.csv: is empty"),
    ):
        path.write_bytes(content)
        refuse(message, "csv", path)


def test_pydoc_holds_out_text_that_training_does_not_have() -> None:
    corpus = sources.pydoc(0.1)
    documents = [d.tobytes().decode() for d in corpus.documents]
    assert corpus.held_out and set(documents) <= set(topics.values())
    train, held = documents[: -corpus.held_out], documents[-corpus.held_out :]
    seen = {line.strip() for text in train for line in text.splitlines()}
    for text in held:
        own = {line.strip() for line in text.splitlines()} - {""}
        assert len(own & seen) < 0.5 * len(own)
    share = sum(map(len, held)) / sum(map(len, documents))
    assert 0.05 < share < 0.2
    assert sum(map(len, documents)) > 200_000  # enough to learn from


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.3, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("sizes", [[5, 5], [1] * 50, [1, 90, 3, 4, 5, 60, 7]])
def test_held_out_documents_are_spread(sizes: list[int], fraction: float) -> None:
    held = sources._spread(sizes, fraction)
    assert 0 < len(held) < len(sizes)
    if len(sizes) == 50 and fraction == 0.1:
        gaps = [b - a for a, b in zip(sorted(held), sorted(held)[1:], strict=False)]
        assert len(held) == 5 and set(gaps) == {10}


def test_a_public_corpus_is_cut_at_its_standard_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"0123456789"
    small = dataclasses.replace(
        SHAKESPEARE, size=10, train=7, val=2, sha256=hashlib.sha256(content).hexdigest()
    )
    monkeypatch.setattr(sources, "SHAKESPEARE", small)
    (tmp_path / "input.txt").write_bytes(content)
    assert read("shakespeare", tmp_path / "input.txt") == [b"0123456", b"78"]
    assert read("shakespeare", tmp_path) == [b"0123456", b"78"]
    (tmp_path / "more.txt").write_bytes(b"")
    refuse("2 files, want one", "shakespeare", tmp_path)
