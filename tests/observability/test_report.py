import json
import re
import shutil
import subprocess

import pytest

from moe_router.errors import DataError
from moe_router.observability.report import write_report


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"experts": 128, "top_k": 8},
        {"moe": False},
        {"sample": ""},
        {"steps": 3},
        {"finished": False},
        {"capacity": True},
    ],
    ids=["plain", "128 experts", "no experts", "no sample", "few steps", "unfinished", "drops"],
)
def test_one_offline_file_for_every_kind_of_run(make_run, fields):
    path = write_report(make_run(**{"steps": 40, "layers": 2, **fields}))
    page = path.read_text()
    assert path.name == "report.html" and 20_000 < len(page) < 3_000_000
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(http""", page)
    islands = re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, re.S)
    assert islands and all(json.loads(island) for island in islands)


@pytest.mark.slow
def test_a_long_run_stays_small(make_run):
    page = write_report(make_run(steps=20_000, layers=1, load_every=100)).read_text()
    assert len(page) < 3_000_000


def test_text_cannot_become_markup(make_run):
    evil = "The </script><script>alert(1)</script><b onmouseover=alert(2)>"
    page = write_report(make_run(steps=5, layers=1, sample=evil)).read_text()
    assert "<script>alert(1)" not in page and "<b onmouseover" not in page


def test_a_classifier_shows_how_many_labels_are_right(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "{model: {kind: encoder, layers: 2, dim: 8}, data: {source: labelled, tokenizer: bytes}}"
    )
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.7\n2,0.6\n")
    (tmp_path / "eval.csv").write_text("step,loss,tokens,accuracy,matthews\n2,0.5,9,0.75,0.5\n")
    page = write_report(tmp_path).read_text()
    (island,) = re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, re.S)
    shown = json.loads(island)
    assert shown["labels"] and shown["eval"]["notes"] == ["75.0% of the labels right"]
    assert shown["eval"]["x"] == [2] and shown["eval"]["unigram"] == []
    assert "A text classifier of 2 layers" in page


def test_an_empty_folder_is_no_run(tmp_path):
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("fields", [{}, {"moe": False}], ids=["experts", "dense"])
def test_a_browser_draws_it_without_an_error(make_run, tmp_path, fields):
    path = write_report(make_run(steps=30, layers=2, **fields))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom"
    quiet = "--disable-background-networking --disable-component-update --disable-sync"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    logs = ["--enable-logging=stderr", "--v=0"]
    command = ["chromium", *flags.split(), *quiet.split(), profile, *logs, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "Uncaught" not in done.stderr
    assert "<svg" in done.stdout or "<canvas" in done.stdout
