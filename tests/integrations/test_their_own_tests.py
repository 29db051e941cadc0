"""transformers' own tests of models with experts, with our experts in the place of theirs.

They are in no package: TRANSFORMERS_CHECKOUT names a checkout of the repository, 5.15 or newer,
whose tests run with its own library. Those that start processes are left out.
"""

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("TRANSFORMERS_CHECKOUT")
ROOT = Path(__file__).resolve().parents[2]
THEY_NEED = ("parameterized", "datasets", "accelerate", "xdist")
LEFT_OUT = "not fsdp and not tp_ and not pipeline"


def outcomes(model, implementation, folder):
    """The names of their tests by outcome: passed, failed, skipped."""
    report = folder / f"{implementation}.xml"
    paths = [f"{CHECKOUT}/src", ROOT, ROOT / "kernels", ROOT / "tests" / "integrations"]
    here = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    more = {
        "PYTHONPATH": os.pathsep.join(map(str, [*paths, *here])),
        "DEFAULT_EXPERTS": implementation,
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "default_experts", "-n0"),
            *(f"tests/models/{model}", "-k", LEFT_OUT, f"--junitxml={report}"),
            *("-o", "addopts=", "-p", "no:cacheprovider"),
        ],
        cwd=CHECKOUT, env=os.environ | more, capture_output=True, text=True,
    )  # fmt: skip
    assert report.is_file() and done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    found = {"passed": set(), "failed": set(), "skipped": set()}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        failed = kinds & {"failure", "error"}
        kind = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
        found[kind].add(case.get("name"))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not CHECKOUT, reason="TRANSFORMERS_CHECKOUT names no checkout of transformers")
@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe", "olmoe"])
def test_what_passes_with_eager_passes_with_our_experts(model, tmp_path):
    missing = [name for name in THEY_NEED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers' tests need {', '.join(missing)}")
    theirs, ours = (outcomes(model, name, tmp_path) for name in ("eager", "moe_router"))
    print({kind: (len(theirs[kind]), len(ours[kind])) for kind in ours})
    assert len(theirs["passed"]) > 50
    assert theirs["passed"] <= ours["passed"], sorted(theirs["passed"] - ours["passed"])
