"""Is a layer right, at the size that is timed? Some tokens in fp64, token by token."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import kept_bytes
from benchmarks.peers.base import Call, Layer

TOKENS = 8
BOUND = 2e-2  # bf16 keeps 8 bits, and some peers weigh in bf16; the sums are fp32


def make_layer(
    shape: tuple[int, ...], seed: int = 0, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> Layer:
    """Fresh random inputs; routing as uniform as random logits make it."""
    T, D, hidden, E, K = shape
    # its own generator: after a capture that failed, the default one of a GPU refuses to draw
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype, generator=generator) * scale

    logits_TE = torch.randn(T, E, device=device, generator=generator)
    weight_TK, ids_TK = logits_TE.softmax(1).topk(K, 1)
    return Layer(
        normal(T, D),
        ids_TK.int(),
        weight_TK / weight_TK.sum(1, keepdim=True),
        normal(E, 2 * hidden, D, scale=D**-0.5),
        normal(E, D, hidden, scale=hidden**-0.5),
        normal(T, D),
    )


def error(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other).norm() / other.norm())


def _some(layer: Layer) -> tuple[Tensor, list[Tensor]]:
    """Tokens, and output, gradient of x and gradient of the weights for them."""
    T = len(layer.x_TD)
    tokens = torch.linspace(0, T - 1, TOKENS, device=layer.x_TD.device).long()
    results = []
    for t in tokens.tolist():
        x_D = layer.x_TD[t].double().requires_grad_()
        weight_K = layer.weight_TK[t].double().requires_grad_()
        out_D = torch.zeros_like(x_D)
        for k, e in enumerate(layer.ids_TK[t].tolist()):
            gate, up = (layer.gate_up[e].double() @ x_D).chunk(2)
            out_D = out_D + weight_K[k] * (layer.down[e].double() @ (F.silu(gate) * up))
        grads = torch.autograd.grad(out_D, [x_D, weight_K], layer.grad_TD[t].double())
        results.append([out_D.detach(), *grads])
    return tokens, [torch.stack(parts) for parts in zip(*results, strict=True)]


def _of_expert(layer: Layer, e: int) -> tuple[Tensor, Tensor]:
    """Gradients of one expert's gate_up and down, fp64."""
    token, slot = (layer.ids_TK == e).nonzero(as_tuple=True)
    rows = layer.x_TD[token].double()
    gate_up = layer.gate_up[e].double().requires_grad_()
    down = layer.down[e].double().requires_grad_()
    gate, up = (rows @ gate_up.T).chunk(2, -1)
    out = layer.weight_TK[token, slot].double()[:, None] * ((F.silu(gate) * up) @ down.T)
    grads = torch.autograd.grad(out, [gate_up, down], layer.grad_TD[token].double())
    return grads[0], grads[1]


class Oracle:
    """References of one layer, computed once for all contenders."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.tokens, self.parts = _some(layer)
        self.expert = int(layer.ids_TK[0, 0])
        self.grads = _of_expert(layer, self.expert)

    def forward(self, call: Call) -> float:
        with torch.no_grad():
            return error(call.run()[self.tokens], self.parts[0])

    def backward(self, call: Call) -> float:
        """The largest error among the output and the gradients of all four leaves."""
        out = call.run()
        grads = torch.autograd.grad(out, call.leaves, self.layer.grad_TD)
        up = grads[2][self.expert]
        if call.interleaved:
            up = torch.cat([up[::2], up[1::2]])
        errors = [
            error(out.detach()[self.tokens], self.parts[0]),
            error(grads[0][self.tokens], self.parts[1]),
            error(grads[1][self.tokens], self.parts[2]),
            error(up, self.grads[0]),
            error(grads[3][self.expert], self.grads[1]),
        ]
        return float(torch.tensor(errors).max())  # Python's max would pass over a NaN


def saved_bytes(call: Call) -> int:
    """Bytes autograd keeps between the passes, weights apart; each storage once."""
    return kept_bytes(call.run, call.leaves[2:])


def peak_bytes(run: Callable[[], object]) -> int:
    """What `run` allocates at most at a time, on top of what was there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
