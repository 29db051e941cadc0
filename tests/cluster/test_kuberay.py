"""What ships for Kubernetes, without one: it is whole, guarded, and of the tested versions."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
FOUND = list(yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text()))
KINDS = {each["kind"]: each for each in FOUND}
RAY = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()


def clusters() -> dict[str, dict]:
    service = KINDS["RayService"]["spec"]["rayClusterConfig"]
    return {"RayCluster": KINDS["RayCluster"]["spec"], "RayService": service}


def pods() -> list:
    found = []
    for kind, spec in clusters().items():
        groups = [("head", spec["headGroupSpec"])]
        groups += [(group["groupName"], group) for group in spec["workerGroupSpecs"]]
        found += [pytest.param(g["template"], id=f"{kind}-{name}") for name, g in groups]
    return found


def test_there_is_what_a_cluster_needs():
    assert set(KINDS) == {"PersistentVolumeClaim", "NetworkPolicy", "RayCluster", "RayService"}
    assert len(FOUND) == len(KINDS)
    assert KINDS["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("kind", ["RayCluster", "RayService"])
def test_every_cluster_wants_the_token_and_is_of_the_tested_ray(kind):
    spec = clusters()[kind]
    assert KINDS[kind]["apiVersion"] == "ray.io/v1"
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == RAY
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("template", pods())
def test_every_pod_is_fenced_in_and_finds_its_volumes(template):
    label = template["metadata"]["labels"]
    assert KINDS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == label
    (container,) = template["spec"]["containers"]
    assert container["image"] == "REGISTRY/moe-router:0.1.0"
    assert container["resources"]["limits"] == container["resources"]["requests"]
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claim = volumes["runs"]["persistentVolumeClaim"]["claimName"]
    assert claim == KINDS["PersistentVolumeClaim"]["metadata"]["name"]
    assert "RAY_AUTH_TOKEN" not in str(template)  # the operator gives it; a file would show it


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments")  # in Ray, by its import
def test_what_is_served_is_what_serve_yaml_serves_but_guarded():
    from ray.serve.schema import ServeDeploySchema

    here = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    there = yaml.safe_load(KINDS["RayService"]["spec"]["serveConfigV2"])
    for config in (here, there):
        ServeDeploySchema.model_validate(config)
    (app,), (plain,) = there["applications"], here["applications"]
    assert (app["import_path"], app["deployments"]) == (plain["import_path"], plain["deployments"])
    assert app["args"].keys() == plain["args"].keys()
    files = {Path(app["args"][key]) for key in ("token_file", "tls_certificate", "tls_key")}
    for template in pods()[2:]:
        mounts = template.values[0]["spec"]["containers"][0]["volumeMounts"]
        assert {str(file.parent) for file in files} <= {mount["mountPath"] for mount in mounts}


def test_the_image_is_of_the_tested_versions_and_of_no_root():
    assert f"ARG BASE=rayproject/ray:{RAY}-" in DOCKERFILE
    assert DOCKERFILE.rstrip().splitlines()[-2:] == ["USER ray", "WORKDIR /home/ray"]
    assert f"image: rayproject/ray:{RAY}-" in (CLUSTER / "gpu-gcp.yaml").read_text()


@pytest.mark.slow
def test_what_the_image_copies_is_enough_to_build_the_package(tmp_path):
    for sources, target in re.findall(r"^COPY --chown=\S+ (.+) (/build\S*)$", DOCKERFILE, re.M):
        place = tmp_path / target.lstrip("/")
        for source in map(ROOT.joinpath, sources.split()):
            if source.is_dir():
                shutil.copytree(source, place)
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(tmp_path), str(tmp_path / "build")], check=True, timeout=250)
    (wheel,) = tmp_path.glob("moe_router-*.whl")
    held = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True
    ).stdout
    for name in ("moe_router_cluster/cli.py", "moe_router_kernels/", "configs/quickstart.yaml"):
        assert name in held
