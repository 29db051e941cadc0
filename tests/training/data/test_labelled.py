"""Labelled documents: what is read, what is refused, and which of them a batch holds."""

import gzip
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.config import DataConfig
from moe_router.errors import ConfigError, DataError
from moe_router.training.data import load_dataset, train_batch, val_batches

ROWS = [("neg", "so bad"), ("pos", "fine, and long"), ("neg", "über 'x'"), ("pos", "yes")]
SEPARATOR = 256


def lines(rows):
    return "".join(f"{label} {text}\n" for label, text in rows)


def table(rows, between=","):
    quoted = ([label, '"' + text.replace('"', '""') + '"', "7"] for label, text in rows)
    return "\n".join(between.join(row) for row in (["label", "text", "stars"], *quoted)) + "\n"


def objects(rows):
    return "\n".join(json.dumps({"text": text, "label": label}) for label, text in rows) + "\n"


def config(path, **keys):
    return DataConfig(
        **{"source": "labelled", "path": str(path), "labels": ("neg", "pos"), "seq_len": 12} | keys
    )


def load(folder, text, name="train.txt", **keys):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_dataset(config(path, **keys))


def documents(part):
    """(label id, text) of each."""
    bounds = part.offsets_N1.tolist()
    ids = [part.ids[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    assert all(each[0] == SEPARATOR and SEPARATOR not in each[1:] for each in ids)
    return list(zip(part.label_N.tolist(), (bytes(each[1:]) for each in ids), strict=True))


def many(count):
    """Documents of all lengths whose text says which one it is."""
    return [("pos" if n % 3 else "neg", f"{n}" + "." * (n % 9)) for n in range(count)]


def dataset(folder, count=40, **keys):
    return load(folder, lines(many(count)), seq_len=10, **keys)


def sequences(batch):
    bounds = batch.offsets_B1.tolist()
    parts = (batch.ids_T[a:b].tolist() for a, b in itertools.pairwise(bounds))
    return list(zip(batch.target_N.tolist(), map(tuple, parts), strict=True))


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.txt", lines(ROWS)),
        ("stsa.binary.train", lines(ROWS)),
        ("a.csv", table(ROWS)),
        ("a.tsv", table(ROWS, "\t")),
        ("a.jsonl", objects(ROWS)),
        ("a.ndjson", "\ufeff" + objects(ROWS) + "\n\n"),
        ("a.csv.gz", gzip.compress(table(ROWS).encode())),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path, name, text):
    data = load(tmp_path, text, name, val_fraction=0.25)
    found = documents(data.train) + documents(data.val)
    # cut at 12 tokens, the separator among them
    wanted = [(("neg", "pos").index(label), t.encode()[:11]) for label, t in ROWS]
    assert sorted(found) == sorted(wanted)


def test_keys_are_named_and_a_label_may_be_a_number(tmp_path):
    text = "\n".join(json.dumps({"body": "x" * n, "stars": n % 2}) for n in (1, 2, 3, 4))
    data = load(
        tmp_path, text, "a.jsonl", field="body", label="stars", labels=("1", "0"), val_fraction=0.25
    )
    assert sorted(documents(data.train) + documents(data.val)) == sorted(
        [(0, b"x"), (1, b"xx"), (0, b"xxx"), (1, b"xxxx")]
    )


def test_held_out_are_the_documents_of_val_path_or_a_spread_of_all(tmp_path):
    (tmp_path / "dev.txt").write_text(lines(ROWS[:2]))
    data = load(tmp_path, lines(ROWS[2:]), val_path=str(tmp_path / "dev.txt"))
    assert (len(documents(data.train)), len(documents(data.val))) == (2, 2)
    assert (0, b"so bad") in documents(data.val)
    by_label = lines(sorted(many(60)))  # sorted files are common: both labels must be held out
    spread = load(tmp_path, by_label, val_fraction=0.1, seq_len=10)
    assert spread.val.rows == 6 and spread.train.rows == 54
    assert set(spread.val.label_N.tolist()) == {0, 1}
    together = documents(spread.train) + documents(spread.val)
    assert len(set(together)) == 60


def test_the_first_held_out_documents_of_a_sorted_file_have_both_labels(tmp_path):
    by_label = sorted(many(60))
    (tmp_path / "dev.txt").write_text(lines(by_label))
    data = load(tmp_path, lines(ROWS), val_path=str(tmp_path / "dev.txt"), seq_len=10)
    first = next(val_batches(data, rows=12, batch=12, rank=0, ranks=1)).target_N.tolist()
    assert 2 <= sum(first) <= 10 and len(first) == 12
    wanted = sorted((label == "pos", text.encode()[:9]) for label, text in by_label)
    assert sorted(documents(data.val)) == wanted
    again = load(tmp_path, lines(ROWS), val_path=str(tmp_path / "dev.txt"), seq_len=10)
    assert documents(again.val) == documents(data.val)


def test_a_folder_is_all_its_files(tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "b.csv").write_text(table(ROWS[2:]))
    (folder / "a.jsonl").write_text(objects(ROWS[:2]))
    data = load_dataset(config(folder, val_fraction=0.25))
    assert data.train.rows + data.val.rows == 4


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", "neg\n", "a.txt:1: an empty text"),
        ("a.txt", "neg x\n\nbad y\n", "a.txt:3: label 'bad', want one of data.labels: neg, pos"),
        ("a.txt", "nag y\n", "did you mean 'neg'?"),
        ("a.txt", "", "is empty, want labelled text"),
        ("a.txt", b"neg caf\xe9\n", "a.txt:1: "),
        ("a.csv", "label,txt\nneg,x\n", "a.csv:1: no column 'text' (data.field), has"),
        ("a.csv", "labels,text\nneg,x\n", "no column 'label' (data.label), has 'labels', 'text'"),
        ("a.csv", "label,text\nneg\n", "a.csv:2: 1 columns, want at least 2"),
        ("a.csv", "label,text\nneg,\n", "a.csv:2: an empty text"),
        ("a.csv", b"label,text\nneg,caf\xe9\n", "want UTF-8"),
        (
            "a.jsonl",
            '{"text": "x"}\n',
            "a.jsonl:1: no label under 'label' (data.label), has 'text'",
        ),
        ("a.jsonl", '{"label": "neg"}\n', "a.jsonl:1: no key 'text' (data.field), has 'label'"),
        ("a.jsonl", '{"label": null, "text": "x"}\n', "a.jsonl:1: no label under 'label'"),
        ("a.jsonl", '{"label": "neg", "text": 3}\n', "'text' is int, want text"),
        ("a.jsonl", "{'label'\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"label": "neg", "text": "caf\xe9"}\n', "want UTF-8"),
        ("a.jsonl", r'{"label": "neg", "text": "\ud800"}' + "\n", "a.jsonl:1: "),
        ("a.txt", lines(ROWS[:1]), "1 documents, want enough to hold out"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path, name, text, message):
    with pytest.raises(DataError) as caught:
        load(tmp_path, text, name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_label_that_only_the_held_out_file_has_is_refused_there(tmp_path):
    (tmp_path / "dev.txt").write_text("neg fine\nmeh so so\n")
    with pytest.raises(DataError, match=r"dev\.txt:2: label 'meh', want one of data\.labels"):
        load(tmp_path, lines(ROWS), val_path=str(tmp_path / "dev.txt"))


def test_a_missing_held_out_file_is_named_by_its_own_key(tmp_path):
    with pytest.raises(DataError, match=r"^data\.val_path=.*dev\.txt: no such file"):
        load(tmp_path, lines(ROWS), val_path=str(tmp_path / "dev.txt"))


@pytest.mark.parametrize("labels", [(), ("one",), ("a", "b", "a")])
def test_labels_are_two_or_more_each_once(labels):
    with pytest.raises(ConfigError, match=r"^data\.labels="):
        config("x.txt", labels=labels)


PLACE = {"step": 0, "micro": 0, "rank": 0, "ranks": 1, "batch": 12, "accumulation": 1, "seed": 0}


def place(step=0, **where):
    return PLACE | {"step": step} | where


def test_documents_lie_end_to_end_and_count_from_zero(tmp_path):
    batch = train_batch(dataset(tmp_path), **place())
    lengths = np.diff(batch.offsets_B1.numpy())
    assert len(set(lengths.tolist())) > 3 and lengths.max() == 10
    assert batch.position_T.tolist() == [i for n in lengths for i in range(n)]
    assert batch.ids_T[batch.offsets_B1[:-1].long()].eq(SEPARATOR).all()
    assert (batch.tokens, batch.targets) == (len(batch.ids_T), 12)
    kinds = [x.dtype for x in (batch.ids_T, batch.target_N, batch.position_T, batch.offsets_B1)]
    assert kinds == [torch.int64, torch.int64, torch.int32, torch.int32]


@settings(max_examples=30, deadline=None)
@given(
    step=st.integers(0, 9),
    seed=st.integers(0, 3),
    ranks=st.sampled_from([1, 2, 3]),
    accumulation=st.sampled_from([1, 2]),
)
def test_any_number_of_ranks_reads_the_same_documents(
    tmp_path_factory, step, seed, ranks, accumulation
):
    data = dataset(tmp_path_factory.mktemp("data"))
    whole = sequences(train_batch(data, **place(step, seed=seed)))
    got = []
    for micro in range(accumulation):
        where = {"step": step, "micro": micro, "accumulation": accumulation, "seed": seed}
        parts = [train_batch(data, **place(rank=r, ranks=ranks, **where)) for r in range(ranks)]
        before = 0
        for part in parts:
            assert (part.first_token, part.targets) == (before, 12 // accumulation)
            assert len(part.target_N) == 12 // accumulation // ranks
            before += len(part.ids_T)
        assert {part.tokens for part in parts} == {before}
        got += [each for part in parts for each in sequences(part)]
    assert got == whole


def test_an_epoch_reads_each_document_once_and_each_anew(tmp_path):
    data = dataset(tmp_path, 44, val_fraction=0.1)
    assert data.train.rows == 40
    epochs = [
        [
            d
            for step in range(5 * e, 5 * e + 5)
            for d in sequences(train_batch(data, **place(step, batch=8)))
        ]
        for e in range(2)
    ]
    assert len(set(epochs[0])) == 40 and sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    assert sequences(train_batch(data, **place(seed=1))) != sequences(train_batch(data, **place()))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("rows", [3, 8, 1000])
def test_held_out_documents_are_read_once_over_all_ranks(tmp_path, rows, ranks):
    data = dataset(tmp_path, val_fraction=0.3)
    parts = [list(val_batches(data, rows=rows, batch=4, rank=r, ranks=ranks)) for r in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    found = [each for part in parts for batch in part for each in sequences(batch)]
    first = [(label, (SEPARATOR, *text)) for label, text in documents(data.val)[:rows]]
    assert sorted(found) == sorted(first) and len(first) == min(rows, 12)


def test_fewer_held_out_documents_than_ranks_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"2 held-out documents .* want at least 3"):
        next(val_batches(dataset(tmp_path), rows=2, batch=4, rank=0, ranks=3))


def test_there_is_no_batch_outside_the_run(tmp_path):
    for where in ({"step": -1}, {"micro": 1}, {"rank": 1}):
        with pytest.raises(IndexError):
            train_batch(dataset(tmp_path), **place(**where))
