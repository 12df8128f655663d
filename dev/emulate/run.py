#!/usr/bin/env python3
"""Runs kernels of the gated delta rule on the CPU, thread by thread, and holds them to the CPU's layer in double.

    python3 dev/emulate/run.py

It compiles gdn/kernels/delta_rule_*.cuh with g++ and cuda_emulator.h; functions that are assembly are replaced by the
emulator's. What it checks: prepare_kernel and the passes on mma.sync and on wgmma, these with one and with two warpgroups,
gradients_kernel, and the passes over pieces of a sequence. So a wrong index or equation is found on a machine without a
GPU; and most missing waits and barriers, for there are two runs whose bits must be the same: in one copies and products
are done at once and one warp runs ahead of all others as far as barriers let it, in the other they are done as late as a
wait allows and chance picks who moves. Three minutes.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "gdn" / "kernels"

# Function -> its body here. The first match of "inline ... NAME(" in the file is meant.
MMA = {
    "shared_address": "return emulator::address_of(p);",
    "ldmatrix": "emulator::ldmatrix(r, address, false);",
    "ldmatrix_transposed": "emulator::ldmatrix(r, address, true);",
    "mma_bf16": "emulator::mma(c, a, b0, b1, false);",
    "mma_fp16": "emulator::mma(c, a, b0, b1, true);",
    "transpose_8x8": "return emulator::transpose_8x8(x);",
    "cp_async_16": "emulator::copy(to, from, 16, valid);",
    "st_global_v4": "const uint32_t words[4] = {x, y, z, w}; std::memcpy(to, words, 16);",
    "cp_async_4": "emulator::copy(to, from, 4, true);",
    "cp_async_commit": "emulator::copies().close();",
    "cp_async_wait_all": "emulator::cp_async_wait_all();",
    "cp_async_wait_all_but_one": "emulator::copies().do_all_but(1);",
    "fast_exp2": "return std::exp2(x);",
    "named_barrier_sync": "emulator::wait(emulator::meeting(id, threads));",
    "named_barrier_any": "return emulator::any_of(id, threads, x);",
    "named_barrier_arrive": "emulator::arrive(emulator::meeting(id, threads));",
}
WGMMA = {
    "wgmma_fence": "",
    "wgmma_commit_group": "emulator::products().close();",
    "wgmma_wait_group": "emulator::products().do_all_but(pending);",
    "fence_proxy_async": "",
    "wgmma_fence_operand": "",
    "wgmma_64": "emulator::wgmma(d, 8, a, b, add, kMajor == kMajorMN, kSign);",
    "wgmma_32": "emulator::wgmma(d, 4, a, b, add, kMajor == kMajorMN, kSign);",
    "wgmma_32_bf16": "emulator::wgmma_bf16(d, 4, a, b, add);",
    "wgmma_32_bf16_shared": "emulator::wgmma_bf16(d, 4, a, b, add);",
}
PASSES = {
    "reload_thread_idx": "return int(threadIdx.x);",
    "keep": "",
    "warpgroup_reg_dealloc": "",
    "warpgroup_reg_alloc": "",
}


def replace_bodies(text: str, bodies: dict[str, str]) -> str:
    for name, body in bodies.items():
        heads = list(re.finditer(rf"inline [\w ]+ {name}\([^;{{]*\) {{", text))
        if not heads:
            sys.exit(f"run.py: no function {name} to replace")
        for head in reversed(heads):
            depth, end = 1, head.end()
            while depth:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            if name != "wgmma_fence_operand" and head is not heads[0]:
                continue
            text = text[: head.end()] + " " + body + " " + text[end - 1 :]
    return text


def emulated(name: str) -> str:
    text = (KERNELS / name).read_text()
    if name == "delta_rule_mma.cuh":
        text = replace_bodies(text.replace("#include <cuda_fp16.h>", ""), MMA)
    # a block's arrays of fixed size; the others are named by extern
    text = re.sub(r"(?<!extern )__shared__", "static", text)
    if name == "delta_rule_wgmma.cuh":
        text = replace_bodies(text, WGMMA)
    if name == "delta_rule_passes_wgmma.cuh":
        text = replace_bodies(text, PASSES)
        text = text[: text.index("// ---- whether this build's wgmma kernels can run")] + "}\n}\n"
    if "asm volatile(" in text and name != "delta_rule_mma.cuh":
        sys.exit(f"run.py: {name} has assembly that is not replaced")
    return text


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cxx", default="g++", help="a compiler that has _Float16 for x86-64, g++ 12 or newer [g++]")
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder, "gdn", "kernels")
        kernels.mkdir(parents=True)
        for name in ("mma", "wgmma", "prepare", "pieces", "passes", "passes_wgmma", "gradients"):
            (kernels / f"delta_rule_{name}.cuh").write_text(emulated(f"delta_rule_{name}.cuh"))
        Path(folder, "gdn", "cuda_device.cuh").write_text((HERE / "cuda_emulator.h").read_text())
        for path in KERNELS.parent.glob("*.h"):
            Path(folder, "gdn", path.name).write_text(path.read_text())
        program = Path(folder, "emulate")
        command = [o.cxx, "-std=c++20", "-O2", "-march=native", "-fopenmp", "-w", f"-I{folder}",
                   HERE / "delta_rule.cpp", "-o", program]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            sys.exit(f"run.py: no compiler {o.cxx}")
        except subprocess.CalledProcessError:
            sys.exit("run.py: the kernels do not compile in the emulator")
        sys.exit(subprocess.run([program]).returncode)


if __name__ == "__main__":
    main()
