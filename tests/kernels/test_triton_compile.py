"""The Triton kernels compile for GPUs that this machine does not have."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.gpu import roofline, sass
from benchmarks.gpu.compile import Needs
from mikv_vllm.tiers.plan import TierSizes

ROOT = Path(__file__).parents[2]
LISTING = """
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;       /* 0x0000000000000001 */
                                                                      /* 0x000ea80000000000 */
.L_x_0:
        /*0010*/                   LDGSTS.E.64 [R3], desc[UR4][R4.64] ; /* 0x0000000000000002 */
                                                                      /* 0x000fe80000000000 */
        /*0020*/              @!P0 LOP3.LUT R5, R5, 0xf, RZ, 0xc0, !PT ; /* 0x0000000000000003 */
                                                                      /* 0x004fe400078ec0ff */
        /*0030*/                   HMMA.16816.F32 R8, R8, R12, R8 ;   /* 0x0000000000000004 */
                                                                      /* 0x000fec0000001808 */
        /*0040*/              @!P0 BRA `(.L_x_0) ;                    /* 0x0000000000000005 */
                                                                      /* 0x000fea000383ffff */
        /*0050*/                   EXIT ;                             /* 0x0000000000000006 */
                                                                      /* 0x000fea0003800000 */
.L_x_1:
        /*0060*/                   BRA `(.L_x_1) ;                    /* 0x0000000000000007 */
                                                                      /* 0x000fc0000383ffff */
"""
"""Output of ``nvdisasm -hex``: a loop that waits for a load."""


def test_a_loop_is_read_with_its_mix_and_its_stalls():
    kernel = sass.parse(LISTING)
    (loop,) = kernel.loops
    assert (len(kernel.code), len(loop)) == (7, 4)
    assert loop.mix == {"global": 1, "integer": 1, "tensor": 1, "other": 1}
    assert loop.loads == {8: 1}
    assert [one.stall for one in loop.instructions] == [4, 2, 6, 5]
    assert loop.pipes["integer"] == 2
    assert loop.alone() == 17
    # Two warps fill each other's stalls, but share the pipes.
    assert loop.alone() / 2 <= loop.interleaved(2) < loop.alone()
    assert kernel.code.alone(1000) > 1000


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(228, 17080, 1, 8), (200, 17080, 1, 10), (32, 0, 4, 16), (32, 100_000, 1, 2), (16, 0, 1, 32)],
)
def test_programs_at_once(registers, shared, warps, programs):
    needs = Needs(registers, 0, shared, warps, sass.parse(LISTING))
    assert roofline.programs_at_once(needs) == programs


def test_splits_cover_all_blocks():
    for records, high in ((98, 29632), (995, 928), (0, 700), (1, 64), (125, 96)):
        sizes = roofline.split_sizes(TierSizes(1, high, records, 0), 8)
        for tier, count in (("low", records), ("high", -(-high // 32))):
            assert sum(size for name, size in sizes if name == tier) == count


def test_kernels_compile_and_attention_spills_nothing():
    command = [sys.executable, "-m", "benchmarks.gpu.compile", "--quick"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    resources, _, _ = result.stdout.partition("\n\n")
    lines = [re.split(r"\s{2,}", line) for line in resources.splitlines()[1:]]
    compiled = {(line[0].split()[0], line[1]) for line in lines}
    kernels = {kernel for kernel, _ in compiled}
    assert len(kernels) == 16
    assert compiled == {(k, t) for k in kernels for t in ("sm_80", "sm_90", "sm_100")}


def test_a_launch_uses_the_same_binary_as_tritons_launch():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.launches"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
