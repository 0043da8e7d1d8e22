"""NExt: the published network and schedule, and what was mended: signs, seed, held-out choice."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from geoscope.errors import OptionError
from geoscope.trajectory import next_predictor
from geoscope.trajectory.backtest import PredictionProducts, backtest
from geoscope.trajectory.increments import increments_of_weights
from geoscope.trajectory.next_network import Predictor
from geoscope.trajectory.next_predictor import (
    Example,
    NextModel,
    NextOptions,
    VectorExample,
    observed,
    predict,
    predict_vectors,
    train,
)
from geoscope.trajectory.rank1 import Rank1Path
from geoscope.trajectory.spatial_rank1 import Pair, outer_moves
from tests.helpers.series import pair_products

T, H = 7, 2
STEPS = tuple(10.0 * i for i in range(T + 1))
QUICK = NextOptions(horizon=H, steps=20, width=8, rate=1e-3, last_rate=1e-4)


def path_of(updates: torch.Tensor) -> Rank1Path:
    U, S, Vh = torch.linalg.svd(updates, full_matrices=False)
    return Rank1Path(S[:, 0], S[:, 1], updates.flatten(1).norm(dim=1), U[:, :, 0], Vh[:, 0])


def weights_of(count: int = 3, seed: int = 0, m: int = 6, n: int = 5) -> dict[str, torch.Tensor]:
    """Paths (T + 1, m, n): a steady rank-1 drift and a little noise."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for i in range(count):
        A = torch.outer(torch.randn(m, generator=g), torch.randn(n, generator=g)).double()
        noise = 0.1 * torch.randn(T, m, n, generator=g).double()
        steps = torch.cat([torch.zeros(1, m, n).double(), A + noise])
        found[f"layers.{i}"] = steps.cumsum(0)
    return found


def example(path: torch.Tensor, horizon: int = H) -> Example:
    return Example(
        path_of(path[1:] - path[0]),
        path_of(path.diff(dim=0)),
        path_of(path[1 + horizon :] - path[1:-horizon]),
    )


def examples(**kwargs: int) -> dict[str, Example]:
    return {name: example(path) for name, path in weights_of(**kwargs).items()}


def states(model: NextModel) -> dict[str, torch.Tensor]:
    return {
        f"{key}.{name}": value
        for key, network in model.networks.items()
        for name, value in network.state_dict().items()
    }


def turned(path: Rank1Path, seed: int) -> Rank1Path:
    g = torch.Generator().manual_seed(seed)
    sign = (torch.randint(0, 2, (len(path), 1), generator=g) * 2 - 1).double()
    return replace(path, u=path.u * sign, v=path.v * sign)


def test_the_network_is_the_published_one() -> None:
    model = train(examples(count=1), STEPS, replace(QUICK, steps=1, width=256))
    assert sorted(model.networks) == ["sigma:1", "u:6", "v:5"]
    for fit in model.fits:
        d = int(fit.key.partition(":")[2])
        biases = 2 * (256 + d + 256 + d) + (256 + 2 * d + 256 + d)
        assert fit.parameters == 3840 * d + biases
    network = model.networks["u:6"]
    layers = [one for one in network.modules() if isinstance(one, nn.Linear | nn.ReLU)]
    shape = ["" if isinstance(one, nn.ReLU) else tuple(one.weight.shape) for one in layers]
    branch = [(256, 6), (6, 256), "", (256, 6), (6, 256)]
    assert shape == [*branch, *branch, (256, 12), (12, 256), "", (256, 12), (6, 256)]


def test_the_schedule_is_the_published_one() -> None:
    options = NextOptions(horizon=H)
    assert (options.steps, options.rate, options.last_rate) == (1000, 2e-5, 2e-6)
    assert (options.width, options.loss, options.validation) == (256, "l1", 0)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_training_is_full_batch_adamw_under_a_cosine(loss: str) -> None:
    """Against a loop as the published script writes it, checkpoint by checkpoint."""
    data = examples(count=2)
    options = replace(QUICK, steps=6, validation=0.0, loss=loss)
    start = train(data, STEPS, replace(options, rate=1e-30, last_rate=1e-30, steps=1))
    network = start.networks["sigma:1"]
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.rate)
    for step in range(options.steps):
        share = (1 + math.cos(math.pi * step / options.steps)) / 2
        rate = options.last_rate + (options.rate - options.last_rate) * share
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        for t in range(T - H):
            far, near, target = (
                torch.stack([getattr(one, part).sigma[t : t + 1] for one in data.values()]).float()
                for part in ("far", "near", "target")
            )
            gap = network(far, near) - target
            ((gap.abs() if loss == "l1" else gap.square()).sum() / (T - H)).backward()
        optimizer.step()
    trained = train(data, STEPS, options).networks["sigma:1"]
    for mine, theirs in zip(trained.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


class Published(nn.Module):
    """The network as the paper writes it, layer by layer."""

    def __init__(self, d: int, width: int = 256) -> None:
        super().__init__()

        def branch(a: int, b: int, c: int) -> nn.Sequential:
            shapes = [(a, width), (width, b), (b, width), (width, c)]
            one, two, three, four = (nn.Linear(*shape) for shape in shapes)
            return nn.Sequential(one, two, nn.ReLU(), three, four)

        self.far, self.near, self.out = branch(d, d, d), branch(d, d, d), branch(2 * d, 2 * d, d)

    def forward(self, far: Tensor, near: Tensor) -> Tensor:
        return self.out(torch.cat([self.far(far), self.near(near)], -1))


@pytest.mark.parametrize("key", ["u:6", "v:5", "sigma:1"])
def test_trained_networks_are_those_of_the_published_loop(key: str) -> None:
    """Width 256; pairs of layers without a ReLU between them are taken as one where that pays."""
    data = examples()
    options = NextOptions(horizon=H, steps=40)

    def part(path: Rank1Path) -> Tensor:
        return {"u": path.u, "v": path.v, "s": path.sigma[:, None]}[key[0]]

    start = train(data, STEPS, replace(options, steps=1, rate=1e-30, last_rate=1e-30))
    network = Published(int(key.partition(":")[2]))
    with torch.no_grad():
        begun = start.networks[key].parameters()
        for mine, theirs in zip(network.parameters(), begun, strict=True):
            mine.copy_(theirs)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=2e-6)
    aligned = [next_predictor._aligned(one) for _, one in sorted(data.items())]
    far, near, target = (
        torch.cat([part(getattr(one, name))[: T - H] for one in aligned]).float()
        for name in ("far", "near", "target")
    )
    for _ in range(40):
        optimizer.zero_grad()
        ((network(far, near) - target).abs().sum() / (T - H)).backward()
        optimizer.step()
        schedule.step()
    out = train(data, STEPS, options).networks[key](far, near)
    torch.testing.assert_close(out, network(far, near), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, start.networks[key](far, near), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 40])  # layers one by one, and taken as one
@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_slopes_are_those_of_autograd(rows: int, keep: float) -> None:
    g = torch.Generator().manual_seed(3)
    network = Predictor(6, 16, g).double()
    joined = network.joined_parameters()
    far, near, aim = (torch.randn(rows, 6, generator=g).double() for _ in range(3))
    assert joined.grad is not None
    joined.grad.fill_(0.5)
    network.differentiate(far, near, lambda out: 2 * (out - aim), keep=keep)
    theirs = Published(6, 16).double()
    with torch.no_grad():
        for mine, other in zip(network.parameters(), theirs.parameters(), strict=True):
            other.copy_(mine)
    (theirs(far, near) - aim).square().sum().backward()
    for mine, other in zip(network.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        expected = other.grad + keep / 2
        torch.testing.assert_close(mine.grad, expected, rtol=1e-11, atol=1e-12)


def test_a_batch_in_parts_has_the_same_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(examples(), STEPS, QUICK)
    monkeypatch.setattr(next_predictor, "_PART", 24)  # two rows of six at a time
    for key, value in states(train(examples(), STEPS, QUICK)).items():
        torch.testing.assert_close(value, states(whole)[key], rtol=1e-3, atol=1e-4)


def test_same_seed_same_bytes_and_another_seed_others() -> None:
    torch.rand(3)  # whatever was drawn before
    one, two = (states(train(examples(), STEPS, QUICK)) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    before = torch.get_rng_state()
    other = states(train(examples(), STEPS, replace(QUICK, seed=1)))
    assert torch.equal(before, torch.get_rng_state())  # the caller's generator is left alone
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_signs_and_order_change_nothing() -> None:
    data = examples()
    mixed = {
        name: Example(turned(e.far, 1), turned(e.near, 2), turned(e.target, 3))
        for name, e in reversed(list(data.items()))
    }
    straight = predict(train(data, STEPS, QUICK), data)
    for name, pair in predict(train(mixed, STEPS, QUICK), mixed).items():
        assert torch.equal(pair.dense(), straight[name].dense())


def test_held_out_checkpoints_choose_the_number_of_steps() -> None:
    model = train(examples(), STEPS, replace(QUICK, steps=60, validation=0.2))
    for fit in model.fits:
        assert 1 <= fit.steps <= 60
        assert fit.held_out is not None and fit.zero is not None
        assert fit.last < fit.first
        assert fit.rows == 3 * (T - H)
    full = train(examples(), STEPS, replace(QUICK, validation=0.0))
    assert all((fit.steps, fit.held_out) == (20, None) for fit in full.fits)


def test_with_one_checkpoint_tensors_are_held_out() -> None:
    steps = STEPS[: H + 2]
    data = {name: e.observed(H + 1, H) for name, e in examples(count=6).items()}
    held = replace(QUICK, validation=0.2)
    model = train(data, steps, held)
    assert all(fit.held_out is not None for fit in model.fits)
    alone = train({"layers.0": data["layers.0"]}, steps, held)
    assert all(fit.held_out is None for fit in alone.fits)


def test_a_steady_drift_is_learned() -> None:
    """In sample, with more rate than published: the pair points along the drift."""
    paths = weights_of(count=2)
    data = {name: example(path) for name, path in paths.items()}
    options = replace(QUICK, steps=600, width=32, rate=3e-3, validation=0.0)
    for name, pair in predict(train(data, STEPS, options), data).items():
        target = paths[name][-1] - paths[name][-1 - H]
        cosine = float((pair.dense() * target).sum() / pair.dense().norm() / target.norm())
        assert cosine > 0.9
        assert pair.sigma == pytest.approx(float(target.norm()), rel=0.3)
        assert float(pair.u.norm()) == pytest.approx(1)


def test_vectors_share_the_network_of_their_length() -> None:
    g = torch.Generator().manual_seed(9)
    path = torch.randn(T + 1, 6, generator=g).double().cumsum(0)
    vector = VectorExample.of(path, H)
    assert torch.equal(vector.target[0], path[1 + H] - path[1])
    assert torch.equal(vector.far, path[1:] - path[0])
    assert torch.equal(vector.near, path[1:] - path[:-1])
    known = observed({"norm": vector}, 4, QUICK)["norm"]
    assert (len(known.far), len(known.near), len(known.target)) == (4, 4, 4 - H)
    model = train(examples(), STEPS, QUICK, vectors={"norm": vector})
    assert sorted(model.networks) == ["sigma:1", "u:6", "v:5"]
    assert {fit.key: fit.rows for fit in model.fits}["u:6"] == 4 * (T - H)
    assert predict_vectors(model, {"norm": vector})["norm"].shape == (6,)
    with pytest.raises(OptionError, match="no network for"):
        predict_vectors(model, {"long": VectorExample(*(torch.zeros(n, 9) for n in (T, T, T - H)))})


def guess_at(origin: int, data: dict[str, Example]) -> dict[str, Pair]:
    """What networks say that were trained on what was known at an origin."""
    seen = observed(data, origin, QUICK)
    return predict(train(seen, STEPS[: origin + 1], QUICK), seen)


def test_it_stands_in_the_backtest_and_sees_no_future() -> None:
    paths = weights_of()
    data = {name: example(path) for name, path in paths.items()}
    inc = {name: increments_of_weights(STEPS, list(path)) for name, path in paths.items()}
    guesses = {o: guess_at(o, data) for o in range(H + 1, T)}
    rows = []
    for name, path in paths.items():
        updates = path[1:] - path[0]
        products = {
            o: pair_products(g[name].u[None], g[name].v[None], updates)[:, 0, 0]
            for o, g in guesses.items()
        }
        rows.append(outer_moves(inc[name], {o: g[name] for o, g in guesses.items()}, products, H))
    moves = PredictionProducts(torch.stack([a for a, _ in rows]), torch.stack([e for _, e in rows]))
    test = backtest(inc, others={"next": moves})
    name, place = "layers.1", test.pairs.index((5, 7))
    predicted = paths[name][5] + guesses[5][name].dense()  # two checkpoints ahead: c = 1
    direct = float((predicted - paths[name][7]).square().sum())
    assert float(test.error("next")[1, place]) == pytest.approx(direct)
    changed = {name: torch.cat([path[:6], path[6:] + 9]) for name, path in paths.items()}
    later = guess_at(5, {name: example(path) for name, path in changed.items()})
    assert torch.equal(later[name].dense(), guesses[5][name].dense())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    """The twin of the tests above: near the CPU's prediction."""
    data = examples()
    here = predict(train(data, STEPS, QUICK), data)
    there = predict(train(data, STEPS, replace(QUICK, device="cuda")), data)
    for name, pair in here.items():
        torch.testing.assert_close(there[name].dense(), pair.dense(), rtol=1e-2, atol=1e-3)


def test_what_is_refused() -> None:
    data = examples(count=1)
    with pytest.raises(OptionError, match="equal distances"):
        train(data, (*STEPS[:-1], 75.0), QUICK)
    with pytest.raises(OptionError, match="need 7, 7 and 4"):
        train(data, STEPS, replace(QUICK, horizon=3))
    with pytest.raises(OptionError, match="no tensor"):
        train({}, STEPS, QUICK)
    with pytest.raises(OptionError, match="neither l1 nor l2"):
        NextOptions(horizon=1, loss="huber")
    with pytest.raises(OptionError, match="needs horizon"):
        NextOptions(horizon=0)
