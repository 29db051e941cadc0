"""transformers' models with our experts against transformers' own."""

import logging

import pytest
import torch

transformers = pytest.importorskip("transformers")
import moe_router  # noqa: E402
from moe_router_kernels import choose  # noqa: E402
from tests.integrations import hf_experts, hf_models  # noqa: E402

moe_router.register_transformers()
SOME = hf_experts.some(hf_experts.modules())


def test_what_older_transformers_do_not_say_of_a_module_is_not_asked():
    for module in SOME[:4]:
        (kind, *_) = hf_experts.classes(module)
        experts = hf_experts.made(kind)
        problem = hf_experts.problem(experts)
        wanted = hf_experts.run(experts, "eager", *problem)
        for name in ("has_post_expert_norm", "_is_expert_parallel"):
            if hasattr(experts, name):
                delattr(experts, name)
        hf_experts.same(hf_experts.run(experts, "moe_router", *problem), wanted)


@pytest.mark.parametrize("kind", hf_models.MODELS)
def test_logits_gradients_and_text_of_whole_models(kind):
    model = hf_models.small(kind).eval()
    ids_BT = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    seen, texts = [], []
    for name in ("moe_router", "eager"):
        model.set_experts_implementation(name)
        out = model(input_ids=ids_BT, labels=ids_BT)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(out.loss, parameters, allow_unused=True)
        seen.append([out.logits, *grads])
        texts.append(model.generate(ids_BT[:, :4], max_new_tokens=6, do_sample=False))
    hf_experts.same(*seen)
    assert torch.equal(*texts)


def test_a_saved_model_is_loaded_with_our_experts(tmp_path):
    model = hf_models.small("Qwen3Moe").eval()
    model.save_pretrained(tmp_path)
    ids_BT = torch.arange(3, 12)[None]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="moe_router"
    )
    assert loaded.config._experts_implementation == "moe_router"
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids_BT).logits, model(ids_BT).logits)


def test_what_is_not_fused_is_logged_once(caplog):
    choose._say_once.cache_clear()
    (kind, *_) = hf_experts.classes("gpt_oss.modeling_gpt_oss")
    with caplog.at_level(logging.INFO, logger="moe_router_kernels"):
        experts = hf_experts.made(kind)
        for _ in range(2):
            hf_experts.run(experts, "moe_router", *hf_experts.problem(experts))
    told = [r.getMessage() for r in caplog.records if "GptOssExperts" in r.getMessage()]
    assert len(told) == 1 and "takes plain torch" in told[0]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", hf_models.MODELS)
def test_bf16_models_on_a_gpu_are_as_close_to_fp32_as_with_eager(kind):
    """Logits and all gradients, in rows wide enough for the fused kernels. Each token goes to all
    experts, so that bf16 cannot choose others than fp32."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
    every = {"num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
    model = hf_models.small(kind, **sizes, **every).eval()
    ids_BT = torch.randint(3, 40, (3, 50), generator=torch.Generator().manual_seed(1))

    def run(name):
        model.set_experts_implementation(name)
        out = model(input_ids=ids_BT.to(model.device), labels=ids_BT.to(model.device))
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(out.loss, parameters, allow_unused=True)
        return [None if x is None else x.float().cpu() for x in (out.logits.detach(), *grads)]

    wanted = run("eager")
    model = model.to("cuda", torch.bfloat16)
    distances = []
    for name in ("moe_router", "eager"):
        pairs = [(a, b) for a, b in zip(run(name), wanted, strict=True) if b is not None]
        distances.append([float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in pairs])
    assert len(distances[0]) > 10
    assert all(ours < 2 * theirs + 1e-2 for ours, theirs in zip(*distances, strict=True))


@pytest.mark.gpu
def test_a_decode_of_the_experts_is_captured_in_a_cuda_graph():
    experts = hf_experts.made(hf_experts.classes(SOME[0])[0], torch.bfloat16, "cuda")
    experts.config._experts_implementation = "moe_router"
    problem = hf_experts.problem(experts, T=4, dtype=torch.bfloat16, device="cuda")
    x_TD, ids_TK, weight_TK = (one.detach() for one in problem)
    with torch.no_grad():
        experts(x_TD, ids_TK, weight_TK)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out_TD = experts(x_TD, ids_TK, weight_TK)
        x_TD.copy_(x_TD.flip(0))
        ids_TK.copy_((ids_TK + 1) % experts.num_experts)
        graph.replay()
        assert torch.equal(out_TD, experts(x_TD, ids_TK, weight_TK))
