"""What a run leaves behind when it has trained: a sample of its text, a summary, a report."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from moe_router.config import Config
from moe_router.errors import NotCausalError
from moe_router.models import Sampling, generate
from moe_router.observability.files import write_atomic
from moe_router.observability.report import write_report
from moe_router.observability.summary import quality_of, write_summary
from moe_router.observability.trace import Recorder
from moe_router.routing import Context
from moe_router.tables import visible
from moe_router.training.inference import load_for_inference
from moe_router.training.remote import is_remote
from moe_router_cluster.course import Progress
from moe_router_cluster.progress import clock, short

_SHOWN = 400  # characters of the sample on the screen; all of it is in sample.json


def write_sample(config: Config, run_dir: Path, step_dir: Path, device: str) -> str | None:
    """Generate text from a checkpoint, in this process, and record how each token was routed.

    The checkpoint may come from any number of ranks: the experts of all are gathered here.

    Returns:
        The text, prompt included; None for a model that cannot generate.
    """
    if config.model.kind != "causal_lm":
        return None
    model, _, tokenizer = load_for_inference(step_dir, device)
    # a document starts with its separator: without it the prompt would look like a torn-off text
    prompt = [tokenizer.document_id, *tokenizer.encode(config.serve.prompt)]
    recorder = Recorder(run_dir / "routing" / "sample.safetensors")
    try:
        made = generate(
            model,
            [prompt],
            _sampling(config),
            stop_id=tokenizer.document_id,
            context=Context(observe=recorder),
        )[0]
    except NotCausalError:
        return None
    ids = [*prompt, *made]
    recorder.label(torch.tensor(ids))
    recorder.save()
    spoken = ids[1:]
    sample = {
        "prompt": config.serve.prompt,
        "text": tokenizer.decode(spoken),
        "token_ids": spoken,
        "token_text": [tokenizer.decode([token]) for token in spoken],
    }
    write_atomic(run_dir / "sample.json", json.dumps(sample, indent=1).encode())
    return str(sample["text"])


def _sampling(config: Config) -> Sampling:
    serve = config.serve
    return Sampling(
        max_new_tokens=serve.max_new_tokens,
        temperature=serve.temperature,
        top_k=serve.top_k,
        top_p=serve.top_p,
        seed=config.run.seed,
    )


def summarise(config: Config, progress: Progress, *, seconds: float, device: str) -> dict[str, Any]:
    """The fields of summary.json.

    Args:
        seconds: wall-clock of this process, start of Ray and recoveries included.
    """
    held_out = progress.evals[progress.step]
    final = progress.last
    return {
        "name": config.run.name,
        "steps": progress.step,
        "bits_per_byte": held_out.bits_per_byte,
        "unigram_bits_per_byte": held_out.unigram_bits_per_byte,
        "accuracy": held_out.accuracy,
        "matthews": held_out.matthews,
        "held_out_loss": held_out.loss,
        "loss": None if final is None else final.loss,
        "seconds": round(seconds, 2),
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / progress.busy_s if progress.busy_s > 0 else None,
        "recoveries": len(progress.recoveries),
        "recovery_log": [
            {"actor": ", ".join(map(str, loss.actors)) or "none", **asdict(loss)}
            for loss in progress.recoveries
        ],
        "actors": config.cluster.actors,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def finish(
    config: Config,
    run_dir: Path,
    step_dir: Path,
    progress: Progress,
    console: Console,
    *,
    began: float,
    device: str,
) -> None:
    """Write sample, summary and report, and show the end of the run on one screen.

    Args:
        step_dir: the last checkpoint.
        began: time.monotonic() at the start of this process's part.
        device: of the actors.
    """
    here = device if torch.cuda.is_available() else "cpu"
    with _one_thread():
        text = write_sample(config, run_dir, step_dir, here)
    seconds = time.monotonic() - began
    summary = summarise(config, progress, seconds=seconds, device=here)
    write_summary(run_dir, **summary)
    report = write_report(run_dir)
    if text is None:
        why = "it gives labels" if summary["accuracy"] is not None else "it looks at later tokens"
        console.print(f"no sample of the model's own text: {why}", style="dim")
    else:
        _show(console, config.serve.prompt, text)
    # soft_wrap: a path that a line break cuts cannot be copied
    console.print(_facts(summary, step_dir, report), soft_wrap=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One token at a time is too little work for threads: on busy cores they wait for each other
    ten times longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _show(console: Console, prompt: str, text: str) -> None:
    shown = Text("\n")
    shown.append(visible(prompt), style="bold cyan")
    shown.append(visible(text[len(prompt) : _SHOWN]))
    if len(text) > _SHOWN:
        shown.append(" ...", style="dim")
    console.print(shown, soft_wrap=not console.is_terminal)


def _facts(summary: dict[str, Any], step_dir: Path, report: Path) -> Text:
    speed = summary["tokens_per_second"]
    pace = "" if speed is None else f", {short(speed)} tokens/s"
    rows = {
        "held out": quality_of(summary),
        "trained": f"{summary['steps']} steps in {clock(summary['seconds'])}{pace}",
        "actors": f"{summary['actors']} on {summary['device']}, {_losses(summary['recoveries'])}",
        "checkpoint": near(step_dir),
        "report": near(report),
    }
    lines = [Text.assemble((f"{name:<12}", "bold cyan"), value) for name, value in rows.items()]
    return Text("\n").join(lines)


def _losses(count: int) -> str:
    return f"{count} recover{'y' if count == 1 else 'ies'}" if count else "none lost"


def near(place: Path | str) -> str:
    """As short as the reader can use it from here."""
    if is_remote(str(place)):
        return str(place)
    path, here = Path(place), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
