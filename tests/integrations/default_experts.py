"""A plugin of pytest: models that ask for no implementation of experts get $DEFAULT_EXPERTS."""

import os

from transformers.modeling_utils import PreTrainedModel

import moe_router

moe_router.register_transformers()
NAME = os.environ["DEFAULT_EXPERTS"]
_chosen = PreTrainedModel.get_correct_experts_implementation


def _by_default(self, requested_experts):
    return _chosen(self, NAME if requested_experts is None else requested_experts)


PreTrainedModel.get_correct_experts_implementation = _by_default
