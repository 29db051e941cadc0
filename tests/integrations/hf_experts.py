"""Every module of experts in the installed transformers, small, without a model around it."""

import importlib
from pathlib import Path

import torch
import transformers
from torch import nn

SIZES = {"limit": 7.0, "eps": 1e-6, "alpha": 1.7, "softcap": 5.0, "act": "silu"}


class Tiny:
    """A config that knows a small number for whatever is asked of it."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if "expert" in name and name.startswith(("num", "n_", "moe_num")):
            return 4
        for part, value in SIZES.items():
            if part in name:
                return value
        return 8 if "intermediate" in name or "ffn" in name else 16


def modules():
    """Names of transformers' model files that use the experts interface."""
    root = Path(transformers.__file__).parent / "models"
    files = root.glob("*/modeling_*.py")
    using = [file for file in files if "@use_experts_implementation" in file.read_text()]
    return sorted(f"{file.parent.name}.{file.stem}" for file in using)


def classes(module):
    """The modules of experts that a model file defines."""
    found = importlib.import_module(f"transformers.models.{module}")
    return [
        one
        for one in vars(found).values()
        if isinstance(one, type)
        and issubclass(one, nn.Module)
        and one.__module__ == found.__name__
        and hasattr(one, "_apply_gate")
    ]


def made(kind, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    experts = kind(Tiny())
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts.to(device, dtype)


def problem(experts, T=11, K=2, dtype=torch.float32, device="cpu"):
    """x, ids and weights of choices."""
    generator = torch.Generator().manual_seed(1)
    D = experts.down_proj.shape[2 if experts.is_transposed else 1]
    x_TD = torch.randn(T, D, generator=generator).to(device, dtype).requires_grad_()
    score_TE = torch.randn(T, experts.num_experts, generator=generator).softmax(1)
    weight_TK, ids_TK = score_TE.topk(K, 1)
    return x_TD, ids_TK.to(device), weight_TK.to(device, dtype).requires_grad_()


def run(experts, implementation, x_TD, ids_TK, weight_TK):
    """The output and the gradients of x, weights and parameters."""
    experts.config._experts_implementation = implementation
    out = experts(x_TD, ids_TK, weight_TK)
    leaves = [x_TD, weight_TK, *experts.parameters()]
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves, allow_unused=True)]
