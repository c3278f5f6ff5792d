"""Spark beside DuckDB: every rule says the same of every row, the same rows are written, the same shards are made.

Runs on Spark's local-cluster: a master and two executors, each a process of its own.
"""

import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import drawn_image
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from metadata import coyo_table, parquet, resources

from align_train.corpus.fetch import FetchSettings, Job, Permissions, spark_job
from align_train.corpus.fetch.commit import claimed
from align_train.corpus.fetch.spark_job import run_job_on_spark
from align_train.corpus.prepare import prepare_coyo
from align_train.corpus.select import AtMost, FarFrom, First, Keep, select
from align_train.corpus.select.duckdb_engine import DuckDB
from align_train.corpus.select.metadata import find_metadata
from align_train.corpus.select.plan import Plan
from align_train.corpus.select.spark_engine import Spark
from align_train.corpus.select.spark_sql import translated, unproven
from align_train.corpus.spark import reason, spark_session
from align_train.shipped import config_folder

# PySpark 4.3 says so of pandas 3, which it is not asked to use here
pytestmark = pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas:FutureWarning")

QUICK = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"  # Java spends no time on what pays only for long runs
CLUSTER = {
    "spark.master": "local-cluster[2,1,1024]",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.log.level": "ERROR",
    "spark.sql.shuffle.partitions": "2",
    "spark.driver.extraJavaOptions": QUICK,
    "spark.executor.extraJavaOptions": QUICK,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The session on a cluster of two executors."""
    pyspark = pytest.importorskip("pyspark", reason="PySpark is not installed")
    if not (shutil.which("java") or Path(os.environ.get("JAVA_HOME", "-"), "bin", "java").is_file()):
        pytest.skip("Spark needs Java, and there is none in JAVA_HOME or on the PATH")
    home = tmp_path_factory.mktemp("spark")  # executors log under it
    for entry in Path(pyspark.__file__).parent.iterdir():
        (home / entry.name).symlink_to(entry)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SPARK_CONF_DIR", "SPARK_REMOTE", "MASTER", "PYSPARK_SUBMIT_ARGS"):
            patch.delenv(name, raising=False)
        patch.setenv("SPARK_HOME", str(home))
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.chdir(home)
        from pyspark import SparkContext
        from pyspark.sql import SparkSession

        session = SparkSession.builder.config(map=CLUSTER).getOrCreate()
        yield session
        gateway = session.sparkContext._gateway
        session.stop()
        gateway.shutdown()  # now: what is left would complain into other tests
        gateway.proc.stdin.close()  # which ends Java
        gateway.proc.wait(30)
        SparkContext._gateway = SparkContext._jvm = None


MOST_FREQUENT = 110  # words and pairs of words
NEAR = ["ffff0000ffff0000", "0123456789abcdef"]
TEXTS = [
    "a red cat on a mat", "A  Red cat!", "it's \"quoted\", isn't it", r"back\slash \n \\ and \d",
    "100% '; DROP TABLE corpus; --", "İstanbul ΣΑΣ ΟΔΟΣ", "i̇stanbul σας οδος", "Straße STRASSE straße",
    "École ÉCOLE école", "Один ДВА один два", "😀 smile 😀", "日本語 テキスト", "nai\u0308ve naïve",
    "\U00031350x \U0002a6dey \u0870z \u1c89q \ua7cbw", "snake_case 42 \uff14\uff12 ²", "tab\tand\nline\u00a0break",
    "K ǅungla ﬁn Ⅷ ⅷ Ⓐ", "a\u0000b", "", "   ", "...", "x", "NULL",
]  # fmt: skip
SCORES = [None, -0.0, 0.1, 0.2, 0.26, 0.3, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, float("nan"), float("inf")]


def flipped(phash: str, *bits: int) -> str:
    return f"{int(phash, 16) ^ sum(1 << bit for bit in bits):016x}"


def drawn_rows(seed: int, first: int, count: int) -> list[dict[str, Any]]:
    """Rows with nulls, odd texts, scores at the rules' bounds, and hashes near those of NEAR."""
    draw = random.Random(seed)
    hashes = [flipped(draw.choice(NEAR), *draw.sample(range(64), draw.randrange(8))) for _ in range(24)]
    hashes += ["FFFF0000FFFF0001", "not a hash, sixt", "ffff", "", "ffff0000ffff00001", "ffff0000ffff000\n"]
    hashes += ["ffff0000ffff_000", "ffff0000fff__000", "ffff0000ffff000_", " fff0000ffff0000"]
    ids = draw.sample(range(first, first + 10 * count), count)
    return [
        {
            "id": ids[number],
            "text": draw.choice([None, *TEXTS, *TEXTS[:2] * 6]),
            "image_phash": draw.choice([None, *hashes, *hashes[:2] * 6]),
            "width": draw.choice([None, 150, 200, 201, 640, 1500]),
            "word_count": draw.choice([None, 2, 3, 20, 21]),
            "num_faces": draw.choice([None, 0, 0, 2]),
            "watermark_score": draw.choice(SCORES),
            "aesthetic_score_laion_v2": draw.choice([None, 4.4, 4.5, 7.1]),
            "clip_similarity_vitb32": draw.choice(SCORES),
            "clip_similarity_vitl14": draw.choice(SCORES),
            "nsfw_score_opennsfw2": draw.choice(SCORES),
        }
        for number in range(count)
    ]


def crafted_rows() -> list[dict[str, Any]]:
    """Rows whose verdicts are known, by id."""
    hash_of_120 = coyo_table([{"id": 120}])["image_phash"][0].as_py()
    eleven = [{"id": 100 + n, "text": "shared by eleven"} for n in range(11)]
    ten = [{"id": 120 + n, "text": "shared by ten"} for n in range(10)]
    ten += [{"id": 130 + n, "text": "shared by ten", "image_phash": (None, hash_of_120)[n]} for n in range(2)]
    one, other = flipped(NEAR[0], *range(20)), flipped(NEAR[0], *range(30))
    captions = [{"id": 140 + n, "text": f"caption {n} of four", "image_phash": one} for n in range(4)]
    again = {"text": "once more please", "clip_similarity_vitb32": 0.8}  # what all other rules keep
    twice = [{"id": number, "image_phash": other, **again} for number in (152, 151, 150)]
    twice[2]["width"] = 100  # but the lowest id is too small an image
    others = [{"id": 153 + n, **again} for n in range(6)]
    near = [{"id": 160 + n, "image_phash": flipped(NEAR[1], *range(n))} for n in range(6)]
    letters = ["seldom zyx", "once more \u0870please", "ONCE MORE PLEASE"]  # U+0870 is a letter since Unicode 14
    words = [{"id": 170 + n, "text": text} for n, text in enumerate(letters)]
    return [*eleven, *ten, *captions, *twice, *others, *near, *words]


def rules(folder: Path) -> dict[str, Any]:
    """All rules that ship, and others with bounds that these rows meet."""
    near = folder / "near.txt"
    near.write_text("\n".join(NEAR))
    shipped = sorted(path.stem for path in (config_folder() / "rules").glob("*.yaml"))
    chosen = f"rules=[{','.join(name for name in shipped if name != 'align_paper_rows')}]"  # which is in align_paper
    changed = [f"rules.evaluation_images.lists=[{near}]", f"rules.rare_words.most_frequent={MOST_FREQUENT}"]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("prepare", [chosen, *changed])
    return {
        **instantiate(config.rules, _convert_="all"),
        "größer": AtMost("text", "image_phash", 3, "drop"),
        "same": FarFrom([str(near)], 0, nulls="drop"),
        "clip": Keep("clip_similarity_vitb32 >= 0.7", "keep"),
        "scores": "clip_similarity_vitb32 + 0.1 > 0.8 OR clip_similarity_vitl14 / 2 BETWEEN 0.1 AND 0.35",
        "zero": Keep("width / num_faces > 400 OR clip_similarity_vitb32 / clip_similarity_vitl14 > 1.2", "keep"),
        "choice": "CASE WHEN num_faces > 0 THEN clip_similarity_vitb32 ELSE 0.7 END IN (0.7, 0.26)",
        "ratio": Keep("greatest(width, height) / least(width, height) < 2.3 AND coalesce(watermark_score, 0.9) <= 0.9"),
        "quotes": Keep("NOT contains(text, '''') AND text NOT LIKE '%\\%' AND text <> '😀 smile 😀'", "keep"),
    }


Verdict = tuple[bool, bool]  # whether a rule cannot tell, and whether it keeps the row


def seen_by(engine: Any, names: list[str]) -> list[dict[str, Verdict]]:
    """The verdict of each rule on each row of the file last judged."""
    query = "SELECT * EXCEPT (_row) FROM judged ORDER BY _row"
    if isinstance(engine, Spark):
        rows = [tuple(row) for row in engine._session.sql(query).collect()]
    else:
        rows = engine._connection.execute(query.replace("EXCEPT", "EXCLUDE")).fetchall()
    return [dict(zip(names, zip(row[::2], row[1::2], strict=True), strict=True)) for row in rows]


@pytest.fixture(scope="module")
def both(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same selection by both engines: their folders, and their verdicts on all rows."""
    folder = tmp_path_factory.mktemp("both")
    rows = [[*crafted_rows(), *drawn_rows(1, 10_000, 260)], [], drawn_rows(2, 20_000, 160)]
    names = ["a b%20[1]{x,y}.parquet", "k=v/empty.parquet", "ü.parquet"]
    files = [parquet(folder / name, part) for name, part in zip(names, rows, strict=True)]
    chosen, verdicts = rules(folder), {"duckdb": [], "spark": []}
    with pytest.MonkeyPatch.context() as patch:
        for engine in (DuckDB, Spark):

            def counts(self: Any, file: Any, counts: Any = engine.counts) -> list[int]:
                counted = counts(self, file)
                verdicts[self.name] += seen_by(self, list(chosen))
                return counted

            patch.setattr(engine, "counts", counts)
        for name in verdicts:
            select(files, folder / name, chosen, resources(folder), engine=name)
    return SimpleNamespace(folder=folder, rules=chosen, verdicts=verdicts, rows=[row for part in rows for row in part])


def test_every_rule_says_the_same_of_every_row(both):
    ours, theirs = both.verdicts.values()
    assert len(ours) == len(theirs) == len(both.rows)
    for name in both.rules:
        verdicts = zip(both.rows, ours, theirs, strict=True)
        assert not [(row, a[name], b[name]) for row, a, b in verdicts if a[name] != b[name]], name


def test_the_rows_put_every_rule_to_the_test(both):
    for name in both.rules:
        kept = {verdict[name][1] for verdict in both.verdicts["duckdb"]}
        assert kept == ({True} if name == "texts_per_image" else {True, False}), name  # none has 1000 texts here
    unknown = {name for name in both.rules if any(verdict[name][0] for verdict in both.verdicts["duckdb"])}
    assert unknown > {"short_side", "shared_text", "clip", "evaluation_images", "rare_words", "exact_duplicates"}


def test_the_funnels_are_equal(both):
    funnels = {name: json.loads((both.folder / name / "funnel.json").read_text()) for name in both.verdicts}
    assert [funnels[name].pop("engine") for name in both.verdicts] == list(both.verdicts)
    for funnel in funnels.values():
        del funnel["seconds"]
    assert funnels["spark"] == funnels["duckdb"]
    assert funnels["spark"]["rows"] == len(both.rows)


def test_the_same_files_are_written(both):
    for number in range(3):
        ours, theirs = (both.folder / name / "selected" / f"{number:05d}.parquet" for name in both.verdicts)
        assert theirs.read_bytes() == ours.read_bytes()
        assert pq.read_schema(theirs).names == coyo_table([]).schema.names


@pytest.mark.parametrize(
    ("rule", "keeps", "drops"),
    [
        ("shared_text", [*range(120, 132)], [*range(100, 111)]),
        ("größer", [100, 120], [140, 141, 142, 143]),
        ("same", [161, 162, 163, 164, 165], [160]),
        ("evaluation_images", [165], [160, 161, 162, 163, 164]),
        ("exact_duplicates", [100, 151], [150, 152]),
        ("rare_words", [100, 172], [170, 171]),
        ("short_side", [151], [150]),
    ],
)
def test_spark_keeps_and_drops_the_rows_that_it_should(both, rule, keeps, drops):
    says = {row["id"]: verdict[rule][1] for row, verdict in zip(both.rows, both.verdicts["spark"], strict=True)}
    assert [number for number in keeps + drops if says[number]] == keeps


def test_the_rows_cut_words_that_are_equally_frequent(both):
    counts = Counter(gram for row in both.rows for gram in grams(row.get("text", f"photo of house {row['id']}") or ""))
    ranked = sorted(counts, key=lambda gram: (-counts[gram], gram.encode()))
    last, next_one = ranked[MOST_FREQUENT - 1 : MOST_FREQUENT + 1]
    assert counts[last] == counts[next_one]


def grams(text: str) -> list[str]:
    words = re.findall(r"\w+", text.replace("İ", "i").replace("Σ", "σ").lower())  # noqa: RUF001
    return words + [f"{first} {second}" for first, second in pairwise(words)]


def test_no_rules_keep_every_row_on_spark(cluster, tmp_path):
    files = find_metadata(parquet(tmp_path / "a.parquet", coyo_table([{}, {}, {}])))
    with Spark(Plan.of({}), resources(tmp_path)).opened(files) as engine:
        assert engine.counts(files[0]) == [3]
        engine.write(files[0], tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("list_zip(text, text) IS NOT NULL", "rules.odd, .*, does not work on Spark"),
        ("width + height", "rules.odd, .* does not work on Spark .*is not a boolean"),
        ("text[1:2] GLOB 'a*'", "rules.odd, .*, does not work on Spark"),
    ],
)
def test_a_rule_that_spark_cannot_run_is_named(cluster, tmp_path, rule, says):
    files = find_metadata(parquet(tmp_path / "a.parquet", coyo_table([{}])))
    with pytest.raises(ValueError, match=says), Spark(Plan.of({"odd": rule}), resources(tmp_path)).opened(files):
        pass


def test_a_rule_that_may_mean_something_else_to_spark_is_warned_of(cluster, tmp_path, caplog):
    files = find_metadata(parquet(tmp_path / "a.parquet", coyo_table([{}])))
    rule = "width > 3 AND regexp_matches(text, '(?i)É')"
    with Spark(Plan.of({"odd": rule}), resources(tmp_path)).opened(files):
        assert "rules.odd" in caplog.text
        assert "REGEXP_MATCHES(text, '(?i)É'), which Spark may take" in caplog.text


def test_a_file_that_spark_leaves_out_is_an_error(cluster, tmp_path):
    files = find_metadata(parquet(tmp_path / "_a.parquet", coyo_table([{}])))
    plan = Plan.of({"wide": "width > 1"})
    with (
        Spark(plan, resources(tmp_path)).opened(files) as engine,
        pytest.raises(ValueError, match=r"0 rows in .*rename"),
    ):
        engine.counts(files[0])


def test_ids_that_repeat_are_refused_by_spark_too(cluster, tmp_path):
    table = coyo_table([{"id": 7, "text": "a", "image_phash": NEAR[0]}] * 2)
    files = find_metadata(parquet(tmp_path / "a.parquet", table))
    plan = Plan.of({"once": First(["image_phash", "text"])})
    with (
        pytest.raises(ValueError, match=r"rules.once: 2 rows .* have the id 7"),
        Spark(plan, resources(tmp_path)).opened(files),
    ):
        pass


def test_a_broken_file_is_named_by_spark(cluster, tmp_path):
    path = Path(parquet(tmp_path / "a.parquet", coyo_table([{}] * 500)))
    group = pq.ParquetFile(path).metadata.row_group(0)
    place = group.column(2).dictionary_page_offset  # of the texts
    content = bytearray(path.read_bytes())
    content[place : place + 200] = bytes(200)
    path.write_bytes(content)
    files = find_metadata(str(path))
    plan = Plan.of({"some": "text <> ''"})
    with (
        Spark(plan, resources(tmp_path)).opened(files) as engine,
        pytest.raises(ValueError, match=r"Spark fails on .*a\.parquet"),
    ):
        engine.counts(files[0])


def test_an_address_that_only_duckdb_reads_is_told(cluster, tmp_path):
    file = find_metadata(parquet(tmp_path / "a.parquet", coyo_table([{}])))[0]
    remote = file.__class__("hf://datasets/x/a.parquet", file.rows, file.schema, file.digest)
    with (
        pytest.raises(ValueError, match=r"Spark cannot read hf://.*engine=duckdb reads any.*No FileSystem for scheme"),
        Spark(Plan.of({"wide": "width > 1"}), resources(tmp_path)).opened([remote]),
    ):
        pass


def selection_of_files(folder: Path, count: int) -> str:
    """Metadata of drawn images in files; the link of number 3 leads nowhere."""
    rows = []
    for number in range(count):
        image = folder / f"{number}.jpg"
        if number != 3:
            image.write_bytes(drawn_image(number))
        rows.append({"url": image.as_uri(), "text": f"image {number}"})
    return parquet(folder / "links.parquet", coyo_table(rows))


def test_shards_made_on_executors_are_those_made_here(cluster, tmp_path):
    links = selection_of_files(tmp_path, 10)
    settings = FetchSettings(permissions=Permissions(files=True), rows_per_task=4, processes=1)
    for engine in ("duckdb", "spark"):
        prepare_coyo(tmp_path / engine, links, {"wide": "width > 1"}, engine=engine, fetch=settings)
    ours, theirs = (tmp_path / engine / "shards" for engine in ("duckdb", "spark"))
    assert sorted(path.name for path in theirs.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    for number in range(3):
        stem = f"{number:05d}"
        assert (theirs / f"{stem}.tar").read_bytes() == (ours / f"{stem}.tar").read_bytes()
        assert pq.read_table(theirs / f"{stem}.parquet").equals(pq.read_table(ours / f"{stem}.parquet"))
    assert json.loads((theirs / "00000.json").read_text())["reasons"] == {"missing_file": 1}


def test_finished_tasks_are_left_alone_and_lost_ones_made_again(cluster, tmp_path, monkeypatch):
    links = selection_of_files(tmp_path, 4)
    settings = FetchSettings(permissions=Permissions(files=True), rows_per_task=2)
    select(links, tmp_path, {}, resources(tmp_path))
    monkeypatch.chdir(tmp_path)
    job = Job(Path("selected"), Path("shards"), settings)  # executors run in another folder
    run_job_on_spark(job)
    first, second = (tmp_path / "shards" / f"0000{number}.tar" for number in range(2))
    second.with_suffix(".parquet").unlink()
    before = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    run_job_on_spark(job)
    assert first.stat().st_mtime_ns == before[0]
    assert second.stat().st_mtime_ns > before[1]


def test_what_goes_wrong_on_an_executor_is_raised_here(cluster, tmp_path):
    select(selection_of_files(tmp_path, 2), tmp_path, {}, resources(tmp_path))
    job = Job(tmp_path / "selected", tmp_path / "shards", FetchSettings(retry_failed=True))
    job.begin(overwrite=False)
    for name in ("00000.tar", "00000.parquet"):
        (tmp_path / "shards" / name).write_bytes(b"not what it should be")
    with pytest.raises(ValueError, match=r"00000\.parquet is not the sidecar of a fetched shard"):
        run_job_on_spark(job)


def test_a_task_that_another_process_has_is_left_to_it(cluster, tmp_path, caplog):
    select(selection_of_files(tmp_path, 2), tmp_path, {}, resources(tmp_path))
    job = Job(tmp_path / "selected", tmp_path / "shards", FetchSettings(permissions=Permissions(files=True)))
    job.begin(overwrite=False)
    with claimed(tmp_path / "shards" / "00000"):
        run_job_on_spark(job)
    assert "1 tasks are being worked on by other processes, such as 00000" in caplog.text
    assert not list((tmp_path / "shards").glob("*.tar"))


def test_a_folder_that_executors_do_not_share_is_named(tmp_path):
    told: list[Any] = []
    job = Job(tmp_path / "selected", tmp_path / "shards")  # here is no job.json, as on a machine of its own
    spark_job._work(job, SimpleNamespace(add=told.extend), 5)
    assert not told[0].ran
    assert "is another folder on" in str(told[0].error)


def test_speculation_is_refused(tmp_path, monkeypatch):
    select(selection_of_files(tmp_path, 2), tmp_path, {}, resources(tmp_path))
    context = SimpleNamespace(getConf=lambda: {"spark.speculation": "true"})
    monkeypatch.setattr(spark_job, "spark_session", lambda: SimpleNamespace(sparkContext=context))
    with pytest.raises(ValueError, match=r"spark\.speculation=false"):
        run_job_on_spark(Job(tmp_path / "selected", tmp_path / "shards"))


def test_columns_of_different_types_are_refused(tmp_path, monkeypatch):
    table = coyo_table([{}])
    other = table.set_column(table.schema.get_field_index("width"), "width", table["width"].cast("int64"))
    files = find_metadata([parquet(tmp_path / "a.parquet", table), parquet(tmp_path / "b.parquet", other)])
    with pytest.raises(ValueError, match=r"column width is int32 in .*a\.parquet and int64 in .*b\.parquet"):
        Spark(Plan.of({"wide": "width > 1"}), resources(tmp_path))._common_schema(files)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("clip >= 0.7", "`clip` >= CAST(0.7 AS FLOAT)"),
        ("clip >= 7e-1", "`clip` >= 7e-1"),
        ("score >= 0.7", "`score` >= 0.7"),
        (
            "n / m > 0.3",
            "CASE WHEN `m` = 0 THEN CAST(`n` AS DOUBLE) * POWER(`m`, -1) ELSE CAST(`n` AS DOUBLE) / `m` END > 0.3",
        ),
        ("clip * 2 > n", "`clip` * CAST(2 AS FLOAT) > CAST(`n` AS FLOAT)"),
        ("coalesce(clip, NULL, 0.3) < score", "COALESCE(`clip`, NULL, CAST(0.3 AS FLOAT)) < `score`"),
        (r"text LIKE 'a\b'", r"`text` LIKE 'a\\\\b'"),
        (r"text = 'it''s \n'", r"`text` = 'it\'s \\n'"),
    ],
)
def test_sql_is_translated_with_its_numbers_and_backslashes(ours, theirs):
    assert (
        translated(f"SELECT {ours}", {"clip": "float", "score": "double", "n": "exact", "m": "exact"})
        == f"SELECT {theirs}"
    )


def test_unproven_parts_are_the_outermost():
    assert unproven("width > 3 AND length(text) < 9") == set()
    assert unproven("round(sqrt(width)) > 3 OR text ILIKE 'a'") == {"ROUND(SQRT(width))", "text ILIKE 'a'"}


def test_missing_pyspark_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with pytest.raises(ValueError, match=r"pip install 'align-train\[spark\]'"):
        spark_session()


def test_missing_java_is_told_with_the_remedy(monkeypatch):
    pytest.importorskip("pyspark", reason="PySpark is not installed")
    from pyspark.errors import PySparkRuntimeError
    from pyspark.sql import SparkSession

    def no_java(*_: Any) -> None:
        raise PySparkRuntimeError(errorClass="JAVA_GATEWAY_EXITED", messageParameters={})

    monkeypatch.setattr(SparkSession, "getActiveSession", lambda: None)
    monkeypatch.setattr(SparkSession.Builder, "getOrCreate", no_java)
    with pytest.raises(ValueError, match=r"Java gateway process exited .* needs Java 17 or later, in JAVA_HOME"):
        spark_session()


JAVA = """An error occurred while calling o1.collect.
: org.apache.spark.SparkException: Exception thrown in awaitResult:
\tat org.apache.spark.util.SparkThreadUtils$.awaitResult(SparkThreadUtils.scala:70)
Caused by: org.apache.spark.SparkException: [FAILED_READ_FILE] Encountered error while reading file a.parquet
\tat x.y(z.scala:1)
Caused by: java.io.IOException: FAILED_TO_UNCOMPRESS(5)"""
PYTHON = """An error occurred while calling o1.foreach.
: org.apache.spark.SparkException: Job aborted due to stage failure: Traceback (most recent call last):
  File "worker.py", line 1, in main
ModuleNotFoundError: No module named 'align_train'
\tat x.y(z.scala:1)"""


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (JAVA, "[FAILED_READ_FILE] Encountered error while reading file a.parquet; FAILED_TO_UNCOMPRESS(5)"),
        (PYTHON, "ModuleNotFoundError: No module named 'align_train'"),
        ("\n[PARSE_SYNTAX_ERROR] Syntax error at end\n\n== SQL ==\nselect", "[PARSE_SYNTAX_ERROR] Syntax error at end"),
    ],
)
def test_the_reason_is_one_line(raised, told):
    assert reason(Exception(raised)) == told
