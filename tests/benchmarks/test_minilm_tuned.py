"""benchmarks.minilm_tuned on a small random BERT: fine-tuned once, every row, and its table."""

import json

import pytest

pytest.importorskip("transformers")
from benchmarks import minilm_models, minilm_table, minilm_tuned, results
from tests.benchmarks.test_minilm import folder  # noqa: F401


def test_a_model_is_tuned_once_and_every_row_is_saved(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(minilm_models, "STEPS", 2)
    monkeypatch.setattr(minilm_tuned, "BATCH", 4)
    monkeypatch.setattr(minilm_tuned, "TIMED", 8)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    data = folder / "sst2"
    (data / "stsa.binary.dev").write_bytes((data / "stsa.binary.test").read_bytes())
    paths = ["--model", str(folder), "--data", str(data), "--tuned", str(tmp_path / "tuned")]
    minilm_tuned.main([*paths, "--rounds", "1", "--only", "prune/0.5*,prune/0.3", "--save"])
    rows = json.loads((tmp_path / "results" / "minilm_tuned.json").read_text())
    of = {row["name"]: row for row in rows}
    names = ["", "/frozen", "/position", "/norm", "/attention"]
    assert list(of) == ["full", *(f"prune/0.5{name}" for name in names), "prune/0.3"]
    assert len(of["prune/0.5"]["seeds"]) == 3 and len(of["prune/0.5/norm"]["seeds"]) == 1
    assert 0 < of["prune/0.3"]["executed"] < of["prune/0.5"]["executed"] < 1
    written = (tmp_path / "tuned" / "model.safetensors").stat().st_mtime_ns
    minilm_tuned.main([*paths, "--only", "none"])
    assert (tmp_path / "tuned" / "model.safetensors").stat().st_mtime_ns == written
    page = "\n".join(minilm_table.tuned(rows, "notes"))
    assert all(f"| {name} |" in page for name in of) and page.endswith("notes")
