"""An empty batch has the structure of the batch it is made of."""

import copy
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.data import default_collate
from transformers import BatchEncoding

from syncbn.emptied import emptied

PLAIN = SimpleNamespace()
"""A loader of which nothing is known."""


def loader(batch_size: int, collate_fn: object = tuple) -> SimpleNamespace:
    return SimpleNamespace(batch_size=batch_size, collate_fn=collate_fn)


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Record:
    x: Tensor
    names: list[str]
    scale: float = field(default=2.0, init=False)


class Frozen(Mapping[str, Any]):
    """A mapping that cannot be changed."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = MappingProxyType(dict(values))

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def test_a_tensor() -> None:
    """0 in dimension 0; dtype, strides and need of a gradient stay; no memory is shared."""
    x = torch.randn(4, 3, 5, 6).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    none = emptied(x, PLAIN)
    assert none.shape == (0, 3, 5, 6)
    assert none.dtype == torch.bfloat16
    assert none.stride() == x.stride()
    assert none.requires_grad
    assert none.is_leaf
    assert none.untyped_storage().nbytes() == 0


def test_a_sparse_tensor() -> None:
    """A sparse tensor stays one."""
    none = emptied(torch.eye(4).to_sparse(), PLAIN)
    assert (none.shape, none.layout, none.dtype) == ((0, 4), torch.sparse_coo, torch.float32)


def test_arrays_and_what_is_no_sample() -> None:
    """numpy arrays are cut alike; numbers, strings, None and what has no dimension are as they were."""
    batch = {"a": np.ones((3, 2), np.int16), "n": 3, "s": "train", "none": None, "t": torch.tensor(7.0)}
    batch |= {"b": True, "np": np.float32(2), "zero": np.array(5), "dtype": torch.float16}
    none = emptied(batch, PLAIN)
    assert none["a"].shape == (0, 2)
    assert none["a"].dtype == np.int16
    assert none["a"].base is None
    assert list(none) == list(batch)
    assert {k: v for k, v in none.items() if k != "a"} == {k: v for k, v in batch.items() if k != "a"}


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict, BatchEncoding, Frozen])
def test_mappings(kind: type) -> None:
    """A mapping of whatever class keeps its class, and the original what it had."""
    batch = kind({"x": torch.ones(3, 2), "names": ["a", "b", "c"]})
    none = emptied(batch, PLAIN)
    assert type(none) is kind
    assert none["x"].shape == (0, 2)
    assert none["names"] == []
    assert len(batch["x"]) == len(batch["names"]) == 3


def test_a_default_factory_and_attributes_stay() -> None:
    """What else a mapping knows is kept."""
    batch = defaultdict(list, x=torch.ones(3))
    assert emptied(batch, PLAIN)["other"] == []
    encoding = BatchEncoding({"x": torch.ones(3, 2)}, n_sequences=1)
    assert emptied(encoding, PLAIN).n_sequences == 1


def test_named_tuples_and_dataclasses() -> None:
    """They keep their class, a frozen dataclass and a field that is no argument too."""
    none = emptied(Pair(torch.ones(3), Record(torch.ones(3, 2), ["a", "b", "c"])), PLAIN)
    assert type(none) is Pair
    assert none.x.shape == (0,)
    assert none.y == Record(none.y.x, [])
    assert none.y.x.shape == (0, 2)
    assert none.y.scale == 2.0


def target(boxes: int, **more: Any) -> dict[str, Any]:
    return {"boxes": torch.zeros(boxes, 4), "labels": torch.zeros(boxes, dtype=torch.int64), **more}


def image(height: int, width: int) -> Tensor:
    return torch.zeros(3, height, width)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("boxes", [(1,), (2, 2), (2, 5), (3, 1, 0), (3, 0, 7, 2)])
def test_detection_batches(boxes: tuple[int, ...], known: bool) -> None:
    """zip(*samples) of images and targets, by images of one size stacked or not, gives lists without entries."""
    size, of = len(boxes), loader(len(boxes)) if known else PLAIN
    images = tuple(image(4 + i, 5) for i in range(size))
    targets = tuple(target(n, image_id=i) for i, n in enumerate(boxes))
    assert emptied((images, targets), of) == ((), ())
    assert emptied([list(images), list(targets)], of) == [[], []]
    stacked, no_targets = emptied((torch.zeros(size, 3, 4, 4), list(targets)), of)
    assert (stacked.shape, no_targets) == ((0, 3, 4, 4), [])
    assert emptied([{"image": i, **t} for i, t in zip(images, targets, strict=True)], of) == []
    assert emptied({"images": list(images), "ids": [torch.tensor(i) for i in range(size)]}, loader(size)) == {
        "images": [],
        "ids": [],
    }


def test_lists_of_fields_and_lists_of_samples() -> None:
    """A list is what its length and its siblings say; only where both fit, its entries' kind decides."""
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    both = emptied([x, y], PLAIN)
    assert [t.shape for t in both] == [(0, 3), (0,)]
    views = emptied([x, x.clone()], PLAIN)  # two views of two samples
    assert [t.shape for t in views] == [(0, 3), (0, 3)]
    dicts = [{"x": x}, {"x": x}]
    assert emptied((y, dicts), PLAIN)[1] == []
    assert [d["x"].shape for d in emptied([y, dicts], loader(2, default_collate))[1]] == [(0, 3), (0, 3)]
    assert [type(v) for v in emptied([{"x": x}, {"y": y}], PLAIN)] == [dict, dict]
    names = emptied({"x": x, "of_samples": ["a", None], "classes": ["cat", "dog", "eel"], "size": (5, 6, 7)}, PLAIN)
    assert (names["of_samples"], names["classes"], names["size"]) == ([], ["cat", "dog", "eel"], (5, 6, 7))
    assert emptied({"x": x, "graphs": [object(), object()]}, PLAIN)["graphs"] == []
    assert emptied({"x": x, "captions": [["a", "b"], ["c"]]}, PLAIN)["captions"] == []


def test_packed_sequences() -> None:
    """A PackedSequence of no sequences goes through recurrent layers, with gradients of zeros."""
    packed = pack_sequence([torch.randn(2, 4), torch.randn(3, 4)], enforce_sorted=False)
    none, names = emptied((packed, ["a", "b"]), PLAIN)
    layer = nn.LSTM(4, 5)
    y, (last, _) = layer(none)
    padded, lengths = pad_packed_sequence(y, batch_first=True)
    (y.data.sum() + last.sum()).backward()
    assert (padded.shape, lengths.shape, names) == ((0, 1, 5), (0,), [])
    assert not padded.requires_grad  # torch 2.13: the graph ends here; the docstring of EvenLoader says what to do
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())


class Graph:
    """Another library's batch."""


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"x": torch.ones(2), "graph": Graph()}, r"got batch\['graph'\] of type tests.test_emptied.Graph"),
        ((torch.ones(2), {"a": {1, 2}}), r"got batch\[1\]\['a'\] of type builtins.set"),
        ((torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), torch.ones(1)), r"got batch\[0\] of type"),
        ({"n": 3, "t": torch.tensor(1.0)}, "must hold samples, .* got dict without any"),
        ({}, "got dict without any"),
    ],
)
def test_what_is_refused(batch: Any, text: str) -> None:
    """Handing out samples a second time would be wrong: what cannot be emptied is named, with what to do."""
    with pytest.raises(TypeError, match=f"{text}.*Pass EvenLoader"):
        emptied(batch, PLAIN)


LEAVES = st.sampled_from([torch.zeros(()), torch.zeros(2), torch.zeros(3, 1, dtype=torch.int32), 1.5, 7, "text"])


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.dictionaries(st.sampled_from("abcd"), inner, min_size=1),
        st.lists(inner, min_size=1, max_size=4),
        st.lists(inner, min_size=1, max_size=4).map(tuple),
        st.builds(Pair, inner, inner),
    )


SAMPLES = st.recursive(LEAVES, _containers, max_leaves=8)


def assert_no_samples(sample: Any, none: Any) -> None:
    """none is what default_collate makes of no samples like this one, if it took none."""
    if isinstance(sample, str):
        assert none in ([], ())
    elif isinstance(sample, dict):
        assert list(none) == list(sample)
        for key, value in sample.items():
            assert_no_samples(value, none[key])
    elif isinstance(sample, (list, tuple)):
        assert isinstance(none, Pair) == isinstance(sample, Pair)
        for value, left in zip(sample, none, strict=True):
            assert_no_samples(value, left)
    else:
        one = torch.as_tensor(sample)
        assert none.shape == (0, *one.shape)
        assert none.dtype == default_collate([sample]).dtype


@given(SAMPLES, st.integers(1, 5))
def test_what_default_collate_makes(sample: Any, size: int) -> None:
    """Whatever samples default_collate puts together, of any number, all are left out and the structure stays."""
    batch = default_collate([sample] * size)
    none = emptied(batch, loader(size, default_collate))
    assert_no_samples(sample, none)
    assert_no_samples(sample, copy.deepcopy(none))


@given(SAMPLES, st.integers(5, 7))
def test_the_same_by_another_collate(sample: Any, size: int) -> None:
    """So it is by a function that is not known, if there are more samples than fields in a list."""
    assert_no_samples(sample, emptied(default_collate([sample] * size), loader(size)))
