"""The benchmark of routing in depth, in a tiny form: every row, gone on with, and its page."""

import gzip
import json
import shutil
from dataclasses import replace

import pytest
import torch

from benchmarks import (
    dense_routing,
    dense_routing_table,
    depth_files,
    depth_measure,
    depth_rows,
    depth_tasks,
    results,
)
from benchmarks.depth_bench import Bench, TimeOver, equal_flops
from benchmarks.depth_files import files_of
from benchmarks.depth_lanes import Lane, run_lanes
from benchmarks.depth_measure import dense_flops
from benchmarks.depth_tasks import settings
from benchmarks.timing import Deadline
from moe_router.config import RoutingConfig
from moe_router.cost import cost
from moe_router.training.data import val_batches
from tests.training.data.images_work import write_idx

TINY = ("model.dim=32", "model.hidden=64", "model.heads=2", "model.kv_heads=2", "train.batch=8")
ROUTINGS = {
    "prune/0.6": RoutingConfig(kind="prune", keep=0.6, every=1, first=0),
    "merge/0.7": RoutingConfig(kind="merge", keep=0.7, every=1, first=0),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Sixty random images, two steps of training."""
    (tmp_path / "fashion").mkdir()
    for part, count in (("train", 40), ("t10k", 20)):
        write_idx(tmp_path / "fashion", part, count, size=28, noise=True)
    task = replace(depth_tasks.TASKS["fashion"], steps=2, tune=1, routings=ROUTINGS)
    monkeypatch.setitem(depth_tasks.TASKS, "fashion", task)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    few = {"cpu": (2, 4), "cuda": (2, 4)}
    monkeypatch.setattr(depth_rows, "BATCHES", few)
    yield tmp_path
    torch.set_num_threads(1)


def run(folder, *more):
    tiny = [word for key in TINY for word in ("--set", key)]
    own = ["--data", str(folder), "--runs", str(folder / "runs"), "--timing", "0.01"]
    dense_routing.main([*own, *tiny, "--save", *more])
    return {r["name"]: r for r in json.loads((folder / "results/dense_routing.json").read_text())}


def test_every_row_is_measured_saved_and_gone_on_with(folder, capsys):
    rows = run(folder, "--only", "fashion/prune/0.6*,fashion/dense")
    names = ["dense", "prune/0.6", "prune/0.6/frozen", "prune/0.6/position", "prune/0.6/equal"]
    assert list(rows) == [f"fashion/{name}" for name in names]
    ours = rows["fashion/prune/0.6"]
    p5, p50, p95 = ours["flops_p5_p50_p95"]
    assert p5 < p50 <= p95 < ours["flops_dense"]
    assert ours["flops_speedup"] == pytest.approx(ours["flops_dense"] / ours["flops"], abs=1e-3)
    assert ours["router_parameters"] == 3 * (32 + 1) and ours["router_flops"] > 0
    assert ours["training_mib"] < ours["training_mib_dense"]
    assert rows["fashion/prune/0.6/equal"]["flops"] == pytest.approx(ours["flops"], rel=0.1)
    assert rows["fashion/dense"]["flops"] == rows["fashion/dense"]["flops_dense"]
    before = sorted((folder / "runs").glob("*/step_*"))
    assert "fashion-prune-0.6-s0" in {path.parent.name for path in before}
    (folder / "runs" / "fashion-prune-0.6-s0" / "kept").touch()
    again = run(folder, "--only", "fashion/prune/0.6,fashion/merge/0.7*")
    assert again["fashion/prune/0.6"]["seeds"] == ours["seeds"]  # the same checkpoint
    assert again["fashion/merge/0.7"]["flops_speedup"] > 1.3
    assert len(again) == len(names) + 5
    assert {path.parent.name for path in (folder / "runs").glob("*/step_*")} >= {
        path.parent.name for path in before
    }
    page = dense_routing_table.page(list(again.values()), "\n## What it says\nkept\n", [])
    assert "| prune/0.6 | " in page and "too few seeds to claim anything" in page
    assert page.endswith("kept\n") and "## sst2" not in page


def test_a_second_seed_joins_the_first_and_time_that_is_over_ends_it(folder, capsys):
    one = run(folder, "--only", "fashion/prune/0.6")["fashion/prune/0.6"]
    late = run(folder, "--only", "fashion/prune/0.6", "--seeds", "0,1", "--seconds", "0")
    assert late["fashion/prune/0.6"] == one
    assert "fashion/prune/0.6: the time is over" in capsys.readouterr().out
    shutil.rmtree(folder / "runs")  # another machine: only what was saved is there
    both = run(folder, "--only", "fashion/prune/0.6", "--seeds", "0,1")["fashion/prune/0.6"]
    assert both["by_seed"].keys() == {"0", "1"} and both["by_seed"]["0"] == one["by_seed"]["0"]
    assert both["std"] is not None
    wider = run(folder, "--only", "fashion/prune/0.6", "--scale", "2")["fashion/prune/0.6"]
    assert wider["of"]["steps"] == 4 and wider["by_seed"].keys() == {"0"}


def test_a_training_ends_when_its_time_is_over(folder):
    files = files_of("fashion", folder / "fashion", folder / "runs")
    late = Bench("fashion", folder / "runs", (*files, *TINY), "cpu", until=Deadline(-1))
    with pytest.raises(TimeOver, match="fashion-dense-s0: at step 0 of 2"):
        late.measured(settings(late.task)[0], 0)


def test_a_run_that_fails_is_told_and_others_go_on(folder, capsys):
    """One process for both: the second lane is another's, whose file is missing."""
    here = folder / "fashion"
    files = (*files_of("fashion", here, folder / "runs"), *TINY)
    lane = Lane("fashion", folder / "runs", here, files, "cpu", 1.0, Deadline(60), row="dense")
    broken = replace(lane, more=(*files, "data.path=nowhere"))
    run_lanes([(0, broken), (0, lane)], workers=1)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("fashion/dense, seed 0: DataError: ")
    assert " s: fashion/dense, seed 0: 0." in said[1]


def test_every_task_makes_a_config_on_each_device(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.depth_bench.load_dataset", lambda data: None)
    for name, task in depth_tasks.TASKS.items():
        for device in ("cpu", "cuda"):
            bench = Bench(name, tmp_path, ["data.path=x", "data.tokenizer=bytes"], device)
            for setting in settings(task):
                assert bench.config(setting, 0).model.routing == setting.routing


def test_small_copies_of_the_files_are_read(tmp_path):
    """Reviews of both labels, judgements of one line each, images that keep their labels."""
    source, to = tmp_path / "from", tmp_path / "to"
    source.mkdir()
    write_idx(source, "train", 30, size=28, noise=True)
    write_idx(source, "t10k", 20, size=28, noise=True)
    for path in source.iterdir():
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
        (source / f"{name}.tsv").write_text("ks08\t1\t\tThe cat sat.\nks08\t0\t*\tCat the.\n")
    depth_files.copy(source, to, ["fashion", "cola"])
    images = Bench("fashion", tmp_path, files_of("fashion", to / "fashion", tmp_path), "cpu")
    assert (images.dataset.train.rows, images.dataset.val.rows) == (30, 20)
    there = depth_files.elsewhere("cola", to / "cola")
    files = files_of("cola", to / "cola", tmp_path)
    cola = Bench("cola", tmp_path, (*files, *TINY), "cpu", elsewhere=there)
    assert sorted(cola.dataset.val.label_N.tolist()) == [0, 1]
    found = cola.measured(replace(settings(cola.task)[0], steps=1), 0)
    assert -1 <= found["elsewhere"]["quality"] <= 1
    with pytest.raises(SystemExit, match=r"no enwik8\.xz in it"):
        depth_files.copy(source, to, ["enwik8"])


def test_flops_of_tokens_are_those_of_the_ledger_and_a_wrong_count_is_caught(folder, monkeypatch):
    files = files_of("fashion", folder / "fashion", folder / "runs")
    bench = Bench("fashion", folder / "runs", (*files, *TINY), "cpu")
    batch = next(val_batches(bench.dataset, rows=4, batch=4, rank=0, ranks=1))
    for setting in settings(bench.task):
        if setting.routing is not None:
            trainer = bench.trained(replace(setting, steps=0), 0)
            measured = depth_measure.executed(trainer.model, trainer.config, [batch])
            assert 0.3 < measured.mean / measured.dense < 0.7
            parts = cost(trainer.config).parts
            blocks = [part for part in parts if part.layer.isdigit()]
            assert measured.dense == sum(part.dense_flops for part in blocks)
            other = replace(trainer.config, model=replace(trainer.config.model, hidden=72))
            with pytest.raises(AssertionError, match="the Ledger counts"):
                depth_measure.executed(trainer.model, other, [batch])


@pytest.mark.gpu
def test_a_row_on_a_gpu(folder):
    """Both passes are CUDA graphs."""
    only = "fashion/prune/0.6,fashion/prune/0.6/equal,fashion/merge/0.7"
    rows = run(folder, "--only", only, "--device", "cuda")
    for name in ("prune/0.6", "merge/0.7"):
        ours = rows[f"fashion/{name}"]
        assert ours["flops_speedup"] > 1.2 and ours["many"]["speedup"] > 0
        assert ours["graphs"] == ["ours", "dense"] and ours["inference_mib"] > 0
        assert ours["many"]["joules_per_1000"] > 0


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_equal_model_executes_as_much(folder, share):
    files = files_of("fashion", folder / "fashion", folder / "runs")
    bench = Bench("fashion", folder / "runs", files, "cpu")
    base = bench.config(settings(bench.task)[0], 0)
    whole = dense_flops(base, bench.counted())
    equal = equal_flops(base, share * whole, bench.counted())
    assert dense_flops(equal, bench.counted()) == pytest.approx(share * whole, rel=0.03)
    assert equal.model.layers == base.model.layers and equal.model.routing is None


def test_a_verdict_wants_three_seeds_and_a_pooled_std():
    row = {"mean": 0.9, "std": 0.01, "seeds": [0.9] * 3, "unit": "accuracy"}
    near, far = row | {"mean": 0.895}, row | {"mean": 0.88}
    assert "not ahead" in dense_routing_table.verdict(row, near)
    assert dense_routing_table.verdict(row, far).endswith("+2.0 pooled std: ahead")
    assert "too few" in dense_routing_table.verdict(row, far | {"seeds": [0.88]})
    bits = row | {"unit": "bits per byte"}  # fewer are better
    assert "not ahead" in dense_routing_table.verdict(bits, far)
    assert dense_routing_table.verdict(bits, row | {"mean": 0.92}).endswith(
        "+2.0 pooled std: ahead"
    )
