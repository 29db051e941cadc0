"""`moe-router export` and `import`, and trainings that begin with what is there already."""

import dataclasses

import pytest
import torch
import typer.testing

transformers = pytest.importorskip("transformers")
from moe_router.cli import app  # noqa: E402
from moe_router.errors import CheckpointError, ConfigError  # noqa: E402
from moe_router.training.inference import load_for_inference  # noqa: E402
from moe_router.training.loop import Trainer  # noqa: E402
from moe_router.training.state import named_weights  # noqa: E402
from tests.training import work  # noqa: E402


def call(*arguments):
    result = typer.testing.CliRunner().invoke(app, [str(one) for one in arguments])
    return result.exit_code, result.output.replace("\n", " ")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config, folder = work.tiny(), tmp_path_factory.mktemp("run")
    trainer = Trainer(config)
    trainer.train_step()
    trainer.save(folder, wait=True)
    return config, next(folder.glob("step_*"))


def test_a_run_goes_to_transformers_and_comes_back(run, tmp_path, monkeypatch):
    _, step = run
    monkeypatch.chdir(tmp_path)
    code, said = call("export", step, "--output", "out")
    assert (code, "as a Mixtral of transformers" in said) == (0, True), said
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    model, _, tokenizer = load_for_inference(step)
    ids = tokenizer.encode("The end of it")
    offsets_B1 = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        ours = model(torch.tensor(ids), torch.arange(len(ids), dtype=torch.int32), offsets_B1)
        torch.testing.assert_close(
            theirs(torch.tensor([ids])).logits[0], ours.logits_TV, rtol=1e-4, atol=1e-5
        )
    code, said = call("import", "out", "--name", "back")
    assert code == 0 and "runs/back/step_0" in said, said
    back, _, _ = load_for_inference(tmp_path / "runs" / "back" / "step_0")
    for name, tensor in named_weights(model).items():
        assert torch.equal(named_weights(back)[name], tensor), name
    code, said = call("import", "out", "--name", "back")
    assert code == 1 and "is there already; want another --name" in said
    code, said = call("export", step, "--output", "out")
    assert code == 1 and "is not empty; want a new folder" in said
    assert call("generate", "back", "--max-new-tokens", 3)[0] == 0


@pytest.mark.parametrize("tied", [True, False])
def test_import_says_which_embeddings_it_leaves_out(tied, tmp_path, monkeypatch):
    """Theirs are often padded; ours has a row for each id of the tokenizer."""
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained("padded")
    code, said = call("import", "padded", "--name", "cut")
    model, _, tokenizer = load_for_inference(tmp_path / "runs" / "cut" / "step_0")
    left_out = 300 - tokenizer.vocab
    assert code == 0 and left_out > 0
    assert f"left out: the embeddings of {left_out} ids beyond those of its tokenizer" in said
    ids, offsets_B1 = torch.arange(6), torch.tensor([0, 6], dtype=torch.int32)
    with torch.no_grad():
        ours = model(ids, ids.int(), offsets_B1).logits_TV
        wanted = theirs(ids[None]).logits[0, :, : tokenizer.vocab]
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def changed(config, **train):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def test_a_training_begins_with_a_checkpoint_and_only_routers_learn(run, tmp_path):
    config, step = run
    weights = named_weights(load_for_inference(step)[0])
    trainer = Trainer(changed(config, init_from=str(step), learn="routers"))
    before = {name: tensor.clone() for name, tensor in named_weights(trainer.model).items()}
    assert all(torch.equal(before[name], tensor) for name, tensor in weights.items())
    trainer.train_step()
    moved = {n for n, t in named_weights(trainer.model).items() if not torch.equal(t, before[n])}
    assert moved and all(".router." in name for name in moved)


def test_routers_in_depth_are_new_beside_a_checkpoint(run, tmp_path):
    from moe_router.config import RoutingConfig

    config, step = run
    routing = RoutingConfig(kind="skip")
    deep = dataclasses.replace(config, model=dataclasses.replace(config.model, routing=routing))
    trainer = Trainer(changed(deep, init_from=str(step)))
    new = set(named_weights(trainer.model)) - set(named_weights(load_for_inference(step)[0]))
    assert new and all(".router." in name for name in new)


def test_a_training_begins_with_a_folder_of_transformers(run, tmp_path):
    config, step = run
    assert call("export", step, "--output", tmp_path / "out")[0] == 0
    trainer = Trainer(changed(config, init_from=str(tmp_path / "out")))
    for name, tensor in named_weights(load_for_inference(step)[0]).items():
        assert torch.equal(named_weights(trainer.model)[name], tensor), name


@pytest.mark.parametrize("folder", [False, True], ids=["ours", "theirs"])
def test_weights_of_a_model_that_computes_otherwise_are_refused(run, tmp_path, folder):
    """The shapes of all tensors are equal."""
    config, step = run
    source = step
    if folder:
        source = tmp_path / "out"
        assert call("export", step, "--output", source)[0] == 0
    moe = dataclasses.replace(config.model.moe, top_k=1, renormalise=True)
    for changes, said in (
        (
            {"rope_theta": 500.0},
            rf"model\.rope_theta=500\.0: train\.init_from={source} was made with",
        ),
        ({"norm_eps": 1e-3}, r"model\.norm_eps=0\.001"),
        (
            {"heads": config.model.heads * 2, "kv_heads": config.model.kv_heads * 2},
            r"model\.heads=",
        ),
        ({"moe": moe}, r"model\.moe\.top_k=1: .* was made with 2; want the same"),
    ):
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
        with pytest.raises(ConfigError, match=said):
            Trainer(changed(other, init_from=str(source)))


def test_what_cannot_be_begun_with_is_one_line(run, tmp_path):
    config, step = run
    with pytest.raises(ConfigError, match=r"train\.init_from=nowhere: want a run with a checkp"):
        Trainer(changed(config, init_from="nowhere"))
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, dim=64))
    with pytest.raises(CheckpointError, match="the model differs"):
        Trainer(changed(wide, init_from=str(step)))
    dense = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=None))
    with pytest.raises(ConfigError, match=r"train\.learn=routers: nothing is left that learns"):
        Trainer(changed(dense, learn="routers"))
