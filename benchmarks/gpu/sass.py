"""Analysis of the machine code of a kernel: its loops, their instructions and pipe cycles.

The second word of an instruction holds its scheduling by ptxas, from bit 41 on: cycles until the
next instruction, the barrier that its result sets, the barrier that is set when its operands are
read, and the barriers that it waits for. NVIDIA does not document this. The fields are those of
arXiv:1804.06826, section 2.1.
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
KINDS = {
    "tensor": "HMMA|HGMMA",
    "global": "LDG|LDGSTS|STG",
    "shared": "LDS|LDSM|STS|STSM|ATOMS",
    "shuffle": "SHFL|REDUX|VOTE",
    "integer": "LOP3|SHF|PRMT|LEA|IADD3|ISETP|SEL|VIADD|VIADDMNMX|VIMNMX|IMNMX|PLOP3|IABS|SGXT",
    "IMAD": "IMAD",
    "float": "FADD|FMUL|FFMA|FMNMX|FSEL|FSETP|HADD2|HMUL2|HFMA2|MUFU|D[A-Z]+",
    "convert": "F2F|F2FP|F2I|I2F|I2FP",
}
"""Opcodes by kind. IMAD also moves and shifts numbers. It runs on the pipe of FFMA."""
COMPARED = ("FMNMX", "FSEL", "FSETP")
"""Floating-point opcodes that run on the integer pipe."""
LATENCY = {"SHFL": 24, "LDS": 30, "LDSM": 33, "MUFU": 24, "REDUX": 24, "ATOMS": 60}
"""Cycles until an opcode without a fixed latency reaches its barrier.

Other such opcodes take 24 cycles. The latency of loads from memory is an argument of the caller.
"""


class Instruction(NamedTuple):
    """One instruction and its scheduling by ptxas."""

    opcode: str
    stall: int
    sets: int
    """Barrier that its result sets; 7 for none."""
    reads: int
    """Barrier that is set when its operands are read; 7 for none."""
    waits: int
    """Barriers that it waits for, one bit each."""

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def thread_bytes(self) -> int:
        """Bytes that one thread loads or stores."""
        if found := re.search(r"\.[US]?(8|16|64|128)\b", self.opcode):
            return int(found[1]) // 8
        return 4

    @property
    def kind(self) -> str:
        matching = (kind for kind, names in KINDS.items() if re.fullmatch(names, self.name))
        return next(matching, "other")

    @property
    def wavefronts(self) -> int:
        """Cycles of the shared memory of a multiprocessor, without bank conflicts."""
        if self.name.endswith("SM"):
            return int(self.opcode[-1]) if self.opcode[-1] in "24" else 1
        if self.name == "SHFL" or self.kind in {"shared", "global"}:
            return max(1, self.thread_bytes // 4)
        return 0


@dataclass(frozen=True)
class Code:
    """Consecutive instructions: the body of a loop, or a kernel."""

    instructions: tuple[Instruction, ...]

    def __len__(self) -> int:
        return len(self.instructions)

    @cached_property
    def mix(self) -> Counter[str]:
        """Number of instructions of each kind."""
        return Counter(one.kind for one in self.instructions)

    @cached_property
    def loads(self) -> Counter[int]:
        """Number of loads from global memory, by bytes per thread."""
        loads = (one for one in self.instructions if one.name in {"LDG", "LDGSTS"})
        return Counter(one.thread_bytes for one in loads)

    @cached_property
    def pipes(self) -> dict[str, int]:
        """Cycles that each pipe of a scheduler needs for one warp on compute capability 9.0.

        The numbers follow from the throughputs in the CUDA programming guide. A multiprocessor has
        64 integer results, 128 floating-point results, 16 exponentials and 32 shuffles per clock.
        mma.sync runs at half the rate of the tensor cores. The four schedulers share the shared
        memory.
        """
        mix = self.mix
        names = Counter(one.name for one in self.instructions)
        compared = sum(names[name] for name in COMPARED)
        rest = mix["float"] - compared - names["MUFU"]
        return {
            "issue": len(self),
            "integer": 2 * (mix["integer"] + compared + mix["convert"]),
            "float": max(2 * mix["IMAD"], mix["IMAD"] + rest),
            "exponential": 8 * names["MUFU"],
            "tensor": 8 * mix["tensor"],
            "shared": 4 * sum(one.wavefronts for one in self.instructions),
        }

    def alone(self, load_cycles: int = 0) -> int:
        """Cycles of a warp that runs alone.

        Args:
            load_cycles: latency of loads into registers. Data of other loads is assumed to have
                arrived.
        """
        time, ready = 0, [0] * 8
        for one in self.instructions:
            time = max([time, *(ready[i] for i in range(6) if one.waits >> i & 1)])
            latency = load_cycles if one.name == "LDG" else LATENCY.get(one.name, 24)
            ready[one.sets] = max(ready[one.sets], time + latency)
            ready[one.reads] = max(ready[one.reads], time + 24)
            time += max(1, one.stall)
        return time

    def interleaved(self, warps: int, rounds: int = 6) -> float:
        """Cycles per run of the code on a scheduler that shares its pipes among ``warps`` warps.

        Each warp runs the code ``rounds`` times. The warp that has waited longest is served first.
        Data of loads is assumed to have arrived.
        """
        lines = [self._line(one) for one in self.instructions]
        total = rounds * len(lines)
        at, free, served = [0] * warps, [0] * warps, list(range(warps))
        barriers = [[0] * 8 for _ in range(warps)]
        pipes: Counter[str] = Counter()
        time = 0
        while min(at) < total:
            for warp in sorted(range(warps), key=served.__getitem__):
                if at[warp] == total:
                    continue
                one, used, latency = lines[at[warp] % len(lines)]
                ready = max((barriers[warp][i] for i in range(6) if one.waits >> i & 1), default=0)
                if max(free[warp], ready, *(pipes[name] for name in used)) > time:
                    continue
                for name, cycles in used.items():
                    pipes[name] = time + cycles
                for barrier, reached in ((one.sets, latency), (one.reads, 24)):
                    barriers[warp][barrier] = max(barriers[warp][barrier], time + reached)
                at[warp], free[warp], served[warp] = at[warp] + 1, time + max(1, one.stall), time
                break
            time += 1
        return time / (warps * rounds)

    @staticmethod
    def _line(one: Instruction) -> tuple[Instruction, dict[str, int], int]:
        """An instruction, the cycles that it needs on each pipe, and its latency."""
        cycles = Code((one,)).pipes
        used = {name: count for name, count in cycles.items() if count and name != "issue"}
        return one, used, 0 if one.name == "LDG" else LATENCY.get(one.name, 24)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel."""

    code: Code
    loops: tuple[Code, ...]
    """Outermost loops, in the order of the code."""

    @property
    def matrix_loops(self) -> tuple[Code, ...]:
        """Loops that use tensor cores."""
        return tuple(loop for loop in self.loops if loop.mix["tensor"])


def parse(listing: str) -> Kernel:
    """Parse the output of ``nvdisasm -hex``."""
    labels: dict[str, int] = {}
    seen: list[Instruction] = []
    spans: list[tuple[int, int]] = []
    pattern = r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
    for line, following in pairwise(listing.splitlines()):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(seen)
        elif found := re.match(pattern, line):
            word = re.search(r"/\* 0x([0-9a-f]{16}) \*/\s*$", following)
            assert word is not None, f"no second word after {line!r}"
            bits = int(word[1], 16) >> 41
            fields = (bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)
            seen.append(Instruction(found[1], *fields))
            branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            # The last instruction of a kernel branches to itself.
            if branch and labels.get(branch[1], len(seen)) < len(seen) - 1:
                spans.append((labels[branch[1]], len(seen)))
    outermost = [
        (start, end)
        for start, end in sorted(set(spans))
        if not any(a <= start and end <= b for a, b in spans if (a, b) != (start, end))
    ]
    every = tuple(seen)
    return Kernel(Code(every), tuple(Code(every[start:end]) for start, end in outermost))


def disassemble(binary: Path) -> Kernel:
    """Disassemble a cubin and parse it."""
    return parse(run_tool("nvdisasm", "-hex", str(binary)))


def run_tool(name: str, *arguments: str) -> str:
    """Run one of the binary tools that are part of Triton, and return its output."""
    command = [TOOLS / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
