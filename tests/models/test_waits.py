"""How often a pass through routed blocks asks the device for a number: each time the host waits.

On a CPU nothing waits, but the same calls are made; they are counted where Python makes them. That
a GPU waits no more often than that is asked of the GPU itself.
"""

import warnings
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode

from moe_router import Context
from moe_router.config import RoutingConfig
from tests.models.helpers import packed, small_model

LENGTHS = [5, 1, 9, 3]
ALL = {"every": 1, "first": 0}  # of four blocks; after the last one nobody has to leave
THRESHOLD = {"kind": "prune", "decide": "threshold"} | ALL
# routing, whether it classifies, then waits in training and in evaluation
CASES = {
    "skip": ({"kind": "skip"} | ALL, False, 0, 4),
    "skip_mlp": ({"kind": "skip", "predictor": "mlp", "router": "mlp"} | ALL, False, 0, 4),
    "leap": ({"kind": "leap", "start": 0.0} | ALL, False, 4, 4),
    "halt": ({"kind": "halt", "start": -2.0} | ALL, False, 3, 3),
    "ponder": ({"kind": "halt", "halting": "ponder", "start": -2.0} | ALL, False, 3, 3),
    "tsa_soft": ({"kind": "halt", "halting": "tsa", "soft_steps": 1} | ALL, False, 0, 3),
    "prune": ({"kind": "prune"} | ALL, True, 0, 0),
    "prune_received": ({"kind": "prune", "router": "attention"} | ALL, True, 0, 0),
    "threshold": (THRESHOLD, True, 3, 3),
    "threshold_soft": (THRESHOLD | {"soft_steps": 1}, True, 0, 3),
    "merge": ({"kind": "merge", "keep": 0.7} | ALL, True, 0, 0),
}
ASKS = {"item", "tolist", "nonzero", "numpy", "cpu", "masked_select", "unique"}
ASKS |= {"__bool__", "__int__", "__float__", "__index__"}


class Asked(TorchFunctionMode):
    """Counts what needs a value on the host."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ASKS or (name == "__getitem__" and _by_flags(args[1])):
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def _by_flags(index):
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


def passed(name, training, device="cpu"):
    """A forward pass, and a backward one in training, over what the host knows already."""
    routing, classifies, *_ = CASES[name]
    classes = {"classes": 3} if classifies else {}
    model = small_model(None, routing=RoutingConfig(**routing), layers=4, dim=32, **classes)
    model.train(training).to(device)
    ids_T, position_T, offsets_B1 = (x.to(device) for x in packed(LENGTHS))
    packing = model.packing(offsets_B1, ids_T.device)

    def run():
        output = model(ids_T, position_T, packing, context=Context(step=0 if training else None))
        if training:
            (output.logits.square().mean() + model.aux_loss(output)).backward()

    return run


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_host_asks_once_a_routed_block_or_never(name, training):
    run, asked = passed(name, training), Asked()
    with asked:
        run()
    assert sum(asked.calls.values()) == CASES[name][2 if training else 3], asked.calls


def test_every_way_of_asking_is_counted():
    x_T, asked = torch.arange(3), Asked()
    with asked:
        x_T.tolist(), x_T[0].item(), int(x_T[1]), bool(x_T[0]), x_T.nonzero(), x_T[x_T > 0]
        x_T[torch.tensor([0, 1])], x_T.cpu(), float(x_T[2])
    assert sum(asked.calls.values()) == 8, asked.calls


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_waits_no_more_often(name, training):
    run = passed(name, training, "cuda")
    run()
    waits = gpu_waits(run)
    assert len(waits) == CASES[name][2 if training else 3], waits


def gpu_waits(run):
    """What torch says of each time that the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(w.message) for w in seen if "synchronizing" in str(w.message)]
