"""vLLM's Triton kernel, by `fused_experts`; its sort, activation, sum and routing are CUDA kernels.

Its tiles come from tables by GPU and size. Where its wheel has none for this GPU, what it has for
an H200 is tried beside its default.
"""

import importlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from triton.testing import do_bench

from benchmarks.peers.base import Call, Layer, Limited, Peer, Route

importlib.import_module("vllm._moe_C")  # vLLM's own import of it hides why it fails
package = importlib.import_module("vllm.model_executor.layers.fused_moe")
fused_moe = importlib.import_module(".fused_moe", package.__name__)
grouped = importlib.import_module(".router.grouped_topk_router", package.__name__)

ROUTE_TILE = 128  # rows of a tile, by which its sort pads an expert's: its default for many tokens


def _settings(layer: Layer) -> list[dict[str, int] | None]:
    """What is tried; None stands for its own choice."""
    E, _, hidden = layer.down.shape
    name = fused_moe.get_config_file_name(E, hidden, None)
    tables = Path(package.__path__[0]) / "configs"
    near = tables / re.sub("device_name=.*", "device_name=NVIDIA_H200.json", name)
    if (tables / name).exists() or not near.exists():
        return [None]
    table = {int(T): tiles for T, tiles in json.loads(near.read_text()).items() if T.isdigit()}
    closest = min(table, key=lambda T: abs(T - len(layer.x_TD)))
    return [None, table[closest]]


def layer(layer: Layer, train: bool) -> Call:
    def run(setting: dict[str, int] | None) -> Tensor:
        with package.override_config(setting):
            out: Tensor = fused_moe.fused_experts(
                layer.x_TD, layer.gate_up, layer.down, layer.weight_TK, layer.ids_TK
            )
        return out

    def took(setting: dict[str, int] | None) -> Any:
        return do_bench(partial(run, setting), warmup=5, rep=30)

    best, *others = _settings(layer)
    if others:
        best = min([best, *others], key=took)
    return Call(partial(run, best), sorts=True)


def route(logits: Tensor, k: int) -> Route:
    def run() -> Tensor:
        _, ids_TK, _ = package.fused_topk(logits, logits, k, renormalize=True)
        fused_moe.moe_align_block_size(ids_TK, ROUTE_TILE, logits.size(1))
        ids: Tensor = ids_TK
        return ids

    return run


def route_groups(of: Limited) -> Route:
    def run() -> Tensor:
        _, ids_TK = grouped.fused_grouped_topk(
            of.logits, of.logits, of.k, renormalize=True, e_score_correction_bias=of.bias_E,
            num_expert_group=of.groups, topk_group=of.top_groups, scoring_func="sigmoid",
        )  # fmt: skip
        fused_moe.moe_align_block_size(ids_TK, ROUTE_TILE, of.logits.size(1))
        ids: Tensor = ids_TK
        return ids

    return run


PEER = Peer(
    "vLLM", "vllm", layer, backward="inference only", route=route, route_groups=route_groups
)
