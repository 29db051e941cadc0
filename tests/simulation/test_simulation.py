"""A replay counts what a dispatch moves; what-ifs go the way they must; predictions meet a run."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from benchmarks import results
from benchmarks import simulate as bench
from moe_router.cli import app
from moe_router.dispatch.cost_model import RATES, Link
from moe_router.errors import ConfigError, DataError
from moe_router.placement import Placement
from moe_router.simulation import (
    Recording,
    Topology,
    load_recording,
    load_topology,
    save_recording,
    simulate,
)
from moe_router.simulation.predict import sum_gradients_s
from moe_router.simulation.recording import Shape
from moe_router.simulation.replay import replay
from moe_router.simulation.topology import FixedConfig, RatesConfig
from tests.dispatch import work as dispatch_work
from tests.gloo import run_ranks
from tests.simulation import work
from tests.training.work import tiny

SHAPE = Shape(experts=8, dim=16, hidden=8, itemsize=4, accumulation=1, dense_bytes=1000)


def topology(ranks=2, **more):
    """A GB/s each way, half of it to other machines."""
    names = [name for name in RATES if name != "put"]
    plain = {"rates": RatesConfig(**dict.fromkeys(names, 1e9), put=1e9)}
    plain["fixed_s"] = FixedConfig(
        all_to_all=4e-5, padded=3e-5, gather_scatter=2e-5, peer_memory=1e-5
    )
    plain |= {"expert_row_s": 1e-5, "rest_token_s": 1e-5}
    return Topology(ranks=ranks, **plain | more)


def recorded(kind="zipf", T=64, layers=2):
    """A step of so many tokens of all ranks."""
    drawn = [dispatch_work.routed(kind, T, 8, 2, seed=n)[0] for n in range(layers)]
    return Recording(SHAPE, {1: torch.stack(drawn).to(torch.int16)})


@pytest.mark.parametrize(
    "placement",
    [Placement.contiguous(8, 2), Placement(((0, 1, 2, 3, 4, 5), (5, 6, 0, 7)))],
    ids=["plain", "copies"],
)
def test_a_replay_counts_what_a_dispatch_moves(placement):
    (target_TK,) = recorded(layers=1).steps[1].int()
    sends, rows = zip(*run_ranks(2, work.counted, placement, target_TK), strict=True)
    found = replay(target_TK.view(2, 32, 2), placement, 2.0, None)
    assert found.load.rows_WW.tolist() == [list(map(float, send)) for send in sends]
    assert found.choices_W.tolist() == list(map(float, rows))
    assert found.dropped == 0


def test_capacity_keeps_the_first_choices_of_an_expert_from_each_rank():
    target_WTK = torch.tensor([[[0, 1], [0, 2], [0, 1]], [[0, 3], [1, 3], [-1, 3]]])
    found = replay(target_WTK, Placement.contiguous(4, 2), 2.0, 2)
    assert found.dropped == 2  # the third token's 0 of rank 0, the third token's 3 of rank 1
    assert found.choices_W.tolist() == [4 + 2, 1 + 2]
    assert found.load.rows_WW.tolist() == [[3, 1], [2, 2]]


def test_a_recording_has_two_bytes_a_choice_and_comes_back(tmp_path):
    before = recorded(T=4096)
    save_recording(before, tmp_path / "routing.safetensors")
    after = load_recording(tmp_path / "routing.safetensors")
    assert after.shape == before.shape and torch.equal(after.steps[1], before.steps[1])
    assert (tmp_path / "routing.safetensors").stat().st_size < 2 * 2 * 4096 * 2 + 500
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="not a recording"):
        load_recording(tmp_path / "broken.safetensors")
    with pytest.raises(DataError, match=r"no recorded routing.*run\.record=true"):
        load_recording(tmp_path)


def test_a_balanced_placement_helps_a_skewed_routing():
    routed, machine = recorded("hot_expert", T=512), topology(4, tokens=128)
    plain = simulate(routed, machine)
    better = simulate(routed, replace(machine, placement="balanced", spare=1))
    assert plain.imbalance_L[0] > 1.9  # every token has an expert on the first of four ranks
    assert max(better.imbalance_L) < 1.3
    assert better.expert_s < plain.expert_s / 1.5 and better.rest_s == plain.rest_s
    assert better.tokens_per_s > plain.tokens_per_s
    own = replace(machine, experts_of_rank=((0,), (1, 2, 3), (4, 5), (6, 7)))
    assert simulate(routed, own).imbalance_L[0] < plain.imbalance_L[0]


def test_capacity_and_bounds_are_told():
    routed, machine = recorded("hot_expert", T=512), topology(4, tokens=128)
    free, bounded = simulate(routed, machine), simulate(routed, replace(machine, capacity_factor=1))
    assert free.dropped == 0 and bounded.dropped > 0.3
    assert bounded.expert_s < free.expert_s
    tight = simulate(routed, replace(machine, row_bound=1.0))
    assert tight.overflows == 1.0 and simulate(routed, replace(machine, row_bound=4)).overflows == 0


def test_every_part_of_a_step_is_counted_by_hand():
    """Two ranks, four tokens each that all choose experts 0 and 4: a row to each rank, of 64 bytes
    there and back, and 16 of ids and weights; the experts of a rank compute 8 rows."""
    target_TK = torch.tensor([[0, 4]] * 8, dtype=torch.int16)
    routed = Recording(SHAPE, {1: torch.stack([target_TK] * 3)})
    rates = dict.fromkeys([name for name in RATES if name != "put"], 1e30) | {"all_to_all": 1e6}
    fixed = FixedConfig(all_to_all=1e-3, padded=1, gather_scatter=1)
    machine = topology(rates=RatesConfig(**rates), fixed_s=fixed)
    found = simulate(routed, machine)
    trip = 1e-3 + 4 * (64 + 16 + 64) / 1e6
    assert found.moving_s["all_to_all"] == pytest.approx(3 * 2 * trip)
    assert found.expert_s == pytest.approx(3 * 8 * 1e-5) and found.rest_s == pytest.approx(4e-5)
    assert found.transport == "all_to_all" and set(found.step_s) == {
        "all_to_all", "padded", "gather_scatter"
    }  # fmt: skip
    parts = (found.moving_s["all_to_all"], found.expert_s, found.gradient_s, found.rest_s)
    assert found.step_s["all_to_all"] == pytest.approx(sum(parts))
    assert found.rows_per_token == 2 and found.sent_bytes == 4 * (64 + 16)
    with pytest.raises(ConfigError, match=r"transport=peer_memory: cannot run"):
        simulate(routed, replace(machine, transport="peer_memory"))


def test_gradients_are_summed_inside_machines_and_between_them():
    rates = {"reduce_scatter": 4e3, "all_gather": 2e3}
    link = Link(8, "any", rates, {}, per_node=4, far_bytes_per_s=1e3)
    near = 3 / 4 * 1000 * (1 / 4e3 + 1 / 2e3)
    assert sum_gradients_s(link, 1000) == pytest.approx(near + 2 * 1 / 2 * 1000 / 4 / 1e3)
    assert sum_gradients_s(replace(link, ranks=1), 1000) == 0


def test_accumulated_micro_steps_are_replayed_apart():
    """The second half of the tokens all go to the last expert: another balance, twice the trips."""
    halves = (torch.tensor([[[0, 1]]] * 8), torch.tensor([[[7, 6]]] * 8))
    target_TK = torch.cat(halves).view(1, 16, 2).to(torch.int16)
    shape = replace(SHAPE, accumulation=2)
    apart = simulate(Recording(shape, {1: target_TK}), topology())
    together = simulate(Recording(SHAPE, {1: target_TK}), topology())
    assert apart.imbalance_L == [2.0] and together.imbalance_L == [1.0]
    assert apart.tokens == together.tokens == 8 and apart.rest_s == together.rest_s


@pytest.fixture
def run(tmp_path):
    """A run of two ranks whose last step was recorded."""
    config = tiny(batch=4)
    config = replace(config, run=replace(config.run, record=True, record_every=1))
    run_ranks(2, work.trained, config, tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    return tmp_path


def test_a_run_is_replayed_from_the_command_line(run, tmp_path):
    file = tmp_path / "machine.yaml"
    file.write_text(yaml.safe_dump(asdict(topology())))

    def call(*more):
        return CliRunner().invoke(app, ["simulate", str(run), str(file), *more])

    found = json.loads(call("--json", "--compact", str(tmp_path / "small")).stdout)
    assert found["tokens"] * 2 == load_recording(run).steps[1].size(1)
    again = CliRunner().invoke(app, ["simulate", str(tmp_path / "small"), str(file), "--json"])
    assert json.loads(again.stdout) == found
    shown = call("--set", "placement=balanced", "--set", "transport=padded").stdout
    assert "padded *" in shown and "times the mean load" in shown
    for change, wrong in (
        ("per_node=-1", "per_node=-1: want a divisor of 2 (ranks)"),
        ("per_node=1", "far_bytes_per_s=None: want a rate between machines"),
        ("rank=3", "rank: unknown key; did you mean ranks?"),
        ("ranks=4000", "ranks=4000: "),
    ):
        told = call("--set", change)
        assert told.exit_code == 1 and wrong in told.stderr, told.stderr
    assert load_topology(file) == topology()


def test_predictions_meet_a_measured_run(tmp_path, monkeypatch, capsys):
    """Two ranks over gloo. On CPUs of two cores, shared: within 60%; the row tells the error."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "local_device", lambda ranks: "cpu")
    monkeypatch.setattr(
        bench,
        "run_here",
        lambda ranks, kind, function, *args: run_ranks(ranks, work.measured, *args)[0],
    )
    small = ("train.batch=8", "data.seq_len=32", "model.layers=2", "cluster.actors=2")
    sets = [part for change in small for part in ("--set", change)]
    how = ["--config", "configs/quickstart.yaml", "--rounds", "2", "--steps", "2", "--save"]
    bench.main([*how, "--topology", str(tmp_path / "machine.yaml"), *sets])
    rows = json.loads((tmp_path / "results/simulate.json").read_text())
    assert {row["name"] for row in rows} == {
        f"simulate/{name}" for name in ("all_to_all", "padded", "gather_scatter", "peer_memory")
    }
    for row in rows:
        assert row["error"] == pytest.approx(row["value"] / row["measured"] - 1, abs=1e-3)
        assert abs(row["error"]) < 0.6, rows
    assert "error" in capsys.readouterr().out
    assert load_topology(tmp_path / "machine.yaml").ranks == 2


def test_the_topology_in_the_docs_is_one(tmp_path):
    text = (Path(__file__).parents[2] / "docs/scaling.md").read_text()
    file = tmp_path / "machine.yaml"
    file.write_text(text.split("```yaml\n")[1].split("```")[0])
    found = load_topology(file)
    assert found.ranks == 64 and found.per_node == 8 and found.link.far_bytes_per_s > 0
