"""The commands that need no Ray, as a user types them, on a run of one step."""

import json
import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from moe_router.cli import app
from moe_router.config_file import config_to_dict, load_config
from moe_router.dispatch.cost_model import Link, Problem
from moe_router.dispatch.probe import Probe
from moe_router.observability.metrics import MetricsWriter
from moe_router.tables_links import links_table
from moe_router.training.loop import Trainer

# torch says at each checkpoint of one rank that there is one rank
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROOT = Path(__file__).parent.parent
TINY = [
    "model.layers=2",
    "model.dim=16",
    "model.heads=2",
    "model.kv_heads=1",
    "model.moe.experts=4",
    "model.moe.hidden=8",
    "data.source=text",
    "data.seq_len=16",
    "train.steps=1",
    "train.batch=4",
    "train.eval_rows=4",
    "cluster.actors=1",
    "run.name=tiny",
    "serve.max_new_tokens=5",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with text.txt and runs/tiny, trained for one step."""
    root = tmp_path_factory.mktemp("work")
    (root / "text.txt").write_text("one two three four five six seven\n" * 60)
    config = load_config("quickstart", [*TINY, f"data.path={root / 'text.txt'}"])
    run = root / "runs" / "tiny"
    trainer = Trainer(config)
    with MetricsWriter(run, config.run) as writer:
        writer.write(trainer.train_step())
    trainer.save(run, wait=True)
    trainer.close()
    (run / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    return root


@pytest.fixture
def run(folder, monkeypatch):
    """Run a command inside the folder."""
    monkeypatch.chdir(folder)
    return lambda *words: CliRunner().invoke(app, list(words), catch_exceptions=False)


def error_of(result):
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("name", ["runs/tiny", "runs/tiny/step_1", "tiny"])
def test_eval(run, name):
    result = run("eval", name, "--json", "--device", "cpu")
    record = json.loads(result.stdout)
    assert result.exit_code == 0 and record["step"] == 1 and record["tokens"] == 4 * 16
    assert 0 < record["unigram_bits_per_byte"] < record["bits_per_byte"] < 10


def test_eval_is_soft_only_where_training_can_be(run):
    refused = run("eval", "tiny", "--soft", "--device", "cpu")
    assert refused.exit_code == 1 and refused.stderr == (
        "error: --soft: want a model whose training can be soft: halt by ponder or tsa, leap or "
        "prune (model.routing)\n"
    )


def test_a_prompt_that_is_not_utf8_is_one_line(run):
    prompt = b"\xff".decode(errors="surrogateescape")  # as the shell passes that byte
    refused = run("generate", "tiny", "--prompt", prompt, "--device", "cpu")
    assert refused.exit_code == 1
    assert refused.stderr == "error: serve.prompt='\\udcff': want text that UTF-8 can hold\n"


def test_eval_takes_other_data(run, folder):
    few, more = (
        json.loads(run("eval", "tiny", "--json", "--set", f"train.eval_rows={n}").stdout)
        for n in (4, 8)
    )
    assert (few["tokens"], more["tokens"]) == (64, 128)
    assert "bits per byte" in run("eval", "tiny").stdout
    error = error_of(run("eval", "tiny", "--set", "data.path=gone.txt"))
    assert error.startswith("data.path=gone.txt: ")
    error = error_of(run("eval", "tiny", "--set", "model.dim=32"))
    assert "--set model.dim=32: the model and its tokenizer are those of the checkpoint" in error


def test_a_compute_budget_wants_a_model_routed_in_depth(run):
    for command in ("eval", "generate"):
        error = error_of(run(command, "tiny", "--compute-budget", "0.5"))
        assert error.startswith("compute budget 0.5: want a model whose tokens skip, halt, leap or")


def test_generate_is_repeatable(run):
    words = ("generate", "tiny", "--prompt", "one ", "--max-new-tokens", "8", "--device", "cpu")
    first, again = run(*words), run(*words)
    assert first.exit_code == 0 and first.stdout == again.stdout
    assert first.stdout.startswith("one ")
    assert len({run(*words, "--seed", str(seed)).stdout for seed in range(4)}) > 1
    greedy = [run(*words, "--temperature", "0", "--seed", str(seed)).stdout for seed in (0, 1)]
    assert greedy[0] == greedy[1]


def test_generate_refuses_models_that_are_not_causal(run, folder):
    state = folder / "runs" / "later" / "step_1"
    shutil.copytree(folder / "runs" / "tiny" / "step_1", state)
    about = json.loads((state / "state.json").read_text())
    about["config"]["model"]["moe"]["policy"] = "expert_choice"
    (state / "state.json").write_text(json.dumps(about))
    assert "later tokens" in error_of(run("generate", str(state)))


def test_inspect_writes_a_report(run, folder):
    result = run("inspect", "runs/tiny/step_1")
    assert result.exit_code == 0 and result.stdout.strip() == "runs/tiny/report.html"
    assert "<html" in (folder / "runs" / "tiny" / "report.html").read_text()


@pytest.mark.parametrize("command", ["eval", "generate", "inspect"])
@pytest.mark.parametrize(
    "name, line",
    [
        ("runs/tony", "runs/tony: no such run; did you mean runs/tiny?"),
        ("tony", "tony: no such run; did you mean runs/tiny?"),
        ("zzz", "zzz: no such run; want runs/NAME or runs/NAME/step_N"),
        ("tiny/step_9", "runs/tiny/step_9: no such step; want one of step_1, or runs/tiny"),
        (".", ".: is no run (no config.yaml, no checkpoint); want runs/NAME or runs/NAME/step_N"),
    ],
)
def test_names_the_run_that_was_meant(run, command, name, line):
    assert error_of(run(command, name)) == line


def test_a_run_without_a_checkpoint(run, folder):
    new = folder / "runs" / "new"
    new.mkdir(exist_ok=True)
    shutil.copy(folder / "runs" / "tiny" / "config.yaml", new)
    want = "runs/new: no whole checkpoint (step_N/state.json); train on until one is written"
    assert error_of(run("eval", "runs/new")) == want


def test_a_truncated_checkpoint(run, folder):
    step = folder / "runs" / "torn" / "step_1"
    shutil.copytree(folder / "runs" / "tiny" / "step_1", step)
    file = next(step.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    error = error_of(run("generate", "torn"))
    assert "100 bytes, want" in error and "truncated" in error


def test_cost(run):
    total = json.loads(run("cost", "quickstart", "--json").stdout)
    assert total["parameters"] == sum(part["parameters"] for part in total["parts"])
    shown = run("cost", "quickstart").stdout
    assert "router: 0.12% of the parameters, 0.38% of the FLOPs" in shown
    assert "a dense SwiGLU of width 512 costs as much" in shown
    assert " 0-3 " in shown and "…" not in shown  # equal layers are one row; 80 columns are enough
    dense = run("cost", "quickstart", "--set", "model.moe=null").stdout
    assert "router: 0.00% of the parameters" in dense and "SwiGLU of width" not in dense
    assert error_of(run("cost", "quickstrat")).startswith("quickstrat: no such file; did you mean")


def test_doctor_exits_by_what_is_missing(run, monkeypatch):
    from moe_router import doctor

    found = json.loads(run("doctor", "--json").stdout)
    assert {"python", "torch", "ray", "gloo", "loopback"} <= {finding["name"] for finding in found}
    broken = doctor.Finding("ray", "missing", "not installed", "pip install ray")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([broken]),))
    result = run("doctor")
    assert result.exit_code == 1 and "pip install ray" in result.stdout
    weak = doctor.Finding("CPU cores", "weak", "1", "more")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([weak]),))
    assert run("doctor").exit_code == 0


def test_doctor_measures_links_between_real_ranks(run):
    found = json.loads(run("doctor", "--links", "--json").stdout)
    assert found["link"]["ranks"] == 2 and len(found["probes"]) == 3
    for probe in found["probes"]:
        names = {"all_to_all", "padded", "gather_scatter", "peer_memory"}
        assert set(probe["predicted"]) == set(probe["measured"]) == names
        assert all(seconds > 0 for seconds in probe["measured"].values())
        assert probe["predicted"][probe["chosen"]] == min(probe["predicted"].values())


def test_links_are_a_table_with_the_choice_marked():
    link = Link(2, "cpu", {"all_to_all": 3e8}, {"all_to_all": 1e-4})
    problem = Problem(tokens=64, top_k=2, experts=8, ranks=2, dim=32, itemsize=4)
    took = ({"all_to_all": 1e-3, "padded": 2.5e-3}, {"all_to_all": 2e-3, "padded": 3e-3})
    console = Console(width=100, file=StringIO())
    console.print(links_table(link, [Probe(problem, *took, "all_to_all")]))
    shown = console.file.getvalue()
    assert "2 ranks on cpu: all_to_all 300 MB/s" in shown
    rows = [line.split() for line in shown.splitlines() if "64x32" in line]
    assert [row[-5:] for row in rows] == [
        ["all_to_all", "*", "1,000", "2,000", "-50%"],
        ["bit", "padded", "2,500", "3,000", "-17%"],
    ]


def test_no_gpu_is_one_line(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    error = error_of(run("eval", "tiny", "--device", "cuda"))
    assert error == "--device cuda: torch finds no GPU; see moe-router doctor"


def test_the_console_script_mounts_every_command():
    roots = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "cluster"))
    help_ = subprocess.run(
        [sys.executable, "-W", "error", "-m", "moe_router_cluster.cli", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": roots},
        check=True,
    )
    assert help_.stderr == ""
    for command in ("train", "eval", "generate", "inspect", "cost", "doctor", "--version"):
        assert command in help_.stdout
