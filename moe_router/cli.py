"""The commands that need no Ray. `moe_router_cluster.cli` adds `train` to this app.

What a command works with is imported inside it: a wrong path is told at once.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moe_router.errors import ConfigError, MoeRouterError

if TYPE_CHECKING:
    from moe_router.config import Config

INTERRUPTED = 130  # what a shell expects of a command that Ctrl-C ended

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False)


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


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"moe-router {metadata.version('moe-router')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print and exit")
    ] = False,
) -> None:
    """One learned token router for mixture-of-experts, depth and attention, on Ray."""


@app.command("eval")
def evaluate(
    run: Run,
    set_: Set = None,
    device: Where = Device.auto,
    as_json: AsJson = False,
    compute_budget: Spend = None,
    soft: Annotated[bool, typer.Option("--soft", help="nobody halts: the soft threshold")] = False,
) -> None:
    """Held-out quality of a checkpoint: loss and bits per byte, and what it executes."""
    with one_line_errors():
        from moe_router.run_path import find_run

        step = find_run(run).step
        from moe_router.commands import evaluate_step
        from moe_router.tables import eval_table

        record = evaluate_step(step, set_ or (), _device(device), compute_budget, soft)
        if as_json:
            _print_json(asdict(record))
        else:
            Console().print(eval_table(record, str(step)))


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str | None, typer.Option(help="default: serve.prompt of the run")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="default: the run's", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the likeliest", min=0)] = None,
    seed: Annotated[int, typer.Option(help="another seed, another text")] = 0,
    device: Where = Device.auto,
    compute_budget: Spend = None,
) -> None:
    """Let a checkpoint go on from a prompt."""
    asked = {"prompt": prompt, "max_new_tokens": max_new_tokens, "temperature": temperature}
    with one_line_errors():
        from moe_router.run_path import find_run

        step = find_run(run).step
        from moe_router.commands import speak
        from moe_router.tables import visible

        said = speak(step, asked, seed, _device(device), compute_budget)
        typer.echo(visible(said) if sys.stdout.isatty() else said)


@app.command("export")
def export_run(
    run: Run,
    output: Annotated[Path, typer.Option(help="a new folder, for from_pretrained")],
) -> None:
    """Write a checkpoint as transformers lays out Llama (dense) or Mixtral (experts)."""
    with one_line_errors():
        from moe_router.run_path import find_run

        step = find_run(run).step
        from moe_router.commands import export

        typer.echo(f"{output}: {step} as a {export(step, output)} of transformers")


@app.command("import")
def import_folder(
    folder: Annotated[Path, typer.Argument(help="of a Llama or Mixtral of transformers")],
    name: Annotated[str, typer.Option(help="of the run that it becomes")],
    set_: Set = None,
) -> None:
    """Make a run of a transformers model: to serve, to evaluate, to begin a training with."""
    with one_line_errors():
        from moe_router.config_file import load_config

        base = load_config("quickstart", [*(set_ or ()), f"run.name={name}"])
        from moe_router.commands import import_model

        step, left_out = import_model(folder, base)
        typer.echo(f"{step}: serve it, or train with --set train.init_from")
        if left_out:
            typer.echo(f"left out: the embeddings of {left_out} ids beyond those of its tokenizer")


@app.command()
def inspect(run: Run) -> None:
    """Render what a run recorded as report.html, one offline file."""
    with one_line_errors():
        from moe_router.observability.report import write_report
        from moe_router.run_path import find_run

        typer.echo(write_report(find_run(run).run))


@app.command()
def cost(
    config: Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped config")],
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """FLOPs, bytes and parameters of each layer, dense and routed; the router's share."""
    with one_line_errors():
        from moe_router.config_file import load_config
        from moe_router.cost import cost as count
        from moe_router.tables import cost_facts, cost_table

        read = load_config(config, set_ or ())
        total = count(read, _vocab(read))
        if as_json:
            sums = ("parameters", "active", "bytes", "flops", "dense_flops", "flops_per_step")
            shares = ("router_parameter_share", "router_flop_share")
            _print_json(asdict(total) | {n: getattr(total, n) for n in (*sums, *shares)})
            return
        console = Console()
        console.print(cost_table(total, config))
        console.print(*cost_facts(total), sep="\n", highlight=False)


@app.command()
def tokenizer(
    config: Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped config")],
    output: Annotated[Path, typer.Option(help="the file to write, for data.tokenizer")],
    vocab: Annotated[int, typer.Option(help="ids to make: bytes, merges, separator")] = 4000,
    set_: Set = None,
) -> None:
    """Make a tokenizer.json (byte-level BPE) of the texts that a config trains on."""
    with one_line_errors():
        from moe_router.config_file import load_config
        from moe_router.training.data import make_tokenizer

        made = make_tokenizer(load_config(config, set_ or ()).data, vocab, output)
        typer.echo(f"{output}: {made:,} ids; train with --set data.tokenizer={output}")


Links = Annotated[bool, typer.Option("--links", help="time tokens between two ranks here instead")]


@app.command()
def doctor(as_json: AsJson = False, links: Links = False) -> None:
    """What this machine has and lacks, each with the fix. Exit code 1 if training cannot start."""
    if links:
        _print_links(as_json)
        return
    from moe_router.doctor import examine
    from moe_router.tables import doctor_table

    findings = examine()
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        Console().print(doctor_table(findings))
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


def _print_links(as_json: bool) -> None:
    from moe_router.dispatch.probe import probe
    from moe_router.tables import links_table

    link, probes = probe()
    if as_json:
        _print_json({"link": asdict(link), "probes": [asdict(found) for found in probes]})
    else:
        Console().print(links_table(link, probes))


def _vocab(config: "Config") -> int:
    from moe_router.training.data import load_tokenizer

    return load_tokenizer(config.data.tokenizer).vocab


def _device(asked: Device) -> str:
    import torch

    there = torch.cuda.is_available()
    if asked is Device.cuda and not there:
        raise ConfigError("--device cuda: torch finds no GPU; see moe-router doctor")
    return "cuda" if there and asked is not Device.cpu else "cpu"


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))
