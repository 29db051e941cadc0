"""Models built from one transformer block."""

from moe_router.models.causal_lm import CausalLM, LMOutput
from moe_router.models.generate import Sampling, generate
from moe_router.models.init import init_parameters
from moe_router.models.kv_cache import KVCache

__all__ = ["CausalLM", "KVCache", "LMOutput", "Sampling", "generate", "init_parameters"]
