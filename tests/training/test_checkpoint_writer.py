"""Writing beside training: it does not hold the steps up, and one rank's failure is everyone's."""

import threading

import pytest
import torch

from moe_router.errors import CheckpointError
from moe_router.training import checkpoint_store
from moe_router.training.checkpoint import CheckpointWriter, read_checkpoint
from moe_router.training.checkpoint_tensors import Snapshot
from tests.gloo import run_ranks
from tests.training import work

STATE = {
    "embed.weight": torch.arange(6.0).view(2, 3),
    "norm.weight": torch.ones(3),
    "blocks.0.moe.experts.0.down": torch.full((2, 2), 5.0),
    "optimizer/exp_avg/norm.weight": torch.zeros(3),
}


def empty_like(state):
    return {name: torch.full_like(tensor, -1.0) for name, tensor in state.items()}


@pytest.fixture
def writer():
    return CheckpointWriter(0, 1, work.tiny())


def test_training_goes_on_while_it_is_written(writer, tmp_path, monkeypatch):
    may_write = threading.Event()
    write = Snapshot.write

    def slowly(self, folder):
        assert may_write.wait(30)
        write(self, folder)

    monkeypatch.setattr(Snapshot, "write", slowly)
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    writer.save(tmp_path, 5, state, wait=False)
    for tensor in state.values():  # the next step changes the weights
        tensor.add_(1.0)
    assert not (tmp_path / "step_5").exists()
    may_write.set()
    writer.wait()
    found = empty_like(STATE)
    assert read_checkpoint(tmp_path / "step_5", found)["step"] == 5
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


def test_a_failure_is_said_once_and_the_next_write_works(writer, tmp_path, monkeypatch):
    def refuse(self, folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Snapshot, "write", refuse)
    writer.save(tmp_path, 1, STATE, wait=False)
    wanted = r"step_1: not written: Permission denied; wanted 0\.0 MiB, .* there is none before it"
    with pytest.raises(CheckpointError, match=wanted):
        writer.save(tmp_path, 2, STATE, wait=True)
    monkeypatch.undo()
    writer.wait()
    writer.save(tmp_path, 2, STATE, wait=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


def test_a_bug_of_ours_is_not_hidden(writer, tmp_path, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(checkpoint_store, "prune", fail)
    writer.save(tmp_path, 1, STATE, wait=False)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        writer.wait()


@pytest.mark.parametrize("failing", [0, 1])
def test_the_failure_of_one_rank_stops_all_of_them(failing, tmp_path):
    for message in run_ranks(2, work.failing_write, failing, str(tmp_path)):
        assert f"step_2: not written: rank {failing}: No space left on device; wanted" in message
        assert "step_1 is kept: free some space or set run.dir to another disk" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_what_all_hold_is_written_once(tmp_path):
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        Snapshot(STATE, rank, 2).write(folder)
    names = work.tensors_in(tmp_path / "0"), work.tensors_in(tmp_path / "1")
    assert names[0] & names[1] == {"blocks.0.moe.experts.0.down"}  # each rank holds its own
    assert names[0] | names[1] == STATE.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("embed.weight"),
            r"has embed\.weight, which this model has not; take the config of the run",
        ),
        (
            lambda state: state.update({"head.weight": torch.ones(2)}),
            r"no tensor head\.weight, which this model has; take the config of the run",
        ),
        (
            lambda state: state.update({"norm.weight": torch.ones(4)}),
            r"norm\.weight is \[3\], want \[4\]: the model differs; take the config",
        ),
    ],
)
def test_another_model_is_refused_before_anything_is_read(writer, tmp_path, change, message):
    writer.save(tmp_path, 1, STATE, wait=True)
    wanted = empty_like(STATE)
    change(wanted)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "step_1", wanted)
    assert all((tensor == -1).all() or (tensor == 1).all() for tensor in wanted.values())


def test_weights_alone_may_be_read_and_experts_of_others_stay_unread(writer, tmp_path):
    state = STATE | {"blocks.0.moe.experts.1.down": torch.full((2, 2), 7.0)}
    writer.save(tmp_path, 1, state, wait=True)
    wanted = {name: tensor for name, tensor in empty_like(STATE).items() if "optim" not in name}
    read_checkpoint(tmp_path / "step_1", wanted)
    assert all(torch.equal(wanted[name], STATE[name]) for name in wanted)
