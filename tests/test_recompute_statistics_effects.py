"""recompute_statistics: what it leaves as it was, what it refuses, and what it costs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from tests.support.ranks import Collectives, RankPool


def states(net: nn.Module) -> list[Any]:
    """All of a model that may not change."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__)) for m in net.modules()]
    values = [(m.training, getattr(m, "momentum", 0), getattr(m, "track_running_stats", 0)) for m in net.modules()]
    return [hooks, values, [p.grad is None for p in net.parameters()], torch.is_grad_enabled()]


def failing(batches: list[Tensor]) -> Iterator[Tensor]:
    yield from batches
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["done", "the model raises", "interrupted", "no batch", "nan"])
def test_all_else_is_as_before(how: str) -> None:
    """Modes, hooks, attributes, momenta, gradients; after an error the statistics, too."""
    net = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), syncbn.SyncBatchNorm(3), nn.Sequential(nn.BatchNorm1d(3)))
    net.register_forward_hook(lambda *_: None)
    net[1].eval()
    net(torch.randn(4, 3)).sum().backward()
    before, buffers = states(net), [b.clone() for b in net.buffers()]
    good, bad = torch.randn(4, 3), torch.full((4, 3), float("nan"))
    if how == "done":
        syncbn.recompute_statistics(net, [good])
    else:
        raised, batches = {
            "the model raises": (RuntimeError, [good, torch.randn(4, 5)]),
            "interrupted": (KeyboardInterrupt, failing([good])),
            "no batch": (ValueError, []),
            "nan": (ValueError, [good, bad]),
        }[how]
        with pytest.raises(raised):
            syncbn.recompute_statistics(net, batches)
        assert all(torch.equal(now, was) for now, was in zip(net.buffers(), buffers, strict=True))
    assert states(net) == before


def test_what_is_left_alone_is_said() -> None:
    """Frozen layers in three ways, one without statistics, and one that is not called, by path and why."""
    norm = lambda **how: nn.BatchNorm1d(3, **how)  # noqa: E731
    net = nn.ModuleDict({name: norm() for name in ("done", "frozen", "evaluating", "unused")})
    net["none"] = norm(track_running_stats=False)
    syncbn.freeze(net["frozen"])
    net["evaluating"].eval()
    called = ("done", "frozen", "evaluating", "none")
    said = syncbn.recompute_statistics(net, [torch.randn(4, 3)], forward=lambda net, x: [net[k](x) for k in called])
    assert said.counts == {"done": 4}
    assert said.left == {
        "frozen": "frozen",
        "evaluating": "frozen: in eval mode in a model in training mode",
        "none": "it has no running statistics",
        "unused": "it was not called",
    }
    lines = ["statistics of 1 batch norms, each of 4 values a channel", "frozen: left alone, frozen"]
    assert str(said).splitlines()[:2] == lines
    assert torch.equal(net["evaluating"].running_mean, torch.zeros(3))


def test_a_model_in_eval_mode_is_not_frozen() -> None:
    """There every layer is recomputed, and the model stays in eval mode."""
    net = nn.Sequential(nn.BatchNorm1d(3)).eval()
    assert syncbn.recompute_statistics(net, [torch.randn(4, 3)]).counts == {"0": 4}
    assert not net.training
    assert not net[0].training


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, net: nn.Module) -> Tensor:
        ctx.net = net
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        syncbn.recompute_statistics(ctx.net, [torch.randn(4, 3)])
        return dy, None


def test_not_within_a_backward() -> None:
    """It is refused, and nothing has changed."""
    net, x = nn.BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"between steps only; got a call within a backward.*Call it after backward"):
        _InBackward.apply(x, net).sum().backward()
    assert torch.equal(net.running_mean, torch.zeros(3))


HALF = nn.BatchNorm1d(3).half()
WRONG = {
    "no batch norm": (nn.Linear(3, 3), [torch.randn(4, 3)], {}, ValueError, "a model with none that can be. Pass"),
    "none that can": (
        nn.BatchNorm1d(3, track_running_stats=False),
        [],
        {},
        ValueError,
        r"\('': it has no running stat",
    ),
    "all frozen": (syncbn.freeze(nn.BatchNorm1d(3)), [], {}, ValueError, r"none that can be \('': frozen\)"),
    "lazy": (nn.LazyBatchNorm1d(), [torch.randn(4, 3)], {}, ValueError, "which is lazy. Call the model once"),
    "no batch": (nn.BatchNorm1d(3), [], {}, ValueError, "got none on any rank.*Pass a loader"),
    "empty batches": (nn.BatchNorm1d(3), [torch.empty(0, 3)], {}, ValueError, "or only empty ones"),
    "no model": ("net", [], {}, TypeError, "model must be a module; got str"),
    "no batches": (nn.BatchNorm1d(3), 3, {}, TypeError, "batches must be iterable, as a DataLoader is; got int"),
    "a dict": (nn.BatchNorm1d(3), [{"x": 1}], {}, TypeError, "begins with one; got dict. Pass forward="),
    "an empty tuple": (nn.BatchNorm1d(3), [()], {}, TypeError, "begins with one; got tuple"),
    "forward": (nn.BatchNorm1d(3), [], {"forward": 1}, TypeError, "forward must be a function of a model and a batch"),
    "momentum": (nn.BatchNorm1d(3), [], {"momentum": 1.5}, ValueError, "from 0 to 1, or None; got 1.5"),
    "no momentum": (nn.BatchNorm1d(3), [], {"momentum": "0.1"}, TypeError, "or None; got '0.1'"),
    "nan": (nn.BatchNorm1d(3), [torch.full((4, 3), float("nan"))], {}, ValueError, "got nan in channel 0 for ''"),
    "too large": (HALF, [torch.randn(64, 3).half() * 3e3], {}, ValueError, "got inf in channel 0.*torch.float16"),
}


@pytest.mark.parametrize(("model", "batches", "options", "kind", "text"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(model: Any, batches: Any, options: dict[str, Any], kind: type[Exception], text: str) -> None:
    """Each is an error that says the rule, what was got and what to do; buffers have not moved."""
    is_known = isinstance(model, nn.Module) and not any(map(nn.parameter.is_lazy, model.buffers()))
    before = [b.clone() for b in model.buffers()] if is_known else []
    with pytest.raises(kind, match=f"(?s){text}"):
        syncbn.recompute_statistics(model, batches, **options)
    if before:
        assert all(torch.equal(now, was) for now, was in zip(model.buffers(), before, strict=True))


def _other_models() -> str:
    net = nn.Sequential(nn.BatchNorm1d(3), *([nn.BatchNorm1d(3)] if dist.get_rank() else []))
    with pytest.raises(ValueError, match="All ranks must have the same batch norms") as caught:
        syncbn.recompute_statistics(net, [torch.randn(4, 3)])
    with pytest.raises(ValueError, match="All ranks must have the same batch norms"):
        syncbn.synchronize_statistics(net)
    return str(caught.value)


def test_ranks_with_other_layers(ranks: RankPool) -> None:
    """An error on all ranks, before sums of other sizes are sent."""
    first, second = ranks.run(2, _other_models)
    assert "this one has 1, first '0'" in first
    assert "this one has 2" in second


def _counted() -> int:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))
    with Collectives() as collectives:
        syncbn.recompute_statistics(net, [torch.randn(4, 3)] * (2 + dist.get_rank()))
    return collectives.count


def test_one_sum_for_all_layers(ranks: RankPool) -> None:
    """Without synchronized layers there are two collectives in all: whether ranks are alike, and the sums."""
    assert ranks.run(2, _counted) == [2, 2]


def _one_fails() -> str:
    rank = dist.get_rank()
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3))).double()
    batches = failing_loader(rank)
    with pytest.raises(Exception, match=r"no such file|that of rank 1 raised OSError") as caught:
        syncbn.recompute_statistics(net, batches)
    assert torch.equal(net[0].running_mean, torch.zeros(3).double())
    return type(caught.value).__name__


def failing_loader(rank: int) -> Iterator[Tensor]:
    yield torch.randn(2, 3, 5, 4, dtype=torch.float64)
    if rank:
        raise OSError("no such file")
    yield torch.randn(2, 3, 5, 4, dtype=torch.float64)


def test_a_loader_that_raises_ends_all_ranks(ranks: RankPool) -> None:
    """With its own error there and its words elsewhere; nothing has changed."""
    assert ranks.run(2, _one_fails) == ["RuntimeError", "OSError"]
