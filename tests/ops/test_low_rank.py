"""low_rank against its reference: values, gradients of both orders, dtypes, and every way of being run."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from inlay.ops import low_rank as module
from inlay.ops.dropout import draw_mask
from inlay.ops.low_rank import low_rank, reference

INS, OUTS, R = 12, 10, 3
LEADING = [(), (5,), (2, 3), (2, 2, 2), (0,), (2, 0)]


@pytest.fixture(autouse=True)
def _function(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are tests of the autograd function: tensors as small as theirs would go by plain torch."""
    monkeypatch.setattr(module, "_FEW", 0)


def operands(leading: tuple[int, ...] = (4,), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(*leading, INS), (*leading, OUTS), (R, INS), (OUTS, R)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def gradients(function, tensors: list[Tensor], *args, leaf=False, **kwargs) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    # A leaf may not be written to, and a layer's output is none.
    out = function(leaves[0], leaves[1] if leaf else leaves[1] * 1, *leaves[2:], *args, **kwargs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


def far(found: Tensor, expected: Tensor) -> float:
    scale = expected.double().norm().clamp(min=1e-30)
    return ((found.double() - expected.double()).norm() / scale).item() if expected.numel() else 0.0


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("scale", [2.0, torch.tensor(0.5)], ids=["float", "tensor"])
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_it_equals_the_reference_with_and_without_gradients(leading, scale, fresh):
    tensors = operands(leading)
    expected = gradients(reference, tensors, scale)
    found = gradients(low_rank, tensors, scale, h_is_fresh=fresh)
    assert max(far(f, e) for f, e in zip(found, expected, strict=True)) < 1e-6
    x_before = tensors[0].clone()
    with torch.no_grad():
        out = low_rank(tensors[0], tensors[1].clone(), *tensors[2:], scale, h_is_fresh=fresh)
    assert far(out, expected[0]) < 1e-6
    assert torch.equal(tensors[0], x_before)


@pytest.mark.parametrize("tokens", [1, 4])
def test_h_is_written_to_only_where_the_caller_allows_it(tokens):
    x, h, down, up = (t.detach() for t in operands((tokens,)))
    before = h.clone()
    out = low_rank(x, h, down, up, 1.0)
    assert torch.equal(h, before)
    assert low_rank(x, h, down, up, 1.0, h_is_fresh=True) is h
    assert far(h, out) < 1e-6


@pytest.mark.parametrize("record", [False, True])
def test_expanded_and_strided_tensors(record):
    x, _, down, up = operands((2, 3))
    x = x.transpose(0, 1)
    h = torch.randn(OUTS).expand(3, 2, OUTS)
    before = h.clone()
    with torch.set_grad_enabled(record):
        out = low_rank(x, h, down, up, 1.5, h_is_fresh=True)
    assert far(out, reference(x, h, down, up, 1.5)) < 1e-6
    assert torch.equal(h, before)


@pytest.mark.parametrize("fresh", [False, True])
def test_bias_of_the_second_factor(fresh):
    tensors = [*operands(), torch.randn(OUTS, requires_grad=True)]

    def run(function):  # type: ignore[no-untyped-def]
        return lambda x, h, down, up, bias: function(x, h, down, up, 2.0, 0.0, bias, h_is_fresh=fresh)

    expected, found = gradients(run(reference), tensors), gradients(run(low_rank), tensors)
    assert max(far(f, e) for f, e in zip(found, expected, strict=True)) < 1e-6
    with torch.no_grad():
        assert far(run(low_rank)(tensors[0], tensors[1] * 1, *tensors[2:]), expected[0]) < 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_first_and_second_derivatives(dropout, with_bias):
    tensors = operands((2, 2), torch.float64)
    tensors += [torch.randn(OUTS, dtype=torch.float64, requires_grad=True)] if with_bias else []
    mask = draw_mask((2, 2, INS), dropout)

    def run(x, h, down, up, bias=None):  # type: ignore[no-untyped-def]
        return low_rank(x, h, down, up, 1.7, dropout, bias, mask=mask)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_second_derivatives_survive_a_widened_backward():
    x, h, down, up = operands((2 * module._PIECE + 3,))
    narrow = [x.detach().bfloat16().requires_grad_(), h.detach().bfloat16().requires_grad_(), down, up]

    def second(function) -> Tensor:  # type: ignore[no-untyped-def]
        (first,) = torch.autograd.grad(function(*narrow, 1.0).float().square().sum(), down, create_graph=True)
        return torch.autograd.grad(first.square().sum(), up)[0]

    assert far(second(low_rank), second(reference)) < 2e-2


@pytest.mark.parametrize("needed", range(4))
def test_only_what_is_asked_for_gets_a_gradient(needed):
    tensors = [t.detach().requires_grad_(i == needed) for i, t in enumerate(operands())]
    low_rank(*tensors, 2.0).sum().backward()
    given = tensors[needed].grad
    assert [t.grad is not None for t in tensors] == [i == needed for i in range(4)]
    tensors[needed].grad = None
    reference(*tensors, 2.0).sum().backward()
    assert far(given, tensors[needed].grad) < 1e-6


@pytest.mark.parametrize("tokens", [2, 700])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_narrow_activations_with_fp32_factors(narrow, tokens):
    exact = operands((tokens,), torch.float64)
    exact[:2] = [t.detach().to(narrow).double().requires_grad_() for t in exact[:2]]
    exact[2:] = [t.detach().float().double().requires_grad_() for t in exact[2:]]
    dtypes = [narrow, narrow, torch.float32, torch.float32]
    tensors = [t.detach().to(d).requires_grad_() for t, d in zip(exact, dtypes, strict=True)]
    truth = gradients(reference, exact, 0.5)
    found, plain = gradients(low_rank, tensors, 0.5), gradients(reference, tensors, 0.5)
    assert [t.dtype for t in found] == [narrow, *dtypes]
    rounding = torch.finfo(narrow).eps
    assert all(far(f, t) < 1.2 * rounding for f, t in zip(found[:2], truth[:2], strict=True))
    # The factors' gradients are as exact as those of the widened formula, with the same rounded weights of the sum;
    # many tokens in bfloat16 add the rounding of their products.
    allowed = rounding if narrow == torch.bfloat16 and tokens == 700 else 2e-6
    assert all(far(f, p) < allowed for f, p in zip(found[3:], plain[3:], strict=True))
    with torch.no_grad():
        assert far(low_rank(*tensors, 0.5), truth[0]) < 1.2 * rounding


@pytest.mark.parametrize("tokens", [0, 1, 255, 1024, 1031, 20 * 256 + 7])
def test_narrow_products_are_summed_widely(tokens):
    a, b = torch.rand(tokens, 8).bfloat16(), torch.rand(tokens, 96).bfloat16()
    exact = a.double().t() @ b.double()
    found = module._over_tokens(a, b, torch.float32)
    assert found.dtype == torch.float32
    assert far(found, exact) <= 2**-9
    if tokens > 1000:  # rounded each for itself, and not one sum as a whole
        assert far(found, exact) < 0.8 * far(torch.mm(a.t(), b), exact)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 70])
def test_the_backward_pass_of_the_weight_is_taken_in(dropout, with_bias, tokens):
    x, _, down, up = operands((2, tokens), torch.float64)
    W, bias = torch.randn(OUTS, INS, dtype=torch.float64), torch.randn(OUTS, dtype=torch.float64)
    bias = bias.requires_grad_() if with_bias else None
    mask = draw_mask(x.shape, dropout) if dropout else None

    def taken(x: Tensor, down: Tensor, up: Tensor, *bias: Tensor) -> Tensor:
        h = F.linear(x, W).detach()
        return low_rank(x, h, down, up, 1.5, dropout, *bias, mask=mask, h_is_fresh=True, W_OI=W)

    def plain(x: Tensor, down: Tensor, up: Tensor, *bias: Tensor) -> Tensor:
        return reference(x, F.linear(x, W), down, up, 1.5, dropout, *bias, mask=mask)

    leaves = [x, down, up] if bias is None else [x, down, up, bias]
    weights = torch.randn(2, tokens, OUTS, dtype=torch.float64)
    expected = torch.autograd.grad((plain(*leaves) * weights).sum(), leaves)
    for again in (False, True):
        found = torch.autograd.grad((taken(*leaves) * weights).sum(), leaves, create_graph=again)
        assert max(far(f, e) for f, e in zip(found, expected, strict=True)) < 1e-12
    if tokens == 1:
        assert torch.autograd.gradcheck(taken, leaves)
        assert torch.autograd.gradgradcheck(taken, leaves)


def test_batched_gradients_go_through_the_function(monkeypatch):
    monkeypatch.setattr(module, "_FEW", 0)
    x, h, down, up = operands((4,), torch.float64)
    out = low_rank(x, h, down, up, 2.0)
    basis = torch.eye(out.numel(), dtype=torch.float64).view(-1, *out.shape)
    found = torch.autograd.grad(out, down, basis, is_grads_batched=True, retain_graph=True)[0]
    expected = torch.stack([torch.autograd.grad(out, down, row, retain_graph=True)[0] for row in basis])
    assert far(found, expected) < 1e-12


@pytest.mark.parametrize(
    "change",
    [
        lambda x, W, b, down: (x, W.clone().requires_grad_(), b, down),
        lambda x, W, b, down: (x, W, b.clone().requires_grad_(), down),
        lambda x, W, b, down: (x.double(), W, b, down),
        lambda x, W, b, down: (x[:1], W, b, down),
        lambda x, W, b, down: (x, W, b, down.as_subclass(Marked)),
    ],
    ids=["trained-W", "trained-b", "another-dtype", "few", "subclass"],
)
def test_what_is_taken_in_is_a_frozen_layer_of_many_numbers(monkeypatch, change):
    monkeypatch.setattr(module, "_FEW", 10 * OUTS)
    x, _, down, _ = operands((11,))
    W, b = torch.randn(OUTS, INS), torch.randn(OUTS)
    assert module.takes_in(x, W, b, down)
    assert not module.takes_in(*change(x, W, b, down))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not module.takes_in(x, W, b, down)
    with TorchDispatchMode():
        assert not module.takes_in(x, W, b, down)


@pytest.mark.parametrize("scale", [2.0, torch.tensor(0.5)], ids=["float", "tensor"])
@pytest.mark.parametrize("leading", [*LEADING, (1,)], ids=str)
def test_few_numbers_take_plain_torch(monkeypatch, leading, scale):
    monkeypatch.setattr(module, "_FEW", 1 << 17)
    monkeypatch.setattr(module, "_LowRank", None)
    tensors = operands(leading, torch.float64)
    expected = gradients(reference, tensors, scale)
    found = gradients(low_rank, tensors, scale, h_is_fresh=True)
    assert max(far(f, e) for f, e in zip(found, expected, strict=True)) < 1e-12
    if tensors[0].numel():
        assert torch.autograd.gradgradcheck(lambda *t: low_rank(*t, scale), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_for_backward_are_x_a_bit_per_element_the_middle_and_narrow_factors(dtype):
    x, h, down, up = operands((512,))
    x, h = x.detach().to(dtype), h.detach().to(dtype)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        low_rank(x, h, down, up, 1.0, 0.1)
    for known in (down, up, x):
        del saved[known.untyped_storage().data_ptr()]
    narrow = 0 if dtype == torch.float32 else (R * INS + OUTS * R) * dtype.itemsize
    assert sum(saved.values()) == 512 * INS // 8 + 512 * R * dtype.itemsize + narrow


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [False, True], ids=["backward-outside", "backward-inside"])
def test_autocast(x_dtype, inside):
    tensors = [
        t.detach().to(d).requires_grad_() for t, d in zip(operands((64,)), [x_dtype, torch.bfloat16], strict=False)
    ]
    tensors += [t.detach().requires_grad_() for t in operands()[2:]]
    results = []
    for function in (reference, low_rank):
        for t in tensors:
            t.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            out = function(*tensors, 2.0)
            if inside:
                out.sum().backward()
        if not inside:
            out.sum().backward()
        results.append([out, *(t.grad for t in tensors)])
    assert [t.dtype for t in results[1]] == [t.dtype for t in results[0]]
    assert max(far(f, e) for f, e in zip(results[1], results[0], strict=True)) < 1e-2


def test_a_forward_outside_autocast_has_its_backward_outside():
    tensors = operands((64,))
    expected = torch.autograd.grad(low_rank(*tensors, 2.0).square().sum(), tensors)
    loss = low_rank(*tensors, 2.0).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_dropout_is_the_same_dropout(reentrant):
    x, h, down, up = operands((6,))

    def layer(x: Tensor, h: Tensor) -> Tensor:
        return low_rank(x, h, down, up, 1.0, 0.5)

    torch.manual_seed(7)
    stored = torch.autograd.grad(layer(x, h).square().sum(), [x, down, up])
    torch.manual_seed(7)
    for t in (x, down, up):
        t.grad = None
    checkpoint(layer, x, h, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(stored, [x.grad, down.grad, up.grad], strict=True))


def _save_products(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_selective_checkpointing_finds_what_it_saved(dropout):
    x, _, down, up = operands((6,))
    W = torch.randn(OUTS, INS)

    def layer(x: Tensor) -> Tensor:
        return low_rank(x, F.linear(x, W), down, up, 1.0, dropout, h_is_fresh=True)

    torch.manual_seed(7)
    stored = torch.autograd.grad(layer(x).square().sum(), [x, down, up])
    torch.manual_seed(7)
    contexts = partial(create_selective_checkpoint_contexts, _save_products)
    out = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    again = torch.autograd.grad(out.square().sum(), [x, down, up])
    assert all(torch.equal(a, b) for a, b in zip(stored, again, strict=True))


def test_dropout_follows_the_seed_and_its_mask():
    x, h, down, up = operands((6,))
    torch.manual_seed(3)
    mask = draw_mask(x.shape, 0.5)
    after = torch.rand(1)
    torch.manual_seed(3)
    out = low_rank(x, h, down, up, 2.0, 0.5)
    assert torch.equal(torch.rand(1), after)
    assert far(out, reference(x, h, down, up, 2.0, 0.5, mask=mask)) < 1e-6
    assert far(out, reference(x, h, down, up, 2.0)) > 1e-2
    with torch.no_grad():
        assert far(low_rank(x, h, down, up, 2.0, 0.5, mask=mask), out) < 1e-6


def test_functorch_and_forward_mode():
    x, h, down, up = (t.detach() for t in operands((4,)))

    def loss(down: Tensor, x: Tensor, h: Tensor) -> Tensor:
        return low_rank(x, h, down, up, 2.0).square().sum()

    leaf = down.clone().requires_grad_()
    expected = torch.autograd.grad(reference(x, h, leaf, up, 2.0).square().sum(), leaf)[0]
    assert far(torch.func.grad(loss)(down, x, h), expected) < 1e-6
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(down, x, h)
    assert far(per_sample.sum(0), expected) < 1e-6
    _, tangent = torch.func.jvp(lambda d: loss(d, x, h), (down,), (down,))
    assert far(tangent, (expected * down).sum()) < 1e-5


def test_forward_mode_without_functorch():
    tensors = operands()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[2], tensors[2].detach())
        out = torch.autograd.forward_ad.unpack_dual(low_rank(*tensors[:2], dual, tensors[3], 2.0))
    assert far(out.tangent, out.primal - tensors[1]) < 1e-6  # the product is linear in its factor


class Marked(Tensor):
    """A subclass, as DTensor is one: the fused path must not see it."""


@pytest.mark.parametrize("record", [False, True])
def test_subclasses_get_the_reference(record, monkeypatch):
    x, h, down, up = operands()
    calls = []
    monkeypatch.setattr(module, "reference", lambda *a, **k: calls.append(a) or reference(*a, **k))
    with torch.set_grad_enabled(record):
        out = low_rank(x.as_subclass(Marked), h, down, up, 1.0)
        low_rank(x, h, down, up, 1.0)
    assert len(calls) == 1
    assert far(out, reference(x, h, down, up, 1.0)) < 1e-6


@pytest.mark.parametrize("record", [False, True])
def test_meta_tensors(record):
    x, h, down, up = (t.detach().to("meta").requires_grad_(record) for t in operands())
    out = low_rank(x, h, down, up, 1.0, 0.1)
    assert (out.shape, out.device.type) == (h.shape, "meta")


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_whole_equals_eager(backend):
    W = torch.randn(OUTS, INS)

    def layer(x, h, down, up):  # type: ignore[no-untyped-def]
        return low_rank(x, F.linear(x, W) + h, down, up, 2.0, h_is_fresh=True)

    torch._dynamo.reset()
    tensors = operands((8,))
    compiled = gradients(torch.compile(layer, fullgraph=True, backend=backend), tensors, leaf=True)
    assert max(far(f, e) for f, e in zip(compiled, gradients(layer, tensors), strict=True)) < 2e-6
