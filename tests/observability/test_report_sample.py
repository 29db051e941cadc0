import base64
import json
from array import array

import pytest
import torch

from moe_router.errors import DataError
from moe_router.observability.report_sample import load_sample, visible
from moe_router.observability.trace import LayerTrace, Trace, save_trace


def write(run_dir, ids, traced, *, prompt="ab", groups=4, target=None, kept=None):
    text = [chr(i) if i < 256 else "" for i in ids]
    sample = {"prompt": prompt, "text": "".join(text), "token_ids": ids, "token_text": text}
    (run_dir / "sample.json").write_text(json.dumps(sample))
    T = len(traced)
    target = torch.arange(T).int()[:, None] % groups if target is None else target
    kept = target < groups if kept is None else kept
    layer = LayerTrace(groups, target, torch.full(target.shape, 0.5), kept)
    at = torch.arange(T)
    trace = Trace(at, torch.tensor(traced), at.int(), {3: layer})
    save_trace(trace, run_dir / "routing" / "sample.safetensors")
    return load_sample(run_dir)


def unpack(text):
    return array("H", base64.b64decode(text)).tolist()


@pytest.mark.parametrize(
    ("traced", "want"),
    [
        ([97, 98, 99], [1, 2, 3, 0]),  # the last token never went in
        ([256, 97, 98, 99], [2, 3, 4, 0]),  # a separator went in first
        ([-1, -1, -1], [1, 2, 3, 0]),  # the ids were not told
    ],
)
def test_the_trace_is_lined_up_with_the_tokens(tmp_path, traced, want):
    sample = write(tmp_path, [97, 98, 99, 100], traced)
    (layer,) = sample["layers"]
    assert (layer["layer"], layer["groups"], layer["K"]) == (3, 4, 1)
    assert unpack(layer["target"]) == want
    assert unpack(layer["weight"]) == [500, 500, 500, 0]
    assert sample["prompt_tokens"] == 2


def test_a_trace_of_other_tokens_gives_no_colours(tmp_path):
    sample = write(tmp_path, [97, 98, 99, 100], [1, 2, 3])
    assert sample["layers"] == [] and sample["traced"]


def test_a_drop_is_marked_and_a_null_expert_is_not_a_drop(tmp_path):
    target = torch.tensor([[1, 5], [2, -1]], dtype=torch.int32)
    kept = torch.tensor([[False, False], [True, False]])
    sample = write(tmp_path, [97, 98, 99], [97, 98], target=target, kept=kept)
    (layer,) = sample["layers"]
    assert unpack(layer["target"]) == [2 | 1 << 15, 6, 3, 0, 0, 0]


def test_a_long_sample_is_cut_and_says_so(tmp_path):
    ids = [97 + i % 7 for i in range(5000)]
    sample = write(tmp_path, ids, ids[:-1])
    assert len(sample["ids"]) == 4000 and sample["cut"] == 1000


@pytest.mark.parametrize(
    ("text", "id_", "want"),
    [
        ("\n", 10, "↵\n"),
        ("\t", 9, "⇥"),
        ("\x1b", 27, "⟨1B⟩"),
        ("\ufffd", 0xC3, "⟨C3⟩"),
        ("", 256, "⟨256⟩"),
        ("\u202e", 900, "⟨U+202E⟩"),
        ("\ud800", 900, "⟨U+D800⟩"),
        ("é b", 900, "é b"),
    ],
)
def test_nothing_in_a_token_is_invisible(text, id_, want):
    assert visible(text, id_) == want


@pytest.mark.parametrize(
    "sample", [{"prompt": "", "text": ""}, {"token_ids": [1], "token_text": [], "prompt": ""}]
)
def test_a_sample_without_a_text_for_each_id_is_refused(tmp_path, sample):
    (tmp_path / "sample.json").write_text(json.dumps(sample))
    with pytest.raises(DataError, match=r"sample\.json: token_ids and token_text are missing or"):
        load_sample(tmp_path)
