"""Laws of `inlay.storage.arena`: pieces are apart, and one mapping serves round after round."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.storage.arena import _WORTHWHILE, Arena, bytes_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings are kept on Linux only")


def weights() -> list[Tensor]:
    half = torch.randn(3, 5).bfloat16()
    return [torch.randn(7, 3), half, torch.randn(4, 4).t(), torch.randn(1 << 16)]


def copied(room: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
    return room(W).copy_(W)


def test_pieces_are_like_what_they_are_for_and_apart() -> None:
    given = weights()
    room = Arena().room(_WORTHWHILE)
    copies = [copied(room, W) for W in given]
    for W, kept in zip(given, copies, strict=True):
        assert kept.dtype == W.dtype
        assert kept.stride() == W.stride()
        assert torch.equal(kept, W)
        assert kept.untyped_storage().nbytes() == W.nbytes  # so a file of them all repeats nothing


def test_no_piece_is_too_small() -> None:
    room = Arena().room(_WORTHWHILE)
    assert room(torch.empty(0, 3)).shape == (0, 3)
    assert room(torch.tensor(1.0)).shape == ()


def test_the_mapping_serves_again_once_every_piece_is_gone() -> None:
    arena, W = Arena(), torch.randn(1000)
    first = copied(arena.room(_WORTHWHILE), W)
    mapping = arena._mapping
    second = copied(arena.room(_WORTHWHILE), W)
    assert arena._mapping is not mapping  # the first still lives
    first.zero_()
    assert torch.equal(second, W)

    mapping, view = arena._mapping, second[10:]
    del second
    third = copied(arena.room(_WORTHWHILE), W)
    assert arena._mapping is not mapping  # a view of it lives
    third.zero_()
    assert torch.equal(view, W[10:])

    mapping = arena._mapping
    del third
    assert torch.equal(copied(arena.room(_WORTHWHILE), W), W)
    assert arena._mapping is mapping
    assert torch.equal(copied(arena.room(2 * _WORTHWHILE), W), W)
    assert arena._mapping is not mapping  # more than it holds


def test_pieces_outlive_their_arena() -> None:
    W = torch.randn(1000)
    kept = copied(Arena().room(_WORTHWHILE), W)
    assert torch.equal(kept, W)


def test_a_copied_model_has_an_arena_of_its_own() -> None:
    arena = Arena()
    kept = copied(arena.room(_WORTHWHILE), torch.ones(8))
    for other in (copy.deepcopy(arena), copy.copy(arena), pickle.loads(pickle.dumps(arena))):
        assert copied(other.room(_WORTHWHILE), torch.zeros(8)).data_ptr() != kept.data_ptr()
    assert kept.sum() == 8


def test_what_is_too_much_has_memory_of_its_own() -> None:
    room = Arena().room(_WORTHWHILE)
    big = torch.arange(_WORTHWHILE // 4 + 1)
    assert bytes_of(big) > _WORTHWHILE
    assert torch.equal(copied(room, big), big)
    assert torch.equal(copied(room, torch.arange(3)), torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_model_comes_back_from_one_mapping(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("inlay.storage.arena._WORTHWHILE", 1)
    net = nn.Sequential(nn.Linear(64, 65), nn.Linear(65, 64)).to(dtype)
    config = inlay.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    model = inlay.get_peft_model(net, config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    mappings = set()
    for _ in range(20):
        model.merge_adapter()
        assert not torch.equal(net[0].weight, before["base_model.model.0.base_layer.weight"])
        mappings.add(model.base_model._arena._mapping)
        model.unmerge_adapter()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len(mappings) == 1
    assert None not in mappings
