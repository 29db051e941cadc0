"""Decoding step after step without the host: from the tokens of a batch to its next tokens, drawn
on the device and fed to the next step there.

All tensors of a step have fixed places and the size of a bucket, so on a GPU the whole step is one
CUDA graph, captured once a bucket and way of drawing. The host takes pages and uploads noise for a
stretch of steps, and in between launches graphs and reads tokens when it likes. Sequences that have
ended run on, unread, until the host begins anew; cells of the bucket without a sequence write to a
page that is nobody's.

Blocks that tokens skip or leap over compute in their places, and read no weights where no token
takes them (`fixed.py`). Not covered: tokens that halt, routed attention, and experts on several
ranks or in blocks routed in depth, whose sizes are values.
"""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_router.dispatch import Local
from moe_router.models import fixed
from moe_router.models.cached import CachedLayer
from moe_router.models.causal_lm import CausalLM
from moe_router.models.fixed import FixedLayer
from moe_router.models.kv_cache import KVCache
from moe_router.models.packing import Packing
from moe_router.models.sampling import Draws, Sampling, sample
from moe_router.models.transfer import Download, upload
from moe_router.routing.context import PLAIN, Context
from moe_router_kernels import paged_op, runs_expert_mlp

STRETCH = 128  # steps that are prepared at once
_ROWS, _COLUMNS = 256, 64  # of the tables at first: what outgrows them is captured anew

_log = logging.getLogger(__name__)


def obstacle(model: CausalLM) -> str:
    """Why a model cannot be decoded in fixed steps; empty if it can."""
    if why := fixed.obstacle(model.config):
        return why
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


def bucket_of(sequences: int, *, graphs: bool) -> int:
    """Cells of a step: a power of two where each size is a graph, else no more than are needed."""
    return 1 << (sequences - 1).bit_length() if graphs else sequences


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
        self._graphs: dict[tuple[int, bool, bool, bool], torch.cuda.CUDAGraph] = {}
        self._packings: dict[int, Packing] = {}
        self._live = 0
        self._key = (0, False, False, False)
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
        self,
        tokens: Sequence[int],
        samplings: Sequence[Sampling],
        noise: Sequence[Tensor],
        held: Sequence[int],
        shifts: Sequence[float] = (),
    ) -> None:
        """Prepare STRETCH steps of the sequences of the cache, each of which holds all but the
        last of its tokens.

        Args:
            tokens: the last of each sequence.
            noise: fp32, on the host, a number for each token to draw; fewer than STRETCH will do.
            held: tokens of each sequence before its last one.
            shifts: of the routers in depth, for each sequence; empty: as they are.
        """
        B = self._live = len(tokens)
        draws = Draws.of(samplings, self._device)
        bucket, shifted = bucket_of(B, graphs=self._on_gpu), any(shifts)
        self._key = (bucket, draws.drawn, draws.ranked, shifted)
        self._fit()
        self.left = STRETCH
        self._token_B[:B] = upload(torch.tensor(tokens), self._device)
        self._live_B.zero_()[:B] = 1
        self._position_B.zero_()[:B] = upload(torch.tensor(held, dtype=torch.int32), self._device)
        self._column.zero_()
        if draws.drawn:
            noise_BK = torch.zeros(B, STRETCH)
            for row, noise_N in zip(noise_BK, noise, strict=True):
                row[: len(noise_N)] = noise_N[:STRETCH]
            self._noise_BK[:B] = upload(noise_BK, self._device)
        if shifted:
            self._shift_B.zero_()[:B] = upload(torch.tensor(shifts), self._device)
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
        rows, columns = self._row_B.numel(), self._tables_LXM.size(2)
        widest = max(layer.table_BM.size(1) for layer in layers)
        if self.bucket > rows or widest > columns:
            self._place(max(rows, self.bucket), max(columns, 1 << (widest - 1).bit_length()))
        kv_2NJSC = self._cache.pool.kv_2NJSC
        if self._storage != (kv_2NJSC.data_ptr(), kv_2NJSC.size(1)):
            self._storage = (kv_2NJSC.data_ptr(), kv_2NJSC.size(1))
            self._graphs.clear()
        self._tables_LXM.zero_()
        for table_XM, layer in zip(self._tables_LXM, layers, strict=True):
            table_XM[: self._live, : layer.table_BM.size(1)] = layer.table_BM
        lengths_LB = torch.stack([layer.length_B for layer in layers])
        self._length_LB.zero_()[:, : self._live] = lengths_LB

    def _place(self, rows: int, columns: int) -> None:
        """New places: graphs know the old ones."""
        self._graphs.clear()

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self._device)

        layers = len(self._cache.layers)
        self._tables_LXM = ints(layers, rows + 1, columns)  # the last row is nobody's
        self._length_LB, self._kept_LB = ints(layers, rows), ints(layers, rows) + 1
        self._position_B, self._live_B = ints(rows), ints(rows)
        self._row_B = torch.arange(rows, dtype=torch.int32, device=self._device)
        self._token_B, self._column = ints(rows).long(), ints(1).long()
        self._noise_BK = torch.zeros(rows, STRETCH, device=self._device)
        self._shift_B = torch.zeros(rows, device=self._device)
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

    def end(self) -> None:
        """Give the cache back, of sequences of which every token was read. Waits for the device:
        how many of them each layer holds is a value."""
        self.left, self._key = 0, (0, False, False, False)
        held_LB = self._length_LB[:, : self._live].tolist()
        for layer, lengths in zip(self._cache.layers, held_LB, strict=True):
            layer.grow(lengths)

    def _run(self) -> None:
        """What is captured."""
        n, drawn, ranked, shifted = self._key
        token_B, position_B = self._token_B[:n], self._position_B[:n]
        length_LB, kept_LB = self._length_LB[:, :n], self._kept_LB[:, :n]
        pages, row_B = self._cache.pool.kv_2NJSC, self._row_B[:n]
        places = (self._tables_LXM, length_LB, length_LB + 1, kept_LB)
        layers = [
            FixedLayer(pages, table_XM, row_B, *own) for table_XM, *own in zip(*places, strict=True)
        ]
        if n not in self._packings:
            self._packings[n] = Packing(torch.arange(n + 1), self._device, fixed=True)
        context = Context(shift_B=self._shift_B[:n]) if shifted else PLAIN
        here = (token_B, position_B, self._packings[n])
        out = self._model(*here, cache=_Cache(layers), context=context)
        uniform_B = self._noise_BK[:n].index_select(1, self._column)[:, 0]
        ours = self._draws
        draws = Draws(ours.temperature_B1[:n], ours.top_k_B1[:n], ours.top_p_B1[:n], drawn, ranked)
        token_B.copy_(sample(out.logits_TV, uniform_B, draws))
        length_LB.add_(kept_LB * self._live_B[:n])
        position_B.add_(self._live_B[:n])
        self._column.add_(1)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """A graph of one step. The step that runs before it is captured compiles, and is undone."""
        state = (self._token_B, self._length_LB, self._position_B, self._column)
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
        # what has been compiled stays: a full collection over it would stop steps for 0.4 s
        gc.freeze()
        _log.info("a step of %d sequences is a CUDA graph", self.bucket)
        return graph
