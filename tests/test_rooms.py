"""What the import linter cannot see: parts of torch, and what importing the library costs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("moe_router", "kernels/moe_router_kernels", "cluster/moe_router_cluster")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
COLLECTIVES = ("moe_router/dispatch/", "moe_router/training/", "cluster/moe_router_cluster/")


def mentions(tree, name):
    """Lines that import `name`, or anything below it, or reach it through its parent."""
    parent, _, last = name.rpartition(".")
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = any((a.name + ".").startswith(name + ".") for a in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found = (module + ".").startswith(name + ".")
                found = found or (module == parent and any(a.name == last for a in names))
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id=top), attr=part), attr=used):
                # asking what a build can do moves no token
                asks = used.startswith("is_") and used.endswith("available")
                found = (top, part) == (parent, last) and not asks
            case _:
                continue
        if found:
            yield node.lineno


def test_collectives_have_their_rooms():
    strays = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        if not str(path.relative_to(ROOT)).startswith(COLLECTIVES)
        for line in mentions(ast.parse(path.read_text()), "torch.distributed")
    ]
    assert strays == []


def test_the_check_sees_every_way_in():
    ways = """
import torch.distributed
import torch.distributed.tensor as dt
from torch.distributed import all_reduce
from torch.distributed.tensor import DTensor
from torch import distributed as dist
torch.distributed.all_reduce(x)
torch.distributed.is_nccl_available()
import torch.nn
"""
    assert sorted(mentions(ast.parse(ways), "torch.distributed")) == [2, 3, 4, 5, 6, 7]


def test_nothing_is_unpickled():
    """No pickle, and no torch.load, which unpickles."""
    strays = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        for name in ("pickle", "cloudpickle", "marshal", "shelve", "torch.load")
        for line in mentions(ast.parse(path.read_text()), name)
    ]
    assert strays == []


def test_torch_alone_without_its_compiler_is_enough_to_import_the_library():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        rooms = ("ray", "typer", "rich", "yaml", "matplotlib", "tensorboard", "tokenizers", "grpc")
        if name.partition(".")[0] in rooms:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import moe_router
compiler = {"torch._dynamo", "sympy"} & sys.modules.keys()  # a second of every process
print(moe_router.MoE.__name__, *compiler)
"""
    roots = os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": roots},
    )
    assert done.stdout == "MoE\n", done.stderr
