"""What `cluster.transport: auto` measures is remembered by the run."""

import json

import torch

from moe_router.dispatch import AllToAll, Bounded
from moe_router.training.transport import LINK, remembered_link, training_dispatcher
from tests.gloo import run_ranks
from tests.training import work


def links(rank, ranks, folders):
    cpu = torch.device("cpu")
    return [remembered_link(ranks, cpu, folder) for folder in folders]


def kinds(rank, ranks, transports):
    made = [
        training_dispatcher(
            work.tiny(cluster={"transport": name}), ranks, torch.device("cpu"), None
        )
        for name in transports
    ]
    return [
        type(by.static).__name__ if isinstance(by, Bounded) else type(by).__name__ for by in made
    ]


def test_a_run_that_goes_on_finds_what_was_measured(tmp_path):
    first, second = run_ranks(2, links, (tmp_path, tmp_path, None))
    assert first == second
    measured, again, anew = first
    assert measured == again != anew
    text = (tmp_path / LINK).read_text()
    assert json.loads(text)["bytes_per_s"] == measured.bytes_per_s
    # of a version that measured less
    (tmp_path / LINK).write_text(text.replace('"combine"', '"other"'))
    assert run_ranks(2, links, (tmp_path,))[0][0].bytes_per_s["combine"] > 0
    # of another number of ranks
    (tmp_path / LINK).write_text(text.replace('"ranks": 2', '"ranks": 3'))
    assert run_ranks(2, links, (tmp_path,))[0][0].ranks == 2
    assert json.loads((tmp_path / LINK).read_text())["ranks"] == 2


def test_the_config_names_the_transport():
    wanted = {
        "all_to_all": "AllToAll",
        "padded": "Padded",
        "gather_scatter": "GatherScatter",
        "peer_memory": "PeerMemory",
        "auto": AllToAll.__name__,  # on a CPU no one runs ahead of the host
    }
    assert run_ranks(2, kinds, tuple(wanted)) == [list(wanted.values())] * 2
