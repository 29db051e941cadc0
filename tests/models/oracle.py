"""A depth-routed model as its definition says: every block computes every token, masks decide what
counts. Plain torch on the model's own weights; the gathered model must equal it."""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F

from moe_router.models.rope import Turn, rotate
from moe_router.types import Tokens


def norm(layer, x):
    return F.rms_norm(x, layer.weight.shape, layer.weight, layer.eps)


def attention(layer, x_SD, turn, seen_SS, mass_S=None):
    """Softmax attention of one sequence under a mask; a query that sees no key gets 0. Also what
    comes to each token. A key of mass m counts m times."""
    q, k, v = (f(x_SD).unflatten(-1, (-1, layer.channels)) for f in (layer.q, layer.k, layer.v))
    q, k = (rotate(x, turn).to(v.dtype) for x in (q, k))
    groups = q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    score_HSS = torch.einsum("shc,thc->hst", q, k) * layer.channels**-0.5
    mass_S = torch.ones_like(x_SD[:, 0]) if mass_S is None else mass_S
    score_HSS = score_HSS + mass_S.log()
    weight_HSS = score_HSS.masked_fill(~seen_SS, -torch.inf).softmax(-1).nan_to_num(0.0)
    received_S = torch.einsum("hst,s->t", weight_HSS, mass_S) / len(weight_HSS)
    return layer.o(torch.einsum("hst,thc->shc", weight_HSS, v).flatten(1)), received_S


def block_delta(block, x_SD, position_S, turn, keep_S, *, causal=True):
    """What the block adds when only the kept tokens exist for it."""
    return block_both(block, x_SD, position_S, turn, keep_S, causal=causal)[0]


def block_both(block, x_SD, position_S, turn, keep_S, mass_S=None, *, causal=True):
    """What the block adds, and how much of its attention comes to each token."""
    seen_SS = torch.ones(len(x_SD), len(x_SD), dtype=torch.bool)
    seen_SS = (seen_SS.tril() if causal else seen_SS) & keep_S
    normed = norm(block.attention_norm, x_SD)
    attended, received_S = attention(block.attention, normed, turn, seen_SS, mass_S)
    normed = norm(block.mlp_norm, x_SD + attended)
    if block.moe is None:
        return attended + block.mlp(normed), received_S
    offsets = torch.tensor([0, len(x_SD)], dtype=torch.int32)
    return attended + block.moe(Tokens(normed, position_S, offsets)).delta_TD, received_S


def turn_of(model, position_S):
    return Turn(*(x.double() for x in model.turn(position_S)))


def skip_logits(model, ids_S):
    """(S, V) logits of one sequence, and which tokens each block computed (L, S)."""
    position_S = torch.arange(len(ids_S), dtype=torch.int32)
    turn = turn_of(model, position_S)
    x_SD, ran = model.embed(ids_S), []
    first_SD = before_SD = x_SD
    decide_at = model.config.routing.decide_at
    for block in list(model.blocks) * model.config.loops:
        asked_SD = {"same": x_SD, "previous": before_SD, "early": first_SD}[decide_at]
        keep_S = torch.ones(len(ids_S), dtype=torch.bool)
        weight_S1 = torch.ones(len(ids_S), 1, dtype=x_SD.dtype)
        if block.leap is not None:
            routing = block.leap.config
            keep_p_S = (-block.leap.router(asked_SD, position_S) - routing.start).sigmoid()
            keep_p_S = torch.where(position_S < routing.protect, 1.0, keep_p_S)
            keep_S = keep_p_S > routing.cut
            weight_S1 = (keep_p_S + 1 - keep_p_S.detach())[:, None]
        if block.skip is not None:
            logit_S = block.skip.router(asked_SD, position_S)
            weight_S1 = logit_S.sigmoid()[:, None]
            if model.training:
                count = int(-(-model.config.routing.keep * len(ids_S) // 1))
                best = logit_S.argsort(descending=True, stable=True)[:count]
                keep_S = torch.zeros_like(keep_S).index_fill(0, best, True)
            else:
                predictor = block.skip.predictor or block.skip.router
                keep_S = predictor(asked_SD, position_S) > 0
        delta_SD = block_delta(block, x_SD, position_S, turn, keep_S)
        before_SD = x_SD
        x_SD = x_SD + torch.where(keep_S[:, None], weight_S1 * delta_SD, 0.0)
        ran.append(keep_S)
    return F.linear(norm(model.norm, x_SD), model.embed.weight), torch.stack(ran)


def halt_logits(model, ids_S, *, soft=False):
    """(S, V) logits of one sequence, which tokens each block computed (L, S), and ponder (S,).

    Args:
        soft: nobody leaves.
    """
    S, config = len(ids_S), model.config.routing
    position_S = torch.arange(S, dtype=torch.int32)
    turn = turn_of(model, position_S)
    x_SD, ran = model.embed(ids_S), []
    going_S, total_S = torch.ones(S, dtype=torch.bool), torch.zeros(S, dtype=x_SD.dtype)
    out_SD, ponder_S = torch.zeros_like(x_SD), torch.zeros(S, dtype=x_SD.dtype)
    taken = 0  # decisions before this one
    for step in range(model.config.steps):
        i = step % len(model.blocks)
        ran.append(going_S)
        delta_SD = block_delta(model.blocks[i], x_SD, position_S, turn, going_S)
        if config.halting == "tsa":
            delta_SD = delta_SD * (1 - total_S)[:, None]
        x_SD = torch.where(going_S[:, None], x_SD + delta_SD, x_SD)
        last = step == model.config.steps - 1
        if not (last or str(i) in model.halts):
            continue
        p_S = torch.zeros(S, dtype=x_SD.dtype)
        if not last:
            p_S = (model.halts[str(i)].router(x_SD, position_S) + config.start).sigmoid()
            if config.halting != "act":
                p_S = p_S * (1 - total_S)
        reached_S = (total_S + p_S >= config.cut) & (not soft)
        halts_S = going_S & (last | reached_S)
        weight_S = torch.where(halts_S, 1 - total_S, p_S) * going_S
        ponder_S = ponder_S + ponder(config, weight_S, going_S, halts_S, taken)
        total_S = total_S + weight_S
        counts_S = halts_S.double() if config.halting == "tsa" else weight_S
        out_SD = out_SD + counts_S[:, None] * x_SD
        going_S = going_S & ~halts_S
        taken += 1
    return F.linear(norm(model.norm, out_SD), model.embed.weight), torch.stack(ran), ponder_S


def ponder(config, weight_S, going_S, halts_S, taken):
    """What a step costs: itself and the remainder, or its part of the divergence."""
    if config.halting != "ponder":
        return going_S + torch.where(halts_S, weight_S, 0.0)
    left = (1 - config.prior) ** taken  # of the geometric prior; all of it where a token halts
    prior_S = torch.where(halts_S, left, left * config.prior)
    return torch.where(going_S, weight_S * (weight_S.clamp(min=1e-30) / prior_S).log(), 0.0)


def class_logits(model, ids_S, *, soft=False):
    """(C,) logits of one text, and which tokens each block computed (L, S), with pruning.

    Args:
        soft: nobody leaves yet; tokens weigh less.
    """
    S = len(ids_S)
    position_S = torch.arange(S, dtype=torch.int32)
    turn = turn_of(model, position_S)
    x_SD, ran = model.embed(ids_S), []
    there_S, mass_S = torch.ones(S, dtype=torch.bool), torch.ones(S, dtype=x_SD.dtype)
    for i, block in enumerate(model.blocks):
        ran.append(there_S)
        # who is not there has mass 0, and no gradient through its logarithm
        seen_S = torch.where(there_S, mass_S, 1.0) * there_S if block.weighs else there_S.double()
        delta_SD, received_S = block_both(
            block, x_SD, position_S, turn, there_S, seen_S.clamp(min=1e-300), causal=False
        )
        x_SD = torch.where(there_S[:, None], x_SD + delta_SD, x_SD)
        if str(i) in model.prunes:
            there_S, weight_S = survivors(
                model.prunes[str(i)], x_SD, position_S, there_S, received_S, soft
            )
            mass_S = mass_S * weight_S
    weight_S = torch.where(there_S, mass_S, 0.0)
    pooled_D = weight_S @ norm(model.norm, x_SD) / weight_S.sum()
    return model.head(pooled_D), torch.stack(ran)


def survivors(prune, x_SD, position_S, there_S, received_S, soft):
    """Who is there after a block, and by what its mass changes."""
    config = prune.config
    if config.router == "attention":
        rank_S = value_S = received_S + prune.router.bias
    else:
        rank_S = prune.router(x_SD, position_S)
        value_S = rank_S.sigmoid()
    rank_S = rank_S.masked_fill(~there_S, -torch.inf)
    rank_S = rank_S.masked_fill(position_S < config.protect, torch.inf)
    order = rank_S.argsort(descending=True, stable=True)

    def first(count):
        count = min(max(count, config.protect, config.min_keep), int(there_S.sum()))
        return torch.zeros_like(there_S).index_fill(0, order[:count], True)

    if config.decide == "top":
        return first(math.ceil(Fraction(str(config.keep)) * int(there_S.sum()))), value_S
    stay_S = there_S & ((value_S > config.cut) | first(0))
    soft_S = torch.where(first(0), 1.0, ((value_S - config.cut) / config.temperature).sigmoid())
    if not prune.training:
        return stay_S, torch.ones_like(soft_S)
    return (there_S, soft_S) if soft else (stay_S, 1 + soft_S - soft_S.detach())
