"""From the rows of a run's CSV files to curves and heatmaps small enough for one HTML file."""

import base64
import math
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

POINTS = 480  # of one curve: more than the pixels of a narrow screen
CELLS = 240_000  # of all heatmaps together: 2 bytes each, a third more as base64
MAX_COLUMNS = 160
SCALE = 256  # load relative to the mean, as fixed point in 16 bits

Rows = Sequence[Mapping[str, str]]


def numbers(row: Mapping[str, str], *names: str) -> list[float] | None:
    """The finite values of some cells; None if one is blank, missing or not a finite number."""
    try:
        values = [float(row[name]) for name in names]
    except (KeyError, ValueError):
        return None
    return values if all(map(math.isfinite, values)) else None


def curve(pairs: Iterable[tuple[float, float]], points: int = POINTS) -> dict[str, list[float]]:
    """At most `points` buckets of neighbouring steps.

    Returns:
        x (the last step of each bucket), y (mean), low, high, and smooth (a moving mean
        over rows); {} without rows.
    """
    pairs = list(pairs)
    if not pairs:
        return {}
    smooth = _smooth([y for _, y in pairs])
    width = math.ceil(len(pairs) / points)
    out: dict[str, list[float]] = {"x": [], "y": [], "low": [], "high": [], "smooth": []}
    for start in range(0, len(pairs), width):
        bucket = pairs[start : start + width]
        ys = [y for _, y in bucket]
        out["x"].append(bucket[-1][0])
        out["y"].append(_short(sum(ys) / len(ys)))
        out["low"].append(_short(min(ys)))
        out["high"].append(_short(max(ys)))
        out["smooth"].append(_short(smooth[start + len(bucket) - 1]))
    return out


def column(rows: Rows, name: str, scale: float = 1.0) -> dict[str, list[float]]:
    """One column over steps."""
    found = (numbers(row, "step", name) for row in rows)
    return curve((v[0], v[1] * scale) for v in found if v is not None)


def percent(rows: Rows, part: str, whole: str) -> dict[str, list[float]]:
    """100 * part / whole over steps, where whole is not 0."""
    found = (numbers(row, "step", part, whole) for row in rows)
    return curve((v[0], 100 * v[1] / v[2]) for v in found if v is not None and v[2] > 0)


def total(rows: Rows, name: str) -> float:
    """Sum of a column over the logged steps."""
    found = (numbers(row, name) for row in rows)
    return sum(v[0] for v in found if v is not None)


def load_maps(rows: Iterable[Mapping[str, str]]) -> dict[str, Any] | None:
    """Heatmaps of load per expert over time.

    Returns:
        steps (C columns, the last step of each), experts E, layers: base64 of little-endian
        uint16, column by column, E each: load / mean load of the layer * SCALE. None without rows.
    """
    layers: dict[int, dict[int, array[int]]] = {}
    for row in rows:
        if row.get("layer", "").isdecimal():
            load_E = [int(row[name]) for name in row if name[:1] == "e" and row[name].isdecimal()]
            layers.setdefault(int(row["layer"]), {})[int(row["step"])] = array("q", load_E)
    experts = max((len(load_E) for held in layers.values() for load_E in held.values()), default=0)
    if experts == 0:
        return None
    columns = max(1, min(MAX_COLUMNS, CELLS // (experts * len(layers))))
    steps = sorted({step for held in layers.values() for step in held})
    width = math.ceil(len(steps) / columns)
    buckets = [steps[i : i + width] for i in range(0, len(steps), width)]
    return {
        "steps": [bucket[-1] for bucket in buckets],
        "first": steps[0],
        "experts": experts,
        "scale": SCALE,
        "layers": [_pack(_relative(layers[i], buckets, experts)) for i in sorted(layers)],
    }


def pack16(values: Iterable[int]) -> str:
    """Base64 of little-endian uint16; larger values become 65535."""
    packed = array("H", (min(max(v, 0), 65535) for v in values))
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode()


def _relative(
    load_of: Mapping[int, Sequence[int]], buckets: list[list[int]], experts: int
) -> list[float]:
    out: list[float] = []
    for bucket in buckets:
        total_E = [0] * experts
        for step in bucket:
            for e, n in enumerate(load_of.get(step, [])):
                total_E[e] += n
        mean = sum(total_E) / experts
        out += [n / mean if mean > 0 else 0.0 for n in total_E]
    return out


def _pack(relative: list[float]) -> str:
    return pack16(round(r * SCALE) for r in relative)


def _smooth(ys: list[float]) -> list[float]:
    """The mean of a fiftieth of the run around each row: centred, so that it does not lag; the
    window narrows towards the ends."""
    reach, sums = len(ys) // 100, [0.0, *accumulate(ys)]
    out = []
    for i in range(len(ys)):
        r = min(reach, i, len(ys) - 1 - i)
        out.append((sums[i + r + 1] - sums[i - r]) / (2 * r + 1))
    return out


def _short(value: float) -> float:
    return float(f"{value:.5g}")
