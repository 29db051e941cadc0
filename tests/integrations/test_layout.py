"""Our models as transformers', and theirs as ours: equal logits; files that say what is wrong."""

import dataclasses
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
from moe_router.config import AttentionConfig  # noqa: E402
from moe_router.errors import CheckpointError, ConfigError  # noqa: E402
from moe_router.integrations import layout, layout_files  # noqa: E402
from moe_router.models import CausalLM  # noqa: E402
from moe_router.training.state import named_weights  # noqa: E402
from tests.models.helpers import VOCAB, packed, small_model  # noqa: E402

KINDS = {"mixtral": {}, "llama": None}


def written(folder, moe, **model):
    made = small_model(moe, std=2.0, **model)
    layout.write_hf(folder, made, named_weights(made), 0, "bytes")
    return made


def read(folder, config, vocab=VOCAB):
    model = CausalLM(config, vocab)
    layout.read_hf(folder, config, named_weights(model))
    return model


@pytest.mark.parametrize(
    "model", [{"tie_embeddings": True}, {"tie_embeddings": False}, {"head_dim": 6}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_we_write_with_equal_logits(kind, model, tmp_path):
    ours = written(tmp_path / "out", KINDS[kind], **model).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.model_type == kind
    ids_T, position_T, offsets_B1 = packed([12])
    with torch.no_grad():
        wanted = theirs(ids_T[None]).logits[0]
        got = ours(ids_T, position_T, offsets_B1).logits_TV
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert layout.from_hf(tmp_path / "out")[0].head_dim == ours.config.head_dim


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["Mixtral", "Llama"])
def test_we_read_what_transformers_writes_with_equal_logits(kind, sharded, tmp_path):
    sizes = {
        "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 5000.0, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    more = {"num_local_experts": 4} if kind == "Mixtral" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB" if sharded else "1GB")
    assert (tmp_path / layout_files.INDEX).is_file() == sharded
    found, vocab = layout.from_hf(tmp_path)
    assert (vocab, found.rope_theta, found.norm_eps) == (30, 5000.0, 1e-6)
    ours = read(tmp_path, found, vocab).eval()
    ids_T, position_T, offsets_B1 = packed([12])
    with torch.no_grad():
        got = ours(ids_T, position_T, offsets_B1).logits_TV
        wanted = theirs(ids_T[None]).logits[0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_dense_checkpoint_is_upcycled_into_experts(tmp_path):
    dense = written(tmp_path / "out", None)
    moe = small_model({"hidden": 24}).config.moe
    grown = read(tmp_path / "out", dataclasses.replace(dense.config, moe=moe))
    ids_T, position_T, offsets_B1 = packed([9])
    with torch.no_grad():
        got = grown.eval()(ids_T, position_T, offsets_B1).logits_TV
        wanted = dense.eval()(ids_T, position_T, offsets_B1).logits_TV
    # all experts are alike, and the weights of a token sum to 1
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("moe", "model", "message"),
    [
        ({"score": "sigmoid"}, {}, "model.moe.score=sigmoid: want softmax: transformers' has no"),
        ({"shared_hidden": 4}, {}, "model.moe.shared_hidden=4: want 0"),
        ({"every": 2}, {}, "model.moe.every=2: want 1"),
        (None, {"attention": AttentionConfig(kind="routed")}, "model.attention=routed: want None"),
    ],
)
def test_what_transformers_does_not_compute_is_not_written(moe, model, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        written(tmp_path / "out", moe, **model)
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path):
    folder = tmp_path / "out"
    model = written(folder, {})
    with pytest.raises(ConfigError, match="is not empty; want a new folder"):
        layout.write_hf(folder, model, named_weights(model), 0, "bytes")
    wide = dataclasses.replace(model.config, dim=32)
    with pytest.raises(CheckpointError, match=r"is \[23, 16\], want \[23, 32\]"):
        read(folder, wide)
    about = json.loads((folder / layout.CONFIG).read_text())
    for key, value, message in (
        ("model_type", "gpt2", "model_type=gpt2: want llama or mixtral"),
        ("attention_bias", True, "attention_bias=True: want False"),
        ("sliding_window", 128, "sliding_window=128: want None"),
    ):
        (folder / layout.CONFIG).write_text(json.dumps(about | {key: value}))
        with pytest.raises(ConfigError, match=message):
            layout.from_hf(folder)
    (folder / layout.CONFIG).write_text(json.dumps(about))
    (folder / layout_files.WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read(folder, model.config)
    (folder / layout_files.INDEX).write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match=r"want model\.safetensors or"):
        read(folder, model.config)
    with pytest.raises(ConfigError, match="want the folder of a transformers model"):
        layout.from_hf(tmp_path / "nowhere")
