"""Jobs: slices of the selection, which tasks are wanted, and whose folder it is."""

import json
from dataclasses import replace

import pyarrow as pa
import pytest
from fetching import QUICK, job_of, run_here, state
from metadata import coyo_row, coyo_table, parquet, resources

from align_train.corpus.fetch import Columns, FetchSettings, Job, Permissions, run_job
from align_train.corpus.fetch.job import chosen
from align_train.corpus.fetch.slices import read_rows, selected_rows
from align_train.corpus.images import ImageSettings
from align_train.corpus.prepare import prepare_coyo
from align_train.corpus.select import select
from align_train.corpus.select.funnel import Funnel

NOWHERE = "missing:"  # refused at once, without a request
ENDINGS = ("json", "parquet", "tar")


# Slices


def test_slices_across_files_and_row_groups_are_those_of_all_rows_together(tmp_path):
    tables = [coyo_table([{"id": 100 * file + row} for row in range(rows)]) for file, rows in enumerate((7, 0, 1, 12))]
    for number, table in enumerate(tables):
        parquet(tmp_path / f"{number:05d}.parquet", table, row_group_size=5)
    whole = pa.concat_tables(tables)
    assert selected_rows(tmp_path) == 20
    for start in range(20):
        for count in range(1, 21 - start):
            assert read_rows(tmp_path, start, count).equals(whole.slice(start, count))


@pytest.mark.parametrize("size", [1, 3, 7, 20, 21])
def test_tasks_cover_all_rows_once(tmp_path, size):
    for number, rows in enumerate((7, 13)):
        parquet(tmp_path / "selected" / f"{number}.parquet", [{"id": 100 * number + row} for row in range(rows)])
    job = job_of(tmp_path, rows_per_task=size)
    assert job.tasks == -(-20 // size)
    ids = [job.task(index).rows["id"].to_pylist() for index in range(job.tasks)]
    assert [len(of_task) for of_task in ids] == [job.rows_of(index) for index in range(job.tasks)]
    assert all(len(of_task) == size for of_task in ids[:-1])
    assert [number for of_task in ids for number in of_task] == [*range(7), *range(100, 113)]


def test_files_whose_columns_differ_share_a_task(tmp_path):
    plain = coyo_table([{"id": 1}])
    parquet(tmp_path / "a.parquet", plain)
    parquet(
        tmp_path / "b.parquet", plain.set_column(4, "height", pa.array([2**40])).append_column("new", pa.array([5]))
    )
    parquet(tmp_path / "c.parquet", plain.set_column(10, "num_faces", pa.nulls(1)))
    rows = read_rows(tmp_path, 0, 3)
    assert rows["height"].to_pylist() == [480, 2**40, 480]
    assert rows["num_faces"].to_pylist() == [0, 0, None]
    assert rows["new"].to_pylist() == [None, 5, None]


def test_a_selection_that_is_made_again_is_read_again(tmp_path):
    for ids in ([1, 2, 3], [4, 5], [6, 7]):
        parquet(tmp_path / "0.parquet", [{"id": number} for number in ids])
        assert read_rows(tmp_path, 0, selected_rows(tmp_path))["id"].to_pylist() == ids


def test_nothing_to_read_names_the_step(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the step `select` first"):
        job_of(tmp_path).begin(False)


def test_a_selection_without_rows_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Funnel, "plot", lambda funnel, path: path.write_bytes(b"a plot"))
    metadata = parquet(tmp_path / "in.parquet", [{}, {}])
    for rows in ([], [{}]):
        metadata = parquet(tmp_path / "in.parquet", rows)
        with pytest.raises(ValueError, match=r"selected has no rows, the rules dropped them all: .*funnel\.md says"):
            prepare_coyo(tmp_path, metadata, {"none": "width < 0"}, resources=resources(tmp_path), overwrite=True)
    assert not (tmp_path / "shards").exists()


# Which tasks


@pytest.mark.parametrize(
    ("tasks", "indices"),
    [("all", range(10)), ("3", [3]), (3, [3]), ("0-1", [0, 1]), ("9-9", [9]), ("0/3", [0, 1, 2]), ("1/3", [3, 4, 5])],
)
def test_tasks_are_chosen(tasks, indices):
    assert list(chosen(tasks, 10)) == list(indices)


@pytest.mark.parametrize("tasks", ["10", "8-10", "3-1", "3/3", "1/0", "-1", "", "some", "1,2", "0-", "1.5"])
def test_tasks_that_do_not_exist_are_told_with_those_that_do(tasks):
    with pytest.raises(ValueError, match=r"source\.fetch\.tasks is .*, and there are tasks 0 to 9: write all"):
        chosen(tasks, 10)


@pytest.mark.parametrize("count", [1, 10, 97])
@pytest.mark.parametrize("parts", [1, 3, 10, 16])
def test_the_parts_cover_all_tasks_once_and_evenly(count, parts):
    chosen_by = [list(chosen(f"{part}/{parts}", count)) for part in range(parts)]
    assert [index for of_part in chosen_by for index in of_part] == list(range(count))
    assert max(map(len, chosen_by)) - min(map(len, chosen_by)) <= 1


def test_only_the_tasks_asked_for_are_run(tmp_path):
    urls = [f"{NOWHERE}{number}" for number in range(9)]
    job = run_here(job_of(tmp_path, urls, tasks="1/3"))
    assert {path[:5] for path in state(job)} == {"00001"}
    assert job_of(tmp_path, urls, tasks="0-1").wanted() == [0]
    with pytest.raises(ValueError, match="there are tasks 0 to 2"):
        run_job(job_of(tmp_path, tasks="3"))


@pytest.mark.parametrize(("name", "value"), [("rows_per_task", 0), ("processes", 0)])
def test_settings_that_make_no_sense_are_named(name, value):
    with pytest.raises(ValueError, match=rf"source\.fetch\.{name} is 0"):
        FetchSettings(**{name: value})


# Whose folder


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ({"images": ImageSettings(size=17)}, "images"),
        ({"rows_per_task": 2}, "rows_per_task"),
        ({"columns": Columns(key="image_phash"), "rows_per_task": 4}, "rows_per_task, columns"),
    ],
)
def test_other_settings_are_refused_and_replace_only_if_told(tmp_path, other, differs):
    job = run_here(job_of(tmp_path, [f"{NOWHERE}{number}" for number in range(5)]))
    before = state(job)
    new = job_of(tmp_path, **other)
    with pytest.raises(ValueError, match=rf"holds shards of another job \(other {differs}\): set overwrite=true"):
        run_here(new)
    assert state(job) == before
    run_here(job_of(tmp_path, limits=replace(QUICK, retries=0), permissions=Permissions(), processes=7))  # may differ
    run_here(new, overwrite=True)
    assert set(state(new)) == {f"{index:05d}.{ending}" for index in range(new.tasks) for ending in ENDINGS}
    assert run_here(new).wanted() == []
    with pytest.raises(ValueError, match="another job"):
        run_here(job)


def test_what_a_crash_of_another_job_left_is_not_finished(tmp_path):
    job = run_here(job_of(tmp_path, [NOWHERE]))
    for ending in ENDINGS:
        (job.shards / f"00000.{ending}").rename(job.shards / f".00000.{ending}.staged")
    new = job_of(tmp_path, images=ImageSettings(size=17))
    new.begin(overwrite=True)
    assert state(new) == {}


@pytest.mark.parametrize("same_size", [False, True])
def test_another_selection_is_refused(tmp_path, same_size):
    job = run_here(job_of(tmp_path, [f"{NOWHERE}1"]))
    size = (job.selected / "00000.parquet").stat().st_size
    (job.selected / "identity.json").write_text('{"rules": "others"}')
    (job.selected.parent / "funnel.json").write_text("{}")
    if not same_size:
        job_of(tmp_path, [f"{NOWHERE}{number}" for number in range(99)])
    assert ((job.selected / "00000.parquet").stat().st_size == size) == same_size
    with pytest.raises(ValueError, match=r"\(other (selection, )?metadata and rules\)"):
        run_here(job_of(tmp_path))


def test_a_folder_of_someone_else_is_refused_and_untouched(tmp_path):
    job = job_of(tmp_path, [NOWHERE])
    job.shards.mkdir()
    (job.shards / "00000.tar").write_bytes(b"mine")
    (job.shards / "2024.tax.pdf").write_bytes(b"mine")
    with pytest.raises(ValueError, match="already holds shards of another job"):
        run_here(job)
    assert sorted(path.name for path in job.shards.iterdir()) == ["00000.tar", "2024.tax.pdf"]
    assert (job.shards / "00000.tar").read_bytes() == b"mine"
    run_here(job, overwrite=True)
    assert (job.shards / "2024.tax.pdf").read_bytes() == b"mine"


def test_rows_without_an_image_make_an_empty_shard(tmp_path):
    job = run_here(job_of(tmp_path, [NOWHERE]))
    assert state(job)["00000.json"] == {"rows": 1, "pairs": 0, "bytes": 10240, "reasons": {"scheme": 1}}
    assert state(job)["00000.tar"] == bytes(10240)


def test_a_selection_that_was_stopped_is_not_fetched(tmp_path):
    parts = [parquet(tmp_path / f"{n}.parquet", [coyo_row(n)]) for n in range(2)]
    select(parts, tmp_path / "out", {})
    job = Job(tmp_path / "out" / "selected", tmp_path / "out" / "shards")
    report = tmp_path / "out" / "funnel.json"
    whole = report.read_bytes()
    report.unlink()
    (job.selected / "00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"selected is not complete: run the step `select`"):
        job.begin(overwrite=False)
    assert not job.shards.exists()
    select(parts, tmp_path / "out", {})
    job.begin(overwrite=False)
    assert json.loads(report.read_bytes())["kept"] == json.loads(whole)["kept"] == 2
