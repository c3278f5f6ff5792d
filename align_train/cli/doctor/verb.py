"""`align-train doctor`: check what training would read and run on, without training."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from align_train.cli.doctor.data_report import report
from align_train.cli.doctor.machine import Machine, look_at_machine
from align_train.cli.doctor.machine_report import machine_report
from align_train.cli.doctor.ranks import join_ranks
from align_train.cli.doctor.verdict import machine_faults, machine_notes
from align_train.cli.hydra_app import told
from align_train.data import BatchPlans, Loader, Opener, Order, OrderSettings, PairReader, Reading, Source, read_sources
from align_train.data.inspection.pairs import Sampling, Seen, caption_facts, pair_facts, read_pairs, repeats
from align_train.data.inspection.sample_sheet import COLUMNS, ROWS, Tile, sample_sheet
from align_train.data.inspection.sources import (
    Epoch,
    SpeedFacts,
    check_shards,
    least_batches,
    measure_speed,
    open_shards,
)
from align_train.data.inspection.verdict import Findings, epochs, faults, notes
from align_train.data.opening import counted_not_told
from align_train.distributed import on_all_ranks, on_rank_zero, rank
from align_train.files import atomic_write
from align_train.records import Preprocessing


def doctor(config: DictConfig) -> None:
    """Look at the machine, on all ranks, and at every source; print a report, write doctor.json and contact_sheet.png.

    Exits with 1 where training would stop, or lose more than data.reading.max_quarantined.
    """
    check_settings(config)
    reading: Reading = instantiate(config.data.get("reading")) or Reading()
    device = join_ranks(config)
    sources = on_all_ranks(
        lambda: read_sources(instantiate(config.data.train, _convert_="all"), reading.cache) if rank() == 0 else []
    )
    machine = look_at_machine(config, sources, reading, device) if config.machine else None
    if on_rank_zero(lambda: look_at_data(config, sources, reading, machine)):
        sys.exit(1)


def look_at_data(config: DictConfig, sources: Sequence[Source], reading: Reading, machine: Machine | None) -> list[str]:
    """Look at every source, measure the speed, say and write that and what is known of the machine.

    Returns:
        What is wrong with either.
    """
    if machine is not None:
        print(machine_report(machine), flush=True)
    sampling = Sampling(
        preprocessing=Preprocessing(**config.model.preprocessing),
        augmentation=instantiate(config.data.augmentation),
        scaled=reading.scaled_decoding,
        pairs=config.pairs,
        keep=COLUMNS * ROWS,
        seed=config.seed,
        stall_seconds=reading.stall_seconds,
    )
    with counted_not_told():
        looks = {source.name: examine(source, sampling, config) for source in sources}
        found = {name: look.findings for name, look in looks.items()}
        speed, wrong = rehearse(list(looks.values()), sampling, reading, config)
    sequences = epochs(sources, [facts.opened.epoch_pairs for facts in found.values()])
    wrong = faults(found, sequences, config.data.batch_size, reading.max_quarantined) + wrong
    if counts := OmegaConf.select(config, "data.order.samples_per_epoch"):
        sequences = {"all": Epoch(counts, 1.0)}
    hints = notes(found, sampling.preprocessing.max_tokens)
    if machine is not None:
        wrong, hints = machine_faults(machine) + wrong, machine_notes(machine) + hints
    result = {
        "machine": machine and asdict(machine),
        "sources": {name: asdict(facts) for name, facts in found.items()},
        "speed": speed and asdict(speed) | {"epoch_seconds": speed.epoch_seconds(sequences)},
        "wrong": wrong,
        "notes": hints,
    }
    print(report(found, sequences, speed, sampling.preprocessing.max_tokens))
    write(Path(config.folder), result, {name: look.seen for name, look in looks.items()})
    for said in [*(f"note: {hint}" for hint in hints), *(f"wrong: {fault}" for fault in wrong)]:
        print(said)
    print(f"doctor.json and contact_sheet.png in {config.folder}")
    return wrong


class Look(NamedTuple):
    """What is known of a source, the pairs that were read, and the source of those shards alone that have pairs."""

    findings: Findings
    seen: list[Seen]
    opened: Source
    seconds: float  # that it took to read the pairs, one after another


def check_settings(config: DictConfig) -> None:
    """Raise ValueError for data without shards, and for a number out of range."""
    if "train" not in config.data:
        raise ValueError(
            "data=coyo_stream has no shards to look at: try its rules with `align-train prepare source=coyo "
            "dry_run=true source.metadata=... source.folder=...`, or prepare shards and give data=shards"
        )
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {config.device!r}; give auto, cpu or cuda")
    for key in ("shards", "opened", "pairs", "data.batch_size"):
        value = OmegaConf.select(config, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} is {value!r}; it must be a whole number of at least 1")
    for key in ("devices", "num_nodes"):
        value = config[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(
                f"{key} is {value!r}; give a whole number of at least 1, or null for as many as srun started"
            )
    mb = config.gather_mb
    if mb is not None and (isinstance(mb, bool) or not isinstance(mb, int | float) or not mb > 0):
        raise ValueError(f"gather_mb is {mb!r}; give a number of megabytes over 0, or null")
    if isinstance(config.seconds, bool) or not isinstance(config.seconds, int | float) or not config.seconds > 0:
        raise ValueError(f"seconds is {config.seconds!r}; give a time over 0")


def examine(source: Source, sampling: Sampling, config: DictConfig) -> Look:
    """Look for the shards of a source, open some, read some pairs."""
    stall_seconds = sampling.stall_seconds
    shards = check_shards(source.shards, config.shards, stall_seconds)
    opened, facts = open_shards(source, shards.broken, config.opened, config.seed, stall_seconds)
    seen: list[Seen] = []
    error, start = "", time.perf_counter()
    try:
        seen = read_pairs(source, opened, sampling)
    except OSError as problem:  # a time-out is one
        error = str(problem)
    seconds = time.perf_counter() - start
    captions = caption_facts([pair.caption for pair in seen if not pair.lost], sampling.preprocessing.max_tokens)
    findings = Findings(shards, facts, pair_facts(seen), captions, repeats(opened, seen), error)
    used = [source.shards[number] for number, shard in opened.items() if len(shard.rows)]
    return Look(findings, seen, replace(source, shards=used), seconds)


def rehearse(
    looks: Sequence[Look], sampling: Sampling, reading: Reading, config: DictConfig
) -> tuple[SpeedFacts | None, list[str]]:
    """The speed of reading the opened shards, and what training would stop with.

    Batches are smaller where these hold fewer pairs than a batch takes, or where the few batches that a speed takes
    would take too long, as with large photographs.
    """
    sources = [look.opened for look in looks]
    sequences = epochs(sources, [look.findings.opened.usable for look in looks])
    most = min(int(epoch.pairs / epoch.share) for epoch in sequences.values())
    if not most or any(look.findings.error or look.findings.opened.error for look in looks):
        return None, []
    workers = config.data.get("workers", 0)
    rate = sum(len(look.seen) for look in looks) / sum(look.seconds for look in looks)
    in_time = int(rate * config.seconds / least_batches(workers))
    batch_size = max(1, min(config.data.batch_size, most, in_time))
    order: OrderSettings = instantiate(config.data.get("order")) or OrderSettings()
    reader = PairReader(
        sources, sampling.preprocessing, sampling.augmentation, order.seed, reading.keep_decoded, sampling.scaled
    )
    opener = Opener(sources, reading.stall_seconds, max_quarantined=1.0)
    steps = sum(epoch.pairs for epoch in sequences.values()) // batch_size
    plans = BatchPlans(Order(sources, order, opener), batch_size, 0, max(steps, least_batches(workers)))
    try:
        speed = measure_speed(Loader(reader, plans, workers, reading), config.seconds)
    except (ValueError, OSError) as error:
        return None, [f"reading stopped: {told(error)}"]
    return speed, []


def write(folder: Path, result: Mapping[str, Any], seen: Mapping[str, Sequence[Seen]]) -> None:
    """doctor.json, and contact_sheet.png with pairs of all sources in turn; the JSON has their captions in full."""
    folder.mkdir(parents=True, exist_ok=True)
    usable = [[(name, pair) for pair in pairs if pair.pixels is not None] for name, pairs in seen.items()]
    turns = [drawn for turn in zip_longest(*usable) for drawn in turn if drawn][: COLUMNS * ROWS]
    sheet = [{"source": name, "key": pair.key, "caption": pair.caption} for name, pair in turns]
    tiles = [Tile(pair.pixels, pair.caption, f"{name}/{pair.key}") for name, pair in turns if pair.pixels is not None]
    sample_sheet(tiles, folder / "contact_sheet.png")
    with atomic_write(folder / "doctor.json") as file:
        file.write((json.dumps({**result, "contact_sheet": sheet}, indent=2, ensure_ascii=False) + "\n").encode())
