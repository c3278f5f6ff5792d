"""`resume=RUN` and `resume=auto`: the settings and the folder of a run that was stopped."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from align_train.cli.attempts import end_unsettled
from align_train.cli.jobs import Job
from align_train.cli.run_folders import folder_of
from align_train.files import atomic_write

AUTO = "auto"  # go on where there is a checkpoint, else begin
FOLDER = "hydra.run.dir"


def continued(overrides: Sequence[str], looks: bool = False) -> list[str]:
    """The overrides the run was started with, then the new ones; unchanged without `resume=...`.

    With `looks` nothing is to run, and a job notes no start in its folder.

    Raises:
        FileNotFoundError: RUN is not a run folder with a checkpoint.
        ValueError: nothing says which folder `resume=auto` is about.
    """
    wanted = value_of(overrides, "resume")
    if not wanted:
        return list(overrides)
    folder = auto_folder(overrides, looks) if wanted == AUTO else Path(wanted).absolute()
    try:
        return _with_recorded(overrides, folder, wanted)
    except Exception as error:
        end_unsettled(folder, f"{type(error).__name__}: {error}")
        raise


def _with_recorded(overrides: Sequence[str], folder: Path, wanted: str) -> list[str]:
    words = [*overrides, f"{FOLDER}={quoted(folder)}", f"resume={wanted if wanted == AUTO else quoted(folder)}"]
    kept = has_checkpoint(folder)
    if not kept and wanted == AUTO:
        return merged(words)
    record = folder / ".hydra" / "overrides.yaml"
    if not kept or not record.is_file():
        missing = folder / "checkpoints" / "last.ckpt" if record.is_file() else record
        raise FileNotFoundError(f"{missing} is missing: resume=... takes the folder of a run that saved a checkpoint")
    return merged([*(str(word) for word in OmegaConf.load(record)), *words])


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has something to go on from, as `engine.newest_checkpoint` looks for it."""
    return any((folder / "checkpoints" / f"{name}.ckpt").exists() for name in ("last", "best"))


def record_settings(config: DictConfig) -> None:
    """Write RUN/.hydra as Hydra does, which would do it in each process, and in a folder that is another's.

    Other processes may read it meanwhile, so each file is replaced whole; what they compose is the same before and
    after. To be called where training can begin: what it could not begin with would be in the way of the next start.
    """
    if not HydraConfig.initialized():
        return
    hydra: Any = HydraConfig.instance().cfg  # typed as what lies below its one key, hydra
    folder = Path(config.folder) / ".hydra"
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"config": config, "hydra": hydra, "overrides": hydra.hydra.overrides.task}
    for name, part in parts.items():
        with atomic_write(folder / f"{name}.yaml") as file:
            file.write(OmegaConf.to_yaml(part).encode())


def auto_folder(overrides: Sequence[str], looks: bool = False) -> Path:
    """The folder that is named, else that of the SLURM job."""
    if named := value_of(overrides, FOLDER):
        if "${" in named:
            raise ValueError(f"resume={AUTO} takes no {FOLDER} with an interpolation ({named}): write the folder out")
        return Path(named).absolute()
    job = Job.current()
    if job is None:
        raise ValueError(f"resume={AUTO} needs the run's folder where there is no SLURM job: give {FOLDER}=FOLDER")
    return folder_of(job, looks).absolute()


def value_of(overrides: Sequence[str], key: str) -> str | None:
    """The text that the last override of a key gives it, as Hydra reads it; None where there is none, or null."""
    words = [word for word in overrides if word.partition("=")[0].lstrip("+~") == key]
    if not words:
        return None
    bare = words[-1].partition("=")[2]
    try:
        value = OverridesParser.create().parse_override(words[-1]).value()
    except HydraException:  # a name that would need quotes
        return bare
    return value if value is None or isinstance(value, str) else bare


def quoted(folder: Path) -> str:
    """An absolute path as the value of an override: in quotes where Hydra's grammar needs them."""
    text = str(folder)
    return text if re.fullmatch(r"[A-Za-z0-9/_.-]+", text) else QuotedString(text, Quote.single).with_quotes()


def merged(overrides: Sequence[str]) -> list[str]:
    """Of each key the last override."""
    return list({word.partition("=")[0].lstrip("+~"): word for word in overrides}.values())
