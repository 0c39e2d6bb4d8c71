from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from volo.config import OptimConfig, load_recipe, recipe_from_dict
from volo.models.factory import create_model
from volo.training.optim import LearningRate, WeightAverage, create_optimizer, set_learning_rate

RECIPES = [path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.toml")]
SMALL = {"depths": (2, 2), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4}


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict:
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def test_learning_rate_of_the_paper() -> None:
    rate = LearningRate.from_recipe(recipe_from_dict({}), steps_per_epoch=10)
    assert rate.total_steps == 3100
    assert rate.at(0) == 1e-6
    assert rate.at(100) == pytest.approx((1e-6 + 1.6e-3) / 2)
    assert rate.at(200) == pytest.approx(1.6e-3)
    assert rate.at(1600) == pytest.approx((1.6e-3 + 1e-5) / 2)
    assert rate.at(3000) == rate.at(3099) == 1e-5


@pytest.mark.parametrize("name", [r for r in RECIPES if r.startswith("imagenet_")])
def test_learning_rate_of_the_original(name) -> None:
    """Epoch by epoch that of timm's scheduler, driven as the original's main.py drives it."""
    from timm.scheduler import CosineLRScheduler

    recipe, steps = load_recipe(name), 11
    rate = LearningRate.from_recipe(recipe, steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate.peak)
    schedule = recipe.schedule
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=int(schedule.epochs),
        lr_min=rate.min_lr,
        warmup_t=int(schedule.warmup_epochs),
        warmup_lr_init=rate.warmup_lr,
    )
    assert rate.total_steps == steps * (schedule.epochs + schedule.cooldown_epochs)
    for epoch in range(rate.total_steps // steps):
        scheduler.step(epoch)
        theirs = optimizer.param_groups[0]["lr"]
        ours = [rate.at(epoch * steps + i) for i in (0, steps - 1)]
        assert ours == pytest.approx([theirs, theirs], rel=1e-12)


@given(
    epochs=st.floats(0.1, 20),
    warmup=st.floats(0, 1),
    cooldown=st.floats(0, 3),
    steps_per_epoch=st.integers(1, 50),
    peak=st.floats(1e-5, 1),
)
def test_learning_rate_rises_then_falls(epochs, warmup, cooldown, steps_per_epoch, peak) -> None:
    schedule = {"epochs": epochs, "warmup_epochs": epochs * warmup, "cooldown_epochs": cooldown}
    rate = LearningRate.from_recipe(recipe_from_dict({"optim": {"lr": peak}, "schedule": schedule}), steps_per_epoch)
    rates = [rate.at(step) for step in range(rate.total_steps)]
    assert all(min(1e-6, peak) <= lr <= peak * (1 + 1e-9) for lr in rates)
    top = min(rate.warmup_steps, len(rates) - 1)
    assert rates[: top + 1] == sorted(rates[: top + 1]) or rate.warmup_steps >= rate.decay_end
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(lr == rate.min_lr for lr in rates[rate.decay_end :])


def test_schedule_in_steps_with_a_line_for_the_decay() -> None:
    schedule = {"steps": 160, "warmup_steps": 10, "decay": "linear", "min_lr": 0.0, "warmup_lr": 0.0}
    recipe = recipe_from_dict({"optim": {"lr": 6e-5}, "schedule": schedule})
    rate = LearningRate.from_recipe(recipe, steps_per_epoch=7)
    assert rate.total_steps == 160
    assert [rate.at(step) for step in (0, 5, 10, 85)] == pytest.approx([0.0, 3e-5, 6e-5, 3e-5])
    assert rate.at(159) == pytest.approx(6e-5 / 150)
    assert rate == LearningRate.from_recipe(recipe, steps_per_epoch=70), "epochs do not matter"


def test_poly_is_mmsegmentations() -> None:
    schedule = {"steps": 160, "warmup_steps": 0, "decay": "poly", "power": 0.9, "min_lr": 1e-4}
    recipe = recipe_from_dict({"optim": {"lr": 0.01}, "schedule": schedule})
    rate, lr = LearningRate.from_recipe(recipe, steps_per_epoch=7), 0.01
    for step in range(160):
        assert rate.at(step) == pytest.approx(lr)
        # mmengine's PolyLR, from step to step
        lr = (lr - 1e-4) * (1 - 1 / (160 - step)) ** 0.9 + 1e-4
    line, power = ({"steps": 50, "warmup_steps": 5, "decay": name} for name in ("linear", "poly"))
    one, other = (LearningRate.from_recipe(recipe_from_dict({"schedule": s}), 7) for s in (line, power))
    assert [one.at(step) for step in range(50)] == [other.at(step) for step in range(50)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schedule": {"epochs": 3, "warmup_epochs": 5}}, "warmup_epochs"),
        ({"schedule": {"steps": 3, "warmup_steps": 5}}, "warmup_steps from 0 to steps"),
        ({"schedule": {"epochs": 0, "warmup_epochs": 0}}, "epochs > 0"),
        ({"optim": {"lr": 1e-6}}, "min_lr"),
        ({"schedule": {"decay": "poly", "power": 0.0}}, "power is above 0"),
        ({"schedule": {"decay": "linear", "power": 0.9}}, "belongs to the decay 'poly'"),
    ],
)
def test_schedule_that_contradicts_itself(changed, message) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRate.from_recipe(recipe_from_dict(changed), 10)


def test_weight_decay_spares_biases_norms_and_embeddings() -> None:
    model = create_model("volo_nano", **SMALL)
    optimizer = create_optimizer(model, OptimConfig(weight_decay=0.05), 1e-3)
    decay = {name: group_of(optimizer, p)["weight_decay"] for name, p in model.named_parameters()}
    spared = {name for name, p in model.named_parameters() if p.dim() == 1} | {"pos_embed", "cls_token"}
    assert {name for name, value in decay.items() if value == 0.0} == spared
    assert {value for name, value in decay.items() if name not in spared} == {0.05}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_layer_decay_scales_the_learning_rate(name) -> None:
    model = create_model("volo_nano", **SMALL)
    optimizer = create_optimizer(model, OptimConfig(name=name, layer_decay=0.5), 1e-3)
    set_learning_rate(optimizer, 0.1)
    rates = {name: group_of(optimizer, p)["lr"] for name, p in model.named_parameters()}
    # Stem, two outlookers, downsample, two transformers, class block, heads: 8 layers.
    order = [
        "patch_embed.proj.weight",
        "network.0.0.attn.v.weight",
        "network.0.1.attn.v.weight",
        "network.1.proj.weight",
    ]
    order += ["network.2.0.mlp.fc1.weight", "network.2.1.mlp.fc1.weight", "post_network.0.attn.q.weight", "head.weight"]
    assert [rates[n] for n in order] == pytest.approx([0.1 * 0.5**i for i in range(7, -1, -1)])
    assert rates["aux_head.weight"] == pytest.approx(0.1)
    assert rates["pos_embed"] == rates["network.1.proj.weight"]
    assert rates["cls_token"] == rates["post_network.0.attn.q.weight"]


def test_muon_leaves_heads_embeddings_and_vectors_to_adamw() -> None:
    torch.manual_seed(0)
    model = create_model("volo_nano", **SMALL)
    optimizer = create_optimizer(model, OptimConfig(name="muon"), 1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    by_muon = {name for name, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    matrices = {name for name, p in model.named_parameters() if p.dim() >= 2}
    assert by_muon == matrices - {"pos_embed", "cls_token", "head.weight", "aux_head.weight"}


def test_muon_does_not_emulate_bfloat16(monkeypatch) -> None:
    gradient = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))

    def step(can_multiply: bool) -> Tensor:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: can_multiply, raising=False)
        layer = nn.Linear(8, 16, bias=False, dtype=torch.float32)
        nn.init.zeros_(layer.weight)
        layer.weight.grad = gradient.clone()
        create_optimizer(layer, OptimConfig(name="muon", weight_decay=0.0, momentum=0.0), 1.0).step()
        return layer.weight.detach() / layer.weight.norm()

    def error(weight: Tensor) -> float:
        left, _, right = torch.linalg.svd(-gradient, full_matrices=False)
        return float((left.T @ weight @ right.T - torch.diag((left.T @ weight @ right.T).diagonal())).abs().max())

    # An odd polynomial of a matrix has its singular vectors: what is left beside the diagonal is rounding alone.
    assert error(step(can_multiply=False)) < 1e-6
    assert 1e-4 < error(step(can_multiply=True)) < 1e-2
    assert error(step(can_multiply=False)) < 1e-6


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "lamb", "lion", "nadamw", "adopt"])
def test_optimizer_state_is_restored_exactly(name) -> None:
    torch.manual_seed(0)
    model = create_model("volo_nano", **SMALL)
    optimizer = create_optimizer(model, OptimConfig(name=name, layer_decay=0.8), 1e-3)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        set_learning_rate(optimizer, 1e-2 / (1 + seed))
        optimizer.step()

    for seed in range(3):
        step(model, optimizer, seed)
    other = create_model("volo_nano", **SMALL)
    other.load_state_dict(model.state_dict())
    restored = create_optimizer(other, OptimConfig(name=name, layer_decay=0.8), 1e-3)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, restored, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_unknown_optimizer_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        create_optimizer(nn.Linear(2, 2), OptimConfig(name="adamww"), 1e-3)


def test_second_order_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="second derivatives"):
        create_optimizer(nn.Linear(2, 2), OptimConfig(name="adahessian"), 1e-3)


@pytest.mark.parametrize("warmup", [True, False])
def test_average_is_timms(warmup) -> None:
    torch.manual_seed(0)
    model = create_model("volo_nano", **SMALL).train()
    ours, timms = WeightAverage(model, 0.9, warmup), ModelEmaV3(model, decay=0.9, use_warmup=warmup)
    for step in range(1, 12):
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        model(torch.randn(2, 3, 32, 32))  # moves BatchNorm's statistics
        ours.update(step)
        timms.update(model, step)
    assert not torch.equal(ours.module.pos_embed, model.pos_embed)
    for (name, a), b in zip(ours.module.state_dict().items(), timms.module.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_average_warms_up_to_its_decay() -> None:
    average = WeightAverage(nn.Linear(2, 2), 0.999, warmup=True)
    assert average.decay_at(1) == 0.0
    assert average.decay_at(1000) == pytest.approx(0.99)
    assert average.decay_at(10**6) == 0.999
    assert math.isclose(WeightAverage(nn.Linear(2, 2), 0.999, warmup=False).decay_at(2), 0.999)


@pytest.mark.parametrize("warmup", [True, False])
def test_how_much_of_the_start_an_average_keeps(warmup: bool) -> None:
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    average = WeightAverage(model, 0.98, warmup)
    for step in range(1, 31):
        average.update(step)
        nn.init.zeros_(model.weight)  # from the second step on
    left = float(average.module.weight.mean())
    assert left == pytest.approx(average.share_of_start(30), rel=1e-4)
    assert (left > 0.5) != warmup and average.share_of_start(10**7) == 0.0


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_average_needs_a_decay(decay) -> None:
    with pytest.raises(ValueError, match="ema_decay"):
        WeightAverage(nn.Linear(2, 2), decay, warmup=True)
