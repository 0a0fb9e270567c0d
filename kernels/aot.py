"""Compile every Triton kernel ahead of time, without a GPU, and check it against ``budgets.json``.

Budgets cover what a GPU does not report: registers that spill to memory (stack), shared memory, and
missing tensor-core instructions. Every version of Triton allocates registers differently, so the
file has budgets per version. A version without budgets is checked against the hard limits alone.
``--update`` writes the budgets of the installed version.

Usage: ``python -m bitlm_dist.kernels.aot [--arch 90] [--width 64] [--update]``. Exits with code 1
and one line per broken budget.
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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitlm_dist.kernels import triton_attention_kernels as attention
from bitlm_dist.kernels import triton_in_block as in_block
from bitlm_dist.kernels.tile_configs import HEAD_DIMS, SMALL_SHARED_MEMORY, lookup_tile_configs
from bitlm_dist.strict_json import to_json

BUDGET_FILE = Path(__file__).with_name("budgets.json")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

# by compute capability: bytes of shared memory per thread block, tensor-core instruction
ARCHITECTURES = {
    80: (163 * 1024, "HMMA"),
    SMALL_SHARED_MEMORY: (99 * 1024, "HMMA"),
    90: (227 * 1024, "HGMMA"),
    100: (227 * 1024, "UTCHMMA"),
}
POINTER_TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
FP32_ARGUMENTS = ("lse", "dlse", "delta")
INT32_ARGUMENTS = ("starts", "ends")
SIZE_ARGUMENTS = {*attention.SIZES, *in_block.SIZES}


@dataclass(frozen=True)
class KernelCase:
    """A kernel and everything that it is specialized for."""

    name: str
    kernel: Any
    architecture: int
    dtype: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        printed = {
            key: value
            for key, value in self.constants.items()
            if value is not False and key not in ("padded", "tile")
        }
        words = [key if value is True else f"{key}={value}" for key, value in printed.items()]

        # also the key of the kernel in the budget file
        return (
            f"sm_{self.architecture} {self.dtype} {self.name} {' '.join(words)} "
            f"warps={self.num_warps} stages={self.num_stages}"
        )


@dataclass(frozen=True)
class Usage:
    """Resources of a compiled kernel."""

    registers: int  # per thread
    stack: int  # bytes per thread
    shared: int  # bytes of shared memory per thread block
    tensor: int  # number of tensor-core instructions


def attention_cases(architecture: int, head_dim: int, dtype: str = "bf16") -> Iterator[KernelCase]:
    """Yield the three attention kernels, with and without documents."""
    table = lookup_tile_configs(architecture, head_dim, dtype == "fp32")
    kernels = {
        "forward": attention.forward_kernel,
        "dq": attention.dq_kernel,
        "dkv": attention.dkv_kernel,
    }

    for name, kernel in kernels.items():
        tile = getattr(table, name)
        for documents in (False, True):
            constants = {
                "width": head_dim,
                "tile_queries": tile.num_queries,
                "tile_keys": tile.num_keys,
                "documents": documents,
            }
            yield KernelCase(
                name, kernel, architecture, dtype, constants, tile.num_warps, tile.num_stages
            )


def in_block_cases(architecture: int, head_dim: int, dtype: str = "bf16") -> Iterator[KernelCase]:
    """Yield the two kernels of in-block attention, with blocks of four tokens."""
    kernels = {
        "in-block forward": in_block.forward_kernel,
        "in-block backward": in_block.backward_kernel,
    }

    for name, kernel in kernels.items():
        constants = {
            "width": head_dim,
            "block": 4,
            "causal": False,
            "padded": head_dim,
            "tile": in_block.TILE_ROWS,
        }
        yield KernelCase(name, kernel, architecture, dtype, constants, in_block.NUM_WARPS, 1)


def cases(architecture: int, head_dim: int) -> Iterator[KernelCase]:
    """Yield all kernels of an architecture and head dimension."""
    yield from attention_cases(architecture, head_dim)
    yield from in_block_cases(architecture, head_dim)


def _signature_type(name: str, case: KernelCase) -> str:
    # without documents, their pointers are the constant None
    if name in INT32_ARGUMENTS:
        return "*i32" if case.constants["documents"] else "constexpr"
    if name in FP32_ARGUMENTS:
        return "*fp32"
    if name == "scale":
        return "fp32"
    if name.startswith("stride") or name in SIZE_ARGUMENTS:
        return "i32"
    return POINTER_TYPES[case.dtype]


def compile_kernel(case: KernelCase) -> Any:
    """Compile a kernel for its architecture.

    As in training, pointers are aligned to 16 bytes, and strides are multiples of 16 elements.
    """
    names = case.kernel.arg_names
    signature = {
        name: "constexpr" if name in case.constants else _signature_type(name, case)
        for name in names
    }
    constants = {name: case.constants.get(name) for name in names if signature[name] == "constexpr"}

    aligned = [
        i
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name.startswith("stride")
    ]
    source = ASTSource(
        case.kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}
    )

    target = GPUTarget("cuda", case.architecture, 32)  # 32 threads per warp
    return triton.compile(
        source, target=target, options={"num_warps": case.num_warps, "num_stages": case.num_stages}
    )


def measure_usage(case: KernelCase) -> Usage:
    """Compile a kernel and read its resources from the binary."""
    kernel = compile_kernel(case)

    # NVIDIA's tools read files only
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)

    registers, stack = (
        int(re.search(rf"{key}:(\d+)", resources).group(1))  # type: ignore[union-attr]
        for key in ("REG", "STACK")
    )
    tensor = len(re.findall(rf"\b{ARCHITECTURES[case.architecture][1]}\b", code))
    return Usage(registers, stack, kernel.metadata.shared, tensor)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / tool, *arguments], check=True, capture_output=True, text=True
    ).stdout


def violations(case: KernelCase, used: Usage, budget: dict[str, int] | None) -> list[str]:
    """List violations of the hard limits, and of the budget if there is one, one line each."""
    limit, instruction = ARCHITECTURES[case.architecture]
    lines = []

    if used.stack:
        lines.append(f"{case}: {used.stack} bytes of stack: registers spill")
    if used.shared > limit:
        lines.append(f"{case}: {used.shared} bytes of shared memory, the architecture has {limit}")
    if not used.tensor and case.dtype != "fp32":
        lines.append(f"{case}: no {instruction}: the products do not run on tensor cores")

    for key, allowed in (budget or {}).items():
        if key in ("registers", "shared") and getattr(used, key) > allowed:
            lines.append(f"{case}: {key} {getattr(used, key)}, budget {allowed}")

    return lines


def check_budgets(
    chosen: list[KernelCase], budgets: dict[str, dict[str, int]]
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Compile all cases, print their table, and compare them with the budgets.

    Args:
        chosen: cases to compile.
        budgets: resources by name of the case. If empty, only the hard limits are checked.

    Returns:
        used: resources by name of the case.
        broken: one line per violation.
    """
    print(f"{'registers':>9} {'stack':>5} {'shared':>7} {'tensor':>6}  kernel")
    all_used = {}
    broken = []

    for case in chosen:
        used = measure_usage(case)
        print(
            f"{used.registers:9} {used.stack:5} {used.shared:7} {used.tensor:6}  {case}", flush=True
        )

        if budgets and str(case) not in budgets:
            broken.append(f"{case}: no budget: add it with --update")
        broken += violations(case, used, budgets.get(str(case)))
        all_used[str(case)] = asdict(used)

    return all_used, broken


def write_budgets(budgets: dict[str, dict[str, dict[str, int]]], file: Path) -> None:
    """Write budgets as JSON with one line per kernel, so that a diff shows which ones changed."""
    versions = []
    for version, kernels in sorted(budgets.items()):
        lines = ",\n".join(
            f"    {to_json(name)}: {to_json(used)}" for name, used in sorted(kernels.items())
        )
        versions.append(f"  {to_json(version)}: {{\n{lines}\n  }}")

    file.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 1 if a budget is broken, else 0."""
    options = _parse_arguments(arguments)
    budgets = json.loads(options.budgets.read_text()) if options.budgets.exists() else {}
    version_budgets = budgets.get(triton.__version__, {})
    if not version_budgets and not options.update:
        print(
            f"no budgets for Triton {triton.__version__}, only for {[*budgets]}: "
            "checking hard limits alone"
        )

    chosen = [
        case
        for architecture in options.arch
        for width in options.width
        for case in cases(architecture, width)
    ]
    used, broken = check_budgets(chosen, {} if options.update else version_budgets)

    if options.update:
        # a complete update also drops entries of kernels that no longer exist
        complete = set(options.arch) == set(ARCHITECTURES)
        budgets[triton.__version__] = used if complete else version_budgets | used
        write_budgets(budgets, options.budgets)

    for line in broken:
        print(line, file=sys.stderr)
    return int(bool(broken))


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bitlm_dist.kernels.aot", description=(__doc__ or "").split("\n")[0]
    )

    # which kernels to compile
    parser.add_argument(
        "--arch", type=int, nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES)
    )
    parser.add_argument(
        "--width",
        type=int,
        nargs="*",
        default=[64, 128],
        choices=list(HEAD_DIMS),
        help="head dimensions",
    )

    parser.add_argument("--budgets", type=Path, default=BUDGET_FILE, help="file to compare with")
    parser.add_argument(
        "--update",
        action="store_true",
        help="write the measured resources as the budgets of the installed Triton version",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
