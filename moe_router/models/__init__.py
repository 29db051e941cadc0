"""Models built from one transformer block. Start with `causal_lm.py`, then `block.py`."""

from moe_router.models.bounded import BoundedPass
from moe_router.models.causal_lm import CausalLM, LMOutput, token_loss
from moe_router.models.encoder import Classifier, ClassifierOutput, TextClassifier
from moe_router.models.generate import generate
from moe_router.models.init import init_parameters
from moe_router.models.kv_cache import KVCache
from moe_router.models.sampling import Sampling
from moe_router.models.vit import ImageClassifier

__all__ = [
    "BoundedPass",
    "CausalLM",
    "Classifier",
    "ClassifierOutput",
    "ImageClassifier",
    "KVCache",
    "LMOutput",
    "Sampling",
    "TextClassifier",
    "generate",
    "init_parameters",
    "token_loss",
]
