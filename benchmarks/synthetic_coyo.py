"""Synthetic metadata in COYO's schema: sizes, texts and repeats drawn so that every rule drops some. Not real rows.

python benchmarks/synthetic_coyo.py FOLDER --rows 20000000 --files 8
"""

import argparse
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from align_train.corpus.coyo import SCHEMA

ROWS = """
SELECT
    {first} + i AS id,
    'https://images-' || (r1 % 5000) || '.example.org/media/' || (r2 % 100) || '/' || md5(i::VARCHAR) || '.jpg' AS url,
    -- one text in fifty is one of 20,000 that many images share
    CASE WHEN r3 % 50 = 0 THEN p1.phrase ELSE p1.phrase || ' ' || p2.phrase END AS text,
    (150 + 1200 * pow((r4 % 10000) / 10000, 2))::INTEGER AS width,
    (150 + 1000 * pow((r5 % 10000) / 10000, 2))::INTEGER AS height,
    printf('%016x', hash(CASE WHEN r1 % 4 = 0 THEN r2 % ({rows} // 8) ELSE {first} + i END)) AS image_phash,
    length(text)::INTEGER AS text_length,
    (1 + length(text) - length(replace(text, ' ', '')))::INTEGER AS word_count,
    (word_count * 1.4)::INTEGER AS num_tokens_bert,
    (word_count * 1.5)::INTEGER AS num_tokens_gpt,
    (r3 % 7 // 5)::INTEGER AS num_faces,
    ((r1 % 1000) / 2500)::FLOAT AS clip_similarity_vitb32,
    CASE WHEN r2 % 100 > 0 THEN ((r2 % 1000) / 2500)::FLOAT END AS clip_similarity_vitl14,
    pow((r4 % 1000) / 1000, 4)::FLOAT / 2 AS nsfw_score_opennsfw2,
    pow((r5 % 1000) / 1000, 4)::FLOAT / 2 AS nsfw_score_gantman,
    CASE WHEN r3 % 100 > 0 THEN pow((r3 % 1000) / 1000, 2)::FLOAT END AS watermark_score,
    (1 + 7 * (r4 % 1000) / 1000)::FLOAT AS aesthetic_score_laion_v2
FROM drawn
JOIN phrases p1 ON p1.number = CASE WHEN r3 % 50 = 0 THEN r1 % 20000 ELSE r1 % 200000 END
JOIN phrases p2 ON p2.number = r2 % 200000
ORDER BY i
"""


def phrases(random: np.random.Generator, count: int = 200_000) -> pa.Table:
    """Runs of one to ten words that follow Zipf's law."""
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(letters[random.zipf(1.4, random.integers(2, 10)) % 26]) for _ in range(30_000)]
    lengths = random.integers(1, 11, count)
    picks = np.minimum(random.zipf(1.3, lengths.sum()) - 1, len(words) - 1)
    parts = np.split(picks, np.cumsum(lengths)[:-1])
    texts = [" ".join(words[word] for word in part) for part in parts]
    return pa.table({"number": np.arange(count), "phrase": texts})


def write(folder: Path, rows: int, files: int, seed: int = 0) -> None:
    """`files` parquet files of `rows` rows in all; the same arguments give the same rows."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    connection = duckdb.connect(config={"memory_limit": "4GiB", "threads": 2})
    connection.register("phrases", phrases(random))
    share = rows // files
    for number in tqdm(range(files), desc="synthetic metadata", unit="file"):
        drawn = {f"r{k}": random.integers(0, 1 << 40, share) for k in range(1, 6)}
        connection.register("drawn", pa.table({"i": np.arange(share), **drawn}))
        query = ROWS.format(first=number * share, rows=rows)
        columns = ", ".join(SCHEMA.names)
        connection.execute(f"COPY (SELECT {columns} FROM ({query})) TO '{folder}/part-{number:05d}.parquet'")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--files", type=int, default=8)
    given = parser.parse_args()
    write(given.folder, given.rows, given.files)
