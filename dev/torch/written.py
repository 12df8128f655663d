"""Shows that what a function returns was written by it: memory that nobody wrote must not pass for a peer's result.

Every tensor of floats that PyTorch's Python functions allocate without a value (torch.empty, empty_like, empty_strided,
new_empty, new_empty_strided; what a Triton kernel or a C function then fills) is filled before it is handed out, once with
NaN and once with 3. A number that is NaN with the first and not with the second was not written, or was computed from memory
that was not. A NaN in both is the function's own.
"""

import contextlib
from collections.abc import Callable
from unittest import mock

import packages  # noqa: F401
import torch

Tensors = dict[str, torch.Tensor]
OTHER = 3.0


class NotWritten(Exception):
    """Names what was not written. It says nothing about the accuracy of what was measured: some kernel did not run."""


@contextlib.contextmanager
def poisoned(value: float):
    """Tensors of floats that are allocated without a value hold `value`, in every thread."""
    def filled(function: Callable) -> Callable:
        def allocate(*args, **options):
            x = function(*args, **options)
            if x.is_floating_point() and x.device.type != "meta":
                x.detach().fill_(value)
            return x

        return allocate

    with contextlib.ExitStack() as stack:
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")),
                             (torch.Tensor, ("new_empty", "new_empty_strided"))):
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        yield


def missing(first: Tensors, second: Tensors) -> dict[str, float]:
    """The part of each tensor's elements that were not written, of those where there are some; the results with NaN and
    with OTHER in unwritten memory."""
    parts = {}
    for name, x in first.items():
        y = second[name]
        count = (x.isnan() & ~y.to(x.device).isnan()).sum().item()
        if count:
            parts[name] = count / x.numel()
    return parts


def checked(call: Callable[[], Tensors]) -> Tensors:
    """What the call returns, by name, after a second call has shown that it was written; else NotWritten."""
    with poisoned(float("nan")):
        first = {name: x.detach().clone() for name, x in call().items()}
    with poisoned(OTHER):
        second = call()
    if parts := missing(first, second):
        raise NotWritten("not written: " + ", ".join(f"{100 * part:.3g}% of {name}" for name, part in parts.items()))
    return first
