"""README is true: its Python runs, its commands and files exist."""

import re
from pathlib import Path

import typer.testing

from moe_router_cluster.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run(capsys):
    printed = []
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(code, "README.md", "exec"), {})
        printed.append([int(n) for n in re.findall(r"\d+", capsys.readouterr().out)])
    rows, logits = printed
    assert len(rows) == 8 and sum(rows) == 4 * 128 * 2
    assert logits == [1, 9, 256]


def test_every_command_exists():
    used = set(re.findall(r"^moe-router (\w+)", README, re.M))
    assert used >= {"train", "inspect", "eval", "generate", "cost", "doctor"}
    for command in used:
        result = typer.testing.CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0, command


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert links and missing == []


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
