"""Compiles Triton's kernels ahead of their use, with one process for each core.

Triton's autotuner compiles its configurations one after another, in Python, on one core. Here a model or a kernel runs
once with every launch left out: Triton then only says what it would compile (the hooks of its asynchronous compiling),
for all configurations of all autotuned kernels. These jobs go to forked workers, which leave their results in Triton's
cache on disk (TRITON_CACHE_DIR). A later process finds them there and has only the measuring to do. Read for Triton 3.6.
"""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from unittest import mock

import triton
from triton.runtime import _async_compile, driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

Jobs = dict[str, Callable]  # Triton's cache key -> a call that compiles


class Collector:
    """In the place of an AsyncCompileMode: keeps what would be compiled."""

    def __init__(self, jobs: Jobs):
        self.jobs = jobs

    def submit(self, key: str, compile_fn: Callable, finalize_fn: Callable) -> None:
        self.jobs.setdefault(key, compile_fn)


@contextlib.contextmanager
def collecting(jobs: Jobs):
    """Triton's kernels compile and launch nothing; what they would compile is added to jobs. Outputs keep whatever is in
    their memory."""
    collector, run_kernel = Collector(jobs), JITFunction.run

    def run(self, *args, grid, warmup, **options) -> None:
        _async_compile.active_mode.set(collector)  # of this thread: a backward has its own
        run_kernel(self, *args, grid=grid, warmup=True, **options)

    def run_all(self, *args, **options) -> None:
        self.nargs = dict(zip(self.arg_names, args))
        for config in self.prune_configs(options):
            self.fn.run(*args, **options, **config.all_kwargs())

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(Autotuner, "run", run_all):
        try:
            yield
        finally:
            _async_compile.active_mode.set(None)


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


def count_compiled() -> list[str]:
    """A list that grows by the name of every kernel that this process compiles, because the cache lacks it."""
    names = []
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or names.append(src.name)
    return names


def shorten_autotuning(ms: float) -> None:
    """The autotuner measures each configuration for `ms` (Triton: 100), after a quarter of that."""
    def do_bench(self):
        return lambda call, quantiles: triton.testing.do_bench(call, warmup=ms / 4, rep=ms, quantiles=quantiles)

    Autotuner.do_bench = property(do_bench)


def prepare(call: Callable) -> None:
    """Compiles on all cores what the call needs; else its first run compiles for minutes. For numbers, not for times:
    the autotuner then takes 2 ms a configuration."""
    jobs = {}
    with collecting(jobs):
        call()
    compile_all(jobs, 120)
    shorten_autotuning(2)
