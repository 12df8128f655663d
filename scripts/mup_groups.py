#!/usr/bin/env python3
"""muP for a PyTorch model with flash-linear-attention's names, from train_gdn's table.

    ./train_gdn -w 2048 -L 24 -mup_table json >mup.json

    table = mup_groups.read("mup.json")
    mup_groups.initialize(model, table)                     # initial values, where they are not a checkpoint's
    mup_groups.multiply(model, table)                       # logits, branches, the output norm's eps: once, after building
    optimizer = torch.optim.AdamW(mup_groups.param_groups(model, table, lr=4e-3, weight_decay=0.1, eps=1e-8))

lr is that of the base width, found by a sweep there (dev/tuning.md). A model whose names differ is renamed by rename(name): the
table's name of a parameter. Parameters that the table does not have, or tensors of it that the model lacks or has in another
shape, are a ValueError that lists them. PyTorch's AdamW and SGD with groups do what train_gdn does: lr, weight_decay and eps times
the table's factors. A scheduler of PyTorch's multiplies each group's lr, as it should. Source of the factors: mup.h.

    python3 scripts/mup_groups.py mup.json                  # the table's factors by class, as text
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator

if TYPE_CHECKING:
    import torch

Table = dict[str, Any]


def read(path: str | Path) -> Table:
    """The table in a file that `./train_gdn -mup_table json` wrote."""
    table = json.loads(Path(path).read_text())
    if not isinstance(table, dict) or "tensors" not in table or "forward" not in table:
        raise ValueError(f"{path}: expected what ./train_gdn -mup_table json prints")
    return table


def matched(
    model: torch.nn.Module, table: Table, rename: Callable[[str], str] = lambda name: name
) -> Iterator[tuple[dict, torch.nn.Parameter]]:
    """Each parameter of the model with its row of the table."""
    rows = {row["name"]: row for row in table["tensors"]}
    pairs, unknown, shapes = [], [], []
    for name, parameter in model.named_parameters():
        row = rows.pop(rename(name), None)
        if row is None:
            unknown.append(name)
        elif list(parameter.shape) != row["shape"]:
            shapes.append(f"{name} {list(parameter.shape)}, the table has {row['shape']}")
        else:
            pairs.append((row, parameter))
    problems = [("not in the table", unknown), ("of another shape", shapes), ("not in the model", list(rows))]
    text = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems if names)
    if text:
        raise ValueError(f"mup_groups: {text}")
    return iter(pairs)


def param_groups(
    model: torch.nn.Module,
    table: Table,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    optimizer: str = "adamw",
    rename: Callable[[str], str] = lambda name: name,
) -> list[dict[str, Any]]:
    """Groups for torch.optim.AdamW (optimizer = "adamw") or SGD ("sgd"), one for each set of factors."""
    if optimizer not in ("adamw", "sgd"):
        raise ValueError(f"optimizer '{optimizer}': expected adamw or sgd")
    groups: dict[tuple, dict[str, Any]] = {}
    for row, parameter in matched(model, table, rename):
        factors = row[optimizer]
        group = {"lr": lr * factors["lr"], "weight_decay": weight_decay * factors["weight_decay"]}
        if optimizer == "adamw":
            group["eps"] = eps * factors["eps"]
        groups.setdefault(tuple(group.values()), {"params": [], **group})["params"].append(parameter)
    return list(groups.values())


def initialize(model: torch.nn.Module, table: Table, rename: Callable[[str], str] = lambda name: name) -> None:
    """Draws initial values from PyTorch's generator; the gates' time scales (A_log, dt_bias) stay as the model has them."""
    import torch

    with torch.no_grad():
        for row, parameter in matched(model, table, rename):
            for kind, x in (row["init"] or {}).items():
                if kind == "normal":
                    parameter.normal_(0, x)
                elif kind == "uniform":
                    parameter.uniform_(-x, x)
                else:
                    parameter.fill_(x)


def multiply(model: torch.nn.Module, table: Table) -> list[Any]:
    """Multiplies the outputs of lm_head (m_out) and of every o_proj and down_proj (the branches), and the eps of every o_norm, by
    which s acts: fla's own readout scale is dk^-1/2. Returns the hooks' handles."""
    forward = table["forward"]
    handles, found = [], {"lm_head": 0, "o_proj": 0, "down_proj": 0, "o_norm": 0}

    def scaled(x: float) -> Callable:
        return lambda module, inputs, output: output * x

    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if last not in found:
            continue
        found[last] += 1
        if last == "lm_head":
            handles.append(module.register_forward_hook(scaled(forward["logits"])))
        elif last == "o_norm":
            module.eps = module.eps / (forward["readout"] * table["head_dim_k"] ** 0.5) ** 2
        elif forward["branches"] != 1:
            handles.append(module.register_forward_hook(scaled(forward["branches"])))
    missing = [name for name, count in found.items() if not count]
    if missing:
        raise ValueError(f"mup_groups: no module named {', '.join(missing)}")
    return handles


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 1
    table = read(sys.argv[1])
    print(f"{table['parametrization']}, width {table['width']} ({table['base_width']}), forward {table['forward']}")
    seen = set()
    for row in table["tensors"]:
        line = f"{row['class']:12s} init {row['init']}, adamw {row['adamw']}, sgd {row['sgd']}"
        if line not in seen:
            print(line)
        seen.add(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
