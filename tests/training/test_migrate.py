"""A placement is committed in two phases: everywhere, or nowhere."""

import json

import pytest
import torch

from moe_router.placement import Placement
from tests.gloo import run_ranks
from tests.training import commit_work, work

SPARE = {"actors": 2, "rebalance": {"every": 1000, "spare": 1}}
OLD = [Placement.dealt(8, 2, 5)] * 2


# before anything travels; when all of it has arrived
@pytest.mark.parametrize("when", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_rank_lost_between_the_phases_leaves_the_old_placement_in_force(tmp_path, when):
    config = work.tiny(cluster=SPARE)
    with pytest.raises(AssertionError, match="rank 1 died"):
        run_ranks(2, commit_work.lost, config, str(tmp_path), when)
    told = json.loads((tmp_path / "told.json").read_text())
    said, _, why = told["error"].partition(": another rank is gone or silent (")
    assert said == "rank 0, moving experts after step 2" and why
    assert told["said"] == when and told["same"] and told["placed"]  # bit for bit
    parts = run_ranks(2, commit_work.resumed, config, str(tmp_path), 2)
    assert [found for found, _ in parts] == [OLD, OLD]
    straight = run_ranks(2, work.curve, config, 3)
    for (_, state), (_, _, wanted) in zip(parts, straight, strict=True):
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_where_a_rank_has_no_room_no_rank_changes_anything():
    for moved, same, placed, later in run_ranks(2, commit_work.crowded, work.tiny(cluster=SPARE)):
        assert moved == 0 and same and placed
        assert later == 10  # slots, once there is room


def test_ranks_that_were_given_different_placements_are_told_so_and_go_on():
    for error, unmoved, step in run_ranks(2, commit_work.at_odds, work.tiny(cluster=SPARE)):
        assert error == (
            "placements: ranks were given different ones, want the same on every rank; nothing "
            "has moved"
        )
        assert unmoved and step == 2


def test_a_placement_that_found_no_room_is_not_tried_again_and_again():
    config = work.tiny(cluster={"actors": 2, "rebalance": {"every": 3, "spare": 1}})
    for said, asked, placed in run_ranks(2, commit_work.looks, config):
        assert said == [None] * 6 and placed
        assert asked in (1, 2)  # layers of the first look: a rank stops at the first without room
