"""What the command lines of the examples have in common."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ranks import fail


def parser(program: str, doc: str, norms: Sequence[str], batch_size: int, epochs: int) -> argparse.ArgumentParser:
    """With the options that every example has; --help begins with doc's first line and ends with the rest of it.

    A wrong option is one message on a node, not one a rank.
    """
    summary, _, commands = doc.partition("\n")
    shown = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(program, description=summary, epilog=commands, formatter_class=shown)
    options.error = lambda message: fail(f"{message}\n{options.format_usage()}")  # type: ignore[method-assign]
    default = "(default: %(default)s)"
    options.add_argument("--norm", choices=norms, default="syncbn", help=f"normalization layer {default}")
    options.add_argument("--batch-size", type=positive, default=batch_size, help=f"samples per rank and step {default}")
    options.add_argument("--epochs", type=positive, default=epochs, help=f"passes over the training set {default}")
    options.add_argument("--seed", type=int, default=0, help=f"of initialization, order and all else {default}")
    options.add_argument("--log-file", type=Path, help="append one JSON line per epoch to this file")
    options.add_argument("--save", type=Path, help="write the trained state_dict to this file")
    return options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value
