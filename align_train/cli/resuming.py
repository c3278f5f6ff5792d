"""`resume=RUN` and `resume=auto`: the settings and the folder of a run that was stopped."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from align_train.cli.jobs import Job
from align_train.cli.run_folders import folder_of
from align_train.files import atomic_write

AUTO = "auto"  # go on where there is a checkpoint, else begin
FOLDER = "hydra.run.dir"


def continued(overrides: Sequence[str]) -> list[str]:
    """The overrides the run was started with, then the new ones; unchanged without `resume=...`.

    Raises:
        FileNotFoundError: RUN is not a run folder with a checkpoint.
        ValueError: nothing says which folder `resume=auto` is about.
    """
    wanted = value_of(overrides, "resume")
    if wanted in (None, "null"):
        return list(overrides)
    folder = auto_folder(overrides) if wanted == AUTO else Path(str(wanted)).absolute()
    words = [*overrides, f"{FOLDER}={folder}", f"resume={wanted if wanted == AUTO else folder}"]
    kept = [file for file in (folder / "checkpoints").glob("*.ckpt") if file.stem in ("last", "best")]
    if not kept and wanted == AUTO:
        return merged(words)
    record = folder / ".hydra" / "overrides.yaml"
    if not kept or not record.is_file():
        missing = folder / "checkpoints" / "last.ckpt" if record.is_file() else record
        raise FileNotFoundError(f"{missing} is missing: resume=... takes the folder of a run that saved a checkpoint")
    words = merged([*(str(word) for word in OmegaConf.load(record)), *words])
    # Every rank comes by here, and reads what others write: so the record is replaced whole, and Hydra writes none.
    with atomic_write(record) as file:
        file.write(OmegaConf.to_yaml([word for word in words if not word.startswith("hydra.")]).encode())
    return [*words, "hydra.output_subdir=null"]


def auto_folder(overrides: Sequence[str]) -> Path:
    """The folder that is named, else that of the SLURM job."""
    if named := value_of(overrides, FOLDER):
        return Path(named).absolute()
    job = Job.current()
    if job is None:
        raise ValueError(f"resume={AUTO} needs the run's folder where there is no SLURM job: give {FOLDER}=FOLDER")
    return folder_of(job).absolute()


def value_of(overrides: Sequence[str], key: str) -> str | None:
    """What the last override of a key says; None where there is none."""
    values = [word.partition("=")[2] for word in overrides if word.partition("=")[0].lstrip("+~") == key]
    return values[-1] if values else None


def merged(overrides: Sequence[str]) -> list[str]:
    """Of each key the last override."""
    return list({word.partition("=")[0].lstrip("+~"): word for word in overrides}.values())
