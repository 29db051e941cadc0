"""The example of docs/gating.md runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "gating.md"


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    exec(compile(example, str(PAGE), "exec"), {"__name__": "example"})
    said = capsys.readouterr().out
    assert "epoch 1 experts of each rank ((0, 1, 2, 3), (4, 5, 6, 7))" in said
    assert "of at most 5" in said and "'balance'" in said
