import pytest

from moe_router.errors import ConfigError
from moe_router_cluster.faults import Kill


def test_a_fraction_and_a_step_name_the_same_moment(tiny):
    config = tiny(steps=40, actors=2)
    assert Kill.parse("1@0.5", config) == Kill.parse("1@20", config) == Kill(1, 20)
    assert Kill.parse("0@0.0", config) == Kill(0, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1", "--kill 1: want RANK@STEP or RANK@FRACTION, such as 1@0.5"),
        ("1@half", "want RANK@STEP or RANK@FRACTION"),
        ("-1@3", "want RANK@STEP or RANK@FRACTION"),
        ("2@3", "rank 2, want 0..1 (cluster.actors)"),
        ("1@40", "step 40, want 0..39 (train.steps)"),
        ("1@1.0", "step 40, want 0..39 (train.steps)"),
    ],
)
def test_what_cannot_be_killed_is_refused(tiny, text, message):
    with pytest.raises(ConfigError) as refused:
        Kill.parse(text, tiny(steps=40, actors=2))
    assert message in str(refused.value)
