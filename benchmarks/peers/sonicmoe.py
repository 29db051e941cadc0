"""SonicMoE: metadata in Triton, top-k and GEMMs in CuTe DSL.

Its forward pass is the one of training, which keeps the pre-activations; so does ours.
"""

import importlib

import torch
from torch import Tensor

from benchmarks.peers.base import Call, Layer, Peer, Route

functional = importlib.import_module("sonicmoe.functional")
SWIGLU = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU


def _metadata(ids_TK: Tensor, experts: int) -> list[Tensor]:
    """expert_frequency, its offsets, x_gather_idx, s_scatter_idx, s_reverse_scatter_idx."""
    R = ids_TK.numel()
    sizes = (experts, experts + 1, R, R, R)
    out = [torch.empty(n, dtype=torch.int32, device=ids_TK.device) for n in sizes]
    functional.TC_topk_router_metadata_triton(ids_TK, experts, *out)
    return out


def layer(layer: Layer, train: bool) -> Call:
    (T, K), E = layer.ids_TK.shape, layer.experts
    _, offsets, gather, scatter, reverse = _metadata(layer.ids_TK, E)
    x_TD, weight_TK, _, down = layer.leaves(train)
    gate_up = layer.interleaved().requires_grad_(train)

    def run() -> Tensor:
        act, pre = functional._UpProjection.apply(
            x_TD, gate_up.permute(1, 2, 0), None, offsets, T * K, K, gather, scatter, reverse,
            None, False, SWIGLU, False, False,
        )  # fmt: skip
        out: Tensor = functional._DownProjection.apply(
            act, pre, down.permute(1, 2, 0), None, weight_TK, offsets, T, K, gather, scatter,
            reverse, None, False, SWIGLU,
        )  # fmt: skip
        return out

    return Call(run, [x_TD, weight_TK, gate_up, down], interleaved=True)


def route(logits: Tensor, k: int) -> Route:
    E = logits.size(1)
    router = functional.TC_Softmax_Topk_Router_Function

    def run() -> Tensor:
        _, ids_TK = router.apply(logits, E, k, True, False)
        _metadata(ids_TK, E)
        out: Tensor = ids_TK
        return out

    return run


PEER = Peer("SonicMoE", "sonic-moe", layer, route=route)
