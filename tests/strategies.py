"""Hypothesis strategies shared by the tests of routing."""

import torch
from hypothesis import strategies as st


@st.composite
def targets(draw, max_tokens=24, max_groups=9):
    """(target_TK, groups): distinct ids per token, some of them -1; T may be 0."""
    groups = draw(st.integers(1, max_groups))
    K = draw(st.integers(1, groups))
    T = draw(st.integers(0, max_tokens))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(T, groups, generator=generator).argsort(dim=1)[:, :K]
    none = torch.rand(T, K, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return ids.masked_fill(none, -1).int(), groups
