"""The loss of every backend is its formula, with gradients of the features and of the temperature."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.autograd import gradcheck

from signal_reid import ops
from signal_reid.ops import gramian_contrastive_loss
from signal_reid.ops.reference import gramian as volumes_by_formula

OPERATOR = "gramian_loss"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCHES = st.sampled_from([1, 2, 5, 33])
CHANNELS = st.sampled_from([8, 13, 127, 128, 516])


class Volume(torch.autograd.Function):
    """The volumes with the oracle's gradient, so that `formula` has one where a volume is 0."""

    @staticmethod
    def forward(ctx, anchor, *others):
        ctx.save_for_backward(anchor, *others)
        return volumes_by_formula.forward(anchor, others)

    @staticmethod
    def backward(ctx, grad):
        anchor, *others = ctx.saved_tensors
        return volumes_by_formula.backward(grad, anchor, tuple(others))


def formula(features, temperature, label_smoothing=0.1):
    """Two cross-entropies by PyTorch's own function."""
    anchor, *others = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=2).unbind(1)
    logits = Volume.apply(anchor, *others) / -temperature
    losses = [
        F.cross_entropy(lines, torch.arange(len(lines), device=lines.device), label_smoothing=label_smoothing)
        for lines in (logits, logits.T)
    ]
    return (losses[0] + losses[1]) / 2


def results(loss, features, temperature, **settings):
    """Loss, gradient of the features, gradient of the temperature."""
    leaves = features.detach().requires_grad_(), temperature.detach().requires_grad_()
    value = loss(*leaves, **settings)
    return value.detach(), *torch.autograd.grad(value, leaves)


def assert_equals_formula(features, temperature=0.07, rtol=1e-4, **settings):
    """Nearly the results in fp64. The gradient of the temperature sums differences of volumes, which are rounded, and
    divides them by the temperature's square: at 0.07, PyTorch's own formula in fp32 misses it by up to 2.4e-5."""
    rounding = 4 * 2**-24 / min(temperature, 1.0) ** 2
    temperature = torch.tensor(temperature)
    exact = results(formula, features.double(), temperature.double(), **settings)
    got = results(gramian_contrastive_loss, features, temperature, **settings)
    # One sample's softmax less its target is 0 but for rounding.
    absolute = (1e-6, 1e-6 * (len(features) == 1), max(1e-6, rounding))
    for value, wanted, nearly in zip(got, exact, absolute, strict=True):
        assert value.shape == wanted.shape
        assert (value.double() - wanted).abs().max() <= rtol * wanted.abs().max() + nearly


def test_equals_the_formula_at_any_size(backend):
    def check(B, M, C, smoothing):
        if backend.interpreted and B * B * C > 20_000:
            B = 5  # the interpreter is slow
        assert_equals_formula(torch.randn(B, M, C) * 3, label_smoothing=smoothing)

    backend.for_all(check, B=BATCHES, M=st.integers(2, 5), C=CHANNELS, smoothing=st.sampled_from([0.0, 0.1, 0.3]))


def test_gradcheck():
    features = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for choice in ("reference", "auto"):
        with ops.use_backend(choice):
            for smoothing in (0.0, 0.3):
                assert gradcheck(gramian_contrastive_loss, (features, temperature, smoothing))


@pytest.fixture
def limits(backend, monkeypatch):
    """A batch beyond which a backend takes other ways; the interpreter's is lowered, so that a small one is beyond."""
    if backend.interpreted:
        from signal_reid.ops.triton import gramian, gramian_loss

        monkeypatch.setattr(gramian, "MANY_BLOCKS", 1)
        monkeypatch.setattr(gramian, "WIDEST_BASIS", 32)
        monkeypatch.setattr(gramian_loss, "ONE_BLOCK", 8)
        return 37
    return 353


@pytest.mark.parametrize("M", [2, 3])
def test_a_large_batch_equals_the_formula(limits, M):
    assert_equals_formula(torch.randn(limits, M, 12))


def test_a_large_batch_of_five_modalities_equals_the_formula(backend, limits):
    assert_equals_formula(torch.randn(min(limits, 37), 5, 20))


def test_any_strides(backend):
    assert_equals_formula(torch.randn(5, 7, 32)[:, 1:4])
    assert_equals_formula(torch.randn(5, 3, 129)[..., 1:])  # rows off 16 bytes
    assert_equals_formula(torch.randn(3, 5, 32).transpose(0, 1))
    assert_equals_formula(torch.randn(5, 3, 64)[..., ::2])
    assert_equals_formula(torch.randn(5, 32, 3).transpose(1, 2))


def test_lengths_do_not_matter(backend):
    features = torch.randn(5, 3, 32)
    loss, of_features, of_temperature = results(gramian_contrastive_loss, features, torch.tensor(0.07))
    for factor in (2.0**-30, 2.0**30):
        scaled = results(gramian_contrastive_loss, features * factor, torch.tensor(0.07))
        assert torch.allclose(scaled[0], loss)
        assert torch.allclose(scaled[1] * factor, of_features, atol=1e-6)
        assert torch.allclose(scaled[2], of_temperature, rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0, 30.0])
def test_any_temperature(backend, temperature):
    assert_equals_formula(torch.randn(6, 3, 64), temperature, rtol=5e-4 if temperature == 0.01 else 1e-4)


def test_the_temperature_is_a_number_or_a_tensor_of_one(backend):
    features = torch.randn(4, 3, 32)
    loss = gramian_contrastive_loss(features, torch.tensor(0.1))
    for other in (0.1, torch.tensor([0.1]), torch.tensor(0.1, dtype=torch.float64)):
        assert torch.allclose(gramian_contrastive_loss(features, other), loss)
    temperature = torch.tensor([0.1], requires_grad=True)
    (grad,) = torch.autograd.grad(gramian_contrastive_loss(features, temperature), temperature)
    assert grad.shape == (1,)
    with pytest.raises(ValueError, match=r"temperature must be a number or a scalar tensor, got shape \(2,\)"):
        gramian_contrastive_loss(features, torch.ones(2))


def test_only_what_needs_a_gradient_gets_one(backend):
    features, temperature = torch.randn(4, 3, 32), torch.tensor(0.07)
    both = results(gramian_contrastive_loss, features, temperature)
    for leaf, wanted in zip((features, temperature), both[1:], strict=True):
        leaf.requires_grad_()
        (got,) = torch.autograd.grad(gramian_contrastive_loss(features, temperature), leaf)
        leaf.requires_grad_(False)
        assert torch.equal(got, wanted)
    assert not gramian_contrastive_loss(features, temperature).requires_grad


def test_the_gradient_of_the_loss_is_passed_on(backend):
    features = torch.randn(4, 3, 32)
    _, *once = results(gramian_contrastive_loss, features, torch.tensor(0.07))
    _, *thrice = results(lambda *x: 3 * gramian_contrastive_loss(*x), features, torch.tensor(0.07))
    for a, b in zip(once, thrice, strict=True):
        assert torch.allclose(3 * a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_is_widened_first(backend, dtype):
    features = torch.randn(4, 3, 64).to(dtype)
    loss, of_features, of_temperature = results(gramian_contrastive_loss, features, torch.tensor(0.07))
    wide = results(gramian_contrastive_loss, features.float(), torch.tensor(0.07))
    assert torch.equal(loss, wide[0])
    assert torch.equal(of_features, wide[1].to(dtype))
    assert torch.equal(of_temperature, wide[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_of_strided_tokens_is_as_close_as_plain_pytorch(backend, dtype):
    def ours(tokens, temperature):
        return gramian_contrastive_loss(ops.mean_tokens(tokens), temperature)

    def plain(tokens, temperature):
        return formula(tokens.to(torch.promote_types(tokens.dtype, torch.float32)).mean(2), temperature)

    tokens, temperature = torch.randn(6, 3, 18, 40).to(dtype)[:, :, 1:], torch.tensor(0.07)
    exact = results(plain, tokens.double(), temperature.double())
    by_plain, got = (results(loss, tokens, temperature) for loss in (plain, ours))
    for value, of_plain, wanted in zip(got, by_plain, exact, strict=True):
        assert value.dtype == of_plain.dtype
        error, allowed = ((x - wanted).abs().max() for x in (value, of_plain))
        assert error <= (1e-4 * wanted.abs().max() if value.dtype == torch.float32 else 2 * allowed)


@pytest.mark.parametrize("M", [2, 3, 4, 5])
def test_volume_zero_has_a_finite_gradient(backend, M):
    features = torch.randn(4, 1, 64).expand(4, M, 64)
    loss, *gradients = results(gramian_contrastive_loss, features, torch.tensor(0.07))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    everything_alike = torch.ones(4, M, 64)
    _, *gradients = results(gramian_contrastive_loss, everything_alike, torch.tensor(0.07))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_zero_and_tiny_features_are_divided_by_no_less_than_their_floor(backend):
    features = torch.randn(5, 3, 32)
    features[1, 0], features[2, 1], features[3] = 0, 0, 0
    _, of_features, _ = results(gramian_contrastive_loss, features, torch.tensor(0.07))
    assert of_features.isfinite().all()
    assert (of_features[1, 0] == 0).all()
    assert (of_features[2, 1] == 0).all()
    features = torch.randn(5, 3, 32)
    features[1, 0] *= 1e-14
    features[2, 2] *= 1e-14
    double = features.double()
    double[1, 0], double[2, 2] = features[1, 0].double(), features[2, 2].double()
    exact = results(formula, double, torch.tensor(0.07).double())
    got = results(gramian_contrastive_loss, features, torch.tensor(0.07))
    assert torch.allclose(got[0].double(), exact[0], rtol=1e-5)
    for sample, modality in ((0, 0), (1, 0), (2, 2), (3, 1)):
        wanted = exact[1][sample, modality]
        assert (got[1][sample, modality] - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_visible(backend, poison):
    features = torch.randn(5, 3, 32)
    features[2, 1, 7] = poison
    loss, of_features, of_temperature = results(gramian_contrastive_loss, features, torch.tensor(0.07))
    assert loss.isnan()
    assert of_features.isnan().any()
    assert of_temperature.isnan()
    learned = torch.tensor(torch.nan, requires_grad=True)  # of any other the loss would refuse it
    assert gramian_contrastive_loss(torch.randn(5, 3, 32), learned).isnan()


@pytest.mark.parametrize("modality", [0, 2])
def test_a_norm_whose_square_is_beyond_fp32_is_no_silent_zero(backend, modality):
    features = torch.randn(5, 3, 32)
    features[2, modality] *= 1e20
    loss = gramian_contrastive_loss(features, 0.07)
    wanted = formula(features.double(), 0.07)
    assert loss.isnan() or torch.allclose(loss.double(), wanted, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 8), (4, 3, 0)])
def test_no_samples_and_no_channels_are_refused(backend, shape):
    with pytest.raises(ValueError, match="with B and C at least 1"):
        gramian_contrastive_loss(torch.empty(shape), 0.07)


def test_the_gradient_of_the_temperature_keeps_its_digits_in_fp32(backend):
    batch, channels = (16, 64) if backend.interpreted else (64, 512)  # the interpreter is slow
    temperature, errors = torch.tensor(0.07), []
    for seed in range(7 if backend.interpreted or backend.emulated else 20):
        torch.manual_seed(seed)
        features = torch.randn(batch, 3, channels)
        wanted = results(formula, features.double(), temperature.double())[2]
        _, slope, _ = torch.ops.signal_reid.gramian_loss(features, temperature, 0.1)
        errors.append((slope - wanted).abs() / wanted.abs())
    assert torch.stack(errors).median() <= 1e-3


def test_is_the_same_to_the_bit_whatever_the_schedule(backend):
    features = torch.randn(13, 3, 36)
    runs = []
    for seed in range(2 + backend.emulated):
        backend.reseed(seed)
        runs.append(results(gramian_contrastive_loss, features, torch.tensor(0.07)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_runs_in_fp32_under_autocast(backend):
    features = torch.randn(4, 3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gramian_contrastive_loss(features, 0.07)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, gramian_contrastive_loss(features, 0.07))


def test_second_derivative_is_refused(backend):
    features = torch.randn(4, 3, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="is not differentiable twice"):
        torch.autograd.grad(gramian_contrastive_loss(features, 0.07), features, create_graph=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the interpreter is off")
def test_the_backward_may_be_served_by_another_backend(emulated_core, rounding_interpreter):
    features, leaves = torch.randn(5, 3, 32), []
    for choice in ("cuda", "triton", "reference"):
        leaf = features.clone().requires_grad_()
        with ops.cuda.core.use(emulated_core), ops.use_backend(choice):
            loss = gramian_contrastive_loss(leaf, 0.07)
        with ops.use_backend("reference"):
            loss.backward()
        leaves.append(leaf.grad)
    assert torch.allclose(leaves[0], leaves[2], rtol=1e-4, atol=1e-6)
    assert torch.allclose(leaves[1], leaves[2], rtol=1e-4, atol=1e-6)
