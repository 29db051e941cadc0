"""What halting in models of transformers is by definition: all tokens are computed."""

import torch

from moe_router.integrations.leaving import Halting
from tests.integrations import test_wrap


def depth_of(model):
    return next(m for m in model.modules() if isinstance(m, Halting))


def masked(layers, depth, x_TD):
    """By definition: each layer computes all tokens of one text, `layers[i](x, alive)`; who has
    halted is not seen and not changed. The outputs, and how many tokens each layer takes."""
    config, at = depth.config, torch.arange(len(x_TD))
    alive = torch.ones(len(x_TD), dtype=torch.bool)
    F_T, y_TD, took = torch.zeros(len(x_TD)), torch.zeros_like(x_TD), []
    for i, layer in enumerate(layers):
        took.append(int(alive.sum()))
        new_TD = layer(x_TD, alive)
        if config.halting == "tsa":
            new_TD = x_TD + (1 - F_T)[:, None] * (new_TD - x_TD)
        x_TD = torch.where(alive[:, None], new_TD, x_TD)
        last = i == len(layers) - 1
        if not last and str(i) not in depth.halts:
            continue
        p_T = torch.zeros_like(F_T)
        if not last:
            p_T = torch.sigmoid(depth.halts[str(i)].router(x_TD, at) + config.start)
        if config.halting != "act":
            p_T = (1 - F_T) * p_T
        halts = alive & ((F_T + p_T >= config.threshold) | last)
        weight_T = torch.where(halts, 1 - F_T, p_T) * alive
        y_TD = y_TD + weight_T[:, None] * x_TD
        F_T, alive = F_T + weight_T, alive & ~halts
    return (x_TD if config.halting == "tsa" else y_TD), took


def encoder_oracle(model, ids):
    def by(layer):
        def run(x_TD, alive):
            seen = torch.where(alive, 0.0, -torch.inf).expand(1, 1, len(alive), -1)
            return layer(x_TD[None], seen)[0]

        return run

    layers = [by(layer) for layer in test_wrap.encoder_of(model).layers]
    return masked(layers, depth_of(model), model.embeddings(input_ids=ids[None])[0])


def decoder_oracle(model, ids):
    base, at = model.model, torch.arange(len(ids))
    x_TD = base.embed_tokens(ids)
    turn = base.rotary_emb(x_TD[None], at[None])

    def by(layer):
        def run(x_TD, alive):
            seen = (at[:, None] >= at) & alive | torch.eye(len(ids), dtype=torch.bool)
            here = {"position_embeddings": turn, "position_ids": at[None]}
            return layer(x_TD[None], seen[None, None], **here)[0]

        return run

    y_TD, took = masked([by(layer) for layer in base.layers.layers], depth_of(model), x_TD)
    return model.lm_head(base.norm(y_TD)), took
