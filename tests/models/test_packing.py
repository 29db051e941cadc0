import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_router.models.packing import NARROW, Packing, cut

CPU = torch.device("cpu")


def pieces(*lengths):
    return cut(list(lengths), CPU)


def test_sequences_of_one_length_are_one_causal_grid():
    (piece,) = pieces(*[7] * 5)
    assert (piece.tokens, piece.rows, piece.width) == (35, 5, 7)
    assert piece.cell_T is None and piece.mask_R1WW is None


def test_rows_cut_by_documents_come_out_as_they_went_in():
    (piece,) = pieces(100, 28, 128, 5, 23, 100)
    assert (piece.rows, piece.width, piece.cell_T) == (3, 128, None)
    assert piece.mask_R1WW[0, 0, 99, 0] and not piece.mask_R1WW[0, 0, 100, 99]


def test_a_long_sequence_is_a_call_of_its_own():
    parts = pieces(3, 3, NARROW + 1, NARROW + 1, NARROW + 2, 5)
    assert [(p.rows, p.width) for p in parts] == [(2, 3), (2, NARROW + 1), (1, NARROW + 2), (1, 5)]
    assert all(p.mask_R1WW is None for p in parts)


def test_one_sequence_a_row_needs_no_mask():
    (piece,) = pieces(90, 80, 100)
    assert (piece.rows, piece.width, piece.mask_R1WW) == (3, 100, None)
    assert piece.cell_T.tolist() == [*range(90), *range(100, 180), *range(200, 300)]


def test_both_ways_round_gaps_in_a_row_are_hidden():
    (piece,) = cut([90, 80, 100], CPU, causal=False)
    assert (piece.rows, piece.width) == (3, 100)
    assert piece.mask_R1WW[0, 0, 0].sum() == 90 and piece.mask_R1WW[1, 0, 79].sum() == 80


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, NARROW + 40), min_size=1, max_size=12), st.booleans())
def test_every_token_has_its_own_cell_and_sees_its_past_or_its_sequence(lengths, causal):
    done = 0
    for piece in cut(lengths, CPU, causal=causal):
        cells = range(piece.tokens) if piece.cell_T is None else piece.cell_T.tolist()
        assert len(set(cells)) == piece.tokens and max(cells) < piece.rows * piece.width
        if piece.mask_R1WW is not None:
            seen_RW = piece.mask_R1WW[:, 0].sum(-1).flatten()[list(cells)]
            wanted = [i + 1 if causal else n for n in lengths[done:] for i in range(n)]
            assert seen_RW.tolist() == wanted[: piece.tokens]
        elif not causal:  # then every row is full of one sequence
            assert piece.rows * piece.width == piece.tokens
            assert set(lengths[done : done + piece.rows]) == {piece.width}
        took = 0
        while took < piece.tokens:
            took += lengths[done]
            done += 1
        assert took == piece.tokens
    assert done == len(lengths)


def test_each_token_knows_its_sequence_and_its_rank_in_it():
    packing = Packing(torch.tensor([0, 2, 2, 5]), CPU)
    assert packing.lengths == [2, 0, 3] and packing.longest == 3
    assert packing.sequence_T.tolist() == [0, 0, 2, 2, 2]
    assert packing.rank_T.tolist() == [0, 1, 0, 1, 2]
    assert packing.offsets_B1.dtype == torch.int32
