"""How much of a checkpoint of transformers a rank reads: its experts, and what all ranks have."""

import collections
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moe_router.integrations import layout, layout_files
from moe_router.models import CausalLM
from moe_router.placement import Placement
from moe_router.training.state import named_weights
from tests.models.helpers import VOCAB, small_model

SMAPS = Path("/proc/self/smaps")
EXPERTS, RANKS = 8, 4


class Counted:
    """A real open file that says what was taken of it; whole tensors are not to be had."""

    def __init__(self, path, taken, **more):
        self._path, self._taken, self._more = path, taken, more

    def __enter__(self):
        self._file = safe_open(self._path, **self._more)
        self._file.__enter__()
        self._taken["files opened"] += 1
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def keys(self):
        return self._file.keys()

    def get_slice(self, name):
        return CountedSlice(name, self._file.get_slice(name), self._taken)


class CountedSlice:
    def __init__(self, name, part, taken):
        self._name, self._part, self._taken = name, part, taken

    def get_shape(self):
        return self._part.get_shape()

    def __getitem__(self, at):
        found = self._part[at]
        self._taken[self._name] += found.nbytes
        return found


@pytest.fixture
def taken(monkeypatch):
    """Bytes by tensor."""
    taken = collections.Counter()

    def opened(path, **more):
        return Counted(path, taken, **more)

    monkeypatch.setattr(layout_files, "safe_open", opened)
    return taken


def written(folder, moe, **model):
    made = small_model(moe, **model)
    layout.write_hf(folder, made, named_weights(made), 0, "bytes")
    return made


def of_rank(model, rank):
    """This rank's weights, empty, by global name."""
    mine = Placement.contiguous(EXPERTS, RANKS).experts_of_rank[rank]
    return {
        name: torch.zeros_like(tensor)
        for name, tensor in named_weights(model).items()
        if ".experts." not in name or int(name.split(".experts.")[1].split(".")[0]) in mine
    }


def test_each_rank_reads_its_own_experts_and_what_all_share(tmp_path, taken):
    model = written(tmp_path / "out", {"experts": EXPERTS, "hidden": 64})
    whole = {name: tensor.nbytes for name, tensor in named_weights(model).items()}
    of_experts = sum(size for name, size in whole.items() if ".experts." in name)
    shared = sum(whole.values()) - of_experts
    assert of_experts > 5 * shared
    times = collections.Counter()
    for rank in range(RANKS):
        taken.clear()
        mine = of_rank(model, rank)
        layout.read_hf(tmp_path / "out", model.config, mine)
        assert taken.pop("files opened") == 1
        assert sum(taken.values()) == shared + of_experts // RANKS
        times.update(name for name in taken if ".experts." in name)
        for name, tensor in mine.items():
            assert torch.equal(tensor, named_weights(model)[name]), name
    # w1, w2 and w3 of each expert, by one rank each
    assert len(times) == 3 * EXPERTS * model.config.layers and set(times.values()) == {1}


def test_of_padded_embeddings_only_the_rows_that_we_have_are_read(tmp_path, taken):
    model = written(tmp_path / "out", None, vocab=5 * VOCAB, tie_embeddings=False)
    cut = CausalLM(model.config, VOCAB)
    layout.read_hf(tmp_path / "out", model.config, named_weights(cut))
    for name in (layout_files.EMBEDDINGS, layout_files.HEAD):
        assert taken[name] == VOCAB * model.config.dim * 4
    assert torch.equal(cut.embed.weight, model.embed.weight[:VOCAB])


def test_a_dense_layer_that_becomes_every_expert_is_read_once(tmp_path, taken):
    dense = written(tmp_path / "out", None)
    moe = small_model({"hidden": 24}).config.moe
    grown = CausalLM(dataclasses.replace(dense.config, moe=moe), VOCAB)
    layout.read_hf(tmp_path / "out", grown.config, named_weights(grown))
    assert taken.pop("files opened") == 1
    assert sum(taken.values()) == sum(t.nbytes for t in named_weights(dense).values())


@pytest.mark.skipif(not SMAPS.exists(), reason=f"{SMAPS} says what a process has read of a file")
def test_the_system_says_that_other_ranks_experts_were_not_read(tmp_path, monkeypatch):
    model = written(tmp_path / "out", {"experts": EXPERTS, "hidden": 512}, dim=256, layers=2)
    path, seen = tmp_path / "out" / layout_files.WEIGHTS, []
    close = layout_files.Files.__exit__

    def look_and_close(self, *error):
        seen.append(resident_bytes(path))
        return close(self, *error)

    monkeypatch.setattr(layout_files.Files, "__exit__", look_and_close)
    for weights in (of_rank(model, 1), named_weights(model)):
        layout.read_hf(tmp_path / "out", model.config, weights)
    mine = sum(t.nbytes for t in of_rank(model, 1).values())
    # around what is asked for the system maps more, up to the 2 MiB of a large page at either end
    runs = 2 * model.config.layers
    assert mine <= seen[0] <= mine + runs * 2 * 2**20 < 0.7 * path.stat().st_size
    assert seen[1] > 0.99 * path.stat().st_size


def resident_bytes(path):
    """How much of a mapped file is in this process."""
    inside, total = False, 0
    for line in SMAPS.read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total
