"""Decoding step after step without the host: from the tokens of a batch to its next tokens, drawn
on the device and fed to the next step there.

All tensors of a step have fixed places and the size of a bucket, so on a GPU the whole step is one
CUDA graph, captured once a bucket and way of drawing. The host takes pages and uploads noise for a
stretch of steps, and in between launches graphs and reads tokens when it likes. Sequences that have
ended run on, unread, until the host begins anew; cells of the bucket without a sequence write to a
page that is nobody's.

Not covered: blocks routed in depth, routed attention, and experts on several ranks, whose sizes are
values.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_router.dispatch import Local
from moe_router.models.cached import CachedLayer
from moe_router.models.causal_lm import CausalLM
from moe_router.models.kv_cache import KVCache, Pages
from moe_router.models.packing import Packing
from moe_router.models.rope import Turn
from moe_router.models.sampling import Draws, Sampling, sample
from moe_router.models.transfer import Download, upload
from moe_router_kernels import paged_op, runs_expert_mlp

STRETCH = 128  # steps that are prepared at once
_ROWS, _COLUMNS = 256, 64  # of the tables at first: what outgrows them is captured anew

_log = logging.getLogger(__name__)


def obstacle(model: CausalLM) -> str:
    """Why a model cannot be decoded in fixed steps; empty if it can."""
    if model.config.routing is not None:
        return "blocks are routed in depth"
    if model.config.attention is not None:
        return "attention is routed"
    if not isinstance(model.dispatcher, Local):
        return "experts are on several ranks"
    if not model.embed.weight.is_cuda:
        return ""
    channels = model.config.channels
    if channels not in paged_op.CHANNELS:
        return f"heads of {channels} channels wait for the host"
    for moe in model.moes:
        if moe is None:
            continue
        gate_up = moe.experts.gate_up
        if not runs_expert_mlp(moe.experts.kernels, gate_up.new_empty(0, moe.dim), gate_up):
            return f"experts in {gate_up.dtype} without our kernels wait for the host"
    return ""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's cache as a step sees it. length_B: slots in use before it; seen_B: after."""

    pages: Pages
    table_BM: Tensor
    row_B: Tensor
    length_B: Tensor
    seen_B: Tensor

    def attend(
        self, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, turn: Turn, packing: Packing
    ) -> tuple[Tensor, Tensor]:
        where = (self.pages.kv_2NJSC, self.table_BM, self.row_B)
        q_THC, k_TJC = paged_op.store(q_THC, k_TJC, v_TJC, *turn, *where, self.length_B)
        return paged_op.attend_pages(q_THC, *where, self.seen_B), k_TJC


@dataclass(frozen=True, slots=True)
class _Cache:
    layers: Sequence[CachedLayer]


class Steps:
    """Args:
    model: without an `obstacle`.
    cache: of the sequences; while steps run, nobody else writes to it.

    Attributes:
        left: steps of the stretch.
        uncaptured: why steps are no CUDA graphs on a GPU, and go on without; else empty.
    """

    def __init__(self, model: CausalLM, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._device = model.embed.weight.device
        self._on_gpu = self._device.type == "cuda"
        self._graphs: dict[tuple[int, bool, bool], torch.cuda.CUDAGraph] = {}
        self._packings: dict[int, Packing] = {}
        self._live = 0
        self._key = (0, False, False)
        self.left, self.uncaptured = 0, ""
        self._place(_ROWS, _COLUMNS)
        self._storage = (0, 0)  # address and number of the pages that graphs know
        self._graph_memory = torch.cuda.graph_pool_handle() if self._on_gpu else None

    @property
    def bucket(self) -> int:
        """Cells of a step; 0 if none is prepared."""
        return self._key[0]

    @torch.no_grad()
    def begin(
        self, tokens: Sequence[int], samplings: Sequence[Sampling], noise: Sequence[Tensor]
    ) -> None:
        """Prepare STRETCH steps of the sequences of the cache, each of which holds all but the
        last of its tokens.

        Args:
            tokens: the last of each sequence.
            noise: fp32, on the host, a number for each token to draw; fewer than STRETCH will do.
        """
        B = self._live = len(tokens)
        draws = Draws.of(samplings, self._device)
        self._key = ((1 << (B - 1).bit_length()), draws.drawn, draws.ranked)
        self._fit()
        self.left = STRETCH
        self._token_B[:B] = upload(torch.tensor(tokens), self._device)
        self._live_B.zero_()[:B] = 1
        self._column.zero_()
        if draws.drawn:
            noise_BK = torch.zeros(B, STRETCH)
            for row, noise_N in zip(noise_BK, noise, strict=True):
                row[: len(noise_N)] = noise_N[:STRETCH]
            self._noise_BK[:B] = upload(noise_BK, self._device)
        for ours, theirs in (
            (self._draws.temperature_B1, draws.temperature_B1),
            (self._draws.top_k_B1, draws.top_k_B1),
            (self._draws.top_p_B1, draws.top_p_B1),
        ):
            ours[:B] = theirs

    def _fit(self) -> None:
        """Take the pages of the stretch, and bring tables and lengths to their fixed places."""
        layers, kv_2NJSC = self._cache.layers, self._cache.pool.kv_2NJSC
        for layer in layers:
            layer.make_room([STRETCH] * self._live)
        for layer in layers:
            layer.settle(kv_2NJSC[0, 0].transpose(0, 1))
        rows, columns = self._tables_LBM.shape[1:]
        widest = max(layer.table_BM.size(1) for layer in layers)
        if self.bucket > rows or widest > columns:
            self._place(max(rows, self.bucket), max(columns, 1 << (widest - 1).bit_length()))
        kv_2NJSC = self._cache.pool.kv_2NJSC
        if self._storage != (kv_2NJSC.data_ptr(), kv_2NJSC.size(1)):
            self._storage = (kv_2NJSC.data_ptr(), kv_2NJSC.size(1))
            self._graphs.clear()
        self._tables_LBM.zero_()
        for table_BM, layer in zip(self._tables_LBM, layers, strict=True):
            table_BM[: self._live, : layer.table_BM.size(1)] = layer.table_BM
        self._length_B.zero_()[: self._live] = layers[0].length_B

    def _place(self, rows: int, columns: int) -> None:
        """New places: graphs know the old ones."""
        self._graphs.clear()

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self._device)

        self._tables_LBM = ints(len(self._cache.layers), rows, columns)
        self._length_B, self._live_B = ints(rows), ints(rows)
        self._row_B = torch.arange(rows, dtype=torch.int32, device=self._device)
        self._token_B, self._column = ints(rows).long(), ints(1).long()
        self._noise_BK = torch.zeros(rows, STRETCH, device=self._device)
        self._draws = Draws(
            torch.zeros(rows, 1, device=self._device), ints(rows, 1).long(),
            torch.zeros(rows, 1, device=self._device), False, False,
        )  # fmt: skip

    @torch.no_grad()
    def launch(self) -> Download:
        """One step, and its tokens; nothing waits."""
        assert self.left > 0
        self.left -= 1
        if self._on_gpu and self._key not in self._graphs and not self.uncaptured:
            try:
                self._graphs[self._key] = self._captured()
            except RuntimeError as problem:
                self.uncaptured = str(problem).strip().splitlines()[0]
                _log.warning("steps are not captured in CUDA graphs: %s", self.uncaptured)
        graph = self._graphs.get(self._key)
        self._run() if graph is None else graph.replay()
        return Download.of(self._token_B[: self._live])

    def end(self, lengths: Sequence[int]) -> None:
        """Give the cache back. lengths: what each of its sequences holds now."""
        self.left, self._key = 0, (0, False, False)
        for layer in self._cache.layers:
            layer.grow(lengths)

    def _run(self) -> None:
        """What is captured."""
        n, drawn, ranked = self._key
        token_B, length_B = self._token_B[:n], self._length_B[:n]
        row_B, seen_B = self._row_B[:n], length_B + 1
        layers = [
            _Layer(self._cache.pool, table_BM, row_B, length_B, seen_B)
            for table_BM in self._tables_LBM
        ]
        if n not in self._packings:
            self._packings[n] = Packing(torch.arange(n + 1), self._device)
        # without routing in depth a token's position is the number of tokens that are cached
        out = self._model(token_B, length_B, self._packings[n], cache=_Cache(layers))
        uniform_B = self._noise_BK[:n].index_select(1, self._column)[:, 0]
        ours = self._draws
        draws = Draws(ours.temperature_B1[:n], ours.top_k_B1[:n], ours.top_p_B1[:n], drawn, ranked)
        token_B.copy_(sample(out.logits_TV, uniform_B, draws))
        length_B.add_(self._live_B[:n])
        self._column.add_(1)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """A graph of one step. The step that runs before it is captured compiles, and is undone."""
        state = (self._token_B, self._length_B, self._column)
        before = [x.clone() for x in state]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        for x, old in zip(state, before, strict=True):
            x.copy_(old)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_memory, capture_error_mode="thread_local"):
            self._run()
        _log.info("a step of %d sequences is a CUDA graph", self.bucket)
        return graph
