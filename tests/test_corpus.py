"""Hugging Face datasets as pairs, and the prepare step."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import read_all

from align_train.corpus.hf_dataset import dataset_pairs
from align_train.corpus.prepare import prepare_dataset, prepare_sample
from align_train.corpus.sample_corpus import read_sample
from align_train.data.storage.shards import Shard
from align_train.records import Pair
from align_train.shipped import sample_corpus

PARTS = {
    "clipart": 4869, "emoji": 3450, "validation": 497, "test_unseen_rendering": 1850, "test_unseen_concept": 173,
    "held_out_concepts": 368,
}  # fmt: skip


def test_prepare_sample_writes_and_then_rests(tmp_path):
    reports = prepare_sample(tmp_path)
    assert {name: report.pairs for name, report in reports.items()} == PARTS
    assert not any(report.failed for report in reports.values())
    assert [report.tasks for report in reports.values()] == [5, 4, 1, 2, 1, 1]
    sample = {pair.key: pair for pair in read_sample()}
    shard = Shard(tmp_path / "emoji" / "shards" / "00003.tar")
    rows = pq.read_table(tmp_path / "emoji" / "shards" / "00003.parquet").to_pylist()
    assert len(rows) == 450
    pairs = [(str(row["id"]), sample[row["url"].removeprefix("package:")]) for row in rows]
    assert read_all(shard) == [(key, pair.image, pair.caption) for key, pair in pairs]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.name != ".lock"}
    assert prepare_sample(tmp_path) == reports
    assert times == {path: path.stat().st_mtime_ns for path in times}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.tar")}
    (tmp_path / "emoji" / "shards" / "00002.tar").unlink()
    prepare_sample(tmp_path)  # finishes what is damaged, to the same bytes
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.tar")}
    with pytest.raises(ValueError, match="overwrite=true"):
        prepare_sample(tmp_path, rows_per_task=5000)
    assert prepare_sample(tmp_path)["emoji"].tasks == 4  # the refusal changed nothing
    assert prepare_sample(tmp_path, rows_per_task=5000, overwrite=True)["emoji"].tasks == 1
    assert len(list(tmp_path.rglob("*.tar"))) == 6


def test_prepare_sample_never_takes_another_folder(tmp_path):
    theirs = tmp_path / "validation" / "shards" / "00000.tar"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"mine")
    for _ in range(2):
        with pytest.raises(ValueError, match="validation"):
            prepare_sample(tmp_path)
    assert theirs.read_bytes() == b"mine"


def test_prepare_dataset_splits_by_image(tmp_path):
    base = [pair for pair, _ in zip(read_sample(), range(200), strict=False)]
    pairs = [Pair(f"{pair.key}-{i}", pair.image, f"{pair.caption} {i}") for pair in base for i in range(2)]
    reports = prepare_dataset(tmp_path, iter(pairs), validation_share=0.2)
    assert sum(report.pairs for report in reports.values()) == 400
    assert 40 <= reports["validation"].pairs <= 120
    rows = {part: pq.read_table(tmp_path / part / "00000.parquet").to_pylist() for part in reports}
    numbers = {part: {row["key"].rsplit("-", 1)[0] for row in of_part} for part, of_part in rows.items()}
    assert not numbers["train"] & numbers["validation"]
    with pytest.raises(ValueError, match=r"validation_share is 1\.5"):
        prepare_dataset(tmp_path, pairs, validation_share=1.5)


@pytest.fixture
def samples(monkeypatch, tmp_path):
    """Three pairs of the sample; datasets offline and caching in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return [pair for pair, _ in zip(read_sample(), range(3), strict=False)]


def image_folder(folder, samples, captions_of=lambda pair: pair.caption):
    (folder / "more").mkdir(parents=True)
    names = ["a.webp", "b.webp", "more/c.webp"]
    rows = [
        {"file_name": name, "caption": captions_of(pair), "rating": number}
        for number, (name, pair) in enumerate(zip(names, samples, strict=True))
    ]
    for name, pair in zip(names, samples, strict=True):
        (folder / name).write_bytes(pair.image)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def content(pairs):
    return {(pair.image, pair.caption) for pair in pairs}


@pytest.mark.parametrize("streaming", [True, False])
def test_image_folder(tmp_path, samples, streaming):
    folder = image_folder(tmp_path / "images", samples)
    found = list(dataset_pairs("imagefolder", data_dir=str(folder), streaming=streaming))
    assert content(found) == content(samples)
    assert [pair.key for pair in found] == ["00000000", "00000001", "00000002"]
    assert {pair.metadata["rating"] for pair in found} == {0, 1, 2}


def test_several_captions_of_one_image(tmp_path, samples):
    folder = image_folder(tmp_path / "images", samples, lambda pair: [pair.caption, "another"])
    found = list(dataset_pairs(str(folder), key_column="rating"))
    assert {pair.key for pair in found} == {f"{row}-{caption}" for row in range(3) for caption in range(2)}
    assert content(found) == content(samples) | {(pair.image, "another") for pair in samples}


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_file(tmp_path, samples, as_struct):
    cells = [{"bytes": pair.image, "path": None} if as_struct else pair.image for pair in samples]
    table = {"img": cells, "TEXT": [p.caption for p in samples], "id": [p.key for p in samples], "hash": [b"x"] * 3}
    if not as_struct:
        del table["hash"]  # two columns of bytes could both be the image
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    options = {"image_column": "img"} if as_struct else {}
    found = list(dataset_pairs(str(tmp_path / "x.parquet"), key_column="id", **options))
    assert [(p.key, p.image, p.caption) for p in found] == [(p.key, p.image, p.caption) for p in samples]
    assert found[0].metadata == {"id": samples[0].key}


def test_the_shipped_parquet_file(samples):
    found = dataset_pairs(str(sample_corpus()), key_column="key")
    first = next(found)
    found.close()
    assert (first.key, first.image, first.caption) == (samples[0].key, samples[0].image, samples[0].caption)
    assert first.metadata == {"key": first.key, **samples[0].metadata}


def test_saved_to_disk(tmp_path, samples):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": p.image, "path": None} for p in samples], "text": [p.caption for p in samples]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "splits")
    for name in ("one", "splits"):
        assert content(dataset_pairs(str(tmp_path / name))) == content(samples)
    with pytest.raises(ValueError, match="no split test: set split to one of train"):
        next(dataset_pairs(str(tmp_path / "splits"), "test"))


def test_columns_that_cannot_be_guessed(tmp_path, samples):
    image = samples[0].image
    pq.write_table(pa.table({"a": [image], "b": [image], "x": ["1"], "y": ["2"]}), tmp_path / "x.parquet")
    path = str(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"set image_column: 2 columns .*a \(binary\).*y \(string\)"):
        next(dataset_pairs(path))
    with pytest.raises(ValueError, match="set caption_column: 2 columns"):
        next(dataset_pairs(path, image_column="a"))
    with pytest.raises(ValueError, match="caption_column=z is not a column"):
        next(dataset_pairs(path, image_column="a", caption_column="z"))
    (found,) = dataset_pairs(path, image_column="b", caption_column="y")
    assert (found.caption, found.metadata) == ("2", {"x": "1"})


def test_corpus_imports_no_torch():
    modules = "align_train.corpus.prepare, align_train.corpus.hf_dataset, datasets"
    check = f"import sys, {modules}; sys.exit(bool({{'torch', 'webdataset', 'transformers'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", check], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=60)
