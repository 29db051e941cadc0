"""Every module of experts in the installed transformers: our backend against its own `eager`."""

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
import moe_router  # noqa: E402
from moe_router.integrations import transformers as backend  # noqa: E402
from tests.integrations import hf_experts  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of imports that are not ours
moe_router.register_transformers()
KNOWN = hf_experts.modules()
FAST = {"mixtral.modeling_mixtral", "gpt_oss.modeling_gpt_oss"}  # fused; by parts
COMPILED = [pytest.param(one, marks=[] if one in FAST else pytest.mark.slow) for one in KNOWN]
VERSION = transformers.__version__.rpartition(".")[0]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "huggingface.md"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# errors of rounding are random; tensor cores add in yet another order
NOISE = {"cpu": 1.25, "cuda": 1.5}
# `eager` computes this one in fp32, whatever its dtype, and nothing else of transformers does
IN_FP32 = {"OpenAIPrivacyFilterExperts": "batched_mm"}


@pytest.mark.parametrize("module", KNOWN)
def test_values_and_gradients_are_those_of_eager(module):
    """All experts here; some of them on other ranks; none of them here."""
    kinds = hf_experts.classes(module)
    assert kinds
    for kind in kinds:
        experts = hf_experts.made(kind)
        problem = hf_experts.problem(experts)
        for share in (0.0, 0.4, 1.0):
            away_TK = hf_experts.away_TK(share)
            got = hf_experts.run_spread(experts, "moe_router", away_TK, *problem)
            wanted = hf_experts.run_spread(experts, "eager", away_TK, *problem)
            hf_experts.same(got, wanted)
            assert bool(got[0].any()) == (share < 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("module", KNOWN)
def test_16_bit_is_as_close_to_fp64_as_eager_is(module, dtype, device):
    """Values and gradients, with some experts on other ranks."""
    for kind in hf_experts.classes(module):
        experts = hf_experts.made(kind, dtype, device)
        problem = hf_experts.problem(experts, T=1000, dtype=dtype, device=device)
        away_TK = hf_experts.away_TK(0.3, T=1000)
        wanted = hf_experts.exact(experts, away_TK, *problem)
        yardstick = IN_FP32.get(kind.__name__, "eager")
        ours, theirs = (
            hf_experts.errors(
                hf_experts.run_spread(experts, name, away_TK.to(device), *problem), wanted
            )
            for name in ("moe_router", yardstick)
        )
        assert len(ours) > 4
        assert all(a < NOISE[device] * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module", KNOWN)
def test_a_few_tokens_are_decoded_as_close_as_by_eager(module, device):
    """No gradients: a GPU has kernels of its own for few rows."""
    for kind in hf_experts.classes(module):
        experts = hf_experts.made(kind, torch.bfloat16, device)
        problem = hf_experts.problem(experts, T=3, dtype=torch.bfloat16, device=device)
        away_TK = hf_experts.away_TK(0.3, T=3)
        (wanted, *_) = hf_experts.exact(experts, away_TK, *problem)
        x_TD, ids_TK, weight_TK = (t.detach() for t in problem)
        ids_TK = ids_TK.masked_fill(away_TK.to(device), experts.num_experts)
        experts.config._experts_implementation, experts._is_expert_parallel = "moe_router", True
        with torch.no_grad():
            (error,) = hf_experts.errors([experts(x_TD, ids_TK, weight_TK)], [wanted])
        assert error < 1e-2  # three roundings to bf16, of 2**-9 each at most


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module", COMPILED)
def test_torch_compiles_experts_into_one_graph(module, device):
    """Forward and backward."""
    dtype, limit = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 1e-2)
    for kind in hf_experts.classes(module):
        experts = hf_experts.made(kind, dtype, device)
        problem = hf_experts.problem(experts, dtype=dtype, device=device)
        torch.compiler.reset()
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        wanted = hf_experts.run(experts, "moe_router", *problem)
        got = hf_experts.run(compiled, "moe_router", *problem)
        assert max(hf_experts.errors(got, wanted)) < limit


def test_the_page_says_which_experts_are_fused():
    lines = []
    for module in KNOWN:
        for kind in hf_experts.classes(module):
            why = backend._uncovered(hf_experts.made(kind))
            lines.append(f"| `{kind.__name__}` | {f'by parts: {why}' if why else 'fused'} |")
    assert len(lines) > 50
    page = PAGE.read_text("utf-8")
    (_, table) = page.split("| module of experts | computed |")
    written = {line for line in table.splitlines() if line.startswith("| `")}
    if f"modules of experts in transformers {VERSION}" in page:
        wanted = "\n".join(sorted(lines))
        assert written == set(lines), f"docs/huggingface.md wants\n{wanted}"
    else:
        assert set(lines) <= written, sorted(set(lines) - written)
