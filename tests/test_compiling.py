"""Compiled towers against eager ones: same numbers, gradients and statistics, same state dict, one graph a shape.

The backend is aot_eager: all of torch.compile but the code generator, which needs minutes and a C++ compiler.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo
from conftest import small_text
from test_models import small
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from align_train.models import Align, compile_towers, compiling, recalibrate
from align_train.models.batch_norm import hold_statistics
from align_train.models.repairs import repair_checkpointing

LENGTHS = [7, 3, 16, 5, 12, 3, 9, 4]


def model(positions: int = 64) -> Align:
    """EfficientNet's first three blocks, which are of three kinds, and a layer of BERT, without dropout."""
    built = small(text={**small_text(layers=1), "positions": positions})
    del built.vision_model.encoder.blocks[3:]
    return built.double()


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> None:
    torch._dynamo.reset()


@pytest.fixture
def pair() -> tuple[Align, Align]:
    """An eager model and the same one with both towers compiled."""
    eager, compiled = model(), model()
    compile_towers(compiled, vision=True, text=True, backend="aot_eager")
    return eager, compiled


def pixels(batch: int = 8) -> Tensor:
    return torch.randint(0, 256, (batch, 3, 33, 33), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def captions(lengths: list[int]) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(1, 50, mask.shape, generator=random) * mask, mask


def results(model: Align, cached: bool = False) -> dict[str, Tensor]:
    """Embeddings, gradients and statistics of one step; `cached` recomputes the towers, as gradient caching does."""

    def run(encode, *inputs: Tensor) -> Tensor:
        if not cached:
            return encode(*inputs)
        once = lambda: (nullcontext(), hold_statistics())  # noqa: E731
        return checkpoint(encode, *inputs, use_reentrant=False, context_fn=once)

    image, text = run(model.encode_image, pixels()), run(model.encode_text, *captions(LENGTHS))
    (image.cos().sum() + text.cos().sum()).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"image": image.detach(), "text": text.detach(), **gradients, **dict(model.named_buffers())}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert len(got) > 50
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_compiled_towers_train_as_eager_ones_do(pair: tuple[Align, Align]) -> None:
    eager, compiled = pair
    compiled.text_chunks = 2
    assert_same(results(compiled.train()), results(eager.train()))


def test_evaluation_compiles_nothing() -> None:
    counter, towers = CompileCounterWithBackend("eager"), model().eval()
    compile_towers(towers, vision=True, text=True, backend=counter)
    with torch.no_grad():
        for rows in (2, 4):
            towers.encode_image(pixels()[:rows])
            towers.encode_text(*captions(LENGTHS[:rows]))
    assert counter.frame_count == 0
    towers.train().encode_text(*captions(LENGTHS))
    assert counter.frame_count == 1


def test_a_recomputed_step_moves_statistics_once_and_has_the_same_gradients(pair: tuple[Align, Align]) -> None:
    eager, compiled = pair
    assert_same(results(compiled.train(), cached=True), results(eager.train()))


def test_recalibration_compiles_nothing(pair: tuple[Align, Align]) -> None:
    eager, compiled = pair
    for towers in pair:
        assert recalibrate(towers, [pixels(), pixels()]) == 2
    torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()), rtol=1e-9, atol=1e-10)
    counter, towers = CompileCounterWithBackend("eager"), model()
    compile_towers(towers, vision=True, text=True, backend=counter)
    recalibrate(towers, [pixels()])
    assert counter.frame_count == 0


def test_compiling_changes_no_key_of_the_state_dict(pair: tuple[Align, Align]) -> None:
    eager, compiled = pair
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert type(compiled.text_model) is type(eager.text_model)
    assert copy.deepcopy(compiled).text_model._compiled_call_impl is None


def test_only_the_tower_that_was_asked_for_is_compiled() -> None:
    towers = model()
    compile_towers(towers, vision=False, text=True, backend="aot_eager")
    assert towers.vision_model._compiled_call_impl is None
    assert towers.text_model._compiled_call_impl is not None
    assert towers.text_multiple == 8
    compile_towers(towers := model(), vision=True, text=False, backend="aot_eager")
    assert towers.text_model._compiled_call_impl is None
    assert towers.text_multiple == 1


def test_eight_lengths_of_captions_share_a_graph() -> None:
    counter = CompileCounterWithBackend("eager")
    towers = model().train()
    compile_towers(towers, vision=False, text=True, backend=counter)
    for longest in range(3, 33):
        towers.encode_text(*captions([3, longest, 5, 4]))
    assert counter.frame_count == 4


def test_more_shapes_than_allowed_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "SHAPES", 2)
    towers = model().train()
    compile_towers(towers, vision=False, text=True, backend="eager")
    for longest in (8, 16):
        towers.encode_text(*captions([3, longest]))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        towers.encode_text(*captions([3, 24]))


def test_positions_that_padded_captions_would_overrun_are_refused() -> None:
    with pytest.raises(ValueError, match="positions is 65"):
        compile_towers(model(positions=65), vision=False, text=True)


def test_an_image_tower_with_gradient_checkpointing_is_refused() -> None:
    towers = model()
    repair_checkpointing(towers)
    compile_towers(towers, vision=False, text=True)
    with pytest.raises(ValueError, match="gradient_checkpointing=true"):
        compile_towers(towers, vision=True, text=False)


def test_an_older_pytorch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, *, backend: model)
    with pytest.raises(ValueError, match=r"PyTorch 2\.13"):
        compile_towers(model(), vision=True, text=False)
