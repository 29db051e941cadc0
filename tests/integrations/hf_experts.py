"""Every module of experts in the installed transformers, small, without a model around it."""

import copy
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


def some(known):
    """A plain one, transposed, without a gate, with biases and a gate of its own, with a norm.

    5.17 does not have all of them.
    """
    names = (
        "mixtral.modeling_mixtral", "aria.modeling_aria", "nemotron_h.modeling_nemotron_h",
        "gpt_oss.modeling_gpt_oss", "muse_spark.modeling_muse_spark",
    )  # fmt: skip
    return [name for name in names if name in known]


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


def same(ours, wanted, tolerance=1e-4):
    """Each tensor equals the other, or both are missing."""
    for one, other in zip(ours, wanted, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def away_TK(share, T=11, K=2):
    """Which choices are for experts of other ranks."""
    return torch.rand(T, K, generator=torch.Generator().manual_seed(3)) < share


def run_spread(experts, implementation, away_TK, x_TD, ids_TK, weight_TK):
    """`run` where some choices are for experts of other ranks, whose weights are 0.

    Expert parallelism marks those by ids past the last expert. Not every `eager` knows such ids, so
    it keeps the ids, and what it says of weights that nobody uses is left out.
    """
    weight_TK = weight_TK.detach().masked_fill(away_TK, 0.0).requires_grad_()
    if implementation != "eager":
        experts._is_expert_parallel = True
        ids_TK = ids_TK.masked_fill(away_TK, experts.num_experts)
    out = run(experts, implementation, x_TD, ids_TK, weight_TK)
    if implementation == "eager":
        out[2] = out[2].masked_fill(away_TK, 0.0)
    return out


def exact(experts, away_TK, x_TD, ids_TK, weight_TK):
    """`run_spread` by `eager` in fp64, with the weights and inputs as they were rounded."""
    wide = copy.deepcopy(experts).to("cpu", torch.float64)
    x_TD, weight_TK = (t.detach().to("cpu", torch.float64) for t in (x_TD, weight_TK))
    return run_spread(wide, "eager", away_TK, x_TD.requires_grad_(), ids_TK.cpu(), weight_TK)


def errors(got, wanted):
    """How far each tensor is from what is wanted, as a share of it."""
    both = zip(got, wanted, strict=True)
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in both if b is not None]
    return [float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in pairs]
