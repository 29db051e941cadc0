"""When experts move, and where to: a Placement for each MoE layer, from the load of past steps.

Every `every` steps all ranks look at the same moving averages, so they come to the same placements
without asking anyone. What the move is worth is then measured: the time that the slowest rank's
experts take, before and after. A placement that made it worse is taken back.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_router.config import Config, RebalanceConfig
from moe_router.layers.moe import MoE
from moe_router.placement import Placement
from moe_router.training.migrate import Placements

_LEAST_GAIN = 0.05  # of the busiest rank's load: less is not worth a move
_NOISE = 1.05  # two windows of the same placement differ by so much


def first_placement(config: Config, ranks: int) -> Placement | None:
    """Where every layer's experts begin; None: where the dispatcher would have them."""
    moe, rebalance = config.model.moe, config.cluster.rebalance
    if moe is None or rebalance is None:
        return None
    return Placement.dealt(moe.experts, ranks, rebalance.slots(moe.experts, ranks))


@dataclass(frozen=True, slots=True)
class Rebalanced:
    """What a look came to, where the last one or this one moved experts.

    Attributes:
        moved: slots that got another expert, of all layers and ranks.
        straggler_us: what the experts of a layer's slowest rank took in a step, forward: median of
            the steps since the last look, summed over layers.
        before_us: the same before the last move; None if nothing had moved.
        rolled_back: that had made it worse, and was taken back.
    """

    step: int
    moved: int
    straggler_us: float
    before_us: float | None
    rolled_back: bool

    def facts(self) -> dict[str, int | None]:
        """For a log."""
        before = None if self.before_us is None else round(self.before_us)
        return {"slots": self.moved, "straggler_us": round(self.straggler_us), "before_us": before}


@dataclass(frozen=True, slots=True)
class _Trial:
    """A move whose worth is not known yet."""

    before_us: float
    before: Placements


class Rebalancer:
    """Args:
    config: of the run.
    layers: its MoE layers, in order.
    move: experts to where placements have them; returns the slots that changed.
    """

    def __init__(
        self, config: RebalanceConfig, layers: list[MoE], move: Callable[[Placements], int]
    ) -> None:
        self._config, self._layers, self._move = config, layers, move
        self._load_LE: Tensor | None = None  # fp64, moving average of the global counts
        self._window: list[list[float]] = []  # of each step since the last look, expert_us_L
        self._trial: _Trial | None = None
        self._refused: Placements | None = None  # made it worse, or found no room

    @property
    def placements(self) -> Placements:
        return tuple(layer.placement for layer in self._layers)

    def after_step(self, step: int, load_LE: Tensor, expert_us_L: list[float]) -> Rebalanced | None:
        """Take note of a committed step, and look at the load when it is time. All ranks together.

        Args:
            step: steps committed.
            load_LE: fp64, choices of all ranks in it.
            expert_us_L: what this rank's experts took.
        """
        decay = self._config.decay
        past = load_LE if self._load_LE is None else self._load_LE
        self._load_LE = decay * past + (1 - decay) * load_LE
        self._window.append(expert_us_L)
        if self._layers[0].placement.ranks == 1 or step % self._config.every:
            return None
        straggler_us, self._window = self._straggler_us(), []
        return self._look(step, straggler_us)

    def proposal(self) -> Placements:
        """What the load of past steps asks for; a layer that would gain little stays."""
        assert self._load_LE is not None
        return tuple(
            _better(layer.placement, load_E)
            for layer, load_E in zip(self._layers, self._load_LE.tolist(), strict=True)
        )

    def state(self) -> dict[str, Any]:
        """For state.json."""
        trial = self._trial
        return {
            "load": None if self._load_LE is None else self._load_LE.tolist(),
            "placements": _plain(self.placements),
            "trial": trial and {"before_us": trial.before_us, "before": _plain(trial.before)},
            "refused": self._refused and _plain(self._refused),
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Take back what `state` said, before weights are read: experts only change their names.

        Other ranks than those that wrote it keep the averages alone.
        """
        state = state or {}
        load = state.get("load")
        self._load_LE = None if load is None else torch.tensor(load, dtype=torch.float64)
        self._window, self._trial, self._refused = [], None, None
        placements = _read(state.get("placements"))
        if placements is None or _slots(placements) != _slots(self.placements):
            return
        for layer, placement in zip(self._layers, placements, strict=True):
            layer.placement = placement
        self._refused = _read(state["refused"])
        trial = state["trial"] or {}
        if (before := _read(trial.get("before"))) is not None:
            self._trial = _Trial(trial["before_us"], before)

    def _look(self, step: int, straggler_us: float) -> Rebalanced | None:
        trial, self._trial = self._trial, None
        before_us = None if trial is None else trial.before_us
        if trial is not None and straggler_us > _NOISE * trial.before_us:
            self._refused = self.placements
            return Rebalanced(step, self._move(trial.before), straggler_us, before_us, True)
        proposal, present, moved = self.proposal(), self.placements, 0
        if proposal not in (present, self._refused):
            moved = self._move(proposal)
            if moved:
                self._trial = _Trial(straggler_us, present)
            else:  # a rank had no room
                self._refused = proposal
        if not moved and trial is None:
            return None
        return Rebalanced(step, moved, straggler_us, before_us, False)

    def _straggler_us(self) -> float:
        """Ranks wait for the slowest in every layer."""
        median_L = [statistics.median(times) for times in zip(*self._window, strict=True)]
        device = next(self._layers[0].parameters()).device
        worst_L = torch.tensor(median_L, dtype=torch.float64, device=device)
        dist.all_reduce(worst_L, dist.ReduceOp.MAX)
        return float(worst_L.sum())


def _better(present: Placement, load_E: list[float]) -> Placement:
    """The balanced placement, if it is worth a move. Which rank gets which of its lots does not
    matter to the load, so each takes the one that it holds most of."""
    slots = len(present.experts_of_rank[0])
    balanced = Placement.balanced(load_E, present.ranks, slots)
    worst, best = (max(p.load_of_ranks(load_E)) for p in (present, balanced))
    if worst - best <= _LEAST_GAIN * worst:
        return present
    lots, taken = list(balanced.experts_of_rank), []
    for held in present.experts_of_rank:
        most = max(lots, key=lambda lot: len(set(lot) & set(held)))
        lots.remove(most)
        taken.append(most)
    return Placement(tuple(taken))


def _slots(placements: Placements) -> list[list[int]]:
    return [[len(held) for held in placement.experts_of_rank] for placement in placements]


def _plain(placements: Placements) -> list[list[list[int]]]:
    return [[list(held) for held in placement.experts_of_rank] for placement in placements]


def _read(plain: list[list[list[int]]] | None) -> Placements | None:
    if plain is None:
        return None
    return tuple(Placement(tuple(map(tuple, ranks))) for ranks in plain)
