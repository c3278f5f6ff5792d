"""`align-train finetune`: a trained model made better on pairs of one's own, and what it forgets by that."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from align_train.cli.adapting import adapt, estimates
from align_train.cli.checks import check_best, check_lengths, check_unused
from align_train.cli.exporting import export_model, push_where_asked
from align_train.cli.fitting import Fitted, fit
from align_train.cli.mixing import Mixture, mix
from align_train.cli.models import save_model
from align_train.cli.recovering import checkpoint_to_resume
from align_train.cli.resuming import AUTO
from align_train.cli.scoring import facts_of, tell, tell_report, write_result
from align_train.cli.starting import Start, asked_for, keep_start, kept_start, load_start, weights_of
from align_train.data.own_pairs import CheckSettings, Findings, OwnPairs, check_pairs, read_findings, report
from align_train.distributed import rank
from align_train.engine.agreement import end_if_asked
from align_train.engine.recalibration import RUNNING
from align_train.evaluation import Forgetting
from align_train.evaluation.report import finetuning_text
from align_train.files import atomic_write
from align_train.hub import weights_digest
from align_train.hub.onnx_export import require_onnx
from align_train.hub.pushing import require_token
from align_train.models import Tuning
from align_train.processes import is_first_process, until_first_process

ASKED = "pairs.yaml"  # in the run folder: what its pairs were made by


def finetune(config: DictConfig) -> None:
    """Load the start, check the pairs, train, mix start and end, export, report."""
    forgetting = check_settings(config)
    folder = Path(config.folder)
    torch.manual_seed(config.seed)
    check_unused(config)
    check_folder(config)
    resumed = checkpoint_to_resume(config)
    start = adapt(config, kept_start(config, resumed) if resumed else load_start(config.start))
    weights, digest = weights_of(start.model), weights_digest(start.model)
    tuning: Tuning = instantiate(config.tuning, _convert_="all")
    tuned = tuning.prepare(start.model)
    findings = until_first_process(lambda: read_findings(folder / "pairs"), lambda: ready_pairs(config, start))
    check_enough(config, findings)
    if not resumed:
        keep_start(start, weights, folder)
    if is_first_process():
        print("\n".join([f"start: {' and '.join(start.sources)}", *start.told, *tuned]))
    fitted = fit(config, start.model, resumed, tuned=True)
    fitted.trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=False)
    facts = {
        "start": " and ".join(start.sources),
        "sources": list(start.sources),
        "start_weights_sha256": digest,
        "pairs": counts_of(findings),
        "tuned": tuned,
    }
    end_if_asked(fitted.trainer.strategy.root_device)  # all is saved; the next start can make the mixtures
    mixture = mix(config, forgetting, fitted, weights, facts)
    if rank() == 0:
        finish(config, mixture, fitted)


def check_settings(config: DictConfig) -> Forgetting:
    """Raise ValueError for what cannot go together, before anything is read."""
    check_lengths(config)
    if isinstance(config.examine_every, int):  # a short run is examined at its end
        config.examine_every = min(config.examine_every, config.max_steps)
    check_best(config)
    forgetting: Forgetting = instantiate(config.forgetting, _convert_="all")
    forgetting.check_names([str(name) for name in config.exams])
    if config.onnx:
        require_onnx()
    if config.push_to is not None:
        require_token(config.push_to)
    if config.alpha is not None and not 0 <= config.alpha <= 1:
        raise ValueError(f"alpha is {config.alpha}: give a share of the end from 0 to 1, or null")
    return forgetting


def check_folder(config: DictConfig) -> None:
    """Raise ValueError where a run that is begun would take up what another has left in its folder."""
    folder = Path(config.folder)
    if config.resume not in (None, AUTO) or not is_first_process():
        return
    if not (folder / "pairs" / "findings.json").is_file():
        return
    asked = folder / ASKED
    if config.resume is None or not asked.is_file() or asked.read_text() != OmegaConf.to_yaml(asked_for(config)):
        raise ValueError(
            f"{folder / 'pairs'} is there already, of a run that was stopped before its first checkpoint: take it "
            "away, or name another folder; with the same settings of start, pairs and check, resume=auto goes on"
        )


def ready_pairs(config: DictConfig, start: Start) -> Findings:
    """Read and check the pairs, write them as RUN/pairs, and tell what was found."""
    pairs: OwnPairs = instantiate(config.pairs, _convert_="all")
    opened = pairs.open()
    check: CheckSettings = instantiate(config.check, _convert_="all")
    folder = Path(config.folder) / "pairs"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder.parent / ASKED) as file:
        file.write(OmegaConf.to_yaml(asked_for(config)).encode())
    findings = check_pairs(opened, folder, check, start.model.preprocessing)
    told = list(estimates(config, start.model))
    print(report.text(findings, opened.told, told))
    print(f"all of it: {report.write(findings, opened.told, told, folder)}")
    return findings


def check_enough(config: DictConfig, findings: Findings) -> None:
    """Raise ValueError where a batch takes more images than there are, or nothing is left to choose by."""
    images = findings.images - findings.validation_images
    if images < config.data.batch_size:
        raise ValueError(
            f"data.batch_size is {config.data.batch_size:,}, but there are {images:,} images to train on, and none may "
            f"come twice in a batch: set data.batch_size={images // 2 * 2 or images} or less"
        )
    exams = {name: OmegaConf.to_container(exam, resolve=True) for name, exam in config.exams.items()}
    own = [name for name, exam in exams.items() if f"{config.folder}/pairs/validation" in str(exam)]
    if own and not findings.validation_images:
        raise ValueError(
            f"no image is held out, but the exam {own[0]} is taken on such: raise check.validation_share (now "
            f"{config.check.validation_share}), or give pairs.validation"
        )


def counts_of(findings: Findings) -> dict[str, Any]:
    """For result.json."""
    return {
        "images": findings.images,
        "captions": findings.captions,
        "validation_images": findings.validation_images,
        "skipped": dict(findings.skipped),
    }


def finish(config: DictConfig, mixture: Mixture, fitted: Fitted) -> None:
    """Save, export, sum up."""
    folder, steps, model = Path(config.folder), fitted.trainer.global_step, mixture.model
    path = folder / "checkpoints" / "recommended.ckpt"
    head = fitted.module.head
    save_model(model, config, steps, RUNNING, path, head)
    known = {**fitted.facts, **facts_of(model), "batch_norm": RUNNING, "finetuning": mixture.story}
    origin = {"checkpoint": str(path), "batch_norm": RUNNING}
    result = write_result(folder, mixture.taken.entries, known, origin)
    if config.export:
        known["export"] = export_model(
            model,
            config,
            folder / "hf",
            steps,
            mixture.taken.entries,
            finetuning=mixture.story,
            head=head,
            onnx=config.onnx,
        )
        result = write_result(folder, mixture.taken.entries, known, origin)
    mixture.taken.draw(folder)
    tell(result)
    print(f"\n{finetuning_text(result)}")
    if config.report:
        tell_report(folder)
    print(f"run folder: {folder}")
    if config.export:
        push_where_asked(config, folder / "hf")
