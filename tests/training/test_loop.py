"""What a trainer does beside following its curve: biases, records, evaluation."""

import math

import pytest
import torch

from moe_router.config_file import config_from_dict, config_to_dict
from moe_router.observability.trace import load_trace
from moe_router.training.data import train_batch
from moe_router.training.loop import Trainer
from moe_router.training.parallel import moe_layers
from tests.gloo import run_ranks
from tests.training import work


def recorded(config, **run):
    data = config_to_dict(config)
    return config_from_dict(data | {"run": data["run"] | {"record": True} | run})


def test_the_bias_moves_by_the_load_of_the_whole_step():
    trainer = Trainer(work.tiny({"bias_rate": 0.5}, accumulation=3))
    record = trainer.train_step()
    for moe, load_E in zip(moe_layers(trainer.model), record.load_LE, strict=True):
        mean = sum(load_E) / len(load_E)
        wanted = [0.5 * ((mean > load) - (mean < load)) for load in load_E]
        assert moe.router.bias_E.tolist() == wanted
    assert sum(map(sum, record.load_LE)) == record.rows == 2 * 2 * record.tokens
    assert record.dropped == 0 and record.tokens == 12 * 32


def test_the_norm_is_that_of_the_whole_gradient():
    """Against plain autograd on one rank, with nothing clipped."""
    trainer = Trainer(work.tiny(clip_norm=0.0))
    batch = train_batch(
        trainer.dataset, batch=12, step=0, micro=0, accumulation=1, rank=0, ranks=1, seed=3
    )
    output = trainer.model(batch.ids_T, batch.position_T, batch.offsets_B1)
    mean = torch.nn.functional.cross_entropy(output.logits_TV, batch.target_N)
    (mean + trainer.model.aux_loss(output)).backward()
    square = sum(p.grad.double().square().sum() for p in trainer.model.parameters())
    trainer.model.zero_grad()
    for dense in ("replicated", "fsdp"):
        ((record, *_), *_), _ = run_ranks(2, work.curve, work.tiny(dense=dense), 1)
        assert record.grad_norm == pytest.approx(float(square.sqrt()), rel=1e-5)
        assert record.loss == pytest.approx(mean.item(), rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_recorded_steps_hold_every_token_of_every_micro_step(ranks, tmp_path):
    config = recorded(work.tiny(accumulation=3, activation_checkpointing=True), record_every=2)
    records = run_ranks(ranks, work.recorded, config, 5, str(tmp_path))[0]
    paths = sorted(path.name for path in (tmp_path / "routing").iterdir())
    assert paths == [f"step_{s}.rank_{r}.safetensors" for s in (2, 4) for r in range(ranks)]
    tokens = []
    for rank in range(ranks):
        trace = load_trace(tmp_path / "routing" / f"step_4.rank_{rank}.safetensors")
        tokens += trace.token_T.tolist()
        assert trace.layers.keys() == {0, 1}
    assert sorted(tokens) == list(range(12 * 32))
    one = load_trace(tmp_path / "routing" / "step_4.rank_0.safetensors").layers[1]
    load_E = one.target_TK.flatten().bincount(minlength=8)
    wanted = torch.tensor(records[3].load_LE[1])
    assert torch.equal(load_E, wanted) if ranks == 1 else (load_E <= wanted).all()


def test_nothing_is_recorded_without_a_folder_or_the_wish(tmp_path):
    Trainer(recorded(work.tiny(), record_every=1)).train_step()
    Trainer(work.tiny(), run_dir=tmp_path).train_step()
    assert list(tmp_path.iterdir()) == []


def test_evaluation_is_of_held_out_bytes_and_changes_nothing():
    trainer = Trainer(work.tiny({"jitter": 0.1, "capacity_factor": 0.5}))
    first, again = trainer.evaluate(), trainer.evaluate()
    assert first == again and first.step == 0 and first.tokens == 24 * 32
    # separators stand for no byte, so there are a few bytes less than tokens
    assert first.bits_per_byte >= first.loss / math.log(2)
    assert first.bits_per_byte == pytest.approx(8.0, abs=0.3)
    assert first.unigram_bits_per_byte == trainer.dataset.unigram_bits_per_byte
    trained = trainer.train_step().loss
    assert trained == Trainer(trainer.config).train_step().loss
