"""`moe-router`: every command of `moe_router.cli`, which needs no Ray, and those of a cluster."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moe_router.cli import INTERRUPTED, Run, Set, app, one_line_errors

__all__ = ["app"]

_ADDRESS = typer.Option(metavar="URL", help="http://HOST:PORT of the cluster's dashboard")


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
    detach: Annotated[
        bool, typer.Option("--detach", help="in the background; `moe-router jobs` shows it")
    ] = False,
) -> None:
    """Train across Ray actors. The same command goes on where a run was stopped."""
    with one_line_errors():
        from moe_router.config_file import load_config

        read = load_config(config, set_ or ())
        if detach:
            from moe_router_cluster.local_jobs import LocalJobs

            sent = LocalJobs().submit(read, kill=kill, restart=restart)
            typer.echo(f"{sent} trains in the background; look: moe-router jobs {sent}")
            return
        from moe_router_cluster.train import train as run  # slow: a bad config is told before

        try:
            done = run(read, Console(), kill=kill, restart=restart)
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command goes on from the newest checkpoint", err=True)
            done = False
    if not done:
        raise typer.Exit(INTERRUPTED)


@app.command()
def submit(
    config: Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped config")],
    address: Annotated[str, _ADDRESS],
    set_: Set = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="move an older run of this name aside")
    ] = False,
) -> None:
    """Train on a cluster, as a Ray Job, and follow it. Ctrl-C looks away, the job goes on."""
    with one_line_errors():
        from moe_router.config_file import load_config
        from moe_router_cluster.jobs import Jobs, for_cluster

        read = for_cluster(load_config(config, set_ or ()))
        from moe_router_cluster.follow import follow

        jobs = Jobs(address)
        sent = jobs.submit(read, restart=restart)
        typer.echo(f"submitted {sent} to {jobs.address}")
        code = follow(jobs, sent, Console())
    raise typer.Exit(code)


@app.command("jobs")
def list_or_follow(
    job: Annotated[str | None, typer.Argument(help="follow this one; none: list all")] = None,
    address: Annotated[str | None, _ADDRESS] = None,
    stop: Annotated[
        str | None, typer.Option(metavar="JOB", help="end this one; it saves a checkpoint first")
    ] = None,
) -> None:
    """List the jobs of a cluster, or without --address of this machine; follow or stop one."""
    with one_line_errors():
        from moe_router_cluster.follow import AnyJobs, follow, job_table
        from moe_router_cluster.jobs import Jobs
        from moe_router_cluster.local_jobs import LocalJobs

        jobs: AnyJobs = LocalJobs() if address is None else Jobs(address)
        if stop is not None:
            asked = jobs.stop(stop)
            typer.echo(f"{stop} {'saves a checkpoint and ends' if asked else 'had ended already'}")
            return
        if job is None:
            Console().print(job_table(jobs.all()))
            return
        code = follow(jobs, job, Console())
    raise typer.Exit(code)


@app.command()
def serve(
    run: Run,
    port: Annotated[int, typer.Option(help="of HTTP", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="0: any that is free", min=0, max=65535)] = 8001,
    host: Annotated[str, typer.Option(help="others need a token and TLS")] = "127.0.0.1",
    token_file: Annotated[
        Path | None, typer.Option(help="holds the bearer token; default: $MOE_ROUTER_TOKEN")
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM, of HTTP and gRPC; with --tls-key")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="no TLS for others: a mesh or a proxy encrypts")
    ] = False,
    actors: Annotated[int | None, typer.Option(help="default: the run's", min=1)] = None,
    set_: Set = None,
) -> None:
    """Answer requests for text over HTTP, in OpenAI's format, and over gRPC, until Ctrl-C."""
    with one_line_errors():
        from moe_router_cluster.serve import serve as answer
        from moe_router_cluster.serve_plan import ServeArguments

        arguments = ServeArguments(
            run=str(run),
            actors=actors,
            set=tuple(set_ or ()),
            host=host,
            grpc_port=grpc_port,
            token_file=None if token_file is None else str(token_file),
            tls_certificate=None if tls_certificate is None else str(tls_certificate),
            tls_key=None if tls_key is None else str(tls_key),
            insecure=insecure,
        )
        try:
            answer(arguments, port, Console())
        except KeyboardInterrupt:
            typer.echo("ended")


@app.command()
def demo(
    run: Annotated[
        Path | None, typer.Argument(help="default: configs/demo.yaml, trained the first time")
    ] = None,
    port: Annotated[int, typer.Option(help="of HTTP", min=1, max=65535)] = 8000,
    chaos: Annotated[
        bool, typer.Option("--chaos", help="buttons that kill shards while the text goes on")
    ] = False,
    browser: Annotated[bool, typer.Option(help="open the page")] = True,
    set_: Set = None,
) -> None:
    """A page that shows, token by token, which blocks and experts compute a text."""
    with one_line_errors():
        import webbrowser

        from moe_router.config_file import load_config
        from moe_router_cluster.serve import serve as answer
        from moe_router_cluster.serve_plan import ServeArguments
        from moe_router_cluster.train import train as train_run

        try:
            if run is None:
                config = load_config("demo", set_ or ())
                if not train_run(config, Console()):
                    raise typer.Exit(INTERRUPTED)
                run, set_ = Path(config.run.dir) / config.run.name, None
            arguments = ServeArguments(
                run=str(run), set=tuple(set_ or ()), grpc_port=0, page=True, chaos=chaos
            )
            answer(arguments, port, Console(), webbrowser.open if browser else None)
        except KeyboardInterrupt:
            typer.echo("ended")


if __name__ == "__main__":
    app()
