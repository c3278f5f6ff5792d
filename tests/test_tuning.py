"""What is trained and what is at rest, adapters and their merging, and weights between two models."""

import sys
from typing import Any

import pytest
import torch
from conftest import small_text
from test_models import drawn_pixels, drawn_text, loss_of, recipe, small
from torch import Tensor

from align_train.hub import export_hf
from align_train.models import (
    Align,
    Lora,
    Tuning,
    build,
    build_align,
    compile_towers,
    has_lora,
    interpolate,
    merge_lora,
    stages,
)
from align_train.models.batch_norm import tracking_layers
from align_train.models.cost import cost_of
from align_train.models.memory import Memory, memory_of

RANK = 2
LORA = Lora(rank=RANK, alpha=4.0)
RESTLESS: dict[str, Any] = {
    "vision": {"depth": 0.1, "stochastic_depth": 0.5},
    "text": {**small_text(layers=2), "dropout": 0.3},
}


def restless(**changes: Any) -> Align:
    """A small model in which training differs from evaluation in all ways there are: one block a stage."""
    return small(**RESTLESS, **changes)


def prepared(model: Align, *, seed: int = 0, **settings: Any) -> Align:
    torch.manual_seed(seed)
    Tuning(**{"lora": LORA, **settings}).prepare(model)
    return model


def adapted(model: Align, seed: int = 0) -> Align:
    """With adapters on both towers, as large as trained ones: none is without effect."""
    prepared(model, seed=seed, image="lora", text="lora")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.normal_(std=0.1)
    return model


def images(model: Align, seed: int = 0) -> Tensor:
    return model.encode_image(drawn_pixels(8, seed=seed))


def texts(model: Align, seed: int = 0) -> Tensor:
    return model.encode_text(*drawn_text([3, 9, 5, 7, 16, 2, 4, 8], seed))


EMBED = {"image": images, "text": texts}


def trained(model: Align) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def names_in(model: Align, tower: str, stage: str) -> set[str]:
    known = {id(weight): name for name, weight in model.named_parameters()}
    modules = dict(stages(model)[tower])[stage]
    return {known[id(weight)] for module in modules for weight in module.parameters()}


def take_step(model: Align) -> None:
    """One step of plain gradient descent on every parameter that is trained; each of them must get a gradient."""
    loss_of(model.train(), drawn_pixels(8), *drawn_text([3, 9, 5, 7, 16, 2, 4, 8])).backward()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            assert (weight.grad is not None) == weight.requires_grad, name
            if weight.grad is not None:
                weight.sub_(weight.grad)
                weight.grad = None


# Stages


@pytest.mark.parametrize(
    ("preset", "blocks", "layers"),
    [("align_tiny", [1] * 7, 1), ("align_b3_mini", [2, 3, 3, 5, 5, 6, 2], 4), ("align_b7_base", None, 12)],
)
def test_every_parameter_is_in_one_stage(preset: str, blocks: list[int] | None, layers: int) -> None:
    with torch.device("meta"):
        model = build(preset)
    towers = stages(model)
    assert [name for name, _ in towers["image"]] == ["stem", *(f"stage {n}" for n in range(1, 8))]
    assert [name for name, _ in towers["text"]] == [
        "embeddings", *(f"layer {n}" for n in range(1, layers + 1)), "projection",
    ]  # fmt: skip
    # EfficientNet-B7: 1, 2, 2, 3, 3, 4, 1 blocks times 3.1, rounded up
    assert [len(modules) for _, modules in towers["image"][1:]] == (blocks or [4, 7, 7, 10, 10, 13, 4])
    found = [weight for tower in towers.values() for _, modules in tower for m in modules for weight in m.parameters()]
    pooler = {id(weight) for weight in model.text_model.pooler.parameters()}
    assert len({id(weight) for weight in found}) == len(found)
    assert {id(weight) for weight in found} == {id(w) for w in model.parameters()} - {id(model.temperature)} - pooler


def test_distances_count_the_stages_above() -> None:
    distances = restless().distances()
    assert distances["temperature"] == distances["text_projection.bias"] == 0
    assert distances["text_model.encoder.layer.1.output.dense.weight"] == 1
    assert distances["text_model.embeddings.word_embeddings.weight"] == 3
    assert distances["vision_model.encoder.blocks.6.projection.project_bn.bias"] == 0
    assert distances["vision_model.embeddings.convolution.weight"] == 7
    assert not [name for name in distances if "pooler" in name]


def test_distances_name_what_is_trained_of_a_model_with_adapters() -> None:
    model = prepared(restless(), image="lora", text="lora")
    distances = model.distances()
    assert trained(model) <= distances.keys()
    assert distances["text_projection.lora_A.default.weight"] == 0
    assert distances["text_model.encoder.layer.0.attention.self.query.lora_B.default.weight"] == 2


# At rest


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("statistics", ["virtual", "cross_rank"])
def test_a_frozen_image_tower_gives_in_training_what_it_gives_in_evaluation(statistics, checkpointing):
    model = restless(batch_norm={"statistics": statistics}, gradient_checkpointing=checkpointing)
    at_rest(prepared(model, image="frozen"), "image")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_text_tower_gives_in_training_what_it_gives_in_evaluation(checkpointing):
    at_rest(prepared(restless(gradient_checkpointing=checkpointing), text="frozen"), "text")


def at_rest(model: Align, tower: str) -> None:
    """The tower is, bit by bit, and nothing of it moves in a step; the other one is not, and does."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert list(before) == list(restless().state_dict())
    for name, embed in EMBED.items():
        with torch.no_grad():
            assert torch.equal(embed(model.train()), embed(model.eval())) == (name == tower)
    take_step(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    of_image = {name for name in moved if name.startswith("vision_model.")}
    of_text = moved - of_image - {"temperature"}
    still, other = (of_image, of_text) if tower == "image" else (of_text, of_image)
    assert not still
    assert len(other) > 20


def test_only_the_last_stages_are_trained_and_those_below_are_at_rest() -> None:
    model = prepared(restless(), image=2, text=2)
    image, text = (
        names_in(model, tower, first) | names_in(model, tower, second)
        for tower, first, second in (("image", "stage 6", "stage 7"), ("text", "layer 2", "projection"))
    )
    assert trained(model) == image | text | {"temperature"}
    blocks, layers = model.vision_model.encoder.blocks, model.text_model.encoder.layer
    heard: dict[str, list[Tensor]] = {"image": [], "text": []}
    blocks[5].register_forward_pre_hook(lambda _, given: heard["image"].append(given[0]))
    layers[1].register_forward_pre_hook(lambda _, given: heard["text"].append(given[0]))
    with torch.no_grad():
        embedded = [(images(model.train(mode)), texts(model)) for mode in (True, False)]
    for at_training, at_evaluation in heard.values():
        assert torch.equal(at_training, at_evaluation)
    assert not torch.equal(embedded[0][0], embedded[1][0])
    assert not torch.equal(embedded[0][1], embedded[1][1])
    assert {id(norm) for norm in tracking_layers(model)} == {id(n) for b in blocks[5:] for n in tracking_layers(b)}
    take_step(model)


def test_all_stages_are_all_of_a_tower() -> None:
    whole = trained(prepared(restless()))
    assert trained(prepared(restless(), image=8, text=4)) == whole
    assert not [name for name in whole if "pooler" in name]
    assert trained(prepared(restless(), temperature=False)) == whole - {"temperature"}


def test_the_lines_say_what_is_trained_with_numbers() -> None:
    sizes = {tower: sum(w.numel() for _, ms in found for m in ms for w in m.parameters())
             for tower, found in stages(restless()).items()}  # fmt: skip
    last = 32 * 32 + 32  # the projection
    assert Tuning(image="frozen", text=1).prepare(restless()) == [
        f"image tower frozen: {sizes['image']:,} parameters at rest",
        f"text tower: projection trained, {last:,} parameters, the {sizes['text'] - last:,} below at rest",
        "temperature trained",
    ]
    # attention 4 of 32 x 32, feed-forward 2 of 32 x 128, in each of 2 layers, and the projection
    adapters = RANK * (2 * (4 * 64 + 2 * 160) + 64)
    assert Tuning(text="lora", temperature=False, lora=LORA).prepare(restless()) == [
        f"image tower: all {sizes['image']:,} parameters trained",
        f"text tower: LoRA of rank {RANK} on 13 matrices, {adapters:,} parameters trained beside "
        f"{sizes['text']:,} at rest",
        "temperature at rest",
    ]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"image": "locked"}, r"tuning\.image is 'locked': give full, frozen, lora, or the number"),
        ({"text": 0}, r"tuning\.text is 0: .* at least 1"),
        ({"text": True}, r"tuning\.text is True"),
        ({"image": "frozen", "text": "frozen"}, "tuning.image and tuning.text are both frozen: nothing is left"),
        ({"image": 9}, r"tuning\.image is 9, but the image tower has 8 stages: stem, stage 1"),
        ({"text": 5}, r"tuning\.text is 5, but the text tower has 4 stages: embeddings, layer 1, layer 2, projection"),
    ],
)
def test_what_cannot_be_tuned_is_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Tuning(**settings).prepare(restless())


# Adapters


def test_fresh_adapters_change_nothing_and_are_all_that_is_trained() -> None:
    model, plain = prepared(restless(), image="lora", text="lora").eval(), restless().eval()
    with torch.no_grad():
        for embed in EMBED.values():
            assert torch.equal(embed(model), embed(plain))
    assert type(model) is Align
    assert {name.rsplit(".lora_")[0] + ".weight" for name in trained(model) - {"temperature"}} == {
        name for name, weight in plain.named_parameters()
        if name.endswith(("_conv.weight", "reduce.weight", "expand.weight", "query.weight", "key.weight",
                          "value.weight", "dense.weight", "text_projection.weight"))
        and "depthwise" not in name and "pooler" not in name and weight.shape[-1] != 3
    }  # fmt: skip


def test_a_step_moves_adapters_and_neither_weights_nor_statistics() -> None:
    model = adapted(restless())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    take_step(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained(model)
    assert len(moved) > 80


def test_adapters_and_their_gradients_lie_in_channels_last_memory() -> None:
    model = adapted(restless())
    loss_of(model.train(), drawn_pixels(8), *drawn_text([5] * 8)).backward()
    seen = [weight for name, weight in model.vision_model.named_parameters() if ".lora_" in name]
    assert all(weight.grad is not None and weight.grad.stride() == weight.stride() for weight in seen)
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    y = model.vision_model.encoder.blocks[1].expansion.expand_conv(x)
    assert y.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_a_merged_model_is_the_unmerged_one_with_the_keys_of_a_plain_one() -> None:
    model, plain = adapted(restless()), restless().eval()
    unmerged = {tower: embed(model.eval()) for tower, embed in EMBED.items()}
    assert has_lora(model)
    merge_lora(model)
    assert not has_lora(model)
    assert [(n, v.shape, v.stride()) for n, v in model.state_dict().items()] == [
        (n, v.shape, v.stride()) for n, v in plain.state_dict().items()
    ]
    for tower, embed in EMBED.items():
        torch.testing.assert_close(embed(model), unmerged[tower], atol=1e-5, rtol=0)
        assert (unmerged[tower] - embed(plain)).abs().max() > 0.02  # the adapters did something
    once = {name: value.clone() for name, value in model.state_dict().items()}
    merge_lora(model)
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())


def test_a_merged_model_is_exported_exactly(tmp_path) -> None:
    model = build("align_tiny")
    adapted(model)
    merge_lora(model)
    assert export_hf(model, tmp_path / "hf", "# card") <= 1e-5


@torch.no_grad()
def test_the_checkpoint_of_an_unmerged_model_loads_into_a_prepared_one(tmp_path) -> None:
    model, fresh = adapted(restless()), prepared(build_align(**recipe(**RESTLESS)), seed=5, image="lora", text="lora")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for embed in EMBED.values():
        assert torch.equal(embed(fresh.eval()), embed(model.eval()))


@torch.no_grad()
def test_adapters_work_in_compiled_towers() -> None:
    model = small(text=small_text(layers=1))
    del model.vision_model.encoder.blocks[2:]  # one without and one with an expansion
    adapted(model)
    expected = images(model.train()), texts(model)
    compile_towers(model, vision=True, text=True, backend="eager")
    torch.testing.assert_close((images(model), texts(model)), expected, atol=1e-5, rtol=0)


def test_a_model_with_adapters_is_not_prepared_again() -> None:
    with pytest.raises(ValueError, match="adapters of LoRA already: merge them first"):
        prepared(adapted(restless()))


def test_without_peft_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'align-train\[lora\]'"):
        Tuning(text="lora").prepare(restless())
    assert Tuning(text=1).prepare(restless())


@pytest.mark.parametrize(
    "setting",
    [{"rank": 0}, {"rank": 2.5}, {"alpha": 0.0}, {"alpha": float("nan")}, {"dropout": 1.0}, {"dropout": -0.1}],
)
def test_settings_of_adapters_out_of_range_are_named(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"tuning\.lora\.{name} is {value}"):
        Lora(**setting)


# What it costs


@pytest.fixture(scope="module")
def whole() -> Memory:
    return memory_of(restless())


def test_a_model_with_adapters_is_counted_as_what_it_trains(whole: Memory) -> None:
    model = adapted(restless(gradient_checkpointing=True))
    memory = memory_of(model)
    adapters = sum(weight.numel() for name, weight in model.named_parameters() if ".lora_" in name)
    assert memory.trained == 4 * (adapters + 1) < 0.5 * whole.trained
    assert memory.weights > whole.weights
    assert memory.pair < whole.pair
    assert cost_of(model).image < 0.9 * cost_of(restless()).image


def test_a_frozen_tower_keeps_nothing_for_the_backward_pass(whole: Memory) -> None:
    model = prepared(restless(), image="frozen")
    assert memory_of(model).pair < 0.6 * whole.pair
    assert cost_of(model).image < 0.4 * cost_of(restless()).image


# Between two models


@pytest.fixture(scope="module")
def ends() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    start, end = restless(), restless()
    take_step(end)
    return start.state_dict(), end.state_dict()


def test_between_two_models_every_number_is_in_proportion_and_counts_are_the_ends(ends) -> None:
    start, end = ends
    found = interpolate(start, end, 0.25)
    assert list(found) == list(start)
    for name, value in found.items():
        expected = end[name] if "num_batches" in name else 0.75 * start[name] + 0.25 * end[name]
        assert torch.equal(value, expected), name
        assert value.dtype == start[name].dtype
    assert not torch.equal(start["vision_model.embeddings.batchnorm.running_mean"], end[
        "vision_model.embeddings.batchnorm.running_mean"])  # fmt: skip


@pytest.mark.parametrize("alpha", [0, 1])
def test_at_its_ends_it_is_a_copy_bit_by_bit(alpha: int) -> None:
    start = {"w": torch.tensor([-0.0, 0.1, 1e30]), "n": torch.tensor(3)}
    end = {"w": torch.tensor([0.0, -0.3, torch.inf]), "n": torch.tensor(5)}
    found, expected = interpolate(start, end, alpha), (start, end)[alpha]
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert found[name].data_ptr() != value.data_ptr()
    assert torch.equal(torch.signbit(found["w"]), torch.signbit(expected["w"]))


def test_models_that_differ_cannot_be_mixed(ends) -> None:
    start, end = ends
    with pytest.raises(ValueError, match=r"the end has no temperature; both must be of one architecture"):
        interpolate(start, {name: value for name, value in end.items() if name != "temperature"}, 0.5)
    with pytest.raises(ValueError, match=r"the start has no text_model\.\S+\.base_layer\.weight"):
        interpolate(start, {**end, **adapted(restless()).state_dict()}, 0.5)
    with pytest.raises(ValueError, match=r"temperature is \(\) at the start and \(2,\) at the end"):
        interpolate(start, {**end, "temperature": torch.ones(2)}, 0.5)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"alpha is {alpha}: give the end's share"):
            interpolate(start, end, alpha)
