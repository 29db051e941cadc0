"""Every Triton kernel compiles for sm_90, on a machine without a GPU, and hardly spills.

Interpreting and compiling cannot share a process: skipped when TRITON_INTERPRET is set.
"""

import os
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so it needs a process without TRITON_INTERPRET", allow_module_level=True)

from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from moe_router_kernels import (  # noqa: E402
    attention_kernels,
    block_attention,
    block_choice,
    few_rows,
    fused_gate,
    grouped,
    permute,
    planning,
    row_tiles,
    tiles,
    top_c,
)

BIN = Path(nvidia.__file__).parent / "bin"
INTS, FLOATS = "*i32", "*fp32"
TYPES = dict.fromkeys(
    ["logits_ptr", "bias_ptr", "weight_ptr", "share_ptr", "shares_ptr", "z_ptr", "zs_ptr"], FLOATS
)
TYPES |= dict.fromkeys(
    ["grad_weight_ptr", "grad_share_ptr", "grad_z_ptr", "grad_logits_ptr", "dot_ptr"], FLOATS
)
TYPES |= dict.fromkeys(["raw_ptr", "target_ptr", "rank_ptr", "load_ptr", "before_ptr"], INTS)
TYPES |= dict.fromkeys(["total_ptr", "src_ptr", "choice_ptr", "offsets_ptr", "row_ptr"], INTS)
TYPES |= dict.fromkeys(["order_ptr", "kept_ptr"], INTS)
TYPES |= dict.fromkeys(["x_ptr", "rows_ptr", "y_ptr", "out_ptr", "grad_ptr"], "*bf16")
TYPES |= dict.fromkeys(["T", "G", "E", "R", "D", "blocks", "capacity", "stride_x"], "i32")


def machine_code(kernel, types, constants, tmp_path, aligned=(), **options):
    """SASS of sm_90; `aligned` are arguments that 16 divides."""
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    at = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, at, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    sass = subprocess.run([BIN / "nvdisasm", "-c", cubin], capture_output=True, text=True)
    assert sass.returncode == 0 and "EXIT" in sass.stdout, sass.stderr
    return sass.stdout


def spills(sass):
    return sass.count("LDL") + sass.count("STL")


def spilled(kernel, constants, tmp_path, types=TYPES):
    """Spill instructions in the machine code."""
    return spills(machine_code(kernel, types, constants, tmp_path))


@pytest.mark.parametrize(
    "groups, k, block, warps", [(8, 2, 32, 2), (128, 8, 8, 4), (128, 8, 8, 2), (256, 8, 8, 4)]
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_gate(groups, k, block, warps, biased, given, tmp_path):
    constants = {"K": k, "K_PAD": k, "G_PAD": groups, "BLOCK_T": block}
    constants |= {"SOFTMAX": not biased, "BIASED": biased, "RENORMALISE": True}
    constants |= {"GROUPS": 4 if biased else 1, "TOP_GROUPS": 2, "GIVEN": given, "SUMS": biased}
    constants["ALONE"] = not given
    kernel = fused_gate._gate_kernel
    aligned = [n for n in kernel.arg_names if n.endswith("_ptr")] + ["G"]
    sass = machine_code(kernel, TYPES, constants, tmp_path, aligned, num_warps=warps)
    assert spills(sass) == 0
    if groups >= 128 and not given:  # a warp holds a token: a choice is two instructions
        assert sass.count("REDUX") >= 2 * k


@pytest.mark.parametrize(
    "groups, k, block, warps", [(8, 2, 32, 2), (128, 8, 8, 2), (512, 16, 4, 4)]
)
@pytest.mark.parametrize("softmax", [False, True])
def test_gate_backward(groups, k, block, warps, softmax, tmp_path):
    constants = {"K": k, "K_PAD": k, "G_PAD": groups, "BLOCK_T": block}
    constants |= {"SOFTMAX": softmax, "RENORMALISE": True, "SUMS": True}
    kernel = fused_gate._gate_backward_kernel
    assert spills(machine_code(kernel, TYPES, constants, tmp_path, num_warps=warps)) == 0


@pytest.mark.parametrize("groups, k", [(8, 2), (128, 8)])
def test_place(groups, k, tmp_path):
    constants = {"K": k, "E_PAD": groups, "PER_BLOCK": 16 * k, "BLOCK_R": planning.PLACED}
    assert spilled(planning._place_kernel, constants, tmp_path) == 0


@pytest.mark.parametrize("groups, blocks, per", [(8, 64, 16), (128, 64, 64), (512, 16, 64)])
@pytest.mark.parametrize("sums", [False, True])
def test_scan_and_place(groups, blocks, per, sums, tmp_path):
    constants = {"K": 8, "G_PAD": groups, "N_PAD": blocks, "PER_BLOCK": per, "BLOCK_R": per}
    options = {"num_warps": 8}
    kernel = planning._scan_and_place_kernel
    assert spills(machine_code(kernel, TYPES, constants | {"SUMS": sums}, tmp_path, **options)) == 0


@pytest.mark.parametrize("groups, block", [(8, 256), (128, 64), (512, 16)])
@pytest.mark.parametrize("ordered", [False, True])
def test_rank(groups, block, ordered, tmp_path):
    constants = {"BLOCK": block, "G_PAD": groups, "ORDERED": ordered}
    assert spilled(planning._rank_kernel, constants, tmp_path) == 0


@pytest.mark.parametrize("choices, groups", [(2048, 8), (128, 128), (16, 1024)])
def test_few(choices, groups, tmp_path):
    constants = {"K": 8, "BLOCK": choices, "G_PAD": groups}
    code = machine_code(planning._few_kernel, TYPES, constants, tmp_path, num_warps=8)
    assert spills(code) == 0


def test_scan(tmp_path):
    constants = {"BLOCK_N": 2048, "SUMS": True}
    assert spilled(planning._scan_kernel, constants, tmp_path) == 0


def test_drop(tmp_path):
    constants = {"PER_BLOCK": 64, "BLOCK": 1024}
    assert spilled(planning._drop_kernel, constants, tmp_path) == 0


@pytest.mark.parametrize("block", [64, 4096])
def test_select(block, tmp_path):
    types = TYPES | {"score_ptr": FLOATS, "count_ptr": INTS, "taken_ptr": "*i8"}
    constants = {"BLOCK": block}
    assert spilled(top_c._select_kernel, constants, tmp_path, types) == 0


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("planned", [True, False])
def test_rows_that_share_no_expert(planned, aligned, tmp_path):
    types = TYPES | {"act_ptr": "*bf16", "w_ptr": "*bf16", "F": "i32", "K": "i32"}
    types["ids_ptr"] = "*i64"
    pads = {"G_PAD": 128, "ROWS": tiles.Few().rows, "PLANNED": planned}
    wide = ["x_ptr", "w_ptr", "act_ptr", "F", "D"] if aligned else []
    for kernel, constants in (
        (few_rows._up_kernel, pads | {"BLOCK_D": 1024}),
        (few_rows._down_kernel, pads | {"BLOCK_F": 1024, "K": 8}),
    ):
        at = [name for name in wide if name in kernel.arg_names]
        sass = machine_code(kernel, types, constants, tmp_path, at, num_warps=tiles.Few().warps)
        assert spills(sass) == 0
        assert ("LDG.E.128" in sass) == aligned


def test_move(tmp_path):
    constants = {"K": 8, "BLOCK_T": 8, "BLOCK_D": 256}
    assert spilled(permute._move_kernel, constants, tmp_path) == 0


def test_combine(tmp_path):
    constants = {"K": 8, "WEIGHTED": True, "BLOCK_T": 1, "BLOCK_D": 1024}
    assert spilled(permute._combine_kernel, constants, tmp_path) == 0


def test_combine_backward(tmp_path):
    constants = {"BLOCK_R": 1, "BLOCK_D": 1024}
    assert spilled(permute._combine_backward_kernel, constants, tmp_path) == 0


HALF = "*bf16"
GEMM = dict.fromkeys(["a_ptr", "b_ptr", "w_ptr", "out_ptr", "act_ptr", "pre_ptr"], HALF)
GEMM |= dict.fromkeys(["src_ptr", "offsets_ptr", "group_ptr", "row_ptr", "used_ptr"], INTS)
GEMM |= dict.fromkeys(["weight_ptr", "dot_ptr"], FLOATS)
GEMM |= dict.fromkeys(["G", "R", "K", "M", "N", "tiles", "stride_a", "stride_b"], "i32")
PLAIN = {"used_ptr", "G", "tiles"}  # 16 need not divide these
LARGE = tiles.Problem(1 << 18, 128, 1024, False, 128, None)


def gemm(kernel, name, tmp_path, problem=LARGE, **constants):
    tile = tiles.pick(name, problem)
    constants |= {"PROGRAMS": 132, "PRECISION": "tf32", "GROUP_M": tile.band}
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    aligned = [n for n in kernel.arg_names if n not in constants and n not in PLAIN]
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return machine_code(kernel, GEMM, constants, tmp_path, aligned, **options)


@pytest.mark.parametrize(
    "name, gather, backward, epilogue",
    [
        ("up", True, False, "swiglu"),
        ("down", False, False, "none"),
        ("down_backward", True, True, "swiglu_backward"),
        ("up_backward", False, True, "none"),
    ],
)
def test_rows_times_groups(name, gather, backward, epilogue, tmp_path):
    flags = {"GATHER": gather, "BACKWARD": backward, "EPILOGUE": epilogue, "KEEP": True}
    flatten = tiles.pick(name, LARGE).flatten
    sass = gemm(grouped._rows_kernel, name, tmp_path, FLATTEN=flatten, **flags)
    assert spills(sass) <= 16
    # warpgroup matrix products, the copy engine for weights, asynchronous copies for the gather
    assert "HGMMA" in sass and "UTMALDG" in sass and ("LDGSTS" in sass) == gather


@pytest.mark.parametrize(
    "name, gather, epilogue", [("up", True, "swiglu"), ("down", False, "none")]
)
def test_few_rows(name, gather, epilogue, tmp_path):
    flags = {"GATHER": gather, "BACKWARD": False, "EPILOGUE": epilogue, "FLATTEN": False}
    flags["KEEP"] = False
    few = tiles.Problem(8, 128, 768, False, 16, None)
    sass = gemm(grouped._rows_kernel, name, tmp_path, few, **flags)
    assert spills(sass) == 0 and "HMMA" in sass and "UTMALDG" in sass


@pytest.mark.parametrize("name, transposed", [("gate_up_weights", True), ("down_weights", False)])
def test_group_weights(name, transposed, tmp_path):
    flags = {"GATHER_A": True, "TRANSPOSED": transposed}
    sass = gemm(grouped._weights_kernel, name, tmp_path, **flags)
    assert spills(sass) == 0 and "HGMMA" in sass and "UTMALDG" in sass and "LDGSTS" in sass


ATTEND = dict.fromkeys(["q_ptr", "k_ptr", "v_ptr", "out_ptr", "grad_ptr", "grad_q_ptr"], HALF)
ATTEND |= dict.fromkeys(["grad_k_ptr", "grad_v_ptr"], HALF)
ATTEND |= dict.fromkeys(["lse_ptr", "dot_ptr", "grad_lse_ptr", "gate_ptr", "grad_gate_ptr"], FLOATS)
ATTEND |= dict.fromkeys(["first_ptr", "last_ptr", "target_ptr", "count_ptr"], INTS)
ATTEND |= dict.fromkeys(["block_ptr", "offsets_ptr"], INTS) | {"scale": "fp32"}
ATTEND |= dict.fromkeys(["T", "H", "J", "K"], "i32")
CUTS = [(kernel, name, 128) for kernel in block_attention.TILES for name in ("wide", "narrow")]
CUTS += [(kernel, "middle", 64) for kernel in block_attention.TILES]


@pytest.mark.parametrize("name, tiles, channels", CUTS)
def test_attend_blocks(name, tiles, channels, tmp_path):
    kernel, tile = getattr(attention_kernels, f"_{name}_kernel"), block_attention.TILES[name][tiles]
    constants = {"D": channels, "BLOCK": 64, "CAUSAL": True, "GATED": False, "PRECISION": "tf32"}
    heads = {"GROUP": 4} if name == "keys" else {"HEADS": tile.heads(4, 64, channels)}
    pointers = [n for n in kernel.arg_names if n.endswith("_ptr")]
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    sass = machine_code(kernel, ATTEND, constants | heads, tmp_path, pointers, **options)
    # registers are full where a tile is large; what matters is the loop that the copy engine feeds
    loops = [part for part in sass.split("\n.L_x_") if "HGMMA" in part and "UTMALDG" in part]
    assert loops and max(map(spills, loops)) <= 16 and spills(sass) <= 400


@pytest.mark.parametrize("padded, warps", [(64, 1), (1024, 4), (8192, 8)])
def test_choose_blocks(padded, warps, tmp_path):
    kernel = block_choice._choose_kernel
    types = {n: INTS if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
    types["score_ptr"], constants = FLOATS, {"N_PAD": padded, "CAUSAL": False, "COUNT": True}
    sass = machine_code(kernel, types, constants, tmp_path, num_warps=warps)
    assert spills(sass) == 0


def test_summaries(tmp_path):
    kernel = block_choice._summaries_kernel
    types = dict.fromkeys(["q_ptr", "k_ptr"], HALF) | dict.fromkeys(["first_ptr", "last_ptr"], INTS)
    types |= dict.fromkeys(["query_ptr", "key_ptr"], FLOATS)
    constants = {"D": 128, "D_PAD": 128, "BLOCK": 64, "GROUP": 4, "GROUP_PAD": 4, "CAUSAL": True}
    plain, pointers = {"N": "i32", "J": "i32", "scale": "fp32"}, [*types]
    sass = machine_code(kernel, types | plain, constants, tmp_path, pointers)
    assert spills(sass) == 0


def test_block_means(tmp_path):
    types = dict.fromkeys(["first_ptr", "last_ptr"], INTS) | {"x_ptr": HALF, "mean_ptr": FLOATS}
    constants = {"D": 128, "D_PAD": 128, "BLOCK": 64, "GROUP": 4}
    kernel, pointers = block_choice._means_kernel, [*types]
    sass = machine_code(kernel, types | {"J": "i32"}, constants, tmp_path, pointers)
    assert spills(sass) == 0


def test_tile_table(tmp_path):
    types = dict.fromkeys(("offsets_ptr", "group_ptr", "row_ptr", "used_ptr"), INTS)
    types |= {"G": "i32", "bound": "i32"}
    constants = {"BLOCK_M": 128, "G_PAD": 512, "BLOCK_N": 64}
    # a table of 512 groups is wider than the registers; it is read once a Plan
    assert spilled(row_tiles._tile_table_kernel, constants, tmp_path, types) <= 1024
