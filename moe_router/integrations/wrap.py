"""Token pruning wrapped around an encoder of transformers (BERT and its kin).

    model = moe_router.wrap(AutoModel.from_pretrained(NAME), kind="prune", keep=0.5)

The model's own layers compute, on packed rows: padding is left out, and after a routed layer the
least important tokens leave for good. Who has left is zero in `last_hidden_state`, so pooling by
the first token or by a mean whose length does not matter works as before. Attention has no dropout
here. `hidden_states` and `attentions` of layers are not to be had: their rows differ.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from moe_router.config_routing import RoutingConfig
from moe_router.errors import CheckpointError, ConfigError
from moe_router.layers.prune import Prune
from moe_router.models.attend import attend_packed
from moe_router.models.packing import Packing
from moe_router.routing import Context
from moe_router.routing.context import PLAIN
from moe_router.types import Tokens
from moe_router_kernels import gather

NAME = "moe_router_packed"
KEY = "moe_router"  # of config.json
_PART = "prunes"
_KEYS = (
    "keep", "every", "first", "router", "router_hidden", "protect", "min_keep", "curriculum",
    "frozen",
)  # fmt: skip


class RoutedEncoder(nn.Module):
    """The layers of an encoder, and the routers between them.

    Args:
        layers: of the model; they keep their names.
        dim: hidden size D.
        config: kind prune, decide top.

    Attributes:
        context: of the next passes: a Ledger counts what is executed, a step (of the optimizer)
            is what a `curriculum` goes by.
    """

    def __init__(self, layers: nn.ModuleList, dim: int, config: RoutingConfig) -> None:
        super().__init__()
        self.layer = layers
        routed = range(config.first, len(layers) - 1, config.every)  # after the last it saves none
        self.prunes = nn.ModuleDict({str(i): Prune(dim, config) for i in routed})
        self.context: Context = PLAIN

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """(B, S, D) to the same; attention_mask is what transformers made of the padding."""
        B, S, D = hidden_states.shape
        here_BS = _not_padding(attention_mask, B, S, hidden_states.device)
        place_R = here_BS.flatten().nonzero().squeeze(1)
        rows = Tokens(
            hidden_states.flatten(0, 1)[place_R],
            (here_BS.int().cumsum(1) - 1).flatten()[place_R].int(),
            torch.cat([torch.zeros(1, dtype=torch.int32), here_BS.sum(1).cpu().cumsum(0).int()]),
        )
        dense = Packing(rows.offsets_B1, hidden_states.device, causal=False)
        packing = dense
        for i, layer in enumerate(self.layer):
            worth_R = self._worth(rows)
            out_1RD: Tensor = layer(rows.x_TD[None], None, packing=packing, size_R=worth_R)
            rows = replace(rows, x_TD=out_1RD[0])
            self._account(layer, packing, dense)
            if str(i) in self.prunes:
                rows, packing, place_R = self._leave(self.prunes[str(i)], rows, packing, place_R)
        x_RD = rows.x_TD
        worth_R = self._worth(rows)
        if worth_R is not None:
            x_RD = x_RD * worth_R[:, None].to(x_RD.dtype)
        out_TD = x_RD.new_zeros(B * S, D).index_copy(0, place_R, x_RD)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=out_TD.view(B, S, D))

    def _worth(self, rows: Tokens) -> Tensor | None:
        """(R,) ones, whose gradient tells routers how much others should see of each survivor."""
        mass_R = rows.size_T
        return 1 + mass_R - mass_R.detach() if self.training and mass_R is not None else None

    def _leave(
        self, prune: nn.Module, rows: Tokens, packing: Packing, place_R: Tensor
    ) -> tuple[Tokens, Packing, Tensor]:
        assert isinstance(prune, Prune)
        rows = replace(rows, offsets_B1=packing.offsets_B1)
        choice, kept = prune(rows, packing.lengths, self.context)
        src_R = kept.plan.src_R.long()
        bounds_B1 = kept.plan.offsets_G1
        packing = Packing(bounds_B1, rows.x_TD.device, lengths=kept.lengths, causal=False)
        size_R = prune.mass(rows, choice, kept)
        x_RD = gather(rows.x_TD, kept.plan.src_R, kept.plan.row_TK)
        survivors = Tokens(x_RD, rows.position_T[src_R], packing.offsets_B1, size_R)
        return survivors, packing, place_R[src_R]

    def _account(self, layer: nn.Module, packing: Packing, dense: Packing) -> None:
        ledger = self.context.ledger
        if ledger is None:
            return
        weights = [p for p in layer.parameters() if p.dim() == 2]
        matrices, D = 2 * sum(p.numel() for p in weights), weights[0].size(1)

        def flops(of: Packing) -> int:
            scores = sum(n * n for n in of.lengths)
            return int(matrices * of.tokens + 4 * D * scores)

        ledger.add("blocks", flops(packing), flops(dense))


def wrap(model: PreTrainedModel, kind: str, *, freeze: bool = True, **routing: Any) -> Any:
    """Route the tokens of an encoder. The model is changed in place.

    Args:
        model: of transformers, with an encoder of layers as BERT has it.
        kind: prune.
        freeze: only routers learn.
        routing: keep, every, first, router, router_hidden, protect, min_keep, curriculum and
            frozen, as in `model.routing`; docs/routing.md.

    Returns:
        The model. `save_pretrained` writes the routers too; `load_wrapped` reads them.

    Raises:
        ConfigError: another kind, or a model whose layers are not known here.
    """
    if kind != "prune":
        raise ConfigError(f"wrap: kind={kind}: want prune; docs/huggingface.md says why")
    unknown = sorted(routing.keys() - set(_KEYS))
    if unknown:
        raise ConfigError(f"wrap: {unknown[0]}: want {', '.join(_KEYS)}")
    if routing.get("router") == "attention":
        raise ConfigError("wrap: router=attention: want linear, mlp or position")
    owner, config = _owner(model), RoutingConfig(kind="prune", **routing)
    layers = owner.encoder.layer
    if config.first > len(layers) - 2:
        raise ConfigError(f"wrap: first={config.first}: want at most {len(layers) - 2}")
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)  # a model that cannot only logs that
    if model.config._attn_implementation != NAME:
        raise ConfigError(
            f"wrap: {type(model).__name__}: its attention is not exchangeable in transformers; "
            "want BERT, MiniLM, RoBERTa, XLM-RoBERTa, CamemBERT or ELECTRA"
        )
    encoder = RoutedEncoder(layers, model.config.hidden_size, config)
    owner.encoder = encoder.to(model.device).train(model.training)
    setattr(model.config, KEY, {"kind": kind} | {key: getattr(config, key) for key in _KEYS})
    if freeze:
        for name, parameter in model.named_parameters():
            routes = _PART in name.split(".")
            parameter.requires_grad_(parameter.requires_grad and routes)
    return model


def load_wrapped(kind: Any, folder: Path | str, **more: Any) -> Any:
    """What `save_pretrained` wrote of a wrapped model.

    Args:
        kind: AutoModel, or another class with `from_pretrained`.
        folder: on this machine.
        more: for `from_pretrained`.

    Raises:
        CheckpointError: it was not wrapped.
    """
    model = kind.from_pretrained(folder, **more)
    routing = dict(getattr(model.config, KEY, None) or {})
    if not routing:
        raise CheckpointError(f"{folder}: config.json has no {KEY}; want a model saved after wrap")
    wrap(model, routing.pop("kind"), **routing)
    routers = {n: t for n, t in model.state_dict().items() if _PART in n.split(".")}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in routers.keys() & set(file.keys()):
                routers.pop(name).copy_(file.get_tensor(name))
    if routers:
        raise CheckpointError(f"{folder}: no tensor {min(routers)}; save the model after wrap")
    return model


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    size_R: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: packed rows (1, H, R, C), else as `sdpa`."""
    if packing is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **more
        )
        return plain
    q_RHC, k_RHC, v_RHC = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend_packed(q_RHC, k_RHC, v_RHC, packing, size_R)[None], None


def _owner(model: PreTrainedModel) -> Any:
    """The module whose `encoder` has the layers."""
    for module in model.modules():
        layers = getattr(getattr(module, "encoder", None), "layer", None)
        if isinstance(layers, nn.ModuleList) and not isinstance(module.encoder, RoutedEncoder):
            known = all(hasattr(one, "intermediate") for one in layers)
            if known and not getattr(model.config, "is_decoder", False):
                return module
    raise ConfigError(
        f"wrap: {type(model).__name__}: want an encoder of layers as BERT has it (BERT, MiniLM, "
        "RoBERTa), not wrapped yet"
    )


def _not_padding(mask: Tensor | None, B: int, S: int, device: torch.device) -> Tensor:
    """(B, S) bool, from a (B, 1, S, S) mask: bool, True for a key that is seen."""
    if mask is None:
        return torch.ones(B, S, dtype=torch.bool, device=device)
    return mask[:, 0, 0].expand(B, S)
