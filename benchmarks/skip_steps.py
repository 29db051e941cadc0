"""What benchmarks.skip_speed times: a training step and a decoded token, ready for a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_router import Context, Ledger
from moe_router.models import CausalLM, token_loss
from moe_router.models.fixed import FixedStep
from moe_router.routing.depth import DepthRouter

VOCAB = 256
STRETCH = 4000  # tokens of a text until it begins anew


class TrainingStep:
    """Forward, backward and AdamW on the same batch."""

    def __init__(self, model: CausalLM, sequences: int, length: int) -> None:
        self._model, device = model, model.embed.weight.device
        tokens = sequences * length
        self._ids_T = torch.randint(VOCAB, (tokens,), device=device)
        self._position_T = torch.arange(length, device=device).repeat(sequences).int()
        self._packing = model.packing(torch.arange(sequences + 1) * length, device)
        on_gpu = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-5, fused=True, capturable=on_gpu
        )
        self.loss = torch.zeros((), device=device)

    def __call__(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        output = self._model(self._ids_T, self._position_T, self._packing)
        loss = token_loss(output.logits_TV, self._ids_T) / self._ids_T.numel()
        loss = loss + self._model.aux_loss(output)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.loss.copy_(loss.detach())

    @torch.no_grad()
    def executed(self) -> float:
        """Of the dense model's FLOPs, by the Ledger."""
        ledger = Ledger()
        context = Context(ledger=ledger)
        self._model(self._ids_T, self._position_T, self._packing, context=context)
        executed, dense = ledger.totals()
        return round(executed / dense, 3) if dense else 1.0


class DecodingStep:
    """One token of each sequence; the next is another. On the device alone, but for `run`."""

    def __init__(self, model: CausalLM, sequences: int, context: int) -> None:
        device = model.embed.weight.device
        self._context, self._calls = context, 0
        self._step = FixedStep(model, sequences, context + STRETCH)
        self._ids_B = torch.randint(VOCAB, (sequences,), device=device)
        self._position_B = torch.zeros(sequences, dtype=torch.int32, device=device)
        self.logits_BV = torch.zeros(sequences, VOCAB, device=device)
        self.rewind()

    def __call__(self) -> None:
        self.logits_BV.copy_(self._step(self._ids_B, self._position_B))
        # what comes next depends on the logits, as in decoding, but does not settle
        self._ids_B.copy_((self.logits_BV.argmax(-1) + self._position_B * 97) % VOCAB)
        self._position_B.add_(1)

    def run(self, step: Callable[[], Any]) -> None:
        """Go on by `step`, this or its graph; from the beginning where the text is full."""
        if self._calls == STRETCH:
            self.rewind()
        self._calls += 1
        step()

    def rewind(self) -> None:
        self._step.length_LB.fill_(self._context)
        self._position_B.fill_(self._context)
        self._calls = 0

    def executed(self) -> float:
        """Of the blocks of all tokens, since it was rewound."""
        kept = self._step.length_LB.double().mean() - self._context
        return round(float(kept) / self._calls, 3)


@torch.no_grad()
def centre(model: CausalLM, bias: float) -> None:
    """Have each router's median logit be `bias`: half of the tokens are kept at 0."""
    device = model.embed.weight.device
    ids_T = torch.randint(VOCAB, (512,), device=device)
    position_T = torch.arange(512, device=device).int()

    def shift(router: Any, _: Any, logit_T: Tensor) -> Tensor:
        by = logit_T.median() - bias
        router.bias.sub_(by)
        return logit_T - by

    routers = [m for m in model.modules() if isinstance(m, DepthRouter)]
    hooks = [router.register_forward_hook(shift) for router in routers]
    model(ids_T, position_T, torch.tensor([0, 512], dtype=torch.int32))
    for hook in hooks:
        hook.remove()
