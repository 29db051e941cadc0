"""transformers' Trainer trains what we wrapped, and experts by our backend; what it saves comes
back."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

pytest.importorskip("accelerate")
import moe_router
from moe_router.integrations.wrap import load_wrapped
from moe_router.layers.trial import trial_loss
from tests.integrations import hf_models, test_wrap, test_wrap_decoder, test_wrap_halt


def texts(n, **more):
    ids = torch.randint(2, 40, (n, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row, **more} for row in ids]


class ByTrials(Trainer):
    def compute_loss(self, model, inputs, **_):
        def losses():
            logits = model(input_ids=inputs["input_ids"]).logits
            return torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")

        model.eval()
        return trial_loss(model, losses)


def train(model, rows, folder, lr=0.1, kind=Trainer):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=lr,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = kind(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(folder))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    return {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}


def classifier(kind, **more):
    model = test_wrap.made(BertForSequenceClassification, num_labels=8)
    return moe_router.wrap(model, kind=kind, **more)


MADE = {
    "prune": lambda: classifier("prune", keep=0.5),
    "halt": lambda: classifier("halt", start=-1.0, cost_loss=0.1),
    "merge": lambda: classifier("merge", keep=0.7, freeze=False),
    "skip": lambda: test_wrap_decoder.wrapped(),
    "halt a decoder": lambda: test_wrap_halt.decoder("tsa"),
}


@pytest.mark.parametrize("kind", MADE)
def test_only_routers_learn_and_come_back(kind, tmp_path):
    """Merging has none: there the model learns."""
    model, auto, rows = MADE[kind](), AutoModelForCausalLM, texts(12)
    if isinstance(model, BertForSequenceClassification):
        auto = AutoModelForSequenceClassification
        rows = [row | {"labels": i % 8} for i, row in enumerate(rows)]
    moved = train(model, rows, tmp_path)
    parts = ("",) if kind == "merge" else (".prunes.", ".skip.", ".halts.")
    assert moved and all(any(part in name for part in parts) for name in moved)
    again, ids = load_wrapped(auto, tmp_path), torch.arange(3, 12)[None]
    for parameter in again.parameters():  # where a file has them may decide on the last bit
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_trials_are_a_loss_of_a_trainer(tmp_path):
    rows = [row | {"labels": i % 8} for i, row in enumerate(texts(12))]
    moved = train(MADE["prune"](), rows, tmp_path, kind=ByTrials)
    assert moved and all(".prunes." in name for name in moved)


@pytest.mark.parametrize("kind", ["skip", "halt a decoder", "halt"])
def test_recomputed_layers_take_the_same_tokens(kind, tmp_path):
    """Gradient checkpointing: the same steps, and the same weights after them."""
    ends = []
    rows = texts(12) if kind != "halt" else [row | {"labels": 1} for row in texts(12)]
    for recomputes in (False, True):
        model = MADE[kind]()
        if recomputes:  # by the name that 5.23 has for it, or that of earlier ones
            name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
        train(model, rows, tmp_path)
        ends.append(model.state_dict())
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, msg=name)


def test_experts_by_our_backend_learn_what_eager_ones_do(tmp_path):
    moe_router.register_transformers()
    ends = []
    for name in ("moe_router", "eager"):
        model = hf_models.small("Mixtral")
        model.set_experts_implementation(name)
        assert train(model, texts(12), tmp_path, lr=1e-3)
        ends.append(model.state_dict())
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
