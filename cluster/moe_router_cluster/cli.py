"""`moe-router`: `train`, and every command of `moe_router.cli`, which needs no Ray."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moe_router.cli import app as commands_without_ray
from moe_router.config_file import load_config
from moe_router.errors import MoeRouterError

INTERRUPTED = 130  # what a shell expects of a command that Ctrl-C ended

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False)
app.add_typer(commands_without_ray)


@app.callback()
def main() -> None:
    """One learned token router for mixture-of-experts, depth and attention, on Ray."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="a YAML file, such as configs/quickstart.yaml")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, such as train.steps=100")
    ] = None,
    kill: Annotated[
        str | None,
        typer.Option(help="RANK@FRACTION or RANK@STEP: SIGKILL an actor there, to see it recover"),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="move an older run of this name aside")
    ] = False,
) -> None:
    """Train across Ray actors. The same command goes on where a run was stopped."""
    from moe_router_cluster.train import train as run  # torch and Ray: not for --help

    with one_line_errors():
        done = run(load_config(config, set_ or ()), Console(), kill=kill, restart=restart)
        if not done:
            raise typer.Exit(INTERRUPTED)


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
        stderr.print("interrupted; the same command goes on from the newest checkpoint, if any")
        raise typer.Exit(INTERRUPTED) from None


if __name__ == "__main__":
    app()
