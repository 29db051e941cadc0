"""benchmarks.minilm on a small random BERT: every row of it, and what its scores say."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
from benchmarks import minilm, minilm_models, minilm_table, minilm_tasks  # noqa: E402
from benchmarks.timing import Deadline  # noqa: E402

WORDS = ["good", "bad", "film", "card", "lost", "money", "my", "a", "is", "the"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of four layers, and 12 sentences of each task and part."""
    folder = tmp_path_factory.mktemp("minilm")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join(special + WORDS), "utf-8")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=15, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=24, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    texts = [" ".join(WORDS[(i + j) % 10] for j in range(2 + i % 5)) for i in range(12)]
    for name in ("sst2", "banking77"):
        (folder / name).mkdir()
    for part in ("train", "test"):
        lines = [f"{i % 2} {text}" for i, text in enumerate(texts)]
        (folder / f"sst2/stsa.binary.{part}").write_text("\n".join(lines), "utf-8")
        rows = ["text,category", *(f"{text},c{i % 3}" for i, text in enumerate(texts))]
        (folder / f"banking77/{part}.csv").write_text("\n".join(rows), "utf-8")
    return folder


def prepared(folder, device):
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("TAUGHT", 8), ("FITTED", 4), ("TESTED", 12)):
            patch.setattr(minilm_tasks, name, count)
        return minilm.prepare(folder, folder, device)


@pytest.fixture(scope="module")
def full(folder):
    return prepared(folder, "cpu")


def test_every_row_is_made(full, monkeypatch):
    monkeypatch.setattr(minilm_models, "STEPS", 2)
    rows = list(minilm.rows(full, ["*"], Deadline(1e9), rounds=1))
    assert [row["name"] for row in rows] == ["full", *minilm.ROWS]
    for row in rows[1:]:
        assert row["seeds"] == minilm.ROWS[row["name"]].seeds
        assert 0 < row["executed"] < 1 and set(row["a_second"]) == {
            "routed", "packed", "transformers",
        }  # fmt: skip
        for task in ("sst2", "banking77"):
            assert -1 <= row[task]["cosine"] < 1 and 0 <= row[task]["probe"] <= 1
            assert ("cosine_std" in row[task]) == (row["seeds"] > 1)
    less, more = (minilm.speed(full, minilm.Setting(keep), 1)["executed"] for keep in (0.3, 0.9))
    assert less < more
    assert list(minilm.rows(full, ["*"], Deadline(-1.0), 1))[1:] == []
    page = minilm_table.page(rows)
    assert all(f"| {row['name']} |" in page for row in rows)
    assert "beside prune/0.7/frozen: sst2 cosine" in page


def test_the_full_model_agrees_with_itself_and_another_does_not(full):
    fitted_ND, tested_ND = full.embedded["banking77"]
    plain = minilm.score(full, "banking77", fitted_ND, tested_ND)
    assert plain["cosine"] == pytest.approx(1) and plain["correlation"] == pytest.approx(1)
    other = minilm.score(full, "banking77", fitted_ND, tested_ND.roll(1, 0))
    assert other["cosine"] < 0.999 and other["correlation"] < 0.9


@pytest.mark.parametrize("way", ["trials", "gradient"])
def test_what_is_taught_is_the_routers_alone(full, monkeypatch, way):
    monkeypatch.setattr(minilm_models, "STEPS", 2)
    taught, plain = minilm.Setting(0.5, taught=way), minilm.Setting(0.5)
    model, untaught = (minilm.with_seed(full, one, 0) for one in (taught, plain))
    before = untaught.state_dict()
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved and all(".prunes." in name for name in moved)


@pytest.mark.gpu
def test_a_row_is_made_on_a_gpu(folder, monkeypatch):
    """Needs a CUDA device."""
    monkeypatch.setattr(minilm_models, "STEPS", 2)
    full = prepared(folder, "cuda")
    rows = list(minilm.rows(full, ["prune/0.7", "merge/0.7"], Deadline(1e9), rounds=1))
    assert [row["name"] for row in rows] == ["full", "prune/0.7", "merge/0.7"]
    assert all(row["device"] == torch.cuda.get_device_name() for row in rows)
    assert all(rate > 0 for row in rows[1:] for rate in row["a_second"].values())


def test_the_probe_finds_what_is_there():
    torch.manual_seed(0)
    labels = [i % 3 for i in range(60)]
    x_ND = torch.eye(3)[labels] + 0.1 * torch.randn(60, 3)
    rows = [("", label) for label in labels]
    assert minilm_tasks.probe(x_ND[:30], rows[:30], x_ND[30:], rows[30:]) == 1.0
    assert minilm_tasks.probe(x_ND[:30], rows[:30], x_ND[30:].roll(1, 1), rows[30:]) < 0.5
