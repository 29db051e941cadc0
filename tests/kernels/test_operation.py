"""An operation goes through the dispatcher where autograd, a mode or a transform listens."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_router_kernels.operation import operation

CALLS = []


@operation("moe_router_test::double")
def double(x: torch.Tensor, times: int) -> torch.Tensor:
    return x * 2**times


double.register_fake(lambda x, times: torch.empty_like(x))
double.register_autograd(
    lambda ctx, grad: (grad * 2**ctx.times, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "times", inputs[1]),
)


@pytest.fixture
def through_op(monkeypatch):
    """Counts the calls that reach the dispatcher."""
    calls, real = [], double.op
    monkeypatch.setattr(double, "op", lambda *args: (calls.append(args), real(*args))[1])
    return calls


class _Heard(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        CALLS.append(str(op))
        return op(*args, **(kwargs or {}))


class _Other(torch.Tensor):
    pass


def test_plain_tensors_take_the_short_way(through_op):
    x = torch.arange(3.0)
    assert double(x, 2).tolist() == [0, 4, 8]
    learnt = torch.nn.Parameter(torch.ones(2))
    with torch.no_grad():
        assert double(learnt, 1).tolist() == [2, 2]
    assert not through_op


def test_autograd_modes_subclasses_and_transforms_are_heard(through_op):
    x = torch.ones(2, requires_grad=True)
    double(x, 3).sum().backward()
    assert x.grad.tolist() == [8, 8] and len(through_op) == 1
    CALLS.clear()
    with _Heard():
        double(torch.ones(2), 1)
    assert "moe_router_test.double.default" in CALLS and len(through_op) == 2
    double(torch.ones(2).as_subclass(_Other), 1)
    assert len(through_op) == 3
    with pytest.raises(RuntimeError, match="functorch"):  # torch's to refuse, not ours to guess
        torch.func.vjp(lambda y: double(y, 1), torch.ones(2))
    assert len(through_op) == 4


def test_a_compiled_call_is_one_node():
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(lambda x: double(x, 1) + 1, fullgraph=True, backend=backend)
    assert compiled(torch.ones(2)).tolist() == [3, 3]
    assert "moe_router_test.double.default" in seen
