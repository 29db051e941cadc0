"""The generated sample, token by token, with the experts that each layer chose for it."""

import unicodedata
from pathlib import Path
from typing import Any

from moe_router.errors import DataError
from moe_router.observability.report_series import pack16
from moe_router.observability.summary import read_object
from moe_router.observability.trace import LayerTrace, Trace, load_trace

CHOICES = 180_000  # of all layers together: 4 bytes each, a third more as base64
MAX_TOKENS = 4000  # each is an element of the page
DROPPED = 1 << 15  # flag on a packed group


def load_sample(run_dir: Path) -> dict[str, Any] | None:
    """What the page needs to draw sample.json and its trace; None without sample.json.

    Raises:
        DataError: sample.json or the trace is not what this project writes.
    """
    path = run_dir / "sample.json"
    if not path.is_file():
        return None
    sample = read_object(path)
    ids, texts = sample.get("token_ids"), sample.get("token_text")
    if not isinstance(ids, list) or not isinstance(texts, list) or len(ids) != len(texts):
        raise DataError(
            f"{path}: token_ids and token_text are missing or differ in length; want one text "
            "for each id: generate the sample again"
        )
    ids, texts, prompt = (
        [int(i) for i in ids],
        [str(t) for t in texts],
        str(sample.get("prompt", "")),
    )
    trace_path = run_dir / "routing" / "sample.safetensors"
    trace = load_trace(trace_path) if trace_path.is_file() else None
    shown, layers = _routing(ids, trace)
    return {
        "prompt": prompt,
        "prompt_tokens": _prompt_tokens(prompt, texts),
        "ids": ids[:shown],
        "text": [visible(text, id_) for text, id_ in zip(texts, ids, strict=True)][:shown],
        "cut": len(ids) - shown,
        "layers": layers,
        "traced": trace is not None,
    }


def visible(text: str, id_: int) -> str:
    """A token's text with everything that has no shape of its own made visible.

    Controls and bytes become hexadecimal, a line feed keeps its break after the arrow, and what
    could reorder or hide text (format characters, lone surrogates) becomes its code point.
    """
    if not text:
        return f"⟨{id_}⟩"
    if text == "\ufffd" and id_ < 256:
        return f"⟨{id_:02X}⟩"  # a byte of a character that several tokens spell
    return "".join(map(_shape, text))


def _shape(char: str) -> str:
    if char == "\n":
        return "↵\n"
    if char == "\t":
        return "⇥"
    if ord(char) < 32 or ord(char) == 127:
        return f"⟨{ord(char):02X}⟩"
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"⟨U+{ord(char):04X}⟩"
    return char


def _prompt_tokens(prompt: str, texts: list[str]) -> int:
    """How many leading tokens spell the prompt; 0 if they do not."""
    spelt = ""
    for count, text in enumerate(texts):
        if len(spelt) >= len(prompt):
            return count if spelt == prompt else 0
        spelt += text
    return 0


def _routing(ids: list[int], trace: Trace | None) -> tuple[int, list[dict[str, Any]]]:
    """How many tokens the page shows, and the packed choices of each layer for them."""
    if trace is None:
        return min(len(ids), MAX_TOKENS), []
    traced: list[int] = trace.ids_T.tolist()
    shift = _shift(ids, traced)
    if shift is None:
        return min(len(ids), MAX_TOKENS), []
    chosen = {layer: _chosen(held) for layer, held in trace.layers.items()}
    widths = {layer: max(map(len, rows), default=0) for layer, rows in chosen.items()}
    shown = min(len(ids), MAX_TOKENS, CHOICES // max(1, sum(widths.values())))
    layers = []
    for layer, rows in chosen.items():
        K, window = widths[layer], range(shift, shift + shown)
        cells = [c for t in window for c in _padded(rows[t] if 0 <= t < len(rows) else [], K)]
        layers.append(
            {
                "layer": layer,
                "groups": trace.layers[layer].groups,
                "K": K,
                "target": pack16(target for target, _ in cells),
                "weight": pack16(round(1000 * weight) for _, weight in cells),
            }
        )
    return shown, layers


def _shift(ids: list[int], traced: list[int]) -> int | None:
    """The index in the trace of the sample's first token; what came out last is not in the trace.

    A separator before the sample (shift 1) or a whole prompt (more) may have gone in first.
    """
    if all(i == -1 for i in traced):
        return 0  # ids were not told: the passes begin with the sample
    shifts: list[int] = [*range(len(traced)), *range(-1, -len(ids), -1)]
    for shift in shifts:
        a, b = ids[max(0, -shift) :], traced[max(0, shift) :]
        overlap = min(len(a), len(b))
        if a[:overlap] == b[:overlap] and 2 * overlap > len(ids):
            return shift
    return None


def _chosen(held: LayerTrace) -> list[list[tuple[int, float]]]:
    """For each token its choices, best weight first: packed group (0 is none) and weight."""
    lists = (held.target_TK.tolist(), held.weight_TK.tolist(), held.dropped_TK.tolist())
    rows = []
    for targets, weights, drops in zip(*lists, strict=True):
        made = [
            (target + 1 + (DROPPED if drop else 0), weight)
            for target, weight, drop in zip(targets, weights, drops, strict=True)
            if target >= 0
        ]
        rows.append(sorted(made, key=lambda choice: -choice[1]))
    return rows


def _padded(choices: list[tuple[int, float]], K: int) -> list[tuple[int, float]]:
    return choices + [(0, 0.0)] * (K - len(choices))
