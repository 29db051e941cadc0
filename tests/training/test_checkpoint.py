"""Checkpoints: exact resume, any W from any W, and every way in which one can be bad."""

import json
import os
import subprocess

import pytest
import torch

from moe_router.errors import CheckpointError
from moe_router.training.checkpoint import latest_checkpoint
from moe_router.training.inference import load_for_inference
from moe_router.training.loop import Trainer
from tests.gloo import run_ranks
from tests.training import work

BIASED = {"bias_rate": 0.05, "jitter": 0.1}


def trained(tmp_path, steps=1, **config):
    """A one-rank trainer with a checkpoint of its last step."""
    trainer = Trainer(work.tiny(**config))
    for _ in range(steps):
        trainer.train_step()
    trainer.save(tmp_path, wait=True)
    return trainer


def merged(parts):
    return {name: tensor for part in parts for name, tensor in part.items()}


@pytest.mark.parametrize("dense", ["replicated", "fsdp"])
def test_resume_is_bitwise_and_the_write_sees_no_later_step(tmp_path, dense):
    config = work.tiny(BIASED, dense=dense)
    straight = run_ranks(2, work.save_at, config, str(tmp_path), 3, 6)
    resumed = run_ranks(2, work.restored, config, str(tmp_path / "step_3"), 3)
    for (saved, final), (step, first, _, last) in zip(straight, resumed, strict=True):
        assert step == 6 and first.keys() == saved.keys()
        assert all(torch.equal(first[name], saved[name]) for name in saved)
        assert all(torch.equal(last[name], final[name]) for name in final)


@pytest.mark.parametrize("written, read", [("replicated", "fsdp"), ("fsdp", "replicated")])
def test_any_number_of_ranks_reads_it(tmp_path, written, read):
    straight = run_ranks(2, work.save_at, work.tiny(BIASED, dense=written), str(tmp_path), 2, 3)
    config = work.tiny(BIASED, dense=read)
    saved = merged(part for part, _ in straight)
    nexts = []
    for ranks in (1, 3, 4):  # 8 experts on 3 ranks: 3, 3, 2
        parts = run_ranks(ranks, work.restored, config, str(tmp_path / "step_2"), 1)
        state = merged(first for _, first, _, _ in parts)
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[name], saved[name]) for name in saved)
        nexts.append(parts[0][2][0].loss)
    assert nexts == pytest.approx([nexts[0]] * 3, rel=1e-5)


def test_four_ranks_write_what_two_read(tmp_path):
    config = work.tiny(BIASED)
    saved = merged(part for part, _ in run_ranks(4, work.save_at, config, str(tmp_path), 1, 2))
    parts = run_ranks(2, work.restored, config, str(tmp_path / "step_1"), 0)
    state = merged(first for _, first, _, _ in parts)
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_inference_takes_weights_from_any_run(tmp_path):
    config = work.tiny()
    run_ranks(2, work.save_at, config, str(tmp_path), 1, 2)
    model, read_config, tokenizer = load_for_inference(tmp_path / "step_1")
    trainer = Trainer(config)
    trainer.restore(tmp_path / "step_1")
    assert read_config == config and tokenizer.vocab == 257 and not model.training
    for (name, ours), (_, wanted) in zip(
        model.named_parameters(), trainer.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, wanted), name


def test_old_checkpoints_go_only_when_a_newer_one_is_in_place(tmp_path):
    trainer = Trainer(work.tiny(keep_checkpoints=2))
    for _ in range(4):
        trainer.train_step()
        trainer.save(tmp_path, wait=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3", "step_4"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_4"


def test_an_unfinished_write_is_never_taken_for_a_checkpoint(tmp_path):
    trained(tmp_path)
    leftover = tmp_path / "step_9.tmp"
    leftover.mkdir()
    (tmp_path / "step_8").mkdir()  # no state.json: not whole
    assert latest_checkpoint(tmp_path) == tmp_path / "step_1"
    Trainer(work.tiny()).restore(tmp_path / "step_1")
    assert not leftover.exists()


def weights_file(step_dir):
    return next(step_dir.glob("*.safetensors"))


def test_a_truncated_file_is_named(tmp_path):
    trained(tmp_path)
    path = weights_file(tmp_path / "step_1")
    size = path.stat().st_size
    os.truncate(path, size - 1)
    wanted = rf"{path}: {size - 1} bytes, want {size}: the checkpoint is truncated"
    with pytest.raises(CheckpointError, match=wanted):
        Trainer(work.tiny()).restore(tmp_path / "step_1")


def test_a_missing_file_is_named(tmp_path):
    trained(tmp_path)
    weights_file(tmp_path / "step_1").unlink()
    with pytest.raises(CheckpointError, match=r"safetensors: no bytes, want \d+"):
        Trainer(work.tiny()).restore(tmp_path / "step_1")


def test_garbage_of_the_right_size_is_refused(tmp_path):
    trained(tmp_path)
    path = weights_file(tmp_path / "step_1")
    path.write_bytes(os.urandom(path.stat().st_size))
    with pytest.raises(CheckpointError, match="step_1: not safetensors: "):
        Trainer(work.tiny()).restore(tmp_path / "step_1")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no state.json, so this is no checkpoint of moe_router"),
        ("{", "not a state.json of moe_router"),
        ("[]", "not a state.json of moe_router"),
        ('{"version": 99, "files": {}}', "version 99, want 1: use a newer moe_router"),
    ],
)
def test_a_foreign_folder_is_refused(tmp_path, content, message):
    trained(tmp_path)
    path = tmp_path / "step_1" / "state.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Trainer(work.tiny()).restore(tmp_path / "step_1")


def test_another_model_is_refused_with_the_tensor_that_differs(tmp_path):
    trained(tmp_path)
    with pytest.raises(CheckpointError, match=r"gate_up is \[64, 32\], want \[80, 32\]: the model"):
        Trainer(work.tiny({"hidden": 40})).restore(tmp_path / "step_1")
    with pytest.raises(
        CheckpointError, match=r"router\.score\.weight is \[8, 32\], want \[9, 32\]"
    ):
        Trainer(work.tiny({"experts": 9})).restore(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match=r"no tensor blocks\.0\.moe\.shared\.gate_up\.weight"):
        Trainer(work.tiny({"shared_hidden": 8})).restore(tmp_path / "step_1")


def test_nothing_is_pickled(tmp_path):
    trained(tmp_path)
    folder = tmp_path / "step_1"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert json.loads((folder / "state.json").read_text())["step"] == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint, not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(small_disk):
    trainer = trained(small_disk)
    trainer.train_step()
    wanted = r"step_2: not written: .*No space left.*step_1 is kept: free some space"
    with pytest.raises(CheckpointError, match=wanted):
        trainer.save(small_disk, wait=True)
    assert [path.name for path in small_disk.iterdir()] == ["step_1"]
    Trainer(work.tiny()).restore(small_disk / "step_1")
    trainer.train_step()  # the run itself is unharmed


def test_an_error_in_the_background_comes_out_at_the_next_save(small_disk):
    trainer = trained(small_disk)
    trainer.train_step()
    trainer.save(small_disk)
    with pytest.raises(CheckpointError, match=r"step_2: not written: "):
        trainer.close()
