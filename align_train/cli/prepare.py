"""`align-train prepare`: a source to tar shards."""

from hydra.utils import instantiate
from omegaconf import DictConfig


def prepare(config: DictConfig) -> None:
    """Do what the source says, and say what was written and what was dropped."""
    if config.dry_run and "dry_run" not in config.source:
        raise ValueError("dry_run=true is for source=coyo: this source has no rules to try")
    reports = instantiate(config.source, _convert_="all")
    for name, report in reports.items():
        print(f"{name:<24} {report.described()}")
    if "folder" in config.source:
        print(f"in {config.source.folder}")
