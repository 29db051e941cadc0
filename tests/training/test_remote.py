"""Checkpoints and data in an object store, against a server that speaks S3 over HTTP."""

import os
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

from moe_router.config import DataConfig
from moe_router.errors import CheckpointError, ConfigError, DataError
from moe_router.training.checkpoint import CheckpointWriter, read_checkpoint
from moe_router.training.checkpoint_store import ObjectStore, open_store
from moe_router.training.data import load_dataset
from moe_router.training.remote import with_local_data
from tests.gloo import run_ranks
from tests.object_store import s3_server
from tests.training import work

STATE = {"norm.weight": torch.ones(3), "blocks.0.moe.experts.0.down": torch.full((2, 2), 5.0)}


@pytest.fixture(scope="module")
def bucket():
    with s3_server() as url:
        yield url


@pytest.fixture
def config(bucket, request):
    plain = work.tiny(keep_checkpoints=2)
    # a name for each test: they share the bucket
    return replace(plain, run=replace(plain.run, name=request.node.name, storage=bucket))


def read(config, folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The newest checkpoint: its step and its tensors."""
    store = open_store(config, folder)
    state = {name: torch.full_like(tensor, -1.0) for name, tensor in STATE.items()}
    with store.local(store.latest()) as step_dir:
        about = read_checkpoint(step_dir, state)
    return about["step"], state


def test_what_was_written_comes_back_and_old_steps_go(config, tmp_path):
    writer = CheckpointWriter(0, 1, config)
    assert open_store(config, tmp_path).latest() is None
    for step in (1, 9, 10):
        grown = {name: tensor + step for name, tensor in STATE.items()}
        writer.save(tmp_path, step, grown, wait=True)
    step, state = read(config, tmp_path)
    assert step == 10 and all(torch.equal(state[name], STATE[name] + 10) for name in STATE)
    store = open_store(config, tmp_path)
    kept = fsspec.filesystem("s3").ls(store.url, detail=False, refresh=True)
    assert sorted(name.rsplit("/", 1)[-1] for name in kept) == ["step_10", "step_9"]
    assert not list(tmp_path.rglob("*"))  # nothing stays on the node


def test_two_ranks_write_one_checkpoint(config, tmp_path):
    trained, _ = run_ranks(2, work.save_at_a_server, dict(os.environ), config, str(tmp_path), 1, 2)[
        0
    ]
    store = open_store(config, tmp_path)
    state = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    with store.local(store.latest()) as step_dir:
        assert read_checkpoint(step_dir, state)["ranks"] == 2
    assert all(torch.equal(state[name], trained[name]) for name in trained)


@pytest.mark.parametrize("failing", ["begin", "sent", "publish"])
def test_a_write_that_broke_off_leaves_the_one_before(config, tmp_path, monkeypatch, failing):
    """As by SIGKILL: what is done stays, what comes after does not happen, nothing is tidied."""
    writer = CheckpointWriter(0, 1, config)
    writer.save(tmp_path, 5, STATE, wait=True)

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    store = open_store(config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, failing, killed)
        with pytest.raises(Killed):
            store.begin(6)
            (store.partial(6) / "half.safetensors").write_bytes(b"half")
            store.sent(6)
            store.publish(6, {"step": 6, "ranks": 1, "config": {}})
    assert read(config, tmp_path)[0] == 5
    writer.save(tmp_path, 6, {name: tensor + 1 for name, tensor in STATE.items()}, wait=True)
    step, state = read(config, tmp_path)
    assert step == 6 and torch.equal(state["norm.weight"], STATE["norm.weight"] + 1)


def test_a_step_that_is_written_again_is_none_until_it_is_whole(config, tmp_path):
    writer = CheckpointWriter(0, 1, config)
    writer.save(tmp_path, 4, STATE, wait=True)
    writer.save(tmp_path, 5, STATE, wait=True)
    store = open_store(config, tmp_path)
    store.begin(5)  # and then the process dies
    assert store.latest().endswith("/step_4")


def test_a_truncated_file_is_passed_over(config, tmp_path):
    writer = CheckpointWriter(0, 1, config)
    for step in (4, 5):
        writer.save(tmp_path, step, STATE, wait=True)
    store, files = open_store(config, tmp_path), fsspec.filesystem("s3")
    (name,) = files.glob(f"{store.url}/step_5/*.safetensors")
    files.pipe_file(name, b"short")
    assert store.latest().endswith("/step_4")


def test_a_refusal_is_one_line_and_the_checkpoint_before_is_kept(config, tmp_path):
    writer = CheckpointWriter(0, 1, config)
    writer.save(tmp_path, 1, STATE, wait=True)
    gone = replace(config, run=replace(config.run, storage="s3://nobody-made-this"))
    with pytest.raises(CheckpointError) as refused:
        CheckpointWriter(0, 1, gone).save(tmp_path, 2, STATE, wait=True)
    said = str(refused.value)
    assert said.startswith("s3://nobody-made-this/") and "\n" not in said
    assert "The specified bucket does not exist" in said
    assert read(config, tmp_path)[0] == 1


def test_data_is_copied_once_for_each_version(bucket, tmp_path):
    files = fsspec.filesystem("s3")
    files.pipe_file("bucket/texts/a.txt", b"First text. " * 400)
    files.pipe_file("bucket/texts/deep/b.txt", b"Second text. " * 400)
    folder = DataConfig(source="text", path="s3://bucket/texts", cache=str(tmp_path), seq_len=32)
    local = with_local_data(folder)
    found = sorted(p.relative_to(local.path) for p in Path(local.path).rglob("*.txt"))
    assert found == [Path("a.txt"), Path("deep/b.txt")]
    assert load_dataset(folder).train.rows > 0
    assert with_local_data(folder) == local
    one = with_local_data(replace(folder, path="s3://bucket/texts/a.txt"))
    assert Path(one.path).read_bytes() == b"First text. " * 400
    files.pipe_file("bucket/texts/a.txt", b"Another text. " * 400)
    assert with_local_data(folder).path != local.path
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("s3://bucket/nothing", DataError, r"data\.path=s3://bucket/nothing: no such object"),
        ("s3:///", DataError, r"s3:///: "),
        ("nfs://host/x", ConfigError, r"Protocol not known: nfs; want s3://BUCKET/PREFIX, gs://"),
        ("gs://bucket/x", ConfigError, r"gcs.*; pip install 'moe-router\[gs\]'"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(bucket, tmp_path, path, error, message):
    config = DataConfig(source="text", path=path, cache=str(tmp_path), seq_len=32)
    with pytest.raises(error, match=message) as refused:
        with_local_data(config)
    assert "\n" not in str(refused.value)


def test_another_folder_may_keep_the_checkpoints(tmp_path):
    plain = work.tiny()
    config = replace(plain, run=replace(plain.run, storage=str(tmp_path / "nfs")))
    run_dir = tmp_path / "runs" / "tiny"
    CheckpointWriter(0, 1, config).save(run_dir, 3, STATE, wait=True)
    store = open_store(config, run_dir)
    assert store.latest() == str(tmp_path / "nfs" / "tiny" / "step_3")
    run_dir.mkdir(parents=True, exist_ok=True)
    brought = store.bring(store.latest(), run_dir)
    assert brought == run_dir / "step_3" and (brought / "state.json").is_file()
