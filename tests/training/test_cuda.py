"""Training on GPUs: the curve of the CPU, the same bits every time, NCCL on two of them."""

import pytest
import torch

from moe_router.training.loop import Trainer
from tests.gloo import run_ranks
from tests.training import work

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
STEPS = 6


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


def test_follows_the_curve_of_the_cpu():
    ours = work.curve(0, 1, work.tiny(), STEPS, "cuda")[0]
    wanted = work.curve(0, 1, work.tiny(), STEPS)[0]
    for one, other in zip(ours, wanted, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_repeats_and_resumes_bit_by_bit(tmp_path, precision):
    config = work.tiny({"bias_rate": 0.05, "jitter": 0.1}, precision=precision)
    straight, resumed = (Trainer(config, device="cuda") for _ in range(2))
    for step in range(STEPS):
        if step == 3:
            straight.save(tmp_path)
        straight.train_step()
    straight.close()
    resumed.restore(tmp_path / "step_3")
    for _ in range(3, STEPS):
        resumed.train_step()
    assert equal(work.copies(resumed), work.copies(straight))
    assert equal(work.curve(0, 1, config, STEPS, "cuda")[2], work.copies(straight))


def test_bf16_learns_like_fp32():
    low = work.curve(0, 1, work.tiny(precision="bf16"), 12, "cuda")[0]
    full = work.curve(0, 1, work.tiny(), 12, "cuda")[0]
    assert low[-1].loss < low[0].loss - 0.3
    assert low[-1].loss == pytest.approx(full[-1].loss, rel=2e-2)


def test_activation_checkpointing_changes_no_bit():
    again = work.curve(0, 1, work.tiny(activation_checkpointing=True), 3, "cuda")[2]
    assert equal(again, work.curve(0, 1, work.tiny(), 3, "cuda")[2])


@two_gpus
@pytest.mark.parametrize("dense", ["replicated", "fsdp"])
@pytest.mark.parametrize("expert_ranks", [2, 1])
def test_two_gpus_follow_the_curve_of_one(dense, expert_ranks):
    cluster = {"actors": 2, "expert_ranks": expert_ranks}
    config = work.tiny({"bias_rate": 0.05, "z_loss": 0.01}, dense=dense, cluster=cluster)
    wanted = work.curve(0, 1, config, STEPS, "cuda")[0]
    parts = run_ranks(2, work.curve, config, STEPS, "cuda", backend="nccl")
    for records, *_ in parts:
        for one, other in zip(records, wanted, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-4)
            assert one.load_LE == other.load_LE


@two_gpus
def test_two_gpus_repeat_bit_by_bit():
    first, second = (
        run_ranks(2, work.curve, work.tiny(), STEPS, "cuda", backend="nccl") for _ in "12"
    )
    for one, other in zip(first, second, strict=True):
        assert equal(one[2], other[2])
