"""Small metadata in COYO's schema, and what a selection makes of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align_train.corpus.coyo import SCHEMA
from align_train.corpus.select import Resources
from align_train.corpus.select.duckdb_engine import DuckDB
from align_train.corpus.select.metadata import find_metadata
from align_train.corpus.select.plan import Plan

REAL_ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "coyo_rows.json").read_text())["rows"]


def coyo_row(number: int, **given: Any) -> dict[str, Any]:
    """A row that every preset keeps, unlike any of another number, but for what is given."""
    number = given.get("id") or number
    text = given.get("text", f"photo of house {number}")
    row = {
        "id": number,
        "url": f"https://example.org/{number}.jpg",
        "text": text,
        "width": 640,
        "height": 480,
        "image_phash": f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}",  # far from those of other numbers
        "text_length": None if text is None else len(text),
        "word_count": None if text is None else len(text.split()),
        "num_tokens_bert": 5,
        "num_tokens_gpt": 6,
        "num_faces": 0,
        "clip_similarity_vitb32": 0.4,
        "clip_similarity_vitl14": 0.3,
        "nsfw_score_opennsfw2": 0.01,
        "nsfw_score_gantman": 0.02,
        "watermark_score": 0.1,
        "aesthetic_score_laion_v2": 6.0,
    }
    return {**row, **given}


def coyo_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table with COYO's 17 columns; what a row does not give, `id` too, comes from `coyo_row`."""
    return pa.Table.from_pylist([coyo_row(number, **row) for number, row in enumerate(rows)], schema=SCHEMA)


def parquet(path: Path, table: pa.Table | Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Write a table, or rows of COYO, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if isinstance(table, pa.Table) else coyo_table(table), path, **options)
    return str(path)


def resources(folder: Path, memory: str = "1GiB", threads: int = 2) -> Resources:
    """A spill folder under `folder`, limits as they are given."""
    return Resources(memory, threads, str(folder / "spill"))


def judged(
    folder: Path, tables: Sequence[pa.Table | Sequence[Mapping[str, Any]]], rules: Mapping[str, Any], **limits: Any
) -> tuple[list[list[Any]], list[int]]:
    """The ids that rules keep of each table, as they stand in its output, and the counts of all tables together."""
    paths = [parquet(folder / f"in-{number}.parquet", table) for number, table in enumerate(tables)]
    ids, counts = [], []
    with DuckDB(Plan.of(rules), resources(folder, **limits)).opened(files := find_metadata(paths)) as engine:
        for number, file in enumerate(files):
            counts.append(engine.counts(file))
            engine.write(file, folder / f"out-{number}.parquet")
            ids.append(pq.read_table(folder / f"out-{number}.parquet")["id"].to_pylist())
    return ids, [sum(column) for column in zip(*counts, strict=True)]
