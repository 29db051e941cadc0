"""The commands that need no Ray. `moe_router_cluster.cli` adds `train` to this app.

What a command works with is imported inside it: a wrong path is told at once.
"""

import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moe_router.cli_machine import doctor, simulate
from moe_router.cli_options import (
    INTERRUPTED,
    AsJson,
    Device,
    Run,
    Set,
    Spend,
    Where,
    one_line_errors,
    print_json,
)
from moe_router.errors import ConfigError

if TYPE_CHECKING:
    from moe_router.config import Config

__all__ = ["INTERRUPTED", "Run", "Set", "app", "one_line_errors"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False)


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
    soft: Annotated[
        bool, typer.Option("--soft", help="nobody leaves: as in the soft steps")
    ] = False,
) -> None:
    """Held-out quality of a checkpoint: loss and bits per byte, and what it executes."""
    with one_line_errors():
        from moe_router.run_path import find_run

        step = find_run(run).step
        from moe_router.commands import evaluate_step
        from moe_router.tables import eval_table

        record = evaluate_step(step, set_ or (), _device(device), compute_budget, soft)
        if as_json:
            print_json(asdict(record))
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
            print_json(asdict(total) | {n: getattr(total, n) for n in (*sums, *shares)})
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


app.command()(doctor)
app.command()(simulate)


def _vocab(config: "Config") -> int:
    from moe_router.training.data import load_tokenizer

    return load_tokenizer(config.data.tokenizer).vocab


def _device(asked: Device) -> str:
    import torch

    there = torch.cuda.is_available()
    if asked is Device.cuda and not there:
        raise ConfigError("--device cuda: torch finds no GPU; see moe-router doctor")
    return "cuda" if there and asked is not Device.cpu else "cpu"
