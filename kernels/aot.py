"""Compiles every Triton kernel ahead of time, without a GPU, and holds it against ``budgets.json``.

What a GPU would not say aloud: registers that spill to memory (stack), shared memory, tensor-core instructions that are missing.
Every version of Triton spills differently, so the file holds budgets by version; one that it does not name is held against the
hard limits alone. ``--update`` writes those of the version at hand.

Usage: ``python -m bitlm_dist.kernels.aot [--arch 90] [--width 64] [--update]``. Exit code 1 and a line for each broken budget.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from bitlm_dist.kernels import triton_attention_kernels as attention
from bitlm_dist.kernels import triton_in_block as in_block
from bitlm_dist.kernels.tiles import SMALL, WIDTHS, tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitlm_dist.files import to_json

BUDGETS = Path(__file__).with_name("budgets.json")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Compute capability -> bytes of shared memory a block may have, the tensor-core instruction.
ARCHITECTURES = {
    80: (163 * 1024, "HMMA"),
    SMALL: (99 * 1024, "HMMA"),
    90: (227 * 1024, "HGMMA"),
    100: (227 * 1024, "UTCHMMA"),
}
NUMBERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
BIT_32 = ("lse", "dlse", "delta")
INTEGERS = ("starts", "ends")
SIZES = {*attention.SIZES, *in_block.SIZES}


@dataclass(frozen=True)
class Case:
    """A kernel with all that it is specialized for."""

    name: str
    kernel: Any
    architecture: int
    dtype: str
    constants: dict[str, Any]
    warps: int
    stages: int

    def __str__(self) -> str:
        shown = {key: value for key, value in self.constants.items() if value is not False and key not in ("padded", "tile")}
        words = [key if value is True else f"{key}={value}" for key, value in shown.items()]
        return f"sm_{self.architecture} {self.dtype} {self.name} {' '.join(words)} warps={self.warps} stages={self.stages}"


@dataclass(frozen=True)
class Usage:
    """What a kernel needs: registers and bytes of stack a thread, bytes of shared memory; its tensor-core instructions."""

    registers: int
    stack: int
    shared: int
    tensor: int


def attention_cases(architecture: int, width: int, dtype: str = "bf16") -> Iterator[Case]:
    """The three attention kernels, with and without documents."""
    table = tiles(architecture, width, dtype == "fp32")
    kernels = {"forward": attention.forward_kernel, "dq": attention.dq_kernel, "dkv": attention.dkv_kernel}
    for name, kernel in kernels.items():
        tile = getattr(table, name)
        for documents in (False, True):
            constants = {"width": width, "tile_queries": tile.queries, "tile_keys": tile.keys, "documents": documents}
            yield Case(name, kernel, architecture, dtype, constants, tile.warps, tile.stages)


def in_block_cases(architecture: int, width: int, dtype: str = "bf16") -> Iterator[Case]:
    """The two kernels of attention inside a block, with blocks of four tokens."""
    kernels = {"in-block forward": in_block.forward_kernel, "in-block backward": in_block.backward_kernel}
    for name, kernel in kernels.items():
        constants = {"width": width, "block": 4, "causal": False, "padded": width, "tile": in_block.ROWS}
        yield Case(name, kernel, architecture, dtype, constants, in_block.WARPS, 1)


def cases(architecture: int, width: int) -> Iterator[Case]:
    """All of an architecture and width of a head."""
    yield from attention_cases(architecture, width)
    yield from in_block_cases(architecture, width)


def _type(name: str, case: Case) -> str:
    if name in INTEGERS:
        return "*i32" if case.constants["documents"] else "constexpr"
    if name in BIT_32:
        return "*fp32"
    if name == "scale":
        return "fp32"
    if name.startswith("stride") or name in SIZES:
        return "i32"
    return NUMBERS[case.dtype]


def compiled(case: Case) -> Any:
    """Triton's compiled kernel: tensors aligned to 16 bytes and strides to 16 numbers, as they are in training."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else _type(name, case) for name in names}
    constants = {name: case.constants.get(name) for name in names if signature[name] == "constexpr"}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name.startswith("stride")]
    source = ASTSource(case.kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    target = GPUTarget("cuda", case.architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": case.warps, "num_stages": case.stages})


def usage(case: Case) -> Usage:
    """Compile and read the binary."""
    kernel = compiled(case)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", resources).group(1)) for key in ("REG", "STACK"))  # type: ignore[union-attr]
    tensor = len(re.findall(rf"\b{ARCHITECTURES[case.architecture][1]}\b", code))
    return Usage(registers, stack, kernel.metadata.shared, tensor)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def violations(case: Case, used: Usage, budget: dict[str, int] | None) -> list[str]:
    """Lines that say what is over the hard limits, and over the budget if there is one."""
    limit, instruction = ARCHITECTURES[case.architecture]
    found = []
    if used.stack:
        found.append(f"{case}: {used.stack} bytes of stack: registers spill")
    if used.shared > limit:
        found.append(f"{case}: {used.shared} bytes of shared memory, the architecture has {limit}")
    if not used.tensor and case.dtype != "fp32":
        found.append(f"{case}: no {instruction}: the products do not run on tensor cores")
    for key, most in (budget or {}).items():
        if key in ("registers", "shared") and getattr(used, key) > most:
            found.append(f"{case}: {key} {getattr(used, key)}, budget {most}")
    return found


def check(chosen: list[Case], budgets: dict[str, dict[str, int]]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Print the table of all cases -> what each uses, and the lines of broken budgets. No budgets at all: hard limits alone."""
    print(f"{'registers':>9} {'stack':>5} {'shared':>7} {'tensor':>6}  kernel")
    all_used, broken = {}, []
    for case in chosen:
        used = usage(case)
        print(f"{used.registers:9} {used.stack:5} {used.shared:7} {used.tensor:6}  {case}", flush=True)
        if budgets and str(case) not in budgets:
            broken.append(f"{case}: no budget: add it with --update")
        broken += violations(case, used, budgets.get(str(case)))
        all_used[str(case)] = asdict(used)
    return all_used, broken


def write(budgets: dict[str, dict[str, dict[str, int]]], file: Path) -> None:
    """JSON with a line a kernel, so that a change shows as one."""
    versions = []
    for version, kernels in sorted(budgets.items()):
        lines = ",\n".join(f"    {to_json(name)}: {to_json(used)}" for name, used in sorted(kernels.items()))
        versions.append(f"  {to_json(version)}: {{\n{lines}\n  }}")
    file.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a budget is broken."""
    parser = argparse.ArgumentParser(prog="python -m bitlm_dist.kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--width", type=int, nargs="*", default=[64, 128], choices=list(WIDTHS), help="of a head")
    parser.add_argument("--budgets", type=Path, default=BUDGETS, help="file to compare with")
    parser.add_argument("--update", action="store_true", help="write what is used now as the budgets of this version of Triton")
    options = parser.parse_args(arguments)
    budgets = json.loads(options.budgets.read_text()) if options.budgets.exists() else {}
    mine = budgets.get(triton.__version__, {})
    if not mine and not options.update:
        print(f"no budgets for Triton {triton.__version__}, only for {[*budgets]}: hard limits are checked")
    chosen = [case for architecture in options.arch for width in options.width for case in cases(architecture, width)]
    used, broken = check(chosen, {} if options.update else mine)
    if options.update:
        complete = set(options.arch) == set(ARCHITECTURES)
        budgets[triton.__version__] = used if complete else mine | used  # of all: entries of kernels that are gone go too
        write(budgets, options.budgets)
    for line in broken:
        print(line, file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
