"""`moe-router`: every command of `moe_router.cli`, which needs no Ray, and `train`."""

from typing import Annotated

import typer
from rich.console import Console

from moe_router.cli import INTERRUPTED, Set, app, one_line_errors

__all__ = ["app"]


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped config")],
    set_: Set = None,
    kill: Annotated[
        str | None,
        typer.Option(
            metavar="RANK@WHEN",
            help="SIGKILL an actor at a fraction of the run (1@0.5) or a step (1@200): watch the "
            "run recover",
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="move an older run of this name aside")
    ] = False,
) -> None:
    """Train across Ray actors. The same command goes on where a run was stopped."""
    with one_line_errors():
        from moe_router.config_file import load_config

        read = load_config(config, set_ or ())
        from moe_router_cluster.train import train as run  # slow: a bad config is told before

        try:
            done = run(read, Console(), kill=kill, restart=restart)
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command goes on from the newest checkpoint", err=True)
            done = False
    if not done:
        raise typer.Exit(INTERRUPTED)


if __name__ == "__main__":
    app()
