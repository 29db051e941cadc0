"""Routing wrapped around dense models of transformers: tokens leave encoders, or skip layers of
decoders.

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

KEY = "moe_router"  # of config.json
_PARTS = {"prunes", "skip"}  # names of the modules that hold routers
_SAME = ("keep", "every", "first", "router", "router_hidden", "curriculum", "frozen")
_KEYS = {
    "prune": (*_SAME, "protect", "min_keep"),
    "skip": (*_SAME, "predictor", "predictor_loss"),
}
_ENCODERS = "BERT, MiniLM, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, ViT or DeiT"
_DECODERS = "Llama, Mistral, Qwen2 or Qwen3 without sliding windows"


def wrap(model: PreTrainedModel, kind: str, *, freeze: bool = True, **routing: Any) -> Any:
    """Route the tokens of a dense model. The model is changed in place.

    Args:
        model: of transformers: an encoder for prune, a decoder for skip.
        kind: prune | skip.
        freeze: only routers learn.
        routing: keep, every, first, router, router_hidden, curriculum and frozen, as in
            `model.routing`; for prune protect and min_keep, for skip predictor and
            predictor_loss. docs/routing.md.

    Returns:
        The model. `save_pretrained` writes the routers too; `load_wrapped` reads them.

    Raises:
        ConfigError: another kind, or a model whose layers are not known here.
    """
    if kind not in _KEYS:
        raise ConfigError(f"wrap: kind={kind}: want {' or '.join(_KEYS)}; see docs/huggingface.md")
    keys = _KEYS[kind]
    unknown = sorted(routing.keys() - set(keys))
    if unknown:
        raise ConfigError(f"wrap: {unknown[0]}: want {', '.join(keys)}")
    if routing.get("router") == "attention":
        raise ConfigError("wrap: router=attention: want linear, mlp or position")
    if getattr(model.config, KEY, None):
        raise ConfigError(
            f"wrap: {type(model).__name__}: is wrapped already; load_wrapped reads a saved one"
        )
    config = RoutingConfig(kind=kind, **routing)  # type: ignore[arg-type]
    if kind == "prune":
        _prune(model, config)
    else:
        _skip(model, config)
    setattr(model.config, KEY, {"kind": kind} | {key: getattr(config, key) for key in keys})
    if freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and bool(_place(name)))
    return model


def _prune(model: Any, config: RoutingConfig) -> None:
    found = encoder.layers_of(model)
    if found is None:
        raise ConfigError(f"wrap: {type(model).__name__}: kind=prune wants {_ENCODERS}")
    _check_first(config, model.config.num_hidden_layers - 2)
    exchange(model, _ENCODERS)
    encoder.route(*found, model, config)


def _skip(model: Any, config: RoutingConfig) -> None:
    if decoder.decoder_of(model) is None:
        raise ConfigError(f"wrap: {type(model).__name__}: kind=skip wants {_DECODERS}")
    _check_first(config, model.config.num_hidden_layers - 1)
    exchange(model, _DECODERS)
    decoder.route(model, config)


def _check_first(config: RoutingConfig, most: int) -> None:
    if config.first > most:
        raise ConfigError(f"wrap: first={config.first}: want at most {most}")


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
