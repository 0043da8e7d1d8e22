"""The other initialisations: against their definitions, against PEFT, and what all promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geoscope.adapters.factors import LoraFactors
from geoscope.adapters.facts import FACTS
from geoscope.adapters.lora import lora
from geoscope.adapters.milora import milora
from geoscope.adapters.olora import olora
from geoscope.adapters.pissa import pissa
from geoscope.adapters.table import INITIALISATIONS, starts_on_base
from geoscope.errors import NumericsError, OptionError
from geoscope.records import Status
from tests.helpers.matrices import DTYPES, gaussian, with_spectrum
from tests.helpers.oracle_initial import part, qr_part

every_one = pytest.mark.parametrize("name", INITIALISATIONS)
SHAPES = [(72, 40), (40, 72), (48, 48)]


def initial(found: LoraFactors) -> np.ndarray:
    return found.scaling * (found.B.double() @ found.A.double()).numpy()


def assert_close(found: np.ndarray, truth: np.ndarray, tolerance: float = 1e-6) -> None:
    assert np.linalg.norm(found - truth) <= tolerance * np.linalg.norm(truth)


# --- definitions --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_the_stated_parts(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = gaussian(*shape, seed=1).to(dtype)
    dense = W.double().numpy()
    for alpha in (None, 5.0, 20.0):  # the scaling cancels, but in OLoRA's
        assert_close(initial(pissa(W, 5, alpha=alpha)), part(dense, slice(0, 5)))
        assert_close(initial(milora(W, 5, alpha=alpha)), part(dense, slice(-5, None)))
        found = olora(W, 5, alpha=alpha)
        assert_close(initial(found), found.scaling * qr_part(dense, 5))


def test_the_tail_is_exact() -> None:
    """To 1e-8 of itself, though it is a thousandth of the whole."""
    W = with_spectrum(200, 160, np.geomspace(1, 1e-3, 160), seed=2)
    found = milora(W, 6)
    truth = part(W.numpy(), slice(-6, None))
    # the factors are rounded to fp32
    assert_close(initial(found), truth, 1e-7)


def test_lora_starts_from_nothing() -> None:
    W = gaussian(60, 50, seed=3)
    one, two, other = lora(W, 4), lora(W, 4), lora(W, 4, seed=1)
    assert torch.equal(one.A, two.A)
    assert not torch.equal(one.A, other.A)
    assert not one.B.any()
    assert float(one.A.abs().max()) <= 50**-0.5
    assert float(one.A.std()) == pytest.approx((3 * 50) ** -0.5, rel=0.15)
    assert one.status["head_energy"] == Status.ZERO_UPDATE
    assert one.facts["relative_norm"] == 0.0


# --- PEFT ---------------------------------------------------------------------------------------


def by_peft(W: Tensor, how: str, r: int, alpha: int) -> tuple[Tensor, Tensor, Tensor]:
    """lora_B, lora_A and the base weight after PEFT has initialised them."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
    model[0].weight.data = W.clone()  # pyright: ignore
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights=how)
    layer = peft.get_peft_model(model, config).base_model.model[0]  # pyright: ignore
    return (
        layer.lora_B["default"].weight.data,  # pyright: ignore
        layer.lora_A["default"].weight.data,  # pyright: ignore
        layer.base_layer.weight.data,  # pyright: ignore
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", ["pissa", "olora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_peft_initialises_alike_up_to_sign(shape: tuple[int, int], how: str) -> None:
    spectrum = np.geomspace(2, 0.1, min(shape))
    W = with_spectrum(*shape, spectrum, seed=4).float()
    B, A, base = by_peft(W, how, 6, 18)
    found = INITIALISATIONS[how](W, 6, alpha=18)
    signs = torch.sign((found.B * B).sum(0))
    tolerance = 2e-5  # of fp32 SVDs over these gaps
    torch.testing.assert_close(found.B * signs, B, atol=tolerance, rtol=0)
    torch.testing.assert_close(found.A * signs[:, None], A, atol=tolerance, rtol=0)
    residual = W - found.scaling * (found.B @ found.A)
    torch.testing.assert_close(residual, base, atol=tolerance, rtol=0)


# --- what all promise ---------------------------------------------------------------------------


@every_one
@pytest.mark.parametrize("shape", [*SHAPES, (30, 5), (5, 30)])
@pytest.mark.parametrize("rank", [1, 5])
def test_shapes_dtypes_ids(name: str, shape: tuple[int, int], rank: int) -> None:
    W = gaussian(*shape, seed=5).bfloat16()
    found = INITIALISATIONS[name](W, rank)
    assert found.B.shape == (shape[0], rank) and found.A.shape == (rank, shape[1])
    assert found.rank == rank and found.scaling == 2.0
    for factor in (found.B, found.A):
        assert factor.dtype == torch.float32
        assert factor.is_contiguous()
        assert bool(torch.isfinite(factor).all())
    assert tuple(found.facts) == FACTS
    missing = {key for key, value in found.facts.items() if value is None}
    assert missing == {key for key, status in found.status.items() if status.is_null}
    assert set(found.nulls) <= set(FACTS)
    assert set(found.method) <= {"spectral", "masked", "tail"}


@every_one
def test_norms_and_head_energy_are_those_of_the_product(name: str) -> None:
    W = gaussian(64, 40, seed=6)
    found = INITIALISATIONS[name](W, 4)
    product, dense = initial(found), W.numpy()
    norm = float(np.linalg.norm(product))
    assert found.facts["relative_norm"] == pytest.approx(norm / np.linalg.norm(dense), rel=1e-6)
    if norm > 0:
        V = np.linalg.svd(dense)[2][:4]
        head = float(((product @ V.T) ** 2).sum()) / norm**2
        assert found.facts["head_energy"] == pytest.approx(head, abs=1e-7)
        assert found.nulls["head_energy"] == 4 / 40


def test_head_energy_of_tails_that_reach_the_head() -> None:
    W = gaussian(12, 9, seed=7)
    for r in (4, 5, 7, 9):
        product = initial(milora(W, r))
        V = np.linalg.svd(W.numpy())[2][:r]
        head = float(((product @ V.T) ** 2).sum() / (product**2).sum())
        assert milora(W, r).facts["head_energy"] == pytest.approx(head, abs=1e-7)


@every_one
def test_same_input_same_bytes(name: str) -> None:
    W = gaussian(64, 48, seed=8).bfloat16()
    one, two = INITIALISATIONS[name](W, 4), INITIALISATIONS[name](W.clone(), 4)
    assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)
    assert one.facts == two.facts


@every_one
def test_alpha_sets_the_scaling(name: str) -> None:
    W = gaussian(20, 16, seed=9)
    assert INITIALISATIONS[name](W, 4, alpha=2).scaling == 0.5
    for alpha in (0, -4, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="alpha is"):
            INITIALISATIONS[name](W, 4, alpha=alpha)


@every_one
def test_what_cannot_be_initialised_is_said_in_one_line(name: str) -> None:
    method, W = INITIALISATIONS[name], gaussian(12, 8, seed=10)
    broken = W.clone()
    broken[0, 0] = float("nan")
    offers: list[tuple[Tensor, int, type[Exception], str]] = [
        (W, 9, OptionError, "rank 9 does not fit a 12×8 matrix"),
        (broken, 2, NumericsError, "1 of 96 entries are NaN"),
        (W[0], 2, NumericsError, "is not a matrix"),
        (W.to(torch.float8_e4m3fn), 2, NumericsError, "is not a matrix"),
    ]
    if name != "lora":
        offers.append(
            (torch.zeros(12, 8), 2, NumericsError, "every entry of a 12×8 matrix is zero")
        )
    for weights, rank, error, message in offers:
        with pytest.raises(error, match=message) as caught:
            method(weights, rank)
        assert "\n" not in str(caught.value)


@every_one
def test_an_option_of_another_initialisation_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} does not take niter"):
        INITIALISATIONS[name](gaussian(8, 8, seed=1), 2, niter=4)


@every_one
def test_the_table_holds_the_defaults_of_the_functions(name: str) -> None:
    import inspect

    parameters = inspect.signature(INITIALISATIONS[name].function).parameters
    assert list(parameters)[:3] == ["W", "rank", "alpha"]
    keywords = {key: one.default for key, one in list(parameters.items())[3:]}
    assert keywords == dict(INITIALISATIONS[name].options)
    assert INITIALISATIONS[name].doc


@every_one
def test_needs_a_layout_exactly_if_it_moves_the_weights(name: str) -> None:
    product = initial(INITIALISATIONS[name](gaussian(16, 12, seed=2), 3))
    assert bool(product.any()) == INITIALISATIONS[name].needs_layout


def test_a_tail_of_zeros_is_noted() -> None:
    W = with_spectrum(20, 16, np.r_[np.linspace(2, 1, 14), 0.0, 0.0], seed=3)
    assert milora(W, 4).notes == ("2 of the last 4 singular values are zero to rounding",)


# --- devices ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_one
def test_devices_agree(name: str) -> None:
    """Its CPU twin is every other test here."""
    W = with_spectrum(600, 520, np.geomspace(1, 1e-2, 520), seed=11).bfloat16()
    here, there = INITIALISATIONS[name](W, 8), INITIALISATIONS[name](W.cuda(), 8)
    assert there.A.is_cuda and there.B.is_cuda
    truth = initial(here)
    found = there.scaling * (there.B.cpu().double() @ there.A.cpu().double()).numpy()
    assert np.linalg.norm(found - truth) <= 1e-6 * np.linalg.norm(truth)
    for key, value in here.facts.items():
        assert there.facts[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key


@every_one
def test_a_start_leaves_the_base_where_its_product_is_zero(name: str) -> None:
    found = INITIALISATIONS[name](gaussian(24, 16, seed=8), 4)
    assert starts_on_base(name) == (not initial(found).any())


def test_a_method_that_is_not_known_is_not_said_to_start_on_its_base() -> None:
    assert not any(map(starts_on_base, ("nosuch", None, ["lora"])))
