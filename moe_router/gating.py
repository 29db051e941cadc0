"""The gating service: what the ranks of a run share, under an epoch, and `route` for outsiders.

It covers no transport (gRPC is in `serving`, the actor in `cluster`), and no token of a training
step passes through it: every rank runs the gate on its own device. See docs/gating.md.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moe_router.errors import StaleEpochError, UnknownRouterError
from moe_router.gating_records import Load, RouterWeights, Snapshot, need
from moe_router.gating_route import Decision, checked_tokens, decide
from moe_router.gating_state import GatingFiles
from moe_router.placement import Placement
from moe_router.routing import Router

_WRITE_S = 1.0  # between two writes of the load


class GatingService:
    """Thread-safe. Epoch 0 means that nothing was published yet.

    Args:
        decay: what a load report leaves of the average before it, in [0, 1).
        heartbeat_timeout_s: silence after which a rank no longer counts as alive.
        clock: seconds that never go back.
        folder: where to keep what is known, for a service that is started again; None keeps
            nothing. The ranks of a kept load count as heard from when that starts.

    Raises:
        GatingError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        decay: float = 0.9,
        heartbeat_timeout_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        folder: Path | None = None,
    ) -> None:
        need(0 <= decay < 1, "decay", decay, "0 <= decay < 1")
        need(heartbeat_timeout_s > 0, "heartbeat_timeout_s", heartbeat_timeout_s, "above 0 s")
        self._decay, self._timeout_s, self._clock = decay, heartbeat_timeout_s, clock
        self._changed = threading.Condition()
        self._seen: dict[int, float] = {}  # by rank, when it was last heard of
        self._load: dict[int, Tensor] = {}  # by rank, the average of its reports
        self._routers: dict[tuple[str, int], Router] = {}  # replaced whole, so read unlocked
        self._agreed = Snapshot(0, 0, (), None, (), (), torch.zeros(0, 0))
        self._files = None if folder is None else GatingFiles(folder)
        self._writing = threading.Lock()  # taken before `_changed`, never inside it
        self._written = -math.inf  # when the load was
        kept = None if self._files is None else self._files.read()
        if kept is not None:
            self._agreed, self._load = kept.agreed, kept.load
            self._seen = dict.fromkeys(kept.load, clock())
            self._routers = {router.key: router.build().eval() for router in kept.agreed.routers}

    def publish(
        self,
        *,
        epoch: int,
        step: int,
        placements: Sequence[Placement],
        capacity_factor: float | None,
        routers: Sequence[RouterWeights],
    ) -> Snapshot:
        """Begin an epoch. Who publishes counts the epochs, so they outlive this service.

        Args:
            epoch: above the present one; the present one again changes nothing.
            step: the checkpointed step from which it holds.
            placements: of each router, on the same ranks, of the same number of experts.
            capacity_factor: multiple of an expert's mean load, for every router; None is dropless.
            routers: all there are; each replaces the factor of its config by that one.

        Raises:
            StaleEpochError: an epoch that has passed.
            GatingError: a router without a placement of its experts, twice the same router,
                weights that do not fit, or a factor that is not above 0.
        """
        need(epoch >= 1 and step >= 0, "epoch, step", (epoch, step), "epoch >= 1, step >= 0")
        finite = capacity_factor is None or 0 < capacity_factor < math.inf
        need(finite, "capacity_factor", capacity_factor, "above 0, or None for dropless")
        held = _in_order(routers, placements)
        ordered = [router.limited(capacity_factor) for router, _ in held]
        built = {router.key: router.build().eval() for router in ordered}
        need(len(built) == len(ordered), "routers", len(ordered), "each model and layer once")
        with self._changed:
            present = self._agreed
            if epoch < present.epoch:
                raise StaleEpochError(f"publish epoch {epoch}: want one above {present.epoch}")
            if epoch > present.epoch:
                placed = tuple(placement for _, placement in held)
                empty_LE = torch.zeros(len(held), placed[0].experts if placed else 0)
                self._agreed = Snapshot(
                    epoch, step, placed, capacity_factor, tuple(ordered), (), empty_LE
                )
                self._routers = built
                self._keep_only_what_fits()
                self._changed.notify_all()
            published = self._present()
        if self._files is not None and published.epoch > present.epoch:
            with self._writing:
                # the newest: another may have been published meanwhile, and written
                self._files.write_epoch(self.snapshot())
        return published

    def snapshot(self) -> Snapshot:
        """The present epoch's, with the ranks and the load of this moment."""
        with self._changed:
            return self._present()

    def load(self) -> Load:
        """What a snapshot says of this moment, without what was agreed: small, at any size."""
        with self._changed:
            now = self._present()
        names = tuple(router.name for router in now.routers)
        return Load(now.epoch, now.step, now.alive, names, now.load_LE)

    def watch(self, after_epoch: int, timeout_s: float) -> Snapshot | None:
        """Wait until an epoch other than `after_epoch` is published; None if none was in time.

        With after_epoch=0 that is the present one; a service that started again has none.
        """
        need(timeout_s >= 0, "timeout_s", timeout_s, "0 s or more")
        with self._changed:
            known = (0, after_epoch)
            came = self._changed.wait_for(lambda: self._agreed.epoch not in known, timeout_s)
            return self._present() if came else None

    def heartbeat(self, rank: int) -> int:
        """A rank lives. Returns the epoch, for it to compare with its own.

        Raises:
            StaleEpochError: nothing is published yet.
            GatingError: no such rank in the placement.
        """
        with self._changed:
            present = self._agreed
            if present.epoch == 0:
                raise StaleEpochError(f"rank {rank}: nothing is published yet; try again later")
            ranks = present.ranks
            need(0 <= rank < ranks, "rank", rank, f"0..{ranks - 1} (placement)")
            if rank not in self._alive():
                self._load.pop(rank, None)  # what it chose before it was silent is old
            self._seen[rank] = self._clock()
            return present.epoch

    def report_load(self, rank: int, epoch: int, load_LE: Tensor) -> None:
        """Add to a rank's moving average; counts as a heartbeat, even when it is stale.

        Args:
            load_LE: (L, E) choices of the rank's own tokens in one step; row l is that of
                `snapshot().routers[l]`.

        Raises:
            StaleEpochError: of another epoch than the present one.
            GatingError: no such rank, another shape, or values that are no counts.
        """
        with self._changed:
            self._need_epoch(f"load of rank {rank}", epoch, self.heartbeat(rank))
            want, got = tuple(self._agreed.load_LE.shape), tuple(load_LE.shape)
            need(got == want, f"load of rank {rank}", got, f"layers x experts {want}")
            new_LE = load_LE.detach().to("cpu", torch.float32, copy=True)
            sound = bool((torch.isfinite(new_LE) & (new_LE >= 0)).all())
            need(sound, f"load of rank {rank}", "NaN, infinite or negative", "counts")
            if rank in self._load:
                new_LE = self._decay * self._load[rank] + (1 - self._decay) * new_LE
            self._load[rank] = new_LE
            load, now = dict(self._load), self._clock()
        if self._files is not None and now - self._written >= _WRITE_S:
            with self._writing:
                self._files.write_load(load)
                self._written = now

    def route(
        self, model: str, layer: int, epoch: int, x_TD: Tensor, offsets_B1: Tensor | None = None
    ) -> Decision:
        """Decide for tokens from outside, by the published Router in evaluation mode.

        Args:
            x_TD: (T, D) hidden states, fp32 or bf16.
            offsets_B1: int32 bounds of the sequences in T; default: one sequence.

        Raises:
            StaleEpochError: of another epoch than the present one.
            UnknownRouterError: no such model and layer.
            GatingError: another D or dtype, bounds that are none, values that are not finite.
        """
        with self._changed:
            agreed, routers = self._agreed, self._routers
        self._need_epoch(f"route by {model}/{layer}", epoch, agreed.epoch)
        router = routers.get((model, layer))
        if router is None:
            known = ", ".join(r.name for r in agreed.routers) or "none"
            raise UnknownRouterError(f"router {model}/{layer}: not published; there are: {known}")
        dim = next(r.dim for r in agreed.routers if r.key == (model, layer))
        tokens = checked_tokens(f"{model}/{layer}", x_TD, dim, offsets_B1)
        return decide(epoch, router, tokens)

    def _present(self) -> Snapshot:
        alive = self._alive()
        # in order of rank: the sum does not depend on who reported first
        load_LE = sum((self._load[r] for r in alive if r in self._load), self._agreed.load_LE)
        return replace(self._agreed, alive=alive, load_LE=load_LE.clone())

    def _alive(self) -> tuple[int, ...]:
        since = self._clock() - self._timeout_s
        return tuple(rank for rank in sorted(self._seen) if self._seen[rank] >= since)

    def _keep_only_what_fits(self) -> None:
        """Forget ranks and loads that the new placement has no place for."""
        ranks, shape = self._agreed.ranks, self._agreed.load_LE.shape
        self._seen = {r: at for r, at in self._seen.items() if r < ranks}
        self._load = {r: x for r, x in self._load.items() if r < ranks and x.shape == shape}

    def _need_epoch(self, where: str, got: int, want: int) -> None:
        if got != want:
            raise StaleEpochError(f"{where}: epoch {got}, want {want}; take the present snapshot")


def _in_order(
    routers: Sequence[RouterWeights], placements: Sequence[Placement]
) -> list[tuple[RouterWeights, Placement]]:
    """Each router with its placement, by model and layer."""
    need(len(placements) == len(routers), "placements", len(placements), f"{len(routers)}: routers")
    held = sorted(zip(routers, placements, strict=True), key=lambda pair: pair[0].key)
    first = held[0][1] if held else Placement(())
    for router, placement in held:
        found, E = router.config.experts, first.experts
        need(
            found == E == placement.experts, f"experts of {router.name}", found, f"{E} (placement)"
        )
        fits = placement.ranks == first.ranks
        need(fits, f"ranks of {router.name}", placement.ranks, f"{first.ranks}, as the others")
    return held
