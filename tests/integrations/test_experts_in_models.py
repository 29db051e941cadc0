"""What people do with Mixtral, Qwen3-MoE and OLMoE, with our experts and with eager ones."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
import moe_router  # noqa: E402
from tests.integrations import hf_experts, hf_models  # noqa: E402

moe_router.register_transformers()
pytestmark = pytest.mark.slow
IDS_BT = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(1))
KINDS = ["Mixtral", "Qwen3Moe", "Olmoe"]
GENERATE = {
    "greedy": {},
    "greedy, no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams, several texts": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 1.3},
    "top-k and top-p": {"do_sample": True, "top_k": 8, "top_p": 0.9},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.fixture(params=KINDS)
def model(request):
    # weights wide enough that the choice of a token does not hang on the last bit
    return hf_models.small(request.param, initializer_range=0.3).eval()


def learned(model, **more):
    """The loss and all gradients."""
    out = model(input_ids=IDS_BT, labels=IDS_BT, **more)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [out.loss.detach(), *torch.autograd.grad(out.loss, parameters, allow_unused=True)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_changes_nothing(model, attention):
    model.set_attn_implementation(attention)

    def use(model):
        with torch.no_grad():
            whole = model(IDS_BT).logits
            start = model(IDS_BT[:, :4], use_cache=True)
            seen, past = [start.logits], start.past_key_values
            for t in range(4, IDS_BT.size(1)):
                out = model(IDS_BT[:, t : t + 1], past_key_values=past)
                seen.append(out.logits)
        hf_experts.same([torch.cat(seen, 1)], [whole], 1e-4)
        return [whole, *seen]

    hf_experts.same(*hf_models.by_both(model, use))


def test_padding_at_the_left_changes_nothing(model):
    def use(model):
        padded = torch.cat([torch.full((3, 4), 2), IDS_BT], 1)
        mask = (torch.arange(13) >= 4).long().expand(3, -1)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            got = model(padded, attention_mask=mask, position_ids=position).logits[:, 4:]
            hf_experts.same([got], [model(IDS_BT).logits])
        text = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False)
        return [got, text[:, 4:].float()]

    hf_experts.same(*hf_models.by_both(model, use))


@pytest.mark.parametrize("how", GENERATE)
def test_texts_are_equal(model, how):
    def use(model):
        torch.manual_seed(0)
        return model.generate(IDS_BT, max_new_tokens=8, **{"do_sample": False} | GENERATE[how])

    ours, theirs = hf_models.by_both(model, use)
    assert torch.equal(ours, theirs)
    assert ours.size(1) > IDS_BT.size(1)


@pytest.mark.parametrize("by", ["a model", "the prompt"])
def test_texts_that_another_model_drafts_are_equal(model, by):
    draft = hf_models.small("Mixtral", initializer_range=0.3, num_hidden_layers=1).eval()
    how = {"assistant_model": draft} if by == "a model" else {"prompt_lookup_num_tokens": 3}

    def use(model):
        draft.set_experts_implementation(model.config._experts_implementation)
        plain = model.generate(IDS_BT[:1], max_new_tokens=8, do_sample=False)
        assert torch.equal(
            model.generate(IDS_BT[:1], max_new_tokens=8, do_sample=False, **how), plain
        )
        return plain

    assert torch.equal(*hf_models.by_both(model, use))


def test_the_router_loss_and_its_gradients_are_equal(model):
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.5

    def use(model):
        plain, routed = learned(model), learned(model, output_router_logits=True)
        assert not torch.equal(plain[0], routed[0])
        return routed

    hf_experts.same(*hf_models.by_both(model, use))


def test_layers_that_are_computed_again_learn_the_same(model):
    """Gradient checkpointing."""
    plain = hf_models.by_both(model, learned)
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model.train(), f"{name}_checkpointing_enable")({"use_reentrant": False})
    again = hf_models.by_both(model, learned)
    for one, other in zip(plain, again, strict=True):
        hf_experts.same(one, other)
    hf_experts.same(*again)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_it_learns_as_exactly_as_with_eager(kind):
    """Each token goes to all experts, so that bf16 cannot choose others than fp32."""
    model = hf_models.small(kind, initializer_range=0.3, num_experts_per_tok=4)
    exact = learned(model)

    def use(model):
        with torch.autocast("cpu", torch.bfloat16):
            return hf_experts.errors(learned(model), exact)

    ours, theirs = hf_models.by_both(model, use)
    assert sum(ours) < 1.1 * sum(theirs)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_saved_and_loaded_it_is_the_same_model(model, shard, tmp_path):
    model.set_experts_implementation("moe_router")
    model.save_pretrained(tmp_path, max_shard_size=shard)
    load = type(model).from_pretrained
    ours, theirs = (load(tmp_path, experts_implementation=n) for n in ("moe_router", "eager"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(ours(IDS_BT).logits, model(IDS_BT).logits)
        hf_experts.same([ours(IDS_BT).logits], [theirs(IDS_BT).logits])


@pytest.mark.filterwarnings("ignore")  # of accelerate, where offloaded weights are not there
def test_layers_that_lie_on_disk_compute_the_same(model, tmp_path):
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path / "saved")
    here = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(here, "cpu") | {"model.layers.1": "disk"}
    loaded = type(model).from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=str(tmp_path / "disk"),
        experts_implementation="moe_router",
    )  # fmt: skip
    assert any(p.is_meta for p in loaded.parameters())
    with torch.no_grad():
        hf_experts.same([loaded(IDS_BT).logits], [model(IDS_BT).logits])


def test_torch_compiles_the_model_into_one_graph(model):
    model.set_experts_implementation("moe_router")
    wanted = learned(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    hf_experts.same(learned(compiled), wanted)


def test_more_or_fewer_embeddings(model):
    def use(model):
        model.resize_token_embeddings(60)
        wide = learned(model)
        model.resize_token_embeddings(40)
        return [*wide, *learned(model)]

    hf_experts.same(*hf_models.by_both(model, use))


def test_frozen_experts_have_no_gradients(model):
    """Only routers learn, or only what is not expert: gradients of the others are the same."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." not in name)
    hf_experts.same(*hf_models.by_both(model, learned))


def test_texts_of_other_lengths_in_a_batch_change_nothing(model):
    model.set_experts_implementation("moe_router")
    mask = (torch.arange(9) < torch.tensor([[9], [5], [7]])).long()
    with torch.no_grad():
        batch = model(IDS_BT, attention_mask=mask).logits
        for row, n in enumerate(mask.sum(1)):
            hf_experts.same([batch[row, :n]], [model(IDS_BT[row : row + 1, :n]).logits[0]])
