"""What an engine tells Prometheus of its work, in its text format."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

PREFIX = "moe_router_serving"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# seconds; a step is 1 ms to 0.1 s, a first token 10 ms to a minute
_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
HISTOGRAMS = {
    "time_to_first_token_seconds": "from the request to its first token, the queue included",
    "time_per_output_token_seconds": "between two tokens of a stream",
    "queue_seconds": "from the request until a rank has it",
}
COUNTERS = {
    "prompt_tokens_total": "of requests that ranks took",
    "prompt_tokens_known_total": "of those, what a rank remembered and did not read again",
    "generation_tokens_total": "that were made",
    "recoveries_total": "losses of ranks that the engine came back from",
}
GAUGES = {
    "running": "requests that ranks hold",
    "waiting": "requests in the queue",
    "cache_use": "share of the cache's tokens that running requests may come to take",
    "healthy": "1 if the model answers",
}


class Histogram:
    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(_BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        below = 0
        for bound, count in zip((*_BOUNDS, "+Inf"), self._counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self._sum:.6g}"
        yield f"{name}_count {below}"


class Meters:
    """Everything since the engine began."""

    def __init__(self) -> None:
        self.seconds = {name: Histogram() for name in HISTOGRAMS}
        self.counts: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()  # requests by how they ended

    def text(self, gauges: Mapping[str, float]) -> str:
        """All of it. gauges: the values of `GAUGES` now."""
        lines: list[str] = []
        for name, what in HISTOGRAMS.items():
            lines += _head(name, what, "histogram")
            lines += self.seconds[name].lines(f"{PREFIX}_{name}")
        for name, what in COUNTERS.items():
            lines += [*_head(name, what, "counter"), f"{PREFIX}_{name} {self.counts[name]}"]
        lines += _head("requests_total", "that ended, by how", "counter")
        for finish in ("stop", "length", "abandoned"):
            count = self.finished[finish]
            lines.append(f'{PREFIX}_requests_total{{finish="{finish}"}} {count}')
        for name, what in GAUGES.items():
            lines += [*_head(name, what, "gauge"), f"{PREFIX}_{name} {gauges[name]:.6g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, what: str, kind: str) -> list[str]:
    return [f"# HELP {PREFIX}_{name} {what}", f"# TYPE {PREFIX}_{name} {kind}"]
