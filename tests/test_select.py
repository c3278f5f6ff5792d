"""Selections from beginning to end: what is written, the report, resuming, limits of memory, presets and real rows."""

import json
import random
from datetime import UTC, date, datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from metadata import REAL_ROWS, coyo_table, judged, parquet, resources
from PIL import Image

from align_train.corpus.coyo import SCHEMA
from align_train.corpus.select import AtMost, First, FrequentWords, Keep, select, selecting
from align_train.corpus.select.duckdb_engine import DuckDB
from align_train.corpus.select.funnel import Funnel, Step
from align_train.shipped import config_folder

WIDE = {"wide": "width > 200"}


def rows_of(*widths, first=0):
    return [{"id": first + number, "width": width} for number, width in enumerate(widths)]


def selected(folder):
    return [pq.read_table(path)["id"].to_pylist() for path in sorted((folder / "selected").glob("*.parquet"))]


def run(folder, rules, metadata=None, **options):
    """Select into FOLDER/out from FOLDER/in."""
    return select(metadata or str(folder / "in"), folder / "out", rules, resources(folder), **options)


@pytest.fixture(autouse=True)
def plotted(request, monkeypatch):
    """Plots take longer than these selections: only tests of reports draw them."""
    if "report" not in request.node.name:
        monkeypatch.setattr(Funnel, "plot", lambda funnel, path: path.write_bytes(b"a plot"))


@pytest.fixture
def two_files(tmp_path):
    """In FOLDER/in: ids 0, 1, 2 and 10, 11, of which 1 and 10 are narrow."""
    parquet(tmp_path / "in" / "a.parquet", rows_of(640, 100, 640))
    parquet(tmp_path / "in" / "b.parquet", rows_of(100, 640, first=10))
    return tmp_path


def composed(*overrides):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("prepare", ["source=coyo", "source.folder=out", "source.metadata=in", *overrides])
    return instantiate(config.source.rules, _convert_="all")


# What is written.


def test_one_output_for_each_file(two_files):
    parquet(two_files / "in" / "c.parquet", rows_of(100, first=20))  # nothing is kept of it
    parquet(two_files / "in" / "d.parquet", [])
    funnel = run(two_files, WIDE)
    assert selected(two_files / "out") == [[0, 2], [11], [], []]
    assert funnel == Funnel(6, 3, (Step("wide", "width > 200", "drop", 0, 3, 3),))
    for path in (two_files / "out" / "selected").glob("*.parquet"):
        assert pq.read_schema(path).names == SCHEMA.names
        assert pq.read_schema(path).types == SCHEMA.types


def test_without_rules_every_row_stays(two_files):
    assert run(two_files, {}) == Funnel(5, 5, ())
    assert selected(two_files / "out") == [[0, 1, 2], [10, 11]]


def test_rows_keep_their_order_with_several_threads(tmp_path):
    """Six row groups, which two threads read at the same time, and rules that look rows up in tables."""
    draw = np.random.default_rng(0)
    count = 120_000
    rows = pa.table({
        "id": draw.permutation(count),
        "text": [f"text {number}" for number in draw.integers(0, count, count)],
        "filling": draw.integers(0, 1 << 40, count),
        "width": draw.integers(0, 1000, count),
    })  # fmt: skip
    path = parquet(tmp_path / "in.parquet", rows, row_group_size=20_000)
    run(tmp_path, {"once": First(["text"]), "rare": AtMost("id", "text", 3), **WIDE}, path)
    (ids,) = selected(tmp_path / "out")
    place = {number: place for place, number in enumerate(rows["id"].to_pylist())}
    assert len(ids) > 30_000
    assert ids == sorted(ids, key=place.__getitem__)


def test_columns_of_every_type_pass_unchanged(tmp_path):
    table = pa.table({
        "flag": pa.array([True, None]),
        "id": pa.array([2**63 - 1, 0], pa.int64()),
        "small": pa.array([255, None], pa.uint8()),
        "when": pa.array([datetime(2022, 8, 31, 1, 2, 3, 4, UTC), None], pa.timestamp("us", "UTC")),
        "day": pa.array([date(2022, 8, 31), None], pa.date32()),
        "price": pa.array([Decimal("1.25"), None], pa.decimal128(9, 2)),
        "bytes": pa.array([b"\x00\xff", None], pa.binary()),
        "text": pa.array(["a\u0000'b\"", None]),
        "vector": pa.array([[0.5, None], None], pa.list_(pa.float32())),
        "struct": pa.array([{"a": 1, "b": ["x"]}, None], pa.struct([("a", pa.int32()), ("b", pa.list_(pa.string()))])),
        "score": pa.array([float("nan"), -0.0], pa.float64()),
    })  # fmt: skip
    parquet(tmp_path / "in.parquet", table)
    run(tmp_path, {"any": "id >= 0"}, str(tmp_path / "in.parquet"))
    found = pq.read_table(tmp_path / "out" / "selected" / "00000.parquet")
    assert found.schema.names == table.schema.names
    assert str(found.to_pylist()) == str(table.to_pylist())
    assert found["vector"].type.value_type == pa.float32()
    assert [found.schema.field(name).type for name in table.schema.names if name not in ("vector", "struct")] == [
        table.schema.field(name).type for name in table.schema.names if name not in ("vector", "struct")
    ]


def test_folders_named_like_columns_add_none(tmp_path):
    path = parquet(tmp_path / "dump=2022" / "width=5" / "a.parquet", rows_of(640))
    run(tmp_path, WIDE, path)
    assert pq.read_table(tmp_path / "out" / "selected" / "00000.parquet").equals(coyo_table(rows_of(640)))


# The report.


def test_the_report_is_written_in_three_forms(two_files):
    rules = {
        "wide": "width > 200",
        "seen": Keep("num_faces = 0 OR width | 1 > 0", "keep"),
        "shared": AtMost("id", "text", 3),
    }
    funnel = run(two_files, rules)
    out = two_files / "out"
    assert sorted(path.name for path in out.iterdir()) == ["funnel.json", "funnel.md", "funnel.png", "selected"]
    written = json.loads((out / "funnel.json").read_text())
    assert written["rows"] == written["kept"] + sum(step["in_order"] for step in written["steps"])
    assert [step["rule"] for step in written["steps"]] == list(rules)
    assert written["files"] == {f"0000{n}.parquet": str(two_files / "in" / f"{'ab'[n]}.parquet") for n in range(2)}
    assert selecting.read_funnel(out / "funnel.json") == funnel
    lines = (out / "funnel.md").read_text().splitlines()
    assert "| wide | 2 (40.0 %) | 3 | 2 (40.0 %) | 0 | width > 200 |" in lines
    assert "| *rows out* | | 3 (60.0 %) | | | |" in lines
    cells = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert cells == {7}
    with Image.open(out / "funnel.png") as image:
        image.load()
        assert image.width > 600
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_rows_are_kept_rows_and_what_each_rule_dropped_in_order(tmp_path):
    draw = random.Random(0)
    rows = [{"width": draw.choice([None, 100, 300]), "num_faces": draw.choice([None, 0, 3])} for _ in range(90)]
    parquet(tmp_path / "in" / "a.parquet", rows)
    funnel = run(tmp_path, {"wide": "width > 200", "faces": Keep("num_faces = 0", "keep"), "high": "height > 100"})
    assert funnel.rows == 90 == funnel.kept + sum(step.in_order for step in funnel.steps)
    assert funnel.left()[-1] == funnel.kept
    unknown = sum(row["width"] is None for row in rows), sum(row["num_faces"] is None for row in rows), 0
    assert tuple(step.unknown for step in funnel.steps) == unknown
    assert all(step.in_order <= step.alone for step in funnel.steps)


def test_the_json_of_the_report_comes_last_since_it_says_that_all_is_done(two_files, monkeypatch):
    monkeypatch.setattr(Funnel, "plot", lambda funnel, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(two_files, WIDE)
    assert not (two_files / "out" / "funnel.json").exists()


@pytest.mark.parametrize(
    "funnel", [Funnel(0, 0, ()), Funnel(3, 0, (Step("a" * 60, "x|y", "keep", 1, 3, 3),), "a sample")]
)
def test_reports_of_nothing_and_of_long_names_are_drawn(funnel, tmp_path):
    funnel.write(tmp_path / "new" / "funnel", {})
    with Image.open(tmp_path / "new" / "funnel.png") as image:
        image.load()
    assert funnel.described().startswith(f"0 of {funnel.rows} rows kept")


def test_a_quick_selection_shows_no_progress_bar(two_files, capfd):
    run(two_files, {**WIDE, "once": First(["text"]), "frequent": FrequentWords(3)})
    assert capfd.readouterr() == ("", "")


# Resuming.


def files_of(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_selection_that_was_stopped_goes_on(two_files, monkeypatch):
    write, written = DuckDB.write, []

    def stopping(engine, file, output):
        if output.name == "00001.parquet":
            raise KeyboardInterrupt
        write(engine, file, output)

    def counting(engine, file, output):
        written.append(output.name)
        write(engine, file, output)

    rules = {**WIDE, "once": First(["text"])}
    whole = run(two_files, rules)
    wanted = files_of(two_files / "out" / "selected")
    (two_files / "out").rename(two_files / "unbroken")
    monkeypatch.setattr(DuckDB, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(two_files, rules)
    left = files_of(two_files / "out")
    assert set(left) == {"00000.parquet", "00000.json", "identity.json"}
    monkeypatch.setattr(DuckDB, "write", counting)
    assert run(two_files, rules) == whole
    assert written == ["00001.parquet"]
    found = files_of(two_files / "out" / "selected")
    assert found["00000.parquet"] == left["00000.parquet"]
    assert {name: content for name, (content, _) in found.items()} == {
        name: content for name, (content, _) in wanted.items()
    }


def test_a_complete_selection_rests(two_files):
    whole = run(two_files, WIDE)
    before = files_of(two_files / "out")
    assert run(two_files, WIDE) == whole
    assert run(two_files, WIDE, overwrite=True) == whole
    assert files_of(two_files / "out") == before


def test_metadata_may_move(two_files):
    run(two_files, WIDE)
    before = files_of(two_files / "out")
    (two_files / "in").rename(two_files / "moved")
    run(two_files, WIDE, str(two_files / "moved"))
    assert files_of(two_files / "out") == before


def test_a_file_that_was_taken_away_is_made_again(two_files):
    run(two_files, WIDE)
    (two_files / "out" / "selected" / "00001.parquet").unlink()
    run(two_files, WIDE)
    assert selected(two_files / "out") == [[0, 2], [11]]


@pytest.mark.parametrize(
    ("rules", "more", "differs"),
    [
        ({"wide": "width > 300"}, False, "other rules"),
        ({"wide": Keep("width > 200", "keep")}, False, "other rules"),
        ({"broad": "width > 200"}, False, "other rules"),
        (WIDE, True, "other metadata"),
        ({}, True, "other metadata and rules"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_selection_is_refused_and_replaced_only_if_told(two_files, rules, more, differs, finished, monkeypatch):
    run(two_files, WIDE)
    if not finished:
        (two_files / "out" / "funnel.json").unlink()
        (two_files / "out" / "selected" / "00001.json").unlink()
    if more:
        parquet(two_files / "in" / "c.parquet", rows_of(640, first=20))
    before = files_of(two_files / "out")
    with pytest.raises(ValueError, match=rf"selected already holds a selection of {differs}: set overwrite=true"):
        run(two_files, rules)
    assert files_of(two_files / "out") == before
    again = run(two_files, rules, overwrite=True)
    assert len(selected(two_files / "out")) == 2 + more
    assert again.kept == sum(map(len, selected(two_files / "out")))


def test_after_a_rule_that_does_not_work_the_mended_one_needs_no_overwriting(two_files):
    with pytest.raises(ValueError, match=r"rules\.wide, .* does not work"):
        run(two_files, {"wide": "no_such_function(width)"})
    assert run(two_files, WIDE).kept == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_someone_else_are_never_replaced(two_files, overwrite):
    parquet(two_files / "out" / "selected" / "00000.parquet", rows_of(1, 2))
    before = files_of(two_files / "out")
    with pytest.raises(ValueError, match=r"selected holds 00000\.parquet, which is not of a selection: take it away"):
        run(two_files, WIDE, overwrite=overwrite)
    assert files_of(two_files / "out") == before


def test_an_unknown_engine_is_refused_before_anything_is_written(two_files):
    with pytest.raises(ValueError, match="engine is 'polars'; there are duckdb and spark"):
        run(two_files, WIDE, engine="polars")
    assert not (two_files / "out").exists()


# Dry runs.


def test_a_dry_run_reports_on_a_sample_and_writes_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(selecting, "DRY_RUN_ROWS", 3)
    for number in range(6):
        parquet(tmp_path / "in" / f"{number}.parquet", rows_of(640, 100, 640, 640, first=10 * number))
    funnel = run(tmp_path, {**WIDE, "shared": AtMost("id", "image_phash", 1)}, dry_run=True)
    assert (funnel.rows, funnel.kept) == (12, 8)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dry_run.json", "dry_run.md", "dry_run.png"]
    written = json.loads((tmp_path / "out" / "dry_run.json").read_text())
    assert written["files"] == [str(tmp_path / "in" / f"{number}.parquet") for number in (0, 1, 3, 4)]
    assert written["sample"] == "the first rows, up to 3, of 4 of 6 files"
    assert "counted over these rows only" in (tmp_path / "out" / "dry_run.md").read_text()


# Memory.


def test_what_exceeds_memory_is_spilled_and_cleaned_up(tmp_path, monkeypatch):
    """Words and pairs of words of 100,000 texts, of which every other is different, in 100 MB."""
    count = 100_000
    texts = [
        f"{number // 2:x} some words that make the text long enough, and again: {number // 2:040d}"
        for number in range(count)
    ]
    table = pa.table({"id": range(count), "text": texts, "width": [640] * count})
    counts, spilled = DuckDB.counts, []

    def watched(engine, file):
        spilled.extend(path.stat().st_size for path in (tmp_path / "spill").rglob("*") if path.is_file())
        return counts(engine, file)

    monkeypatch.setattr(DuckDB, "counts", watched)
    rules = {"once": First(["text"]), "frequent": FrequentWords(10_000_000)}
    (ids,), found = judged(tmp_path, [table], rules, memory="100MB")
    assert ids == list(range(0, count, 2))
    assert found == [count, 0, count // 2, count // 2, 0, 0, 0]
    assert sum(spilled) > 1e6
    assert list((tmp_path / "spill").iterdir()) == []


def test_too_little_memory_is_told_with_what_helps(tmp_path):
    table = pa.table({"id": range(50_000), "text": [f"{number:0200d}" for number in range(50_000)]})
    with pytest.raises(ValueError, match=r"give more memory than resources\.memory=3MB, fewer threads than 2"):
        judged(tmp_path, [table], {"frequent": FrequentWords(10_000_000)}, memory="3MB")
    assert list((tmp_path / "spill").iterdir()) == []


@pytest.mark.parametrize("limits", [{"memory": "plenty"}, {"threads": 0}], ids=str)
def test_wrong_limits_are_named(limits, tmp_path):
    (name, value), = limits.items()  # fmt: skip
    with pytest.raises(ValueError, match=rf"does not take .*resources\.{name}={value}.*give for instance memory=4GiB"):
        judged(tmp_path, [[{}]], WIDE, **limits)


def test_a_spill_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "spill").write_text("a file")
    with pytest.raises(ValueError, match=r"nothing can be written to resources\.spill=.*spill .*: name a folder"):
        judged(tmp_path, [[{}]], WIDE)


def test_two_selections_share_a_spill_folder(tmp_path):
    """Each has a folder of its own there: DuckDB's files have the same names in all processes."""
    parquet(tmp_path / "in.parquet", rows_of(640))
    files = selecting.find_metadata(str(tmp_path / "in.parquet"))
    engine = DuckDB(selecting.Plan.of(WIDE), resources(tmp_path))
    with engine.opened(files), DuckDB(engine.plan, engine.resources).opened(files) as other:
        query = "SELECT current_setting('temp_directory')"
        folders = [opened._connection.execute(query).fetchone()[0] for opened in (engine, other)]
        assert {str(folder) for folder in (tmp_path / "spill").iterdir()} == set(folders)
        assert len(set(folders)) == 2
    assert list((tmp_path / "spill").iterdir()) == []


# Real rows and presets.


def test_coyos_release_rules_keep_its_real_rows(tmp_path):
    (ids,), counts = judged(tmp_path, [coyo_table(REAL_ROWS)], composed("rules=coyo_release"))
    assert ids == [row["id"] for row in REAL_ROWS]
    assert len(ids) == 10
    assert sum(counts[1:]) == 0


def test_the_align_papers_verdict_on_coyos_real_rows(tmp_path):
    """By hand: 25, 27 and 26 words are too many; no side is 200 pixels or less, none three times the other."""
    too_many_words = {4896263451343, 5626407855002, 1434519186493}
    (ids,), counts = judged(tmp_path, [coyo_table(REAL_ROWS)], composed("rules=align_paper"))
    assert ids == [row["id"] for row in REAL_ROWS if row["id"] not in too_many_words]
    assert dict(zip(composed("rules=align_paper"), counts[3::3], strict=True)) == {
        "short_side": 0, "aspect": 0, "words": 3, "shared_text": 0, "texts_per_image": 0,
    }  # fmt: skip


SHARED = [{"id": 100 + number, "text": "eleven images share this"} for number in range(11)]
DOUBLE = [
    {"id": 200 + number, "text": "the same image twice", "image_phash": "1234567890abcdef"} for number in range(2)
]
MANY = [{"id": 300 + n, "text": f"one image, many texts, {n}", "image_phash": "fedcba0987654321"} for n in range(1001)]
ODD = [
    {},
    {"width": 200},
    {"width": 199},
    {"width": 900, "height": 300},
    {"width": 901, "height": 300},
    {"text": "two words"},
    {"text": " ".join(["word"] * 21)},
    {"text": " ".join(["word"] * 257)},
    {"clip_similarity_vitb32": 0.29},
    {"clip_similarity_vitb32": None},
    {"watermark_score": 0.8},
    {"watermark_score": None},
    {"aesthetic_score_laion_v2": 4.4},
    {"aesthetic_score_laion_v2": None},
    {"num_faces": 1},
    {"num_faces": None},
    {"nsfw_score_gantman": 0.3},
    {"nsfw_score_gantman": 0.51},
    {"nsfw_score_gantman": None, "nsfw_score_opennsfw2": None},
    {"image_phash": "00000000ffff000f"},
    {"image_phash": "00000000ffff003f"},
    {"image_phash": None},
    {"text": None},
]
ALIGN_ROWS = {1, 2, 3, 4, 5, 6, 7, 22}
DROPPED = {
    "none": set(),
    "coyo_release": {2, 4, 5, 7, 17, 22, *range(100, 111), 201},
    "align_paper_rows": ALIGN_ROWS,
    "align_paper": {*ALIGN_ROWS, *range(100, 111), *range(300, 1301)},
    "rare_words": {22},
    "clip_similarity": {8, 9},
    "watermark": {10},
    "aesthetic": {12, 13},
    "no_faces": {14, 15},
    "nsfw": {16, 17, 18},
    "exact_duplicates": {201},
    "evaluation_images": {19},
}


def test_every_preset_is_tried():
    assert {path.stem for path in (config_folder() / "rules").glob("*.yaml")} == set(DROPPED)


@pytest.mark.parametrize("preset", DROPPED)
def test_a_preset_drops_what_it_says(preset, tmp_path):
    (tmp_path / "list.txt").write_text("00000000ffff0000\n")
    lists = [f"rules.evaluation_images.lists=[{tmp_path}/list.txt]"] if preset == "evaluation_images" else []
    rows = [{"id": number, **row} for number, row in enumerate(ODD)]
    rows = [*rows, *SHARED, *DOUBLE, *MANY]
    (ids,), _ = judged(tmp_path, [rows], composed(f"rules={preset}", *lists))
    assert {row["id"] for row in rows} - set(ids) == DROPPED[preset]


def test_presets_are_combined_and_changed_on_the_command_line(tmp_path):
    rules = composed(
        "rules=[align_paper_rows,watermark]", "rules.words='word_count > 1'",
        "+rules.tall='height > 479'", "~rules.aspect",
    )  # fmt: skip
    assert list(rules) == ["short_side", "words", "watermark", "tall"]
    (ids,), _ = judged(tmp_path, [[{"id": number, **row} for number, row in enumerate(ODD)]], rules)
    assert set(range(len(ODD))) - set(ids) == {1, 2, 3, 4, 10, 22}


def test_prepare_selects_as_configured(two_files):
    overrides = [
        "source=coyo", "rules=[align_paper,watermark]", "source.steps=[select]",
        f"source.folder={two_files}/out", f"source.metadata={two_files}/in",
        f"source.resources.spill={two_files}/spill",
    ]  # fmt: skip
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        reports = instantiate(compose("prepare", overrides).source, _convert_="all")
        dry = instantiate(compose("prepare", [*overrides, "dry_run=true"]).source, _convert_="all")
    assert reports["select"].described() == "3 of 5 rows kept (60.0 %); dropped: short_side 2"
    assert dry["dry run"].kept == 3
    assert selected(two_files / "out") == [[0, 2], [11]]
