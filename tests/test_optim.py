"""LAMB against the reference implementation's numbers, its fast path against its slow one, schedules and groups."""

import copy
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from align_train.optim import Lamb, adamw, constant, cosine, lamb, linear

GOLDEN = Path(__file__).parent / "golden" / "lamb.npz"
CHECKED_STEPS = (1, 2, 5, 10, 50)
# The recorded run warms up for 10 steps and decays over the 50 that follow; it was stopped after 50.
DECAYED_AT = 60


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return {name: arrays[name] for name in arrays.files}


def golden_run(golden: dict[str, np.ndarray], foreach: bool) -> tuple[dict[str, Tensor], Lamb]:
    """The 11 tensors of the reference and a LAMB over them, batch norm set apart by the reference's rule."""
    weights = {str(name): nn.Parameter(torch.from_numpy(golden[f"init|{name}"].copy())) for name in golden["names"]}
    norms = [w for name, w in weights.items() if "bn/" in name]
    rest = [w for name, w in weights.items() if "bn/" not in name]
    assert len(norms) == 3
    assert len(rest) == 8
    return weights, Lamb([{"params": rest}, {"params": norms, "adapt": False}], lr=0.005, foreach=foreach)


def give_gradients(golden: dict[str, np.ndarray], weights: dict[str, Tensor], k: int) -> None:
    """Set the gradients of update k, counted from 1."""
    for name, w in weights.items():
        w.grad = torch.as_tensor(golden[f"grad|{name}"][k - 1].copy())


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("run", ["sched", "const"])
def test_golden_lamb(golden, run, foreach):
    weights, optimizer = golden_run(golden, foreach)
    schedule = LambdaLR(optimizer, linear(10, DECAYED_AT) if run == "sched" else constant(0, 50))
    rates = golden["lr_schedule" if run == "sched" else "lr_const"]
    for k in range(1, 51):
        assert optimizer.param_groups[1]["lr"] == pytest.approx(rates[k - 1], rel=1e-6, abs=0)
        give_gradients(golden, weights, k)
        optimizer.step()
        schedule.step()
        for name, w in weights.items():
            if k in CHECKED_STEPS:
                expected = torch.from_numpy(golden[f"{run}|step{k}|{name}"])
                torch.testing.assert_close(w.data, expected, rtol=0, atol=4e-7, msg=lambda m, n=name: f"{n}: {m}")
    for name, w in weights.items():
        for key, moment in (("m50", "mean"), ("v50", "square")):
            expected = torch.from_numpy(golden[f"{run}|{key}|{name}"])
            # TensorFlow takes 1 - .999 in float32, which is off by 1.3e-5 of it.
            torch.testing.assert_close(optimizer.state[w][moment], expected, rtol=4e-5, atol=1e-7)


def test_foreach_equals_the_reference(golden):
    (fast, together), (slow, one_by_one) = golden_run(golden, True), golden_run(golden, False)
    for k in range(1, 51):
        for weights, optimizer in ((fast, together), (slow, one_by_one)):
            give_gradients(golden, weights, k)
            if k % 7 == 0:  # steps then differ between tensors
                weights["dense/bias:0"].grad = None
            optimizer.step()
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-6, atol=1e-8)
        assert together.state[fast[name]]["step"] == one_by_one.state[slow[name]]["step"]
    assert together.state[fast["dense/bias:0"]]["step"] == 43


@pytest.mark.parametrize("foreach", [True, False])
def test_one_step_by_hand(foreach):
    # First step: m_hat = g, v_hat = g^2, so u = sign(g) (eps aside) + decay * w; here w = (3, 4), |w| = 5.
    def after(start: list[float], grad: list[float], **group) -> Tensor:
        w = nn.Parameter(torch.tensor(start, dtype=torch.float32))
        w.grad = torch.tensor(grad, dtype=torch.float32)
        Lamb([{"params": [w], **group}], lr=0.1, eps=1e-12, weight_decay=0.5, foreach=foreach).step()
        return w.detach()

    u = torch.tensor([1 + 1.5, -1 + 2.0])
    torch.testing.assert_close(after([3, 4], [7, -2]), torch.tensor([3.0, 4.0]) - 0.1 * 5 / u.norm() * u)
    torch.testing.assert_close(after([3, 4], [7, -2], adapt=False), torch.tensor([2.9, 4.1]))
    torch.testing.assert_close(after([0, 0], [7, -2]), torch.tensor([-0.1, 0.1]))  # norm 0: plain Adam
    torch.testing.assert_close(after([3, 4], [0, 0]), torch.tensor([2.7, 3.6]))  # gradient 0: shrinks by 1 - lr
    torch.testing.assert_close(after([3, 4], [0, 0], weight_decay=0.0), torch.tensor([3.0, 4.0]))  # u = 0: stays


@pytest.mark.parametrize("foreach", [True, False])
def test_no_gradient_means_no_step(foreach):
    with_gradient, without = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lamb([with_gradient, without], lr=0.1, foreach=foreach)
    with_gradient.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(without, torch.ones(2))
    assert without not in optimizer.state
    assert not torch.equal(with_gradient, torch.ones(2))


@pytest.mark.parametrize("foreach", [True, False])
def test_a_step_never_waits_for_the_device(foreach):
    # Tensors on "meta" have no values: reading one, as .item() or an `if` on a norm would, raises.
    weights = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((3, 2), (3,), ())]
    optimizer = Lamb([{"params": weights[:2]}, {"params": weights[2:], "adapt": False}], lr=0.1, foreach=foreach)
    for w in weights:
        w.grad = torch.empty_like(w)
    optimizer.step()
    assert [optimizer.state[w]["step"] for w in weights] == [1, 1, 1]


@pytest.mark.parametrize("foreach", [True, False])
def test_types_may_be_mixed(foreach):
    weights = [nn.Parameter(torch.full((300,), 0.5, dtype=t)) for t in (torch.float32, torch.bfloat16, torch.float64)]
    optimizer = Lamb(weights, lr=0.1, weight_decay=0.0, foreach=foreach)
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer.step()
    for w in weights:
        torch.testing.assert_close(
            w.data, torch.full_like(w, 0.45), rtol=1e-2 if w.dtype == torch.bfloat16 else 1e-5, atol=0
        )


@pytest.mark.parametrize("foreach", [True, False])
def test_resuming_is_exact(golden, foreach):
    weights, optimizer = golden_run(golden, foreach)
    schedule = LambdaLR(optimizer, linear(10, DECAYED_AT))
    for k in range(1, 51):
        if k == 21:
            file = io.BytesIO()
            names = dict(weights)
            torch.save({"w": names, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file)
        give_gradients(golden, weights, k)
        optimizer.step()
        schedule.step()

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, resumed = golden_run(golden, foreach)
    resumed_schedule = LambdaLR(resumed, linear(10, DECAYED_AT))
    for name, w in again.items():
        w.data.copy_(saved["w"][name])
    resumed.load_state_dict(saved["optimizer"])
    resumed_schedule.load_state_dict(saved["schedule"])
    for k in range(21, 51):
        give_gradients(golden, again, k)
        resumed.step()
        resumed_schedule.step()
    for name in weights:
        assert torch.equal(again[name], weights[name]), name


def test_a_copy_keeps_its_options(golden):
    weights, optimizer = golden_run(golden, foreach=False)
    give_gradients(golden, weights, 1)
    optimizer.step()
    groups = copy.deepcopy(optimizer).param_groups
    assert [(g["adapt"], g["foreach"]) for g in groups] == [(True, False), (False, False)]


def test_a_closure_gives_the_loss():
    w = nn.Parameter(torch.tensor([2.0]))

    def closure() -> Tensor:
        loss = w.square().sum()
        loss.backward()
        return loss

    assert Lamb([w], lr=0.1).step(closure) == 4
    assert w.item() == pytest.approx(1.8)


def test_sparse_gradients_are_refused_before_anything_moves():
    dense, embedding = nn.Parameter(torch.ones(2)), nn.Embedding(5, 3, sparse=True)
    optimizer = Lamb([dense, embedding.weight], lr=0.1)
    (embedding(torch.tensor([1, 1])).sum() + dense.sum()).backward()
    with pytest.raises(ValueError, match=r"shape \(5, 3\): build its embedding with sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2))
    assert not optimizer.state


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1},
        {"lr": float("nan")},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9,)},
        {"eps": 0},
        {"weight_decay": -1e-5},
    ],
)
def test_options_out_of_range(options):
    (name, value), w = next(iter(options.items())), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=f"{name} of LAMB") as error:
        Lamb([w], **{"lr": 0.1, **options})
    assert str(value) in str(error.value)
    with pytest.raises(ValueError, match=f"{name} of LAMB"):
        Lamb([{"params": [w], **options}], lr=0.1)


@pytest.mark.parametrize("name", ["default", "cc3m", "coyo700m"])
def test_golden_schedules(golden, name):
    warmup, peak, total = golden[f"sched_{name}_cfg"]
    factor = linear(int(warmup), int(total))
    factors = [factor(int(step)) for step in golden[f"sched_{name}_steps"]]
    # Reached 9e-8 of the peak: the reference subtracts in float32.
    assert factors == pytest.approx((golden[f"sched_{name}_lr"] / peak).tolist(), rel=0, abs=3e-7)


def test_schedules_by_hand():
    steps = [0, 1, 2, 3, 4, 5, 6, 7]
    assert [linear(2, 6)(s) for s in steps] == [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]
    assert [constant(2, 6)(s) for s in steps] == [0, 0.5, 1, 1, 1, 1, 0, 0]
    half = [0, 0.5, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0, 0]
    assert [cosine(2, 6)(s) for s in steps] == pytest.approx(half)
    assert [schedule(0, 4)(0) for schedule in (linear, cosine, constant)] == [1, 1, 1]


@pytest.mark.parametrize("schedule", [linear, cosine, constant])
def test_every_schedule_pickles_and_checks_its_numbers(schedule):
    factor = schedule(3, 9)
    again = pickle.loads(pickle.dumps(factor))  # noqa: S301 - the test's own bytes
    assert [again(s) for s in range(12)] == [factor(s) for s in range(12)]
    for warmup, total in ((-1, 5), (5, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match=f"warmup_steps={warmup} and total_steps={total}"):
            schedule(warmup, total)


def test_a_resumed_schedule_follows_its_own_total_steps():
    def scheduler(total: int) -> LambdaLR:
        return LambdaLR(Lamb([nn.Parameter(torch.ones(1))], lr=1.0), linear(0, total))

    longer = scheduler(20)
    longer.load_state_dict(scheduler(10).state_dict())
    assert longer.lr_lambdas[0](15) == 0.25


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.norm = nn.LayerNorm(4)
        self.shared = self.conv
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(1.0))


def names(model: nn.Module, group: dict) -> set[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return {by_id[id(p)] for p in group["params"]}


def test_lamb_sets_batch_norm_apart():
    model = Small()
    optimizer = lamb(model, 1e-3, betas=[0.9, 0.99])  # a list, as a config gives it
    rest, batch_norm = optimizer.param_groups
    assert names(model, batch_norm) == {"bn.weight", "bn.bias"}
    assert (batch_norm["adapt"], batch_norm["weight_decay"]) == (False, 0)
    assert names(model, rest) == {"conv.weight", "conv.bias", "norm.weight", "norm.bias", "temperature"}
    assert (rest["adapt"], rest["weight_decay"]) == (True, 1e-5)
    assert rest["betas"] == (0.9, 0.99)


def test_adamw_decays_matrices_only():
    model = Small()
    optimizer = adamw(model, 1e-3, betas=[0.9, 0.98], weight_decay=0.2)
    assert type(optimizer) is AdamW
    matrices, vectors = optimizer.param_groups
    assert names(model, matrices) == {"conv.weight"}
    assert matrices["weight_decay"] == 0.2
    assert names(model, vectors) == {"conv.bias", "bn.weight", "bn.bias", "norm.weight", "norm.bias", "temperature"}
    assert vectors["weight_decay"] == 0
    assert vectors["betas"] == (0.9, 0.98)


class Staged(Small):
    """Says of its parameters how far they are from the outputs."""

    def distances(self) -> dict[str, int]:
        far = {"conv": 2, "bn": 1, "norm": 1, "frozen": 3, "temperature": 0}
        return {name: far[name.partition(".")[0]] for name, _ in self.named_parameters()}


@pytest.mark.parametrize("factory", [lamb, adamw])
def test_layer_decay_lowers_the_rate_by_distance_and_keeps_the_rules(factory):
    model = Staged()
    optimizer = factory(model, 1e-3, weight_decay=0.1, layer_decay=0.5)
    plain = {
        name: group for group in factory(model, 1e-3, weight_decay=0.1).param_groups for name in names(model, group)
    }
    seen = []
    for group in optimizer.param_groups:
        for name in names(model, group):
            assert group["lr"] == 1e-3 * 0.5 ** model.distances()[name]
            assert {**group, "params": 0, "lr": 0} == {**plain[name], "params": 0, "lr": 0}
            seen.append(name)
    assert sorted(seen) == sorted(plain)
    schedule = LambdaLR(optimizer, linear(2, 6))
    peaks = schedule.base_lrs
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [peak / 2 for peak in peaks]


def test_groups_of_layer_decay_come_in_a_fixed_order():
    model = Staged()
    found = [(sorted(names(model, group)), group["lr"]) for group in lamb(model, 1.0, layer_decay=0.5).param_groups]
    assert found == [
        (["temperature"], 1.0),
        (["norm.bias", "norm.weight"], 0.5),
        (["conv.bias", "conv.weight"], 0.25),
        (["bn.bias", "bn.weight"], 0.5),  # the group without decay and adaptation comes second, as without layer_decay
    ]


@pytest.mark.parametrize("factory", [lamb, adamw])
def test_a_layer_decay_of_one_leaves_the_groups_alone(factory):
    model = Staged()
    plain, one = factory(model, 1e-3), factory(model, 1e-3, layer_decay=1.0)
    assert one.state_dict() == plain.state_dict()
    assert len(one.param_groups) == 2


@pytest.mark.parametrize("factory", [lamb, adamw])
def test_a_layer_decay_that_cannot_be_is_refused(factory):
    for value in (0.0, -0.5, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"optimizer.layer_decay is {value}: give a factor above 0"):
            factory(Staged(), 1e-3, layer_decay=value)
    with pytest.raises(ValueError, match=r"layer_decay is 0.5, but Small has no stages: set it to 1"):
        factory(Small(), 1e-3, layer_decay=0.5)


@pytest.mark.parametrize("factory", [lamb, adamw])
def test_groups_without_parameters(factory):
    assert len(factory(nn.Linear(2, 2, bias=False), 1e-3).param_groups) == 1
    with pytest.raises(ValueError, match="none of the 2 parameters of Linear is trainable"):
        factory(nn.Linear(2, 2).requires_grad_(False), 1e-3)


def test_the_config_names_are_functions():
    from align_train import optim

    assert optim.lamb is lamb
    assert callable(optim.lamb)
    from align_train.optim.lamb import Lamb as from_module

    assert from_module is Lamb
    assert optim.lamb is lamb
