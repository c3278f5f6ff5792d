"""The shipped sample: its split, its metadata in COYO's schema, and the images behind the metadata's links."""

import io
import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from align_train import shipped
from align_train.corpus import sample_corpus
from align_train.corpus.coyo import SCHEMA
from align_train.corpus.sample_corpus import (
    SAMPLE_SCHEMA,
    normalised,
    pair_id,
    phash,
    read_sample,
    sample_metadata,
    sample_parts,
    shipped_image,
    text_counts,
    unit_hash,
    write_sample_metadata,
)
from align_train.corpus.shards import image_format
from align_train.shipped import SAMPLE_PARTS, sample_metadata_file

FOLDER = shipped.sample_corpus().parent
# Rows of each part, and SHA-256 of its keys joined by newlines: training repeats bit by bit only in this order.
PARTS = {
    "clipart": (4869, "d8b779a5bfd7ec49b61c83da1e6b29db420369918ee50f515b2b601eb49f3229"),
    "emoji": (3450, "7bacedf541487a17629d5b0beea99413bf7473b827c704f6a339fadbf9c46e79"),
    "validation": (497, "fc2fd1c1971f9d3d785452a709dddbdeab75fdb3c71c3187904fa880e4e7c025"),
    "test_unseen_rendering": (1850, "db1021332d01f31135832d6f89e773859e00bbb6d1dc4e7d63915e95f9b9246b"),
    "test_unseen_concept": (173, "c703ded6b8acbbf953d535521b1faaa730a0174ac832c1182dee361a67067806"),
    "held_out_concepts": (368, "cdff6dbedb7d906cc4ae6296cd172603d6bbef70d927fd0e048a2979dc5b3070"),
}
UNKNOWN = {
    "num_tokens_gpt", "num_faces", "clip_similarity_vitb32", "clip_similarity_vitl14", "nsfw_score_opennsfw2",
    "nsfw_score_gantman", "watermark_score", "aesthetic_score_laion_v2",
}  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    return {group or part: pairs for (part, group), pairs in sample_parts().items()}


@pytest.fixture(scope="module")
def tables():
    return {part: pq.read_table(sample_metadata_file(part)) for part in SAMPLE_PARTS}


def images(pairs):
    return {sha256(pair.image).hexdigest() for pair in pairs}


def captions(pairs):
    return {normalised(pair.caption) for pair in pairs}


def train_of(parts):
    return parts["clipart"] + parts["emoji"]


def column(tables, name, *of_parts):
    return [value for part in of_parts or SAMPLE_PARTS for value in tables[part][name].to_pylist()]


def test_sample_ships_small_and_whole():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 15e6
    assert sum(sample_metadata_file(part).stat().st_size for part in SAMPLE_PARTS) <= 1e6
    assert (FOLDER / "README.md").is_file()
    pairs = list(read_sample())
    assert len({pair.key for pair in pairs}) == len(pairs) == 11058
    assert all(image_format(pair.image) == "webp" and pair.caption.strip() for pair in pairs)
    assert all(pair.metadata["licence"] and None not in pair.metadata.values() for pair in pairs)
    assert pairs[0].key == "openclipart-00000"
    assert pairs[0].metadata["keywords"] == ["chemistry", "science", "apparatus", "symbols"]


def test_the_images_are_those_of_the_first_release():
    digest = "db7765a6526483221b88f6b9fd73ed4d9c6965ca517dfd188016155ba69a87aa"
    assert sha256(shipped.sample_corpus().read_bytes()).hexdigest() == digest


def test_missing_files_name_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="reinstall"):
        list(read_sample(tmp_path / "no.parquet"))
    with pytest.raises(ValueError, match="no part train: choose one of clipart, emoji, validation"):
        sample_metadata_file("train")
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"emoji\.parquet: reinstall"):
        sample_metadata_file("emoji")


def test_sizes_and_order_of_parts(parts):
    found = {
        part: (len(pairs), sha256("\n".join(p.key for p in pairs).encode()).hexdigest())
        for part, pairs in parts.items()
    }
    assert found == PARTS
    assert tuple(parts) == SAMPLE_PARTS
    readme = (FOLDER / "README.md").read_text()
    assert all(f"| {size:,} |" in readme for size, _ in PARTS.values())
    assert all(f"| {path.stat().st_size:,} |" in readme for path in FOLDER.glob("*.parquet"))


def test_what_each_part_holds(parts):
    sources = {part: {pair.metadata["source"] for pair in pairs} for part, pairs in parts.items()}
    assert sources["clipart"] == sources["validation"] == {"openclipart"}
    assert sources["emoji"] == {"noto", "twemoji"}
    assert sources["held_out_concepts"] == {"noto", "twemoji"}
    assert sources["test_unseen_rendering"] == sources["test_unseen_concept"] == {"fluent3d"}
    rendering, concept = parts["test_unseen_rendering"], parts["test_unseen_concept"]
    assert {pair.key for pair in concept} < {pair.key for pair in rendering}
    assert len(captions(rendering)) == len(rendering)
    assert captions(concept) < captions(parts["held_out_concepts"])


def test_no_leak_into_validation(parts):
    train, validation = train_of(parts), parts["validation"]
    assert not images(train) & images(validation)
    assert not captions(train) & captions(validation)


def test_no_leak_into_the_tests(parts):
    train, unseen = train_of(parts), parts["test_unseen_concept"]
    concepts = {pair.metadata["concept"] for pair in unseen}
    assert not concepts & {pair.metadata.get("concept") for pair in train}
    assert not images(unseen) & images(parts["held_out_concepts"])
    assert not captions(unseen) & (captions(train) | captions(parts["validation"]))
    assert not images(parts["test_unseen_rendering"]) & (images(train) | images(parts["validation"]))


def test_no_leak_between_the_metadata_files(tables):
    """The same once more on what is shipped, and by perceptual hash for the tests."""
    train, tests = ("clipart", "emoji"), ("test_unseen_rendering", "test_unseen_concept")
    assert not set(column(tables, "id", *train)) & set(column(tables, "id", "validation", *tests))
    assert not set(column(tables, "id", "validation")) & set(column(tables, "id", *tests))
    assert not set(column(tables, "image_phash", *train)) & set(column(tables, "image_phash", *tests))


def test_schema_is_coyos_and_then_ours(tables):
    assert SAMPLE_SCHEMA.names[:17] == SCHEMA.names
    assert SAMPLE_SCHEMA.names[17:] == ["source", "licence", "concept", "category", "tags", "keywords"]
    for table in tables.values():
        assert table.schema.equals(SAMPLE_SCHEMA)
        assert pa.schema(list(table.schema)[:17]).equals(SCHEMA)


def test_metadata_files_are_what_the_package_builds(tables, monkeypatch):
    """All columns of all rows; the pHash anew for every 37th image only, since all would take four seconds."""
    rows = [row for table in tables.values() for row in table.select(["url", "image_phash"]).to_pylist()]
    known = {shipped_image(row["url"].removeprefix("package:")): row["image_phash"] for row in rows}
    computed = []

    def some_hashes(image):
        if unit_hash(image) < 1 / 37:
            computed.append((int(phash(image), 16) ^ int(known[image], 16)).bit_count())
        return known[image]

    monkeypatch.setattr(sample_corpus, "phash", some_hashes)
    built = sample_metadata()
    assert len(computed) >= 250
    assert sum(bits == 0 for bits in computed) > 0.97 * len(computed)  # Pillow before 13 moves a few
    assert list(built) == list(tables)
    assert all(built[part].equals(table) for part, table in tables.items())


def test_written_files_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_corpus, "phash", lambda image: "0123456789abcdef")
    write_sample_metadata(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(SAMPLE_PARTS)
    table = pq.read_table(tmp_path / "validation.parquet")
    assert table.schema.equals(SAMPLE_SCHEMA)
    assert table["image_phash"][0].as_py() == "0123456789abcdef"


def test_rows_are_the_pairs_in_their_order(parts, tables):
    for part, pairs in parts.items():
        rows = tables[part].to_pylist()
        assert [row["url"] for row in rows] == [f"package:{pair.key}" for pair in pairs]
        assert [row["text"] for row in rows] == [pair.caption for pair in pairs]
        for row, pair in zip(rows, pairs, strict=True):
            assert {name: row[name] for name in pair.metadata} == pair.metadata


def test_ids_are_unique_positive_and_fixed_by_the_key(tables):
    ids = column(tables, "id", "clipart", "emoji", "validation", "test_unseen_rendering")
    assert len(set(ids)) == len(ids) == 10666
    assert all(0 < number < 2**63 for number in ids)
    assert set(column(tables, "id", "test_unseen_concept")) < set(ids)
    assert pair_id("openclipart-00000") == int(sha256(b"openclipart-00000").hexdigest()[:16], 16) % 2**63
    assert pair_id("openclipart-00000") in column(tables, "id", "clipart", "validation")


def test_only_what_nobody_knows_is_null(tables):
    for part, table in tables.items():
        empty = {name for name in table.column_names if table[name].null_count == table.num_rows}
        some = {name for name in table.column_names if 0 < table[name].null_count < table.num_rows}
        of_clipart = part in ("clipart", "validation")
        assert empty == UNKNOWN | ({"concept", "category", "tags"} if of_clipart else {"keywords"})
        assert some <= {"keywords"}


def test_every_link_leads_to_its_image(parts, tables):
    assert all(key == key.strip() and key.isascii() and key.replace("-", "").isalnum() for key in keys(tables))
    for part, pairs in parts.items():
        assert [shipped_image(key) for key in keys(tables, part)] == [pair.image for pair in pairs]
    for row in (row for table in tables.values() for row in table.to_pylist()):
        with Image.open(io.BytesIO(shipped_image(row["url"].removeprefix("package:")))) as image:
            assert image.size == (row["width"], row["height"])
    assert shipped_image("openclipart-99999") is None


def keys(tables, *of_parts):
    return [url.removeprefix("package:") for url in column(tables, "url", *of_parts)]


def test_counts_of_the_text_are_coyos():
    """On ten published rows of COYO-700M."""
    rows = json.loads((Path(__file__).parent / "data" / "coyo_rows.json").read_text())["rows"]
    assert len(rows) == 10
    for row in rows:
        counts = text_counts(row["text"])
        assert counts == {name: row[name] for name in counts}


def test_importing_the_sample_loads_nothing_heavy():
    check = "import sys, align_train.corpus.sample_corpus; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", check], check=True, timeout=60, capture_output=True, text=True)
    heavy = {"torch", "transformers", "tokenizers", "imagehash", "scipy", "datasets"}
    assert not heavy & set(result.stdout.split())
