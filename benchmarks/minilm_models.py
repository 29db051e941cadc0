"""The models that `benchmarks.minilm` measures: who leaves a MiniLM, and how its routers are
taught."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.results import Row
from benchmarks.timing import Run, interleave
from moe_router import Context, Ledger, wrap
from moe_router.integrations.wrap import set_context
from moe_router.layers.prune import Prune
from moe_router.layers.trial import trial_loss

BATCH, STEPS, GRADUAL = 32, 120, 90
RATE = {"trials": 0.003, "gradient": 0.01}  # of routers


@dataclass(frozen=True, slots=True)
class Setting:
    """One row. `taught` by trials or by the gradient of what stays; None: nothing is learned."""

    keep: float
    kind: Literal["prune", "merge"] = "prune"
    router: str = "mlp"  # or norm: the longest states stay
    taught: Literal["trials", "gradient"] | None = None
    seeds: int = 1


def _around(keep: float) -> dict[str, Setting]:
    """A learned router, and who decides without learning, at one keep."""
    return {
        f"prune/{keep}": Setting(keep, taught="trials", seeds=3),
        f"prune/{keep}/frozen": Setting(keep, seeds=3),
        f"prune/{keep}/attention": Setting(keep, router="attention"),
        f"prune/{keep}/norm": Setting(keep, router="norm"),
        f"merge/{keep}": Setting(keep, kind="merge"),
    }


ROWS = {
    **_around(0.7),
    "prune/0.7/position": Setting(0.7, router="position", taught="trials", seeds=3),
    "prune/0.7/linear": Setting(0.7, router="linear", taught="trials", seeds=3),
    "prune/0.7/gradient": Setting(0.7, taught="gradient", seeds=3),
    **_around(0.85),
    **_around(0.5),
}


class Norm(nn.Module):
    """A control: the length of a state, to which each norm's gains and biases give a meaning."""

    def forward(self, x_TD: Tensor, position_T: Tensor) -> Tensor:
        norm_T: Tensor = torch.linalg.vector_norm(x_TD.float(), dim=-1)
        return norm_T


def tokens_of(model: Any, tokenizer: Any, texts: list[str]) -> Any:
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    return inputs.to(model.device)


def rates(models: dict[str, Any], run: Callable[[Any], Any], count: int, rounds: int) -> Row:
    """Sentences a second of each model, in turn, and of `routed` the FLOPs that ran over the dense
    ones.

    Args:
        run: one pass of a model, of so many sentences.
    """
    with torch.no_grad():
        set_context(models["routed"], Context(ledger=(ledger := Ledger())))
        run(models["routed"])
        set_context(models["routed"], Context())
        calls: dict[str, Run] = {name: partial(run, model) for name, model in models.items()}
        timings = interleave(calls, rounds=rounds, idle=True)
    executed, dense = ledger.by_op()["blocks"]
    a_second = {name: round(count / timing.median * 1e6, 1) for name, timing in timings.items()}
    return {"executed": round(executed / dense, 3), "batch": count, "a_second": a_second}


def load(folder: Path, device: str) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval().to(device)


def routed(folder: Path, device: str, setting: Setting, seed: int = 0) -> Any:
    """The model with its routers."""
    torch.manual_seed(seed)
    return with_routers(load(folder, device), setting)


def with_routers(model: Any, setting: Setting) -> Any:
    if setting.kind == "merge":
        return wrap(model, "merge", keep=setting.keep)
    router = "linear" if setting.router == "norm" else setting.router
    curriculum = GRADUAL if setting.taught == "gradient" else 0
    wrap(model, "prune", keep=setting.keep, router=router, curriculum=curriculum)
    if setting.router == "norm":
        for module in model.modules():
            if isinstance(module, Prune):
                module.router = Norm()  # type: ignore[assignment]
    return model


def teach(
    model: Any, way: Literal["trials", "gradient"], missed: Callable[[list[int]], Tensor],
    sentences: int, seed: int,
) -> None:  # fmt: skip
    """Its routers, on sentences that are drawn.

    Args:
        missed: (B,) by how much the embeddings of these sentences miss the full model's.
    """
    learners = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learners, lr=RATE[way])
    generator = torch.Generator().manual_seed(seed)
    model.train(way == "gradient")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    for step in range(STEPS):
        set_context(model, Context(step=step))
        drawn = torch.randint(sentences, (BATCH,), generator=generator).tolist()
        loss = (
            trial_loss(model, lambda drawn=drawn: missed(drawn))  # type: ignore[misc]
            if way == "trials"
            else missed(drawn).mean()
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    set_context(model, Context())
    model.eval()
