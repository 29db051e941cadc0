"""The examples of docs/data.md do what the page says."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from moe_router.config import DataConfig

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_the_page_has_its_examples() -> None:
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize(
    "example", EXAMPLES, ids=["text", "labelled", "images", "shards", "resume"]
)
def test_an_example_runs(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/data.md", "exec"), {})
    printed = capsys.readouterr().out
    if "notes" in example:
        assert "On wednesday the router" in printed
    if "reviews.csv" in example:
        assert printed.startswith("36 4 [")
    if "idx3" in example:
        assert printed.startswith("18 2 (24, 16) [0, 4, 8")
    if "shards" in example:
        (shown,) = re.findall(r"```json\n(.*?)```", PAGE, re.S)
        assert json.loads((tmp_path / "shards/0000.bin.json").read_text()) == json.loads(shown)


def test_the_commands_name_real_keys() -> None:
    keys = re.findall(r"--set data\.(\w+)=", PAGE)
    assert keys and set(keys) <= {field.name for field in fields(DataConfig)}
