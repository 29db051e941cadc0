"""train.init_from and train.learn on several ranks: they begin, and go on, as one rank does."""

import pytest
import torch

from moe_router.integrations import layout
from moe_router.training.loop import Trainer
from tests.gloo import run_ranks
from tests.training import work

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A run of two steps, and the same as transformers has it."""
    folder = tmp_path_factory.mktemp("runs")
    trainer = Trainer(work.tiny())
    for _ in range(2):
        trainer.train_step()
    trainer.save(folder / "ours", wait=True)
    weights = {n: t for n, t in work.copies(trainer).items() if not n.startswith("optimizer")}
    layout.write_hf(folder / "theirs", trainer.model, weights, 0, "bytes")
    return folder


@pytest.mark.parametrize(
    "source, how",
    [
        ("ours", {}),
        ("theirs", {}),
        ("theirs", {"dense": "fsdp"}),
        ("ours", {"learn": "routers"}),
    ],
    ids=["ours", "theirs", "fsdp", "routers"],
)
def test_two_ranks_begin_as_one(sources, source, how):
    config = work.tiny(init_from=str(sources / source), **how)
    records, _, state = work.curve(0, 1, config, 2)
    fresh, *_ = work.curve(0, 1, work.tiny(), 1)
    assert records[0].loss < fresh[0].loss - 0.01  # two steps were taken before
    for other, _, held in run_ranks(2, work.curve, config, 2):
        losses = [record.loss for record in records]
        assert [record.loss for record in other] == pytest.approx(losses, rel=1e-5)
        for name, tensor in held.items():
            torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-5)


def test_routers_that_learn_alone_resume(sources, tmp_path):
    """A checkpoint holds the moments of what learns, and no others."""
    config = work.tiny(init_from=str(sources / "ours"), learn="routers")
    trainer = Trainer(config)
    trainer.train_step()
    trainer.save(tmp_path, wait=True)
    moments = [name for name in work.copies(trainer) if name.startswith("optimizer")]
    assert moments and all(".router." in name for name in moments)
    again = Trainer(config)
    again.restore(tmp_path / "step_1")
    assert again.train_step().loss == trainer.train_step().loss
