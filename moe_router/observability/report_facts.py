"""The parts of a report that are plain HTML: headline numbers, the summary and the config."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from moe_router.observability.report_series import Rows, numbers, total

Fact = tuple[str, str, str]  # label, value, note


def headline(summary: Mapping[str, Any], metrics: Rows, evals: Rows) -> list[Fact]:
    """The numbers of the first screen; from the CSV files where the summary is not there yet."""
    facts = [_quality(summary, evals), *_pace(summary, metrics), _recoveries(summary)]
    return [fact for fact in [*facts, *_balance(metrics)] if fact is not None]


def _quality(summary: Mapping[str, Any], evals: Rows) -> Fact | None:
    accuracy = _number(summary.get("accuracy"))
    if accuracy is None and evals:
        accuracy = next(iter(numbers(evals[-1], "accuracy") or ()), None)
    if accuracy is not None:
        return ("Accuracy", f"{accuracy:.1%}", "of the held-out labels")
    bits = _number(summary.get("bits_per_byte"))
    unigram = _number(summary.get("unigram_bits_per_byte"))
    if bits is None and evals:
        found = numbers(evals[-1], "bits_per_byte", "unigram_bits_per_byte")
        bits, unigram = found or (None, None)
    if bits is None:
        return None
    note = f"{bits / unigram:.2f} of the unigram entropy {unigram:.2f}" if unigram else "held out"
    return ("Bits per byte", f"{bits:.3f}", note)


def _pace(summary: Mapping[str, Any], metrics: Rows) -> list[Fact]:
    steps = _number(summary.get("steps"))
    if steps is None and metrics:
        steps = float(metrics[-1]["step"])
    seconds = _number(summary.get("seconds"))
    speed = _number(summary.get("tokens_per_second"))
    if speed is None and total(metrics, "seconds") > 0:
        speed = total(metrics, "tokens") / total(metrics, "seconds")
    facts = []
    if steps is not None:
        facts.append(("Steps", f"{steps:,.0f}", "" if summary else "no summary: still running"))
    if seconds is not None:
        facts.append(("Time", duration(seconds), "wall-clock"))
    if speed is not None:
        facts.append(("Tokens per second", compact(speed), "trained on"))
    return facts


def _recoveries(summary: Mapping[str, Any]) -> Fact | None:
    count = _number(summary.get("recoveries"))
    if count is None:
        return None
    log = recovery_log(summary)
    first = log[0] if log else None
    note = f"actor {first['actor']} at step {first['step']}" if first else "no actor was lost"
    if first and first["seconds"] is not None:
        note += f", back in {first['seconds']:.1f} s"
    return ("Recoveries", f"{count:.0f}", note + (f" and {len(log) - 1} more" if log[1:] else ""))


def _balance(metrics: Rows) -> list[Fact]:
    facts = []
    last = next((n for r in reversed(metrics) if (n := numbers(r, "imbalance"))), None)
    if last is not None:
        facts.append(("Imbalance", f"{last[0]:.2f}", "busiest expert over mean, last step"))
    rows, dropped = total(metrics, "rows"), total(metrics, "dropped")
    if rows > 0:
        facts.append(("Dropped", f"{100 * dropped / rows:.2g}%", f"of {compact(rows)} rows"))
    dense = total(metrics, "dense_flops")
    if dense > 0:
        share = 100 * total(metrics, "executed_flops") / dense
        facts.append(("Computed", f"{share:.4g}%", "of the routed layers' dense FLOPs"))
    return facts


def recovery_log(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The well-formed entries of `recovery_log`: step, seconds (or None), actor."""
    log = summary.get("recovery_log")
    entries = [e for e in log if isinstance(e, dict)] if isinstance(log, list) else []
    return [
        {"step": e["step"], "seconds": _number(e.get("seconds")), "actor": e.get("actor", "?")}
        for e in entries
        if isinstance(e.get("step"), int)
    ]


def facts_html(facts: list[Fact]) -> str:
    """The headline as a definition list."""
    return "\n".join(
        f'<div class="fact"><dt>{escape(label)}</dt><dd>{escape(value)}</dd>'
        f'<dd class="note">{escape(note)}</dd></div>'
        for label, value, note in facts
    )


def read_config(run_dir: Path) -> dict[str, Any]:
    """config.yaml as plain data, {} without one; unreadable YAML is one entry with its text."""
    import yaml

    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    return value if isinstance(value, dict) else {"config.yaml": value}


def table_html(groups: Mapping[str, Any]) -> str:
    """One table for each top key; nested keys are joined by dots."""
    nested = {k: v for k, v in groups.items() if isinstance(v, dict) and v}
    plain = {k: v for k, v in groups.items() if k not in nested}
    parts = [_table(str(k), _flat(v)) for k, v in nested.items()]
    if plain:
        parts.append(_table("other" if nested else "", plain))
    return "\n".join(parts)


def _table(title: str, values: Mapping[str, Any]) -> str:
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(_shown(value))}</td></tr>'
        for key, value in values.items()
    )
    return f"<table>{caption}<tbody>{rows}</tbody></table>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        out |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return out


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if good else None


def compact(value: float) -> str:
    """1234567 as 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """95 as 1 min 35 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
