"""report.html: a whole run in one offline file, for a reader who has only a browser.

The page draws itself from a JSON island with the scripts in `assets/`; it may load nothing.
"""

import json
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from moe_router.errors import DataError
from moe_router.observability import report_facts as facts
from moe_router.observability import report_series as series
from moe_router.observability.csv_log import iter_rows, read_rows
from moe_router.observability.files import write_atomic
from moe_router.observability.report_sample import load_sample
from moe_router.observability.summary import read_object

SCRIPTS = ("base.js", "chart.js", "heatmap.js", "palette.js", "sample.js", "main.js")
_LABELLED = {
    "encoder": ("text classifier", "labelled text"),
    "vit": ("image classifier", "labelled images"),
}
_NATS_TO_BITS = 1.4426950408889634


def write_report(run_dir: Path) -> Path:
    """Write report.html beside the files of a run, finished or not.

    Args:
        run_dir: any of metrics.csv, load.csv, eval.csv, summary.json, config.yaml, sample.json
            and routing/sample.safetensors may be missing; what they would show is left out.

    Returns:
        The file, below 3 MB however long the run.

    Raises:
        DataError: there is nothing of a run in the folder, or one of its files is not ours.
        MoeRouterError: the disk refused.
    """
    run_dir = Path(run_dir)
    if not any((run_dir / name).is_file() for name in ("metrics.csv", "summary.json")):
        raise DataError(
            f"{run_dir}: neither metrics.csv nor summary.json is there; want the folder of a run: "
            "check the path, or train first"
        )
    has_summary = (run_dir / "summary.json").is_file()
    summary = read_object(run_dir / "summary.json") if has_summary else {}
    config = facts.read_config(run_dir)
    page = _fill(_asset("report.html"), _parts(run_dir, config, summary))
    path = run_dir / "report.html"
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def _parts(run_dir: Path, config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, str]:
    """What goes into each {{key}} of the template."""
    metrics, evals = read_rows(run_dir / "metrics.csv"), read_rows(run_dir / "eval.csv")
    sample = load_sample(run_dir)
    payload = {
        "charts": _charts(metrics),
        "compute": {k: series.total(metrics, f"{k}_flops") for k in ("executed", "dense")},
        "eval": _evals(evals),
        "recoveries": facts.recovery_log(summary),
        "load": series.load_maps(iter_rows(run_dir / "load.csv")),
        "moe_layers": _moe_layers(config),
        "byte_tokens": _at(config, "data", "tokenizer") == "bytes",
        "labels": _at(config, "model", "kind") in _LABELLED,
        "sample": sample,
    }
    return {
        "name": escape(str(_at(config, "run", "name") or run_dir.resolve().name)),
        "lead": escape(_lead(config)),
        "facts": facts.facts_html(facts.headline(summary, metrics, evals)),
        "plain_sample": escape("".join(sample["text"]) if sample else "No sample."),
        "config": facts.table_html(config) or "<p>config.yaml is not there.</p>",
        "summary": facts.table_html(_scalars(summary)) or "<p>The run is not finished.</p>",
        "style": _asset("report.css"),
        "data": _island(payload),
        "script": "\n".join(map(_asset, SCRIPTS)),
    }


def _charts(metrics: series.Rows) -> dict[str, Any]:
    names = list(metrics[-1]) if metrics else []
    return {
        "loss": series.column(metrics, "loss", _NATS_TO_BITS),
        "imbalance": series.column(metrics, "imbalance"),
        "dropped": series.percent(metrics, "dropped", "rows"),
        "computed": series.percent(metrics, "executed_flops", "dense_flops"),
        "speed": series.column(metrics, "tokens_per_second"),
        "grad_norm": series.column(metrics, "grad_norm"),
        "lr": series.column(metrics, "lr"),
        "losses": {
            name.removeprefix("loss_"): series.column(metrics, name)
            for name in names
            if name.startswith("loss_")
        },
    }


def _evals(evals: series.Rows) -> dict[str, list[Any]]:
    """Held-out loss in bits, and in words what it comes to: bits per byte, or labels right."""
    found = [(v, row) for row in evals if (v := series.numbers(row, "step", "loss")) is not None]
    thin = found[:: max(1, len(found) // series.POINTS)]
    kept = thin if not found or thin[-1] is found[-1] else [*thin, found[-1]]
    unigrams = [series.numbers(row, "unigram_bits_per_byte") for _, row in kept]
    return {
        "x": [v[0] for v, _ in kept],
        "y": [v[1] * _NATS_TO_BITS for v, _ in kept],
        "notes": [_measured(row) for _, row in kept],
        "unigram": [v[0] for v in unigrams if v is not None],
    }


def _measured(row: Mapping[str, str]) -> str:
    if (accuracy := series.numbers(row, "accuracy")) is not None:
        return f"{accuracy[0]:.1%} of the labels right"
    bits = series.numbers(row, "bits_per_byte")
    return f"{bits[0]:.3f} bits per byte" if bits is not None else "loss alone"


def _moe_layers(config: Mapping[str, Any]) -> list[int]:
    """Block indices of the MoE layers; load.csv counts MoE layers alone."""
    layers, moe = _at(config, "model", "layers"), _at(config, "model", "moe")
    if not isinstance(layers, int) or not isinstance(moe, dict):
        return []
    first, every = moe.get("first", 0), moe.get("every", 1)
    if not isinstance(first, int) or not isinstance(every, int) or every < 1:
        return []
    return list(range(first, layers, every))


def _lead(config: Mapping[str, Any]) -> str:
    """One sentence: what was trained on what."""
    layers, dim = _at(config, "model", "layers"), _at(config, "model", "dim")
    if layers is None or dim is None:
        return "A training run of moe_router."
    moe = _at(config, "model", "moe")
    kind = "dense" if not isinstance(moe, dict) else _experts(moe)
    actors = _at(config, "cluster", "actors") or 1
    on = f"{actors} actors" if actors != 1 else "one actor"
    source = _at(config, "data", "source") or "text"
    what, data = _LABELLED.get(_at(config, "model", "kind"), ("language model", source))
    return f"A {what} of {layers} layers, width {dim}, {kind}, trained on {data} by {on}."


def _experts(moe: Mapping[str, Any]) -> str:
    shared = " and a shared one" if moe.get("shared_hidden") else ""
    if moe.get("policy") == "expert_choice":
        return f"{moe.get('experts')} experts that choose their tokens{shared}"
    return f"{moe.get('experts')} experts, {moe.get('top_k')} per token{shared}"


def _scalars(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in summary.items() if k != "recovery_log" and not isinstance(v, list)}


def _at(config: Mapping[str, Any], *keys: str) -> Any:
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _asset(name: str) -> str:
    return (files("moe_router.observability") / "assets" / name).read_text(encoding="utf-8")


def _island(payload: Mapping[str, Any]) -> str:
    """JSON that cannot end its own script element."""
    text = json.dumps(payload, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Replace every {{key}} once; what was put in is not searched again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)
