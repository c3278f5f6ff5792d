"""`align-train prepare`: a source to tar shards."""

from hydra.utils import instantiate
from omegaconf import DictConfig


def prepare(config: DictConfig) -> None:
    """Write the shards, and say what was written and what was dropped."""
    reports = instantiate(config.source, _convert_="all")
    for part, report in reports.items():
        print(f"{part:<24} {report.described()}")
    print(f"shards in {config.source.folder}")
