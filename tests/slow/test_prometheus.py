"""Every query of the dashboard, asked of a real Prometheus that scrapes a real run."""

import io
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from moe_router.config import ClusterConfig
from moe_router_cluster import meters, session
from tests.cluster.conftest import make_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "cluster" / "dashboards" / "moe_router.json").read_text())
PROMETHEUS = shutil.which("prometheus")


@pytest.fixture
def prometheus(tmp_path):
    """Starts one that scrapes a port; its address."""
    if PROMETHEUS is None:
        pytest.skip("needs prometheus (Debian: apt-get install prometheus)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []

    def start(scraped: int) -> str:
        scrape = {
            "job_name": "ray",
            "scrape_interval": "1s",
            "static_configs": [{"targets": [f"127.0.0.1:{scraped}"]}],
        }
        config = tmp_path / "prometheus.yml"
        config.write_text(yaml.safe_dump({"scrape_configs": [scrape]}))
        started.append(
            subprocess.Popen(
                [
                    PROMETHEUS,
                    f"--config.file={config}",
                    f"--storage.tsdb.path={tmp_path / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stderr=subprocess.DEVNULL,
            )
        )
        return f"http://127.0.0.1:{port}"

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=30)


def ask(address: str, query: str) -> list[dict]:
    """The series of an instant query; none while Prometheus starts."""
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]["result"]
    except ConnectionRefusedError:
        return []
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            return []
        raise


def queries() -> list[str]:
    """As Grafana asks with every run and layer chosen."""
    found = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]
    return [query.replace("$run", ".*").replace("$layer", ".*") for query in found]


def test_every_query_of_the_dashboard_has_an_answer(prometheus, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    # no datasheet has the peak of this machine's cores; without one there is no MFU
    monkeypatch.setattr(meters, "peak_flops", lambda device: 1e12)
    from moe_router_cluster.train import train

    config = make_tiny(tmp_path / "runs", name="seen")
    with session.ray_session(ClusterConfig()):
        import ray

        address = prometheus(ray.nodes()[0]["MetricsExportPort"])
        out = io.StringIO()
        assert train(config, Console(file=out, width=200), kill="1@7"), out.getvalue()
        until = time.monotonic() + 60
        unanswered = queries()
        while unanswered and time.monotonic() < until:
            time.sleep(1.0)
            unanswered = [query for query in unanswered if not ask(address, query)]
        assert unanswered == []
        (recoveries,) = ask(address, "sum by (run) (ray_moe_router_recoveries_total)")
        assert (recoveries["metric"], recoveries["value"][1]) == ({"run": "seen"}, "1")
        # what the dashboard's variables offer
        steps = ask(address, "ray_moe_router_step")
        assert {series["metric"]["run"] for series in steps} == {"seen"}
