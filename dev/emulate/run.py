#!/usr/bin/env python3
"""Runs the kernels of the gated delta rule on the CPU, thread by thread, and compares them with the CPU's layer in double.

    python3 dev/emulate/run.py

It compiles gdn/kernels/delta_rule/ with g++ -DGDN_EMULATED, which makes gdn/kernels/ptx.cuh take its functions from
ptx_emulated.h. Covered: the float kernels of dev/readable; prepare_kernel, the passes and the gradients on mma.sync and on
wgmma (passes with one and with two consumer warpgroups), and sequence splits. So a wrong index or equation is found on a
machine without a GPU; and most missing waits and barriers, for there are two runs whose bits must be the same: in one, asynchronous work (cp.async, TMA, wgmma) is
done at once and one warp runs ahead of all others as far as barriers let it; in the other it is done as late as a wait
allows, and chance picks which warp moves. The mma.sync kernels also run with the plans for GPUs with 163 and 99 KiB of
shared memory a block, and must give the same o, dv, dbeta, states, E, dS and X to the bit. No multiply-add is fused, so that
bits depend on the order of sums alone. Five minutes.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cxx", default="g++", help="a compiler that has _Float16 for x86-64, g++ 12 or newer [g++]")
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        failed = 0
        for source in (HERE.parent / "readable" / "emulated.cpp", HERE / "delta_rule.cpp"):
            program = Path(folder, "emulate")
            command = [o.cxx, "-std=c++20", "-O2", "-ffp-contract=off", "-march=native", "-fopenmp", "-w",
                       "-DGDN_EMULATED", f"-I{HERE.parents[1]}", source, "-o", program]
            try:
                subprocess.run(command, check=True)
            except FileNotFoundError:
                sys.exit(f"run.py: no compiler {o.cxx}")
            except subprocess.CalledProcessError:
                sys.exit("run.py: the kernels do not compile in the emulator")
            failed |= subprocess.run([program]).returncode
        sys.exit(failed)


if __name__ == "__main__":
    main()
