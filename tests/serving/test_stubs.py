"""The committed gRPC stubs are those of router.proto."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path("moe_router/serving")


def test_stubs_are_generated_from_the_proto(tmp_path):
    pytest.importorskip("grpc_tools", reason="needs grpcio-tools, of the lint extra")
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs]
    subprocess.run([*protoc, str(FOLDER / "router.proto")], cwd=ROOT, check=True)
    for name in ("router_pb2.py", "router_pb2.pyi", "router_pb2_grpc.py"):
        made, held = tmp_path / FOLDER / name, ROOT / FOLDER / name
        assert made.read_bytes() == held.read_bytes(), f"{name} is old: run `make stubs`"
