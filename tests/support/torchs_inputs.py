"""The inputs on which torch tests its batch norms, from torch.testing's databases.

    python -m tests.support.torchs_inputs FILE

A process of its own, since importing them changes torch's flags for the rest of a process.
"""

import sys
from typing import Any

import torch
from torch import nn

MISSING = 3
"""The exit status where the databases cannot be imported; they need expecttest."""


def function_inputs() -> list[tuple[Any, ...]]:
    """input, args, kwargs of F.batch_norm"""
    from torch.testing._internal.common_methods_invocations import op_db

    infos = [info for info in op_db if info.name == "nn.functional.batch_norm" and torch.float64 in info.dtypes]
    given = [sample for info in infos for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True)]
    return [(each.input, each.args, each.kwargs) for each in given]


def layer_inputs(rank: int, training: bool) -> list[tuple[Any, ...]]:
    """args and kwargs of the constructor of BatchNorm1d, 2d or 3d, then of its forward"""
    from torch.testing._internal.common_modules import module_db

    cls, found = getattr(nn, f"BatchNorm{rank}d"), []
    for info in module_db:
        if info.module_cls is cls:
            inputs = info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training)
            for each in inputs:
                given = each.constructor_input, each.forward_input
                found.append(tuple(part for one in given for part in (one.args, one.kwargs)))
    return found


def main(path: str) -> None:
    """Save all of them."""
    try:
        found: dict[Any, list[tuple[Any, ...]]] = {"function": function_inputs()}
        found |= {(rank, mode): layer_inputs(rank, mode) for rank in (1, 2, 3) for mode in (True, False)}
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(MISSING)
    torch.save(found, path)


if __name__ == "__main__":
    main(sys.argv[1])
