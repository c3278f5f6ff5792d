"""After fine-tuning: mixtures of its start and its end, their exams, and the one that is recommended."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from align_train.cli.fitting import Fitted
from align_train.cli.models import load_model
from align_train.cli.scoring import build_exams
from align_train.data import AlignInputs
from align_train.engine import of_training
from align_train.evaluation import Encoder, Forgetting, Taken, as_result, metrics_of, recommend, sweep, take_exams
from align_train.models import Align, interpolate


@dataclass(frozen=True)
class Mixture:
    """The model that is exported.

    Attributes:
        model: with the weights of the mixture.
        taken: its exams.
        story: how it was chosen, result.json's "finetuning".
    """

    model: Align
    taken: Taken
    story: dict[str, Any]


def mix(
    config: DictConfig, forgetting: Forgetting, fitted: Fitted, start: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> Mixture:
    """Take the exams of mixtures between the start and the end, and choose; every rank must call it.

    What is trained beside the model is mixed with it.

    The end is best.ckpt, or last.ckpt where no exam was taken in training.

    Args:
        config: of `finetune`.
        forgetting: which mixtures, and how they are judged.
        fitted: what was trained.
        start: the weights before it.
        facts: of the start and the pairs, for the story.
    """
    fitted.examination.tell(fitted.trainer)
    device = fitted.trainer.strategy.root_device
    module = fitted.module.cpu()  # its place on the device is needed
    loaded = load_model(end_of(Path(config.folder)))
    model = module.model = loaded.model
    module.eval().to(device)
    begin, end = (
        {name: value.to(device).clone() for name, value in {**of_training(weights), **beside}.items()}
        for weights, beside in ((start, fitted.beside), (model.state_dict(), loaded.beside))
    )
    exams, encoding = module.own_exams(build_exams(config.exams)), instantiate(config.encoding)

    def take() -> Taken:
        return take_exams(exams, Encoder(model, AlignInputs(model.preprocessing), device, encoding))

    before = metrics_of(fitted.examination.before)
    if config.alpha is not None:
        forgetting = replace(forgetting, alphas=sorted({*forgetting.alphas, config.alpha}))
    points = sweep(forgetting, module, begin, end, lambda: metrics_of(take().entries), {0.0: before} if before else {})
    advice = recommend(forgetting, points)
    alpha = advice.alpha if config.alpha is None else config.alpha
    module.load_state_dict(interpolate(begin, end, alpha))
    story = as_result(forgetting, points, advice, facts)
    return Mixture(model, take(), {**story, "end_step": loaded.steps, "end_by": config.best.by, "exported": alpha})


def end_of(run: Path) -> Path:
    """The checkpoint that fine-tuning ends with: its best, else its last."""
    best = run / "checkpoints" / "best.ckpt"
    return best if best.is_file() else best.with_name("last.ckpt")
