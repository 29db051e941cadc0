"""Training a classifier: any number of ranks, exact resume, what it learns and what it reports."""

import json
import math
import random
from itertools import pairwise

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from moe_router.cli import app
from moe_router.config_file import config_from_dict
from moe_router.errors import ConfigError
from moe_router.training.data import train_batch, val_batches
from moe_router.training.evaluate import matthews
from moe_router.training.loop import Trainer
from tests.gloo import run_ranks
from tests.training import work
from tests.training.test_ranks import assert_same_curve

STEPS = 5
COUNT = 120  # documents
LABELS = ("low", "mid", "high")
PRUNE = {"kind": "prune", "keep": 0.5, "every": 1, "first": 0}
VARIANTS = {
    "dense": {"moe": None},
    "prune": {"moe": None, "routing": PRUNE},
    "prune_experts": {"routing": PRUNE | {"keep": 0.7}},
    # some steps soft, then hard
    "threshold": {
        "moe": None,
        "routing": PRUNE
        | {"decide": "threshold", "router": "attention", "threshold": 1.0}
        | {"soft_steps": 3, "budget": 0.6},
    },
    "threshold_budget": {
        "moe": None,
        "routing": PRUNE | {"decide": "threshold", "soft_steps": 10, "budget": 0.5},
    },
    # by position: of two neighbours that are the same byte, rounding would decide who is kept
    "skip": {"moe": None, "routing": {"kind": "skip", "router": "position"}},
    "halt": {"moe": None, "routing": {"kind": "halt", "start": -1.0, "every": 1, "first": 0}},
}


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Noise of all lengths with the label's letter in it, somewhere."""
    draw = random.Random(0)
    rows = []
    for n in range(COUNT):
        noise = draw.choices("abcdefgh ", k=draw.randint(2, 30))
        noise[draw.randrange(len(noise))] = "xyz"[n % 3]
        rows.append({"text": "".join(noise), "label": LABELS[n % 3]})
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(texts, name="dense", data=None, **train):
    # its own copy of the settings: ranks are other processes and read the same file
    model = {"layers": 2, "dim": 32, "heads": 2, "kv_heads": 1, "hidden": 48, "kind": "encoder"}
    more = VARIANTS[name]
    moe = more.get("moe", {"experts": 8, "top_k": 2, "hidden": 32})
    model |= {"moe": moe, "routing": more.get("routing")}
    known = {"source": "labelled", "path": str(texts), "labels": LABELS, "seq_len": 32}
    return config_from_dict(
        {
            "run": {"name": "tiny", "seed": 3},
            "data": known | (data or {}),
            "model": model,
            "train": work.TRAIN | train,
        }
    )


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_follow_the_curve_of_one(texts, name, accumulation):
    config = config_of(texts, name, accumulation=accumulation)
    records, held_out, _ = work.curve(0, 1, config, STEPS)
    for ours, ours_held_out, _ in run_ranks(2, work.curve, config, STEPS):
        assert_same_curve(ours, records)
        assert ours_held_out.loss == pytest.approx(held_out.loss, rel=1e-5)
        assert ours_held_out.accuracy == held_out.accuracy
        assert ours_held_out.matthews == pytest.approx(held_out.matthews)
        assert ours_held_out.tokens == held_out.tokens


@pytest.mark.parametrize("dense", ["replicated", "fsdp"])
@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_have_the_gradient_of_one(texts, name, dense):
    """Adam's first mean is a tenth of it. Weights are not compared: the queries' gradients start
    at 1e-8, and Adam makes whole steps of their rounding."""
    config = config_of(texts, name, dense=dense)
    *_, state = work.curve(0, 1, config, 1)
    parts = [part for *_, part in run_ranks(2, work.curve, config, 1)]
    whole = {n: t for part in parts for n, t in part.items()}
    assert whole.keys() == state.keys()
    means = [n for n in state if n.startswith("optimizer/exp_avg/")]
    assert max(state[n].abs().max() for n in means) > 1e-3
    for n in means:
        torch.testing.assert_close(
            whole[n], state[n], rtol=1e-4, atol=2e-8, msg=lambda why, n=n: f"{n}: {why}"
        )


def test_accumulation_is_the_same_step_in_less_memory(texts):
    one = work.curve(0, 1, config_of(texts), STEPS)[0]
    three = work.curve(0, 1, config_of(texts, accumulation=3), STEPS)[0]
    assert_same_curve(three, one)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["dense", "prune_experts", "threshold"])
def test_resume_is_bitwise(texts, name, ranks, tmp_path):
    config = config_of(texts, name)
    straight = run_ranks(ranks, work.save_at, config, str(tmp_path), 2, 4)
    resumed = run_ranks(ranks, work.restored, config, str(tmp_path / "step_2"), 2)
    for (saved, final), (step, first, _, last) in zip(straight, resumed, strict=True):
        assert step == 4 and first.keys() == saved.keys()
        assert all(torch.equal(first[name], saved[name]) for name in saved)
        assert all(torch.equal(last[name], final[name]) for name in final)


def test_the_loss_is_the_mean_over_documents_not_over_tokens(texts):
    config = config_of(texts)
    trainer = Trainer(config)
    batch = train_batch(
        trainer.dataset, batch=12, step=0, micro=0, accumulation=1, rank=0, ranks=1, seed=3
    )
    bounds, nats = batch.offsets_B1.tolist(), []
    for b, (start, end) in enumerate(pairwise(bounds)):
        alone = (batch.ids_T[start:end], torch.arange(end - start).int())
        logits_1C = trainer.model(*alone, torch.tensor([0, end - start])).logits_BC
        nats.append(nn.functional.cross_entropy(logits_1C, batch.target_N[b : b + 1]).item())
    assert len(nats) == 12
    record = trainer.train_step()
    assert record.loss == pytest.approx(sum(nats) / 12, rel=1e-5)
    assert record.tokens == len(batch.ids_T)


def test_evaluation_is_what_counting_by_hand_gives(texts):
    trainer = Trainer(config_of(texts, eval_rows=10))
    for _ in range(15):
        trainer.train_step()
    record = trainer.evaluate()
    (batch,) = val_batches(trainer.dataset, rows=10, batch=10, rank=0, ranks=1)
    with torch.no_grad():
        logits_BC = trainer.model(batch.ids_T, batch.position_T, batch.offsets_B1).logits_BC
    right = (logits_BC.argmax(-1) == batch.target_N).float().mean().item()
    assert record.accuracy == pytest.approx(right)
    loss = nn.functional.cross_entropy(logits_BC, batch.target_N).item()
    assert record.loss == pytest.approx(loss, rel=1e-5)
    assert record.tokens == len(batch.ids_T) and record.step == 15
    assert record.bits_per_byte is None and record.unigram_bits_per_byte is None


@pytest.mark.parametrize("name", ["dense", "prune", "prune_experts"])
def test_it_learns_what_can_be_told_apart(texts, name):
    trainer = Trainer(config_of(texts, name, lr=1e-2, steps=80, eval_rows=1000))
    first = trainer.evaluate()
    for _ in range(80):
        last = trainer.train_step()
    after = trainer.evaluate()
    assert first.accuracy < 0.7 and first.loss == pytest.approx(math.log(3), rel=0.05)
    assert last.loss < 0.1
    assert after.accuracy > 0.9 and after.matthews > 0.85


def test_pruning_saves_what_it_does_not_compute(texts):
    record = Trainer(config_of(texts, "prune")).train_step()
    assert 0.5 < record.executed_flops / record.dense_flops < 0.85


def test_a_soft_threshold_saves_nothing_and_a_hard_one_does(texts):
    trainer = Trainer(config_of(texts, "threshold"))
    shares = [r.executed_flops / r.dense_flops for r in (trainer.train_step() for _ in range(4))]
    assert min(shares[:3]) > 1 and 0.3 < shares[3] < 0.95  # the router costs something


@pytest.mark.parametrize(
    "confusion, wanted",
    [
        ([[5, 0], [0, 7]], 1.0),
        ([[0, 5], [7, 0]], -1.0),
        ([[3, 3], [4, 4]], 0.0),
        ([[9, 0], [3, 0]], 0.0),  # it guesses one label alone
        (
            [[6, 2], [1, 3]],
            (6 * 3 - 2 * 1) / math.sqrt(7 * 8 * 4 * 5),
        ),  # the formula for two labels
        ([[4, 0, 0], [0, 4, 0], [0, 0, 4]], 1.0),
        ([[2, 1, 0], [0, 2, 1], [1, 0, 2]], 0.5),
    ],
)
def test_matthews_correlation(confusion, wanted):
    assert matthews(torch.tensor(confusion, dtype=torch.float64)) == pytest.approx(wanted)


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    """A folder as a run of two steps leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    trainer = Trainer(config_of(texts))
    for _ in range(2):
        trainer.train_step()
    trainer.save(folder, wait=True)
    return folder, trainer.evaluate()


def call(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})


def test_eval_prints_accuracy_and_the_same_as_the_trainer(run):
    folder, wanted = run
    shown = call("eval", folder, "--device", "cpu")
    assert shown.exit_code == 0, shown.output
    assert f"{wanted.accuracy:.2%}" in shown.output and "Matthews" in shown.output
    assert "bits per byte" not in shown.output
    told = json.loads(call("eval", folder, "--device", "cpu", "--json").output)
    assert told["accuracy"] == wanted.accuracy
    assert told["loss"] == pytest.approx(wanted.loss, rel=1e-6)


def test_eval_takes_other_held_out_documents_but_no_other_labels(run, tmp_path):
    folder, _ = run
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "x", "label": "low"}\n' * 7)
    told = call("eval", folder, "--device", "cpu", "--json", "--set", f"data.val_path={other}")
    assert json.loads(told.output)["tokens"] == 7 * 2
    refused = call("eval", folder, "--device", "cpu", "--set", "data.labels=[high, mid, low]")
    assert refused.exit_code == 1 and "data.labels" in refused.output
    assert "Traceback" not in refused.output


@pytest.mark.parametrize("more", [[], ["--prompt", "x"]])
def test_a_classifier_does_not_generate(run, more):
    said = call("generate", run[0], "--device", "cpu", *more)
    assert said.exit_code == 1
    (line,) = said.output.strip().splitlines()
    assert line.startswith("error: ") and "moe-router eval" in line


@pytest.mark.parametrize(
    "data, model, message",
    [
        ({}, {"kind": "causal_lm"}, "model.kind"),
        ({"source": "pydoc", "path": None}, {"kind": "encoder"}, "model.kind"),
    ],
)
def test_a_model_and_its_data_go_together(texts, data, model, message):
    known = {"source": "labelled", "path": str(texts), "labels": LABELS} | data
    with pytest.raises(ConfigError, match=message) as caught:
        config_from_dict(
            {
                "run": {"name": "x"},
                "data": known,
                "model": work.MODEL | model,
                "train": work.TRAIN,
            }
        )
    assert "\n" not in str(caught.value)
