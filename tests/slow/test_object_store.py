"""A whole run with its checkpoints in an object store: killed, recovered, bit for bit the same."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import safe_open

from moe_router.config import ClusterConfig
from moe_router_cluster import session
from tests.cluster.conftest import make_tiny
from tests.object_store import s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def weights(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
    return found


def test_a_run_recovers_from_an_object_store_bit_for_bit(tmp_path):
    from moe_router_cluster.train import train

    def run(config, **options) -> tuple[bool, str]:
        out = io.StringIO()
        return train(config, Console(file=out, width=200), **options), out.getvalue()

    with s3_server() as bucket, session.ray_session(ClusterConfig()):
        plain = make_tiny(tmp_path / "runs", name="plain")
        stored = make_tiny(tmp_path / "elsewhere", name="stored")
        stored = replace(stored, run=replace(stored.run, storage=bucket))
        assert run(plain)[0]
        done, said = run(stored, kill="1@7")
        assert done and "actor 1 killed at step 7, recovered in " in said
    folder = tmp_path / "elsewhere" / "stored"
    # the last one is brought home, where generate and serve look; no other ever lay there
    assert [path.name for path in sorted(folder.glob("step_*"))] == ["step_12"]
    assert weights(folder / "step_12") == weights(tmp_path / "runs" / "plain" / "step_12") != {}
