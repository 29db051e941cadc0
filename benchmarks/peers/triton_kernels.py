"""triton_kernels of OpenAI, as vLLM's wheel ships them.

Its SwiGLU is silu(gate) * (up + 1): a bias of -1 on the columns of up makes it the usual one.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.base import Call, Layer, Peer, Route

tensor = importlib.import_module("triton_kernels.tensor")
topk = importlib.import_module("triton_kernels.topk")
ogs = importlib.import_module("triton_kernels.matmul_ogs")
swiglu = importlib.import_module("triton_kernels.swiglu")
specialize = importlib.import_module("triton_kernels.specialize")


def _routing(logits: Tensor, k: int) -> tuple[Any, Any]:
    sparse = topk.topk(logits, k, apply_softmax=True)
    meta = sparse.mask_metadata
    rows = meta.row_sorted_indx.shape[0]
    return sparse, tensor.make_ragged_tensor_metadata(meta.col_sum, rows)


def route(logits: Tensor, k: int) -> Route:
    def run() -> Tensor:
        ids: Tensor = _routing(logits, k)[0].indx
        return ids

    return run


def layer(layer: Layer, train: bool) -> Call:
    E, K = layer.experts, layer.ids_TK.size(1)
    # its metadata come from logits: these have the ids as their top-k, and the weights as softmax
    logits = torch.full((len(layer.x_TD), E), -1e4, device=layer.x_TD.device)
    logits.scatter_(1, layer.ids_TK.long(), layer.weight_TK.log())
    sparse, ragged = _routing(logits, K)
    meta = sparse.mask_metadata
    to_rows, to_tokens = meta.row_sorted_indx, meta.col_sorted_indx
    weight_R = sparse.vals.flatten()[to_tokens]
    routing = ogs.RoutingData(weight_R, ragged.block_sizes, E, K, ragged)
    gather, scatter = ogs.GatherIndx(to_tokens, to_rows), ogs.ScatterIndx(to_rows, to_tokens)
    spec = specialize.FnSpecs("swiglu", swiglu.swiglu_fn, ("alpha", "limit"), reduction_n=2)
    act = ogs.FusedActivation(spec, (1.0, None))
    up, down = layer.interleaved().mT, layer.down.mT
    bias = torch.zeros(E, up.size(2), device=up.device)
    bias[:, 1::2] = -1

    def run() -> Tensor:
        act_RF = ogs.matmul_ogs(
            layer.x_TD, up, bias, routing, gather_indx=gather, fused_activation=act
        )
        out: Tensor = ogs.matmul_ogs(
            act_RF, down, None, routing, scatter_indx=scatter, gammas=weight_R
        )
        return out

    return Call(run, interleaved=True)


PEER = Peer(
    "triton_kernels",
    "vllm",
    layer,
    backward="inference only",
    route=route,
)
