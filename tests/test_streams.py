"""Streams: what is cut is a view, and a mark tells a tensor from another in its place."""

from __future__ import annotations

import torch

from inlay.streams import Owner, Stream, _Mark, joined


def entries(n: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    return tuple((torch.randn(1, 2, n, 4), torch.randn(1, 2, n, 3)) for _ in range(2))


def test_cut_and_plus_are_slices_of_the_whole() -> None:
    parts = [entries(n) for n in (3, 1, 4)]
    stream = Stream(Owner(("a",), (5,), 5), 5)
    for part in parts:
        stream = stream.plus(part)
    assert (stream.begin, stream.end) == (5, 13)
    whole = joined(Stream(), stream)
    for end in range(15):
        cut = stream.cut(end)
        assert cut.end == min(max(end, 5), 13)
        for (K, V), (K0, V0) in zip(joined(Stream(), cut), whole, strict=False):
            assert torch.equal(K, K0[:, :, : end - 5])
            assert torch.equal(V, V0[:, :, : end - 5])


def test_a_stream_of_one_part_is_joined_without_copying() -> None:
    part = entries(3)
    assert joined(Stream().plus(part), Stream()) == list(part)


def test_a_mark_is_of_one_tensor_as_it_is_now() -> None:
    t = torch.zeros(2)
    mark = _Mark(t)
    assert mark == _Mark(t)
    assert mark != _Mark(t.detach())  # the same memory and version
    t.add_(1)
    assert mark != _Mark(t)
    mark = _Mark(t)
    t.data = torch.zeros(2)
    assert mark != _Mark(t)
    mark, t = _Mark(t), torch.zeros(2)
    assert mark != mark
