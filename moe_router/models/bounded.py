"""A forward pass in which nobody waits to hear how many tokens a router lets go on.

START HERE for inference of a model whose tokens halt, skip, leap or are pruned by a threshold. Such
a pass takes bounds for the numbers of rows, from the passes before it, and is one CUDA graph for
each size of a batch. What it counted comes back with its result; if a bound was too small, the pass
is made again without them, and they grow. On a CPU there are no graphs and no waits, and the same
bounds; on a GPU in fp32 attention asks for lengths, and every pass is made without bounds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_router.errors import ConfigError
from moe_router.models.attend import HALF
from moe_router.models.causal_lm import CausalLM
from moe_router.models.encoder import Classifier
from moe_router.models.packing import Packing
from moe_router.routing.bounds import Bounds
from moe_router.routing.context import PLAIN

FINEST = 8  # steps between two powers of two: at most an eighth more rows than are needed
LEAST = 64  # rows
MARGIN = 1.1  # of what was seen, to what is prepared


def bucket_of(size: float) -> int:
    """The least of the sizes that are prepared which is no smaller."""
    step = max(LEAST, 1 << max(0, math.ceil(math.log2(max(size, 1))))) // FINEST
    return math.ceil(size / step) * step


def obstacle(model: Classifier | CausalLM) -> str:
    """Why the passes of a model have no bounds; empty if they can."""
    config = model.config
    if config.routing is None or config.routing.kind == "merge":
        return "the host knows every number of rows as it is"
    if config.routing.kind == "prune" and config.routing.decide == "top":
        return "the host knows every number of rows as it is"
    if config.moe is not None:
        return "experts would compute rows of no token"
    if config.attention is not None:
        return "routed attention asks for lengths"
    if config.routing.router == "attention":
        return "router=attention asks for lengths"
    return ""


@dataclass(slots=True)
class _Prepared:
    """A pass of one size: its inputs stay in their places.

    Attributes:
        counts_N: what the decisions wanted.
        graph: None on a CPU, and before it is captured.
    """

    input_T: Tensor
    position_T: Tensor
    offsets_B1: Tensor
    rows: tuple[int, ...]
    logits: Tensor | None = None
    counts_N: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


class BoundedPass:
    """The logits of a model, in evaluation and without gradients.

    Args:
        model: without an `obstacle`; weights stay where they are.

    Attributes:
        repeated: passes that had to be made again.

    Raises:
        ConfigError: a model whose passes cannot be bounded.
    """

    def __init__(self, model: Classifier | CausalLM) -> None:
        if why := obstacle(model):
            raise ConfigError(f"bounded pass: {why}; call the model itself")
        self._model = model
        self._shares: list[float] = []  # of the tokens that came in, for each decision
        self._prepared: dict[tuple[int, int, int], _Prepared] = {}
        self.repeated = 0
        on_gpu = model.norm.weight.is_cuda
        # graphs run one after the other, and what comes out is copied before the next
        self._graph_memory = torch.cuda.graph_pool_handle() if on_gpu else None

    @torch.no_grad()
    def __call__(self, input_T: Tensor, position_T: Tensor, offsets_B1: Tensor) -> Tensor:
        """Logits: (B, C) of a classifier, (T, V) of a language model.

        Args:
            input_T, position_T: as the model takes them.
            offsets_B1: (B + 1,) int32 cu_seqlens on the CPU.

        Raises:
            ConfigError: the model is in training, where others go on than in evaluation.
        """
        if self._model.training:
            raise ConfigError("bounded pass: the model is in training; call model.eval() before")
        lengths = [b - a for a, b in pairwise(offsets_B1.tolist())]
        T, B = input_T.size(0), len(lengths)
        if not self._shares or not T or not self._attends(input_T.device):
            return self._whole(input_T, position_T, offsets_B1)
        key = (bucket_of(T), bucket_of(B), bucket_of(max(lengths)))
        rows = tuple(bucket_of(min(T, MARGIN * share * key[0])) for share in self._shares)
        ready = self._prepared.get(key)
        if ready is None or any(a < b for a, b in zip(ready.rows, rows, strict=True)):
            ready = self._prepared[key] = self._places(key, rows, input_T, position_T)
        self._fill(ready, input_T, position_T, offsets_B1)
        self._run(ready, key[2])
        assert ready.logits is not None and ready.counts_N is not None
        counts = ready.counts_N.tolist()  # the one wait, for everything
        if any(count > bound for count, bound in zip(counts, ready.rows, strict=True)):
            self.repeated += 1
            return self._whole(input_T, position_T, offsets_B1)
        self._learn(counts, T)
        return ready.logits[: B if isinstance(self._model, Classifier) else T].clone()

    def _attends(self, device: torch.device) -> bool:
        """Whether attention takes lengths that only the device knows."""
        dtype = self._model.norm.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return device.type == "cpu" or (dtype in HALF and self._model.config.channels % 8 == 0)

    def _whole(self, input_T: Tensor, position_T: Tensor, offsets_B1: Tensor) -> Tensor:
        """Without bounds, and with a wait for each."""
        bounds = Bounds()
        context = replace(PLAIN, bounds=bounds)
        output = self._model(input_T, position_T, offsets_B1, context=context)
        if input_T.numel() and bounds.counts:
            self._learn(torch.cat(bounds.counts).tolist(), input_T.size(0))
        logits: Tensor = output.logits
        return logits

    def _learn(self, counts: Sequence[int], tokens: int) -> None:
        shares = [count / tokens for count in counts]
        self._shares = [max(two) for two in zip(self._shares or shares, shares, strict=True)]

    def _places(
        self, key: tuple[int, int, int], rows: tuple[int, ...], input_T: Tensor, position_T: Tensor
    ) -> _Prepared:
        T, B, _ = key
        offsets_B1 = torch.zeros(B + 1, dtype=torch.int32, device=input_T.device)
        return _Prepared(
            input_T.new_zeros(T, *input_T.shape[1:]), position_T.new_zeros(T), offsets_B1, rows
        )

    def _fill(
        self, ready: _Prepared, input_T: Tensor, position_T: Tensor, offsets_B1: Tensor
    ) -> None:
        """Sequences that are left over are empty; tokens that are left over are in none."""
        T, more = input_T.size(0), ready.offsets_B1.numel() - offsets_B1.numel()
        ready.input_T[:T].copy_(input_T)
        ready.position_T[:T].copy_(position_T)
        bounds_B1 = F.pad(offsets_B1.int(), (0, more), value=T)
        ready.offsets_B1.copy_(bounds_B1, non_blocking=True)

    def _run(self, ready: _Prepared, longest: int) -> None:
        if ready.graph is not None:
            ready.graph.replay()
            return
        self._pass(ready, longest)
        assert ready.logits is not None
        if ready.logits.is_cuda:
            ready.graph = self._captured(ready, longest)
            ready.graph.replay()  # a capture computes nothing

    def _pass(self, ready: _Prepared, longest: int) -> None:
        causal = self._model.config.kind == "causal_lm"
        packing = Packing.bounded(ready.offsets_B1, ready.input_T.size(0), longest, causal=causal)
        bounds = Bounds(ready.rows)
        context = replace(PLAIN, bounds=bounds)
        output = self._model(ready.input_T, ready.position_T, packing, context=context)
        ready.logits, ready.counts_N = output.logits, torch.cat(bounds.counts)

    def _captured(self, ready: _Prepared, longest: int) -> torch.cuda.CUDAGraph:
        """The pass before has compiled what it takes."""
        graph = torch.cuda.CUDAGraph()
        # what autocast has cast before would be gone at the next replay, and what it casts in a
        # capture is not there yet for those who come after
        torch.clear_autocast_cache()
        with torch.cuda.graph(graph, pool=self._graph_memory, capture_error_mode="thread_local"):
            self._pass(ready, longest)
        torch.clear_autocast_cache()
        return graph
