"""What each rank does in the tests of transformers' expert parallelism."""

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moe_router

IDS_BT = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distances(rank, ranks, folder, how):
    """The largest differences of logits and of each gradient between a model with our experts,
    spread over the ranks, and one with eager experts alone; and how many experts are here."""
    moe_router.register_transformers()
    spread = DistributedConfig(tp_size=ranks, ep_size=ranks, ep_implementation=how)
    ours = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=spread, experts_implementation="moe_router"
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    with torch.no_grad():
        apart = {"logits": whole(ours(IDS_BT).logits) - theirs(IDS_BT).logits}
    for model in (ours, theirs):
        model.train()(input_ids=IDS_BT, labels=IDS_BT).loss.backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        apart[name] = whole(parameter.grad) - grads[name]
    experts = {m.num_experts for m in ours.modules() if getattr(m, "_is_expert_parallel", False)}
    return {name: float(one.abs().max()) for name, one in apart.items()}, experts
