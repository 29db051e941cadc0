from moe_router.tables import visible


def test_what_a_model_wrote_cannot_steer_the_terminal():
    written = "a\tb\n\x1b[31mred\x07\x9b2Jé\xa0☂"
    assert visible(written) == "a\tb\n�[31mred��2Jé\xa0☂"
