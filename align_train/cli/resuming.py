"""`align-train train resume=RUN`: the settings and the folder of a run that was stopped."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from align_train.files import atomic_write


def continued(overrides: Sequence[str]) -> list[str]:
    """The overrides the run was started with, then the new ones; unchanged without `resume=RUN`.

    Raises:
        FileNotFoundError: RUN is not a run folder with a checkpoint.
    """
    wanted = [word.partition("=")[2] for word in overrides if word.startswith("resume=")]
    if not wanted:
        return list(overrides)
    folder = Path(wanted[-1]).absolute()
    record = folder / ".hydra" / "overrides.yaml"
    for needed in (record, folder / "checkpoints" / "last.ckpt"):
        if not needed.is_file():
            raise FileNotFoundError(
                f"{needed} is missing: resume=... takes the folder of a run that saved a checkpoint"
            )
    before = [str(word) for word in OmegaConf.load(record)]
    words = [*before, *overrides, f"hydra.run.dir={folder}", f"resume={folder}"]
    merged = list({word.partition("=")[0].lstrip("+~"): word for word in words}.values())
    # Every rank comes by here, and reads what others write: so the record is replaced whole, and Hydra writes none.
    with atomic_write(record) as file:
        file.write(OmegaConf.to_yaml([word for word in merged if not word.startswith("hydra.")]).encode())
    return [*merged, "hydra.output_subdir=null"]
