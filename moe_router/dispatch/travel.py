"""Rows on their way: who waits for them, and where. In between, other work runs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Wait = Callable[[], object]
Home = Callable[[], tuple[Tensor, Tensor]]  # waits for the gradients of rows and of weights


class Travel:
    """Rows on their way out, and later the gradients of them and their weights on the way home.

    Args:
        wait: for the rows out.
        start_home: sets those gradients off.
        with_ids: ids and weights travel with the rows; else they are here.
        keep: what came must outlive the next exchange, which would overwrite it.
    """

    def __init__(
        self,
        wait: Wait,
        start_home: Callable[[Tensor, Tensor], Home],
        *,
        with_ids: bool = False,
        keep: bool = False,
    ) -> None:
        self.with_ids, self.keep = with_ids, keep
        self._wait: Wait | None = wait
        self._start_home = start_home
        self._home: Home | None = None

    def arrive(
        self, coming_ND: Tensor, weight_NK: Tensor, id_NK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What was sent, once it is here."""
        here_ND, weight_NK = _Arrive.apply(coming_ND, weight_NK, self)  # type: ignore[no-untyped-call]
        return here_ND, weight_NK, id_NK.clone() if self.keep else id_NK

    def wait(self) -> None:
        """What was kept for the way is let go."""
        wait, self._wait = self._wait, None
        if wait is not None:
            wait()

    def set_off(self, grad_ND: Tensor, grad_NK: Tensor) -> None:
        self._home = self._start_home(grad_ND, grad_NK)

    def come_home(self, grad_ND: Tensor, grad_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Args:
        grad_ND, grad_NK: what sets off now if nothing did: of a rank whose rows nobody used.
        """
        home, self._home = self._home or self._start_home(grad_ND, grad_NK), None
        return home()


class _Arrive(torch.autograd.Function):
    """Where rows are waited for, and where their gradients set off: what autograd recorded after
    the dispatch and before this, runs while they travel, in both directions."""

    @staticmethod
    def forward(
        ctx: Any, coming_ND: Tensor, weight_NK: Tensor, travel: Travel
    ) -> tuple[Tensor, Tensor]:
        ctx.travel = travel
        travel.wait()
        parts = (coming_ND, weight_NK)
        here_ND, here_NK = (p.clone() if travel.keep else p.view_as(p) for p in parts)
        return here_ND, here_NK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.travel.set_off(*grads)
        return grads[0], grads[1], None


def home_after(grad_RD: Tensor, wait: Wait, then: Callable[[], Tensor]) -> Home:
    """Rows whose gradients are waited for, before those of their weights move."""

    def home() -> tuple[Tensor, Tensor]:
        wait()
        return grad_RD, then()

    return home


def finish(work: Any, sent: Tensor) -> None:
    """The sent rows are kept until here."""
    work.wait()
