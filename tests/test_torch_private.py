"""torch's private parts: named in one file, and a torch that has renamed one costs time or an error in words.

Each is taken away in a process of its own, whose group of two ranks sums nothing, so that alone is what is right there.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.renamed import EAGER, HOOKS, WAYS, without

SOURCE = Path(__file__).parent.parent / "syncbn"
EDGE = SOURCE / "torch_private.py"
PYTHONS = {"_asdict", "_make", "_current_frames", "_getframe"}
NAMES = re.findall(r'"(torch[\w.]*:[\w.]+)"', EDGE.read_text())
NAMES += [f"torch.utils.checkpoint:{name}" for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")]
GRAPHS = ("_guards", "PROXY", "_get_dispatch_mode", "_c10d_functional")
REFUSED = {
    "is_fx_symbolic_tracing": {"fx"},
    "_are_functorch_transforms_active": {"compiled"},
    "temporarily_clear_interpreter_stack": {"func_others"},
    "_remove_batch_dim": {"many"},
    "_add_batch_dim": {"many"},
    "_c10d_functional.all_reduce": {"jit", "compiled"},
    "_c10d_functional.wait_tensor": {"jit", "compiled"},
}
"""Ways that have no other way to go without a name; all else is right without it."""


def private_names(text: str) -> Iterator[str]:
    """Names and attributes in a source that begin with an underscore, and imports from modules that do."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            path = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (part for part in path if re.match("_[^_]", part))
        elif isinstance(node, ast.Constant) and re.fullmatch("_[a-z]\\w+", str(node.value)):
            yield str(node.value)


def own_names(text: str) -> Iterator[str]:
    """What a source defines: functions, classes, arguments, variables, and attributes that it sets."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def strangers(text: str, own: set[str]) -> set[str]:
    """Private names that are not ours, and those of the one file wherever they come from."""
    named, torchs = set(private_names(text)), set(private_names(EDGE.read_text())) - own
    strings = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    return {name for name in named - own - PYTHONS if name not in strings or name in torchs}


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != EDGE)
OWN = {name for path in FILES for name in own_names(path.read_text())}
"""Among these are the few methods of torch's classes that ours override, such as _check_input_dim."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_private_name_of_torch_elsewhere(path: Path) -> None:
    """No file but torch_private.py names what torch has not made public, by attribute, import or string."""
    assert strangers(path.read_text(), OWN) == set()


@pytest.mark.parametrize(
    "text",
    ["torch._C.f", "torch.f._has_storage", "from torch._guards import x", "from torch.x import _y", "f('_orig_mod')"],
)
def test_the_reading_can_fail(text: str) -> None:
    """Each way to name a private part is found."""
    assert strangers(text, OWN)


@pytest.mark.parametrize("name", [*NAMES, *HOOKS])
def test_a_torch_that_has_renamed_it(name: str) -> None:
    """Every way has right numbers or, where the table says so, an error that is not an AttributeError; one warning says
    torch's version, the name and what is lost.
    """
    ways = list(WAYS) if any(part in name for part in GRAPHS) else EAGER
    found, warned = without([name], ways)
    refused = next((ways for part, ways in REFUSED.items() if name.endswith(part)), set())
    for way, outcome in found.items():
        assert (outcome == "right") == (way not in refused), f"{way}: {outcome}"
        assert not outcome.startswith(("wrong", "AttributeError", "NameError", "no answer")), f"{way}: {outcome}"
    assert len(warned) == 1
    assert torch.__version__ in warned[0]
    assert name.replace(":", ".") in warned[0]


def test_a_torch_that_has_renamed_them_all() -> None:
    """Training, checkpointing, derivatives and transforms are right still, and one warning names all."""
    found, warned = without(NAMES, EAGER)
    assert {way for way, outcome in found.items() if outcome != "right"} == {"fx", "jit", "many"}
    assert len(warned) == 1
    assert all(name.replace(":", ".") in warned[0] for name in NAMES)


def test_this_torch_has_them_all() -> None:
    """Here nothing is missing, nobody is warned, and every way is right."""
    found, warned = without([], list(WAYS))
    assert set(found.values()) == {"right"}, found
    assert warned == []
