"""Inputs and times for the peers that run under PyTorch (and ours, which runs on its tensors)."""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "torch"))
import torch  # noqa: E402

import common  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensor(shape: str, name: str) -> torch.Tensor:
    x = torch.from_numpy(common.load(shape, name).copy())
    return (x.view(torch.bfloat16) if name in ("q", "k", "v", "do") else x).to(DEVICE)


def inputs(shape: str, grad: bool = False) -> dict[str, torch.Tensor]:
    x = {name: tensor(shape, name) for name in ("q", "k", "v", "g", "beta", "do")}
    if grad:
        for name in ("q", "k", "v", "g", "beta"):
            x[name].requires_grad_()
    return x


def to_numpy(x: torch.Tensor):
    return x.detach().double().cpu().numpy()


def free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


class Graph:
    """A call as a CUDA graph: the times of its replays are the GPU's alone. The call runs on one stream throughout, also
    autograd's part of it."""

    def __init__(self, call: Callable, before: Callable | None = None):
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.kept = before() if before else None
            run = (lambda: call(self.kept)) if before else call
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.out = run()
        torch.cuda.synchronize()

    def __call__(self) -> None:
        self.graph.replay()


def times(call: Callable, runs: int, warm: int = 2) -> list[float]:
    """ms of each call between CUDA events, all queued: the GPU does not wait for the host between them. On a CPU, for a dry
    run, the clock's."""
    for _ in range(warm):
        call()
    if DEVICE == "cpu":
        out = []
        for _ in range(runs):
            begin = time.perf_counter()
            call()
            out.append(1e3 * (time.perf_counter() - begin))
        return out
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:])]


def host_ms(call: Callable, runs: int = 10) -> float:
    """ms for which a call keeps the host: its median, with the GPU idle before."""
    out = []
    for _ in range(runs):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        out.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(out)


class Worker:
    """Measures one peer. A subclass sets, in prepare(shape), `calls` (case -> call, or (call, before) where the call takes
    what `before` left), and gives the results that are held to float64."""

    eager: tuple[str, ...] = ()  # cases that are timed without a graph too

    def __init__(self) -> None:
        self.calls: dict[str, Callable | tuple] = {}
        self.graphs: dict[str, Callable] = {}
        self.notes: dict[str, str] = {}

    def load(self, shape: str) -> tuple[Callable, float | None]:
        """Fills self.calls; returns the call whose results (name -> tensor) are checked, and MiB kept for the backward."""
        raise NotImplementedError

    def prepare(self, shape: str) -> dict:
        import written

        self.drop()
        check, kept = self.load(shape)
        try:
            found = common.errors(shape, written.checked(check), to_numpy)
            wrong = common.verdict(found)
        except written.NotWritten as e:
            found, wrong = {}, str(e)
        free()
        return dict(errors=found, wrong=wrong, kept_mib=kept, cases=list(self.calls), eager=list(self.eager),
                    notes=self.notes)

    def graph(self, case: str) -> Callable:
        if case not in self.graphs:
            call, before = self.calls[case] if isinstance(self.calls[case], tuple) else (self.calls[case], None)
            if DEVICE == "cpu":
                kept = before() if before else None
                self.graphs[case] = (lambda: call(kept)) if before else call
            else:
                self.graphs[case] = Graph(call, before)
        return self.graphs[case]

    def time(self, case: str, runs: int) -> dict:
        return dict(ms=times(self.graph(case), runs))

    def time_eager(self, case: str, runs: int) -> dict:
        call = self.calls[case]
        return dict(ms=times(call, runs), host_ms=host_ms(call))

    def drop(self) -> dict:
        self.calls, self.graphs, self.notes = {}, {}, {}
        free()
        return {}

    def about(self) -> dict:
        return {}
