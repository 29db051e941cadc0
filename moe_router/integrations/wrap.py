"""Routing wrapped around dense models of transformers: tokens leave encoders, skip layers of
decoders, halt in both.

    model = moe_router.wrap(AutoModel.from_pretrained(NAME), kind="prune", keep=0.5)
"""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel

from moe_router.config_routing import RoutingConfig
from moe_router.errors import CheckpointError, ConfigError
from moe_router.integrations import decoder, encoder
from moe_router.integrations.packed import exchange
from moe_router.routing import Context
from moe_router.strict_schema import section

KEY = "moe_router"  # of config.json
_PARTS = {"prunes", "skip", "halts", "merges"}  # names of the modules that hold routers
_SAME = ("every", "first", "router", "router_hidden", "frozen")
_KEYS = {
    "prune": (*_SAME, "keep", "curriculum", "protect", "min_keep"),
    "skip": (*_SAME, "keep", "curriculum", "predictor", "predictor_loss"),
    "halt": (
        *_SAME, "halting", "threshold", "start", "soft_steps", "prior", "ponder_loss", "cost_loss",
    ),
    "merge": (*_SAME, "keep"),
}  # fmt: skip
_ENCODERS = "BERT, MiniLM, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, ViT or DeiT"
_DECODERS = "Llama, Mistral, Qwen2 or Qwen3 without sliding windows"
_WHY = {
    "prune": "it looks at later tokens, which a decoder does not have yet",
    "merge": "it looks at later tokens, which a decoder does not have yet",
    "skip": "encoders read tokens that some layers left out; prune or halt is for them",
}
_LAST = {"prune": 2, "halt": 2, "merge": 1, "skip": 1}  # routed layer, from the end


def wrap(model: PreTrainedModel, kind: str, *, freeze: bool = True, **routing: Any) -> Any:
    """Route the tokens of a dense model. The model is changed in place.

    Args:
        model: of transformers: an encoder for prune and merge, a decoder for skip, either for halt.
        kind: prune | skip | halt | merge.
        freeze: only routers learn; merging has none.
        routing: as in `model.routing`, see docs/routing.md: every, first, router, router_hidden
            and frozen; keep, but for halt; for prune and skip curriculum; for prune protect and
            min_keep; for skip predictor and predictor_loss; for halt halting (tsa if not said),
            threshold, start, soft_steps, prior, ponder_loss and cost_loss.

    Returns:
        The model. `save_pretrained` writes the routers too; `load_wrapped` reads them.

    Raises:
        ConfigError: another kind, a wrong value, a model whose layers are not known here, or are
            spread over devices.
    """
    if kind not in _KEYS:
        raise ConfigError(f"wrap: kind={kind}: want {', '.join(_KEYS)}; see docs/huggingface.md")
    keys = _KEYS[kind]
    unknown = sorted(routing.keys() - set(keys))
    if unknown:
        raise ConfigError(f"wrap: {unknown[0]}: kind={kind} wants {', '.join(keys)}")
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"wrap: {type(model).__name__}: want a model of transformers itself")
    if getattr(model.config, KEY, None):
        raise ConfigError(
            f"wrap: {type(model).__name__}: is wrapped already; load_wrapped reads a saved one"
        )
    if kind == "halt":  # of the three it alone begins near the model itself
        routing = {"halting": "tsa"} | routing
    config = section({"kind": kind} | routing, RoutingConfig, "model.routing")
    _route(model, config)
    setattr(model.config, KEY, {"kind": kind} | {key: getattr(config, key) for key in keys})
    if freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and bool(_place(name)))
    return model


def _route(model: Any, config: RoutingConfig) -> None:
    kind, name = config.kind, type(model).__name__
    encodes, decodes = encoder.layers_of(model), decoder.decoder_of(model) is not None
    found = None if kind == "skip" else encodes
    if found is None and not (decodes and kind in ("skip", "halt")):
        fit = {"skip": _DECODERS, "halt": f"{_ENCODERS}; {_DECODERS}"}.get(kind, _ENCODERS)
        why = f"; {_WHY[kind]}" if encodes or decodes else "; its layers are not known here"
        raise ConfigError(f"wrap: {name}: kind={kind} wants {fit}{why}")
    layers = model.config.num_hidden_layers
    if config.first > layers - _LAST[kind]:
        few = f"kind={kind} wants more layers than {layers}"
        want = f"want at most {layers - _LAST[kind]}" if layers >= _LAST[kind] else few
        raise ConfigError(f"wrap: first={config.first}: {want}")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ConfigError(  # hooks call the layers as they were before
            f"wrap: {name}: device_map has it on several devices, or on disk; want it on one"
        )
    exchange(model, _ENCODERS if found else _DECODERS)
    if found:
        encoder.route(*found, model, config)
    else:
        decoder.route(model, config)


def set_context(model: Any, context: Context) -> None:
    """What the next passes of a wrapped model go by: a Ledger that counts what is executed, and
    the step (of the optimizer) for `curriculum` and `soft_steps`."""
    for module in model.modules():
        if isinstance(module, encoder.RoutedLayers | decoder.RoutedStack | decoder.RoutedLayer):
            module.context = context


def load_wrapped(kind: Any, folder: Path | str, **more: Any) -> Any:
    """What `save_pretrained` wrote of a wrapped model.

    Args:
        kind: AutoModel, or another class with `from_pretrained`.
        folder: on this machine.
        more: for `from_pretrained`.

    Raises:
        CheckpointError: it was not wrapped.
    """
    model = kind.from_pretrained(folder, **more)
    routing = dict(getattr(model.config, KEY, None) or {})
    if not routing:
        raise CheckpointError(f"{folder}: config.json has no {KEY}; want a model saved after wrap")
    delattr(model.config, KEY)
    wrap(model, routing.pop("kind"), **routing)
    routers = {_place(n): t for n, t in model.state_dict().items() if _place(n)}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                if _place(name) in routers:
                    routers.pop(_place(name)).copy_(file.get_tensor(name))
    if routers:
        raise CheckpointError(f"{folder}: no tensor {min(routers)}; save the model after wrap")
    return model


def _place(name: str) -> str:
    """Which router's tensor it is, and of which layer; empty: none. The modules around it have
    other names on disk than in memory for some models."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part in _PARTS), len(parts))
    layer = [part for part in parts[:at] if part.isdigit()]
    return ".".join((*layer, *parts[at:])) if at < len(parts) else ""
