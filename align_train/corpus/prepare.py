"""Sources to folders of shards that training reads: the shipped sample, or any pairs of one's own."""

import json
import logging
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from align_train.corpus.sample_corpus import sample_parts, unit_hash
from align_train.corpus.shards import ShardReport, ShardWriter
from align_train.files import atomic_write
from align_train.records import Pair, Tally
from align_train.shipped import sample_corpus

log = logging.getLogger(__name__)

Reports = dict[str, ShardReport]


def prepare_sample(folder: str | Path, pairs_per_shard: int = 1000, overwrite: bool = False) -> Reports:
    """Writes the shipped sample as FOLDER/PART/*.tar; at once done if the same shards are there already.

    Parts: `train` (clipart-*.tar and emoji-*.tar, which training samples at different rates), `validation`,
    `test_unseen_rendering` and `test_unseen_concept`. FOLDER/sample.json, written last, says which sample it is.

    Args:
        folder: where the parts go.
        pairs_per_shard: pairs in each shard but the last of a part.
        overwrite: replace the shards of another sample, or of another size.

    Returns:
        A report for `train/clipart`, `train/emoji`, `validation`, `test_unseen_rendering`, `test_unseen_concept`.
    """
    folder = Path(folder)
    version = {"sha256": sha256(sample_corpus().read_bytes()).hexdigest(), "pairs_per_shard": pairs_per_shard}
    marker = _marker(folder)
    reports = _reports(folder, marker)
    unchanged = marker.get("version") == version
    if unchanged and _complete(reports) and not overwrite:
        log.info("the sample is ready in %s, nothing to do", folder)
        return reports
    overwrite = overwrite or unchanged  # what an interrupted run left of this very sample is replaced without asking
    parts = sample_parts()
    writers = {
        (part, group): ShardWriter(folder / part, f"{group}-" if group else "", pairs_per_shard, overwrite)
        for part, group in parts
    }
    # Only now, when no writer has refused the folder: from here on its shards are ours to replace.
    _write_marker(folder, version, {})
    with tqdm(total=sum(map(len, parts.values())), desc="sample", unit="pair", delay=3) as progress:
        for part, pairs in parts.items():
            for pair in pairs:
                writers[part].add(pair)
                progress.update()
    reports = _closed({f"{part}/{group}" if group else part: writer for (part, group), writer in writers.items()})
    _write_marker(folder, version, reports)
    return reports


def prepare_dataset(
    folder: str | Path,
    pairs: Iterable[Pair],
    validation_share: float = 0.0,
    pairs_per_shard: int = 1000,
    overwrite: bool = False,
) -> Reports:
    """Writes pairs of one's own, for instance of `dataset_pairs`, as FOLDER/train and FOLDER/validation in one pass.

    Args:
        folder: where the parts go.
        pairs: the source, read once.
        validation_share: fraction of the images, in [0, 1), that goes to validation. The bytes of the image decide,
            so all captions of one image are on the same side, and more data moves no image to the other.
        pairs_per_shard: pairs in each shard but the last of a part.
        overwrite: replace shards that are already there.

    Returns:
        A report for `train`, and for `validation` if it has a share.
    """
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation_share is {validation_share}, it must be at least 0 and below 1")
    names = ["train", "validation"] if validation_share > 0 else ["train"]
    writers = {name: ShardWriter(Path(folder) / name, "", pairs_per_shard, overwrite) for name in names}
    for pair in tqdm(pairs, desc="prepare", unit="pair", delay=3):
        held_out = validation_share > 0 and unit_hash(pair.image) < validation_share
        writers["validation" if held_out else "train"].add(pair)
    return _closed(writers)


def _closed(writers: dict[str, ShardWriter]) -> Reports:
    reports = {name: writer.close(may_be_empty=name == "validation") for name, writer in writers.items()}
    for name, report in reports.items():
        log.info("%s: %s", name, report.described())
        if not report.shards:
            log.warning("no pair went to %s: a larger validation_share would send some there", name)
    return reports


def _marker(folder: Path) -> dict[str, Any]:
    path = folder / "sample.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _write_marker(folder: Path, version: dict[str, Any], reports: Reports) -> None:
    """Which sample the folder holds; without reports: which sample is being written to it."""
    listed = {
        name: {
            "shards": [path.relative_to(folder).as_posix() for path in report.shards],
            "pairs": report.pairs,
            "bytes": report.bytes,
            "dropped": dict(report.dropped),
        }
        for name, report in reports.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "sample.json") as file:
        file.write(json.dumps({"version": version, "reports": listed}, indent=1).encode())


def _reports(folder: Path, marker: dict[str, Any]) -> Reports:
    return {
        name: ShardReport(
            tuple(folder / path for path in report["shards"]),
            report["pairs"],
            report["bytes"],
            Tally(report["dropped"]),
        )
        for name, report in marker.get("reports", {}).items()
    }


def _complete(reports: Reports) -> bool:
    """True if every shard and its sidecar is there and the tars have the size that was written."""
    return bool(reports) and all(
        all(path.is_file() and path.with_suffix(".parquet").is_file() for path in report.shards)
        and sum(path.stat().st_size for path in report.shards) == report.bytes
        for report in reports.values()
    )
