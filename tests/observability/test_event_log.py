import json
import re

import pytest

from moe_router.errors import MoeRouterError
from moe_router.observability.event_log import EventLog


def test_a_line_says_when_who_and_what(tmp_path):
    facts = {"rank": 1, "step": 4}
    log = EventLog(tmp_path / "logs" / "rank_1.jsonl", lambda: facts)
    log.write("restored", checkpoint="step_4")
    facts["step"] = 5
    log.write("peer lost", reason="two\nlines")
    first, second = map(json.loads, log.path.read_text().splitlines())
    stamp = first.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d{4}", stamp)
    assert first == {"event": "restored", "rank": 1, "step": 4, "checkpoint": "step_4"}
    assert (second["step"], second["reason"]) == (5, "two\nlines")


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(MoeRouterError, match=r"rank_0\.jsonl: could not be written"):
        EventLog(tmp_path / "logs" / "rank_0.jsonl", dict).write("restored")
