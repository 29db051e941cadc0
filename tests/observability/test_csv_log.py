import os
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.errors import DataError, MoeRouterError
from moe_router.observability.csv_log import CsvLog, read_rows
from moe_router.observability.files import write_atomic


def row(step):
    return {"step": step, "loss": step / 7}


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 8), cut=st.integers(0, 200), back=st.integers(0, 8))
def test_a_cut_at_any_byte_costs_at_most_the_rows_after_it(steps, cut, back):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.csv"
        log = CsvLog(path, keep=0)
        for step in range(1, steps + 1):
            log.append([row(step)])
        whole = path.read_bytes()
        path.write_bytes(whole[:cut])
        kept = max(0, whole[:cut].count(b"\n") - 1)  # less the header
        log = CsvLog(path, keep=back or 1)
        last = min(kept, back or 1)
        assert [int(r["step"]) for r in read_rows(path)] == list(range(1, last + 1))
        log.append([row(last + 1)])
        assert [int(r["step"]) for r in read_rows(path)] == list(range(1, last + 2))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_no_order_of_writes_makes_a_step_appear_twice(steps):
    with tempfile.TemporaryDirectory() as folder:
        log = CsvLog(Path(folder) / "log.csv", keep=0)
        for step in steps:
            log.append([{**row(step), "layer": layer} for layer in (0, 1)])
        found = [(int(r["step"]), int(r["layer"])) for r in read_rows(log.path)]
    assert found == sorted(set(found)) and found[-1] == (steps[-1], 1)


def test_a_new_run_begins_with_an_empty_log(tmp_path):
    path = tmp_path / "log.csv"
    CsvLog(path, keep=0).append([row(0)])
    assert read_rows(path)
    CsvLog(path, keep=0)
    assert read_rows(path) == []


def test_rewinding_to_the_start_keeps_step_0(tmp_path):
    log = CsvLog(tmp_path / "log.csv", keep=0)
    for step in (0, 1, 2):
        log.append([row(step)])
    log.rewind(0)
    assert [r["step"] for r in read_rows(log.path)] == ["0"]


def test_a_foreign_file_is_refused_by_name(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("name,age\nAda,36\n")
    with pytest.raises(DataError, match=r"metrics\.csv: line 1 is 'name,age'; want a header"):
        CsvLog(path, keep=3)
    assert path.read_text() == "name,age\nAda,36\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    log = CsvLog(tmp_path / "metrics.csv", keep=0)
    log.append([row(1)])
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(MoeRouterError, match=r"metrics\.csv: could not be written \(No space left"):
        log.append([row(2)])


def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomic(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    want = re.escape("could not be written (No space left on device); want a writable folder")
    with pytest.raises(MoeRouterError, match=want):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["summary.json"]
