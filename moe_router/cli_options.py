"""What the commands have in common: options, errors as one line, JSON."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moe_router.errors import MoeRouterError

INTERRUPTED = 130  # what a shell expects of a command that Ctrl-C ended


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Run = Annotated[Path, typer.Argument(help="runs/NAME, or one of its steps: runs/NAME/step_N")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a key")]
Where = Annotated[Device, typer.Option(help="where to compute")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")]
Spend = Annotated[float | None, typer.Option(help="depth: 0, the least, to 1", min=0, max=1)]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What we raised on purpose ends as one line on stderr and exit code 1, without a traceback."""
    stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        yield
    except MoeRouterError as error:
        stderr.print(f"error: {error}", style="bold red" if stderr.is_terminal else None)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        stderr.print("interrupted")
        raise typer.Exit(INTERRUPTED) from None


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))
