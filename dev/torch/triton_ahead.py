"""Compiles Triton's kernels ahead of their use, with one process for each core.

Triton's autotuner compiles its configurations one after another, in Python, on one core. Here a model or a kernel runs
once with every launch left out: Triton then only says what it would compile (the hooks of its asynchronous compiling),
for all configurations of all autotuned kernels. These jobs go to forked workers, which leave their results in Triton's
cache on disk (TRITON_CACHE_DIR). Another process finds them there and has only the measuring to do. Read for Triton 3.6.

The process that collects is of no use for numbers: its outputs are uninitialised memory, and in autograd's threads Triton
goes on collecting (a context variable, one for each thread). So numbers come from another process, always: once a process
has collected, every launch of a Triton kernel in it raises, in every thread. A script that needs numbers calls

    in_another_process([__file__, *arguments, "--compile-ahead"])

and where it is called with --compile-ahead it calls compile_ahead(...), which ends that process.
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable

import triton
from triton.runtime import _async_compile, driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

Jobs = dict[str, Callable]  # Triton's cache key -> a call that compiles
REFUSAL = ("this process compiled ahead, with every launch left out: its kernels run no more, numbers come from a process of "
           "their own (triton_ahead.in_another_process)")


class Collector:
    """In the place of an AsyncCompileMode: keeps what would be compiled."""

    def __init__(self, jobs: Jobs):
        self.jobs = jobs

    def submit(self, key: str, compile_fn: Callable, finalize_fn: Callable) -> None:
        self.jobs.setdefault(key, compile_fn)


def refuse(self, *args, **options) -> None:
    raise RuntimeError(REFUSAL)


run_kernel = JITFunction.run


@contextlib.contextmanager
def collecting(jobs: Jobs):
    """Triton's kernels compile and launch nothing; what they would compile is added to jobs. Outputs keep whatever is in
    their memory. Afterwards every launch in this process raises."""
    collector = Collector(jobs)

    def run(self, *args, grid, warmup, **options) -> None:
        _async_compile.active_mode.set(collector)  # of this thread: a backward has its own
        run_kernel(self, *args, grid=grid, warmup=True, **options)

    def run_all(self, *args, **options) -> None:
        self.nargs = dict(zip(self.arg_names, args))
        for config in self.prune_configs(options):
            self.fn.run(*args, **options, **config.all_kwargs())

    JITFunction.run, Autotuner.run = run, run_all
    try:
        yield
    finally:
        JITFunction.run = Autotuner.run = refuse


def compile_all(jobs: Jobs, seconds: float, workers: int = 0) -> dict:
    """Compiles the jobs in their order, as many as begin within `seconds`; workers 0: one for each core. Returns how many
    are compiled and how many failed (of an autotuner's configurations some may), the seconds and those of the cores."""
    fork, calls, begin = multiprocessing.get_context("fork"), list(jobs.values()), time.time()
    taken, compiled, failed, busy = fork.Value("i", 0), fork.Value("i", 0), fork.Value("i", 0), fork.Value("d", 0.0)

    def work() -> None:
        start = sum(os.times()[:4])
        while time.time() - begin < seconds:
            with taken.get_lock():
                job, taken.value = taken.value, taken.value + 1
            if job >= len(calls):
                break
            try:
                kernel = calls[job]()
                driver.active.launcher_cls(kernel.src, kernel.metadata)  # the C code that launches it
                result = compiled
            except Exception:  # as the autotuner: a configuration that cannot be compiled is not a choice
                result = failed
            with result.get_lock():
                result.value += 1
        with busy.get_lock():
            busy.value += sum(os.times()[:4]) - start

    processes = [fork.Process(target=work) for _ in range(workers or os.cpu_count())]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(1.0, seconds + 30 - (time.time() - begin)))
        if process.is_alive():
            process.kill()
    return dict(kernels=len(calls), compiled=compiled.value, failed=failed.value, seconds=time.time() - begin,
                core_seconds=busy.value, workers=len(processes))


def compile_ahead(calls: list[Callable], seconds: float = 120) -> None:
    """Compiles on all cores what the calls need, says how much that was, and ends this process. A call that raises (a
    package that refuses this GPU) has what came before it compiled."""
    jobs, problems = {}, []
    for call in calls:
        try:
            with collecting(jobs):
                call()
        except Exception as e:  # of any of the packages' own kinds
            problems.append((str(e) or repr(e)).splitlines()[0])
    done = compile_all(jobs, seconds)
    print(f"compiled ahead: {done['compiled']} of {done['kernels']} kernel configurations, {done['failed']} cannot be, in "
          f"{done['seconds']:.0f} s by {done['workers']} processes" + "".join(f"; {p}" for p in problems), file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(0)  # nothing of this process is used again


def in_another_process(command: list[str]) -> None:
    """Runs a Python script that ends in compile_ahead(). Where it fails, the kernels are compiled on one core as they come."""
    done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    if done.returncode:
        print(f"compiling ahead failed (exit code {done.returncode}): the first run compiles on one core", file=sys.stderr)


def count_compiled() -> list[str]:
    """A list that grows by the name of every kernel that this process compiles, because the cache lacks it."""
    names = []
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or names.append(src.name)
    return names


def shorten_autotuning(ms: float) -> None:
    """The autotuner measures each configuration for `ms` (Triton: 100), after a quarter of that. For numbers, not for times:
    a configuration that is not the best may win."""
    def do_bench(self):
        return lambda call, quantiles: triton.testing.do_bench(call, warmup=ms / 4, rep=ms, quantiles=quantiles)

    Autotuner.do_bench = property(do_bench)
