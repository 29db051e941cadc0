"""Attention of transformers' models on packed rows: only tokens that are computed have one.

Where a cache is, every token keeps its slot in it, computed or not, so lengths, cropping and beams
are those of transformers; more channels beside the keys say whose slots are filled.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from moe_router.errors import ConfigError
from moe_router.models.attend import attend_packed, received
from moe_router.models.packing import Packing

NAME = "moe_router_packed"
FLAGS = 8  # channels that say whether a slot is filled: kernels want channels by eights


@dataclass(slots=True)
class Asked:
    """What of a layer's attention routers want to know, for who calls the layer.

    Attributes:
        key_TJC: its keys.
        received_T: how much attention came to each token, if `received`.
    """

    received: bool = False
    key_TJC: Tensor | None = None
    received_T: Tensor | None = None

    def see(self, q_THC: Tensor, k_TJC: Tensor, packing: Packing, size_T: Tensor | None) -> None:
        self.key_TJC = k_TJC
        if self.received:
            self.received_T = received(q_THC, k_TJC, packing, size_T)


class Slots:
    """One layer's part of a cache, where only some of the S new tokens of B texts have keys.

    Args:
        place_R: int64, of each row in the flat (B, S) grid of the new tokens.
        mask_B1SL: bool, which slots a new token may see; None: all, or causal without a past.
        past: slots before the new tokens.
    """

    def __init__(
        self, cache: Cache, place_R: Tensor, grid: tuple[int, int], mask_B1SL: Tensor | None,
        past: int,
    ) -> None:  # fmt: skip
        self.cache, self.place_R, self.grid, self.past = cache, place_R, grid, past
        self.mask_B1SL = mask_B1SL
        self.length = past

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """transformers' interface of a cache: (1, J, R, C) rows in; the same rows, if there is no
        past, else all slots, (B, J, L, ...)."""
        flags = keys.new_ones(*keys.shape[:-1], FLAGS)
        new = self._slots(torch.cat([keys, flags], -1)), self._slots(values)
        all_keys, all_values = self.cache.update(*new, layer)
        self.length = all_keys.size(2)
        return (all_keys, all_values) if self.past else (keys, values)

    def attend(self, q_1HRC: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(R, H, C) of the rows, among all slots that are filled."""
        filled_B11L = keys[:, :1, None, :, -1] > 0
        mask = filled_B11L if self.mask_B1SL is None else filled_B11L & self.mask_B1SL
        mask = mask | ~mask.any(-1, keepdim=True)  # queries of no row see anything, not nothing
        q_BHSC = self._slots(q_1HRC)
        y_BHSC = F.scaled_dot_product_attention(
            q_BHSC, keys[..., :-FLAGS], values, attn_mask=mask,
            enable_gqa=q_BHSC.size(1) > keys.size(1),
        )  # fmt: skip
        return y_BHSC.transpose(1, 2).flatten(0, 1)[self.place_R]

    def _slots(self, rows_1HRC: Tensor) -> Tensor:
        """(1, H, R, C) to (B, H, S, C), 0 in slots of no row."""
        B, S = self.grid
        rows_RHC = rows_1HRC[0].transpose(0, 1)
        flat = rows_RHC.new_zeros(B * S, *rows_RHC.shape[1:]).index_copy(0, self.place_R, rows_RHC)
        return flat.view(B, S, *rows_RHC.shape[1:]).transpose(1, 2)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    size_R: Tensor | None = None,
    slots: Slots | None = None,
    asked: Asked | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: packed rows (1, H, R, C), else as `sdpa`."""
    if packing is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **more
        )
        return plain
    if slots is not None and slots.past:
        return slots.attend(query, key, value)[None], None
    q_RHC, k_RHC, v_RHC = (x[0].transpose(0, 1) for x in (query, key, value))
    if asked is not None:
        asked.see(q_RHC, k_RHC, packing, size_R)
    return attend_packed(q_RHC, k_RHC, v_RHC, packing, size_R)[None], None


def exchange(model: PreTrainedModel, want: str) -> None:
    """Have the model attend by `attend`.

    Args:
        want: models that can, for the error.

    Raises:
        ConfigError: its attention cannot be exchanged; it is as before.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)  # a model that cannot only logs that
    if model.config._attn_implementation != NAME:
        raise ConfigError(
            f"wrap: {type(model).__name__}: its attention is not exchangeable in transformers; "
            f"want {want}"
        )


def require_ours(config: Any) -> None:
    """Raises:
    ConfigError: since `exchange`, the model was given another attention, which would mix texts.
    """
    got = config._attn_implementation
    if got != NAME:
        raise ConfigError(
            f"attn_implementation={got}: a wrapped model wants set_attn_implementation({NAME!r}): "
            "only that knows which tokens are computed"
        )
