"""Where rows come from: the commit, which saved rows do not change, and which of them are there."""

import subprocess

from benchmarks import results


def test_saved_rows_change_no_commit_and_are_found_again(tmp_path, monkeypatch):
    code = tmp_path / "code.py"
    code.write_text("one\n")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "x.json").write_text("[]\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setattr(results, "ROOT", tmp_path / "benchmarks")
    origin = results.provenance("cpu")
    results.save("x", [{"name": "a"} | origin, {"name": "b"} | origin | {"commit": "older"}])
    assert results.provenance("cpu") == origin and "+" not in origin["commit"]
    assert results.saved("x", origin) == {"a"} and results.saved("y", origin) == set()
    code.write_text("two\n")
    assert results.provenance("cpu")["commit"] == origin["commit"] + "+"
