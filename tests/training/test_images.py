"""Training an image classifier: any number of ranks, exact resume, what it learns and reports."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from moe_router.cli import app
from moe_router.config_file import config_from_dict
from moe_router.errors import ConfigError
from moe_router.observability.trace import load_trace
from moe_router.training.loop import Trainer
from tests.gloo import run_ranks
from tests.training import work
from tests.training.data.images_work import NAMES, write_folders, write_idx
from tests.training.test_ranks import assert_same_curve

PRUNE = {"kind": "prune", "keep": 0.5, "every": 1, "first": 0}
VARIANTS = {
    "dense": {},
    "prune_experts": {"routing": PRUNE, "moe": work.MOE},
    "merge": {"routing": PRUNE | {"kind": "merge", "keep": 0.6}},
}


@pytest.fixture(scope="session")
def file(tmp_path_factory):
    return write_idx(tmp_path_factory.mktemp("images"), "train", 90, size=8, noise=True)


def config_of(file, name="dense", data=None, **train):
    image = {"size": 8, "channels": 1, "patch": 2}
    known = {"source": "images", "path": str(file), "labels": NAMES, "image": image, "seq_len": 16}
    model = {"kind": "vit", "layers": 2, "dim": 32, "heads": 2, "kv_heads": 1, "hidden": 48}
    return config_from_dict(
        {
            "run": {"name": "tiny", "seed": 3},
            "data": known | (data or {}),
            "model": model | VARIANTS[name],
            "train": work.TRAIN | train,
        }
    )


@pytest.mark.parametrize("dense", ["replicated", "fsdp"])
@pytest.mark.parametrize("name", ["prune_experts", "merge"])
def test_two_ranks_follow_the_curve_of_one(file, name, dense):
    config = config_of(file, name, dense=dense)
    records, held_out, state = work.curve(0, 1, config, 4)
    parts = run_ranks(2, work.curve, config, 4)
    for ours, ours_held_out, _ in parts:
        assert_same_curve(ours, records)
        assert ours_held_out.accuracy == held_out.accuracy
    assert {n for *_, part in parts for n in part} == set(state)
    assert records[0].tokens == 12 * 16
    assert 0.5 < records[0].executed_flops / records[0].dense_flops < 0.85


def test_resume_is_bitwise_and_keeps_what_images_are_normalised_by(file, tmp_path):
    config = config_of(file, "prune_experts")
    saved, final = work.save_at(0, 1, config, str(tmp_path), 2, 4)
    # another file beside the run: mean and spread are those of the checkpoint
    other = write_idx(tmp_path, "other", 30, size=8)
    other.write_bytes(other.read_bytes()[:16] + b"\x07" * (30 * 64))
    trainer = Trainer(config_of(other, "prune_experts"))
    assert trainer.model.embed.mean_P[0] == 7
    trainer.restore(tmp_path / "step_2")
    assert torch.equal(trainer.model.embed.mean_P, saved["embed.mean_P"])
    step, first, _, last = work.restored(0, 1, config, str(tmp_path / "step_2"), 2)
    assert step == 4 and all(torch.equal(first[name], saved[name]) for name in saved)
    assert all(torch.equal(last[name], final[name]) for name in final)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_learns_what_can_be_told_apart(tmp_path, name):
    root = write_folders(tmp_path / "all", 60, size=8, channels=1)
    for n, path in enumerate(sorted(root.rglob("*.png"))):  # a label is which third is bright
        third = NAMES.index(path.parent.name)
        _bright_third(path, third, n)
    config = config_of(root, name, lr=1e-2, steps=100, eval_rows=1000)
    trainer = Trainer(config)
    for _ in range(100):
        last = trainer.train_step()
    record = trainer.evaluate()
    assert last.loss < 0.2 and record.accuracy > 0.9 and record.tokens == 6 * 16


def _bright_third(path, third, seed):
    pixels = np.random.default_rng(seed).integers(0, 80, (8, 8)).astype(np.uint8)
    pixels[:, third * 3 : third * 3 + 2] += 150
    Image.fromarray(pixels).save(path)


def test_a_recorded_step_names_patches_by_place(file, tmp_path):
    config = config_of(file, "prune_experts")
    recording = config_from_dict(
        {
            "run": {"name": "tiny", "record": True, "record_every": 1},
            "data": asdict(config.data),
            "model": asdict(config.model),
            "train": work.TRAIN,
        }
    )
    Trainer(recording, run_dir=tmp_path).train_step()
    trace = load_trace(tmp_path / "routing" / "step_1.rank_0.safetensors")
    assert trace.ids_T.tolist() == [-1] * (12 * 16)
    assert trace.position_T.tolist() == list(range(16)) * 12
    kept = [int((trace.layers[i].target_TK[:, 0] >= 0).sum()) for i in (0, 1)]
    assert kept == [12 * 16, 12 * 8]  # half of the patches have left before the second block


def test_eval_gives_the_accuracy_of_the_trainer_and_generate_is_refused(file, tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    trainer = Trainer(config_of(file))
    trainer.train_step()
    trainer.save(folder, wait=True)
    wanted = trainer.evaluate()
    told = CliRunner().invoke(app, ["eval", str(folder), "--device", "cpu", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.output)["accuracy"] == wanted.accuracy
    refused = CliRunner().invoke(app, ["generate", str(folder), "--device", "cpu"])
    assert refused.exit_code == 1 and "moe-router eval" in refused.output


def test_images_want_a_vit(file):
    good = config_of(file)
    with pytest.raises(
        ConfigError, match=r"model\.kind=encoder: want vit, for data\.source=images"
    ):
        config_from_dict(
            {
                "run": {"name": "x"},
                "data": asdict(good.data),
                "model": asdict(good.model) | {"kind": "encoder"},
                "train": work.TRAIN,
            }
        )
