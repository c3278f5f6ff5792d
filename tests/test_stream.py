"""Training from the metadata: which rows, in which order, where it goes on, and what becomes of links that are dead."""

import csv
import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pyarrow as pa
import pytest
from conftest import drawn_image, on_ranks
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from metadata import coyo_table, judged, parquet
from torch.utils.data import DataLoader

from align_train.cli import main
from align_train.cli.train import train
from align_train.corpus import stream as stream_module
from align_train.corpus.fetch import Columns, Fetcher
from align_train.corpus.fetch.client import Limits, Permissions
from align_train.corpus.images import ImageSettings
from align_train.corpus.select import AtMost, FarFrom, First, FrequentWords, Keep
from align_train.corpus.select.plan import Plan
from align_train.corpus.select.row_filter import RowFilter
from align_train.corpus.stream import CoyoStream, Item, Position
from align_train.data import Augmentation, StreamedBatches
from align_train.data.stream import Share
from align_train.engine import StreamData, read_checkpoint, recalibration
from align_train.records import Preprocessing, Tally
from align_train.shipped import config_folder

pytest_plugins = ["bad_server"]

QUICK = Limits(connect_seconds=5, total_seconds=5, retries=0, window=16, ahead_bytes=5_000)
LOCAL = Permissions(networks=("127.0.0.1/32",), files=True)
AS_IT_CAME = ImageSettings(mode="original", reencode=False)
DEAD = {"http_404": "/404", "too_many_pixels": "/bomb.png", "not_an_image": "/html.jpg", "timeout": "/never"}
Row = dict[str, Any]


def stream_of(metadata: Any, rules: Any = None, limits: Limits = QUICK, **more: Any) -> CoyoStream:
    """A stream that may fetch from this machine."""
    return CoyoStream(metadata, rules or {}, Fetcher(limits, LOCAL, AS_IT_CAME), **{"block": 8, **more})


def taken(stream: CoyoStream, count: int, start: Position = stream_module.START, **part: int) -> list[Item]:
    with closing(stream.items(start, **part)) as items:
        return list(islice(items, count))


def epoch(stream: CoyoStream, number: int, **part: int) -> list[str]:
    """Keys of a part in one epoch, in order."""
    with closing(stream.items(Position(number), **part)) as items:
        return [item.pair.key for item in takewhile(lambda item: item.after.epoch == number, items) if item.pair]


def added(items: list[Item]) -> Tally:
    total = Tally()
    for item in items:
        total.update(item.dropped)
    return total


@pytest.fixture
def picture(tmp_path: Path) -> str:
    """The address of an image that costs no network."""
    path = tmp_path / "picture.jpg"
    path.write_bytes(drawn_image(1))
    return path.as_uri()


@pytest.fixture
def metadata(tmp_path: Path, picture: str) -> Callable[..., list[str]]:
    """Write files of so many rows each, all with the picture; every fifth row is too small for `WIDE`."""

    def write(*counts: int) -> list[str]:
        ids = iter(range(sum(counts)))
        rows = [[{"id": next(ids), "url": picture} for _ in range(count)] for count in counts]
        for row in (row for file in rows for row in file if row["id"] % 5 == 0):
            row["width"] = 100
        return [parquet(tmp_path / f"{number}.parquet", file, row_group_size=7) for number, file in enumerate(rows)]

    return write


WIDE = {"wide": "width > 200"}


# Which rows


def random_rows(count: int, picture: str) -> list[Row]:
    draw, near = random.Random(3), "0123456789abcdef"
    hashes = [near, "0123456789abcdee", "0123456789abcd00", "f" * 16, "no hash", None]
    return [
        {
            "id": number,
            "url": picture,
            "width": draw.choice([None, 100, 201, 640]),
            "text": draw.choice([None, "a red cat", "one two three four", "x"]),
            "image_phash": draw.choice(hashes),
            "watermark_score": draw.choice([None, 0.1, 0.8, 0.9]),
        }
        for number in range(count)
    ]


def single_row_rules(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "near.txt").write_text("0123456789abcdef\n")
    return {
        "wide": "least(width, height) > 200",
        "clean": Keep("watermark_score < 0.8", nulls="keep"),
        "far": FarFrom([str(tmp_path / "near.txt")], 4, nulls="keep"),
        "words": "word_count BETWEEN 3 AND 20",
    }


@pytest.mark.parametrize("block", [3, 32, 1000])
def test_a_stream_keeps_and_counts_what_selection_over_files_does(block: int, tmp_path: Path, picture: str) -> None:
    rows, rules = random_rows(160, picture), single_row_rules(tmp_path)
    [ids], counts = judged(tmp_path, [coyo_table(rows)], rules)
    stream = stream_of(str(tmp_path / "in-0.parquet"), rules, block=block)
    items = taken(stream, len(ids) + 1)  # the last is the first of the next epoch: all that is dropped lies between
    assert sorted(int(item.pair.key) for item in items[:-1] if item.pair) == sorted(ids)
    dropped = added(items[1:])
    assert dropped == dict(zip(rules, counts[3::3], strict=True))
    assert dropped.total() + len(ids) == counts[0] == 160
    assert min(dropped.values()) > 0


def test_a_batch_without_rows_or_rules_stays_as_it_is() -> None:
    table = coyo_table([{}, {}])
    with RowFilter(Plan.of({})) as unfiltered, RowFilter(Plan.of(WIDE)) as filtered:
        assert unfiltered.kept(table) == (table, Tally())
        assert filtered.kept(table[:0]) == (table[:0], Tally())


@pytest.mark.parametrize(
    "rule", [AtMost("id", "text", 3), First(["text"]), FrequentWords(5)], ids=lambda rule: type(rule).__name__
)
def test_rules_over_the_whole_corpus_are_refused(rule: Any, metadata: Callable[..., list[str]]) -> None:
    with pytest.raises(ValueError, match=r"^counted count over the whole corpus.*stream FOLDER/selected.*rules=none"):
        stream_of(metadata(3), {"wide": "width > 200", "counted": rule})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rules": {"light": "weight < 3"}}, r"0\.parquet has no column weight, which the rule light needs"),
        ({"columns": Columns(url="link")}, r"0\.parquet has no column link, it has id.*data\.stream\.columns"),
    ],
)
def test_a_missing_column_is_named_before_anything_starts(
    given: Row, message: str, metadata: Callable[..., list[str]]
) -> None:
    stream = stream_of(metadata(3), **given)
    with pytest.raises(ValueError, match=message):
        stream.check()
    with pytest.raises(ValueError, match=message):
        taken(stream, 1)


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("width", r"rules\.odd, 'width', gives INTEGER, not true or false"),
        ("width > 'many'", r"rules\.odd, .* does not work on this metadata: .*many"),
        ("text::INTEGER > 3", r"rules\.odd, .* does not work on this metadata: .*photo of house"),
        ("row_number() OVER () < 3", r"rules\.odd, .* does not work on this metadata: .*window"),
        ("no_such_function(width)", r"rules\.odd, .* does not work on this metadata: .*no_such_function"),
    ],
)
def test_a_rule_that_does_not_work_is_named(sql: str, message: str, metadata: Callable[..., list[str]]) -> None:
    with pytest.raises(ValueError, match=message):
        taken(stream_of(metadata(3), {**WIDE, "odd": sql}), 1)


@pytest.mark.parametrize("rules", [{"none": "width > 1000"}, {"none": "text = ''"}])
def test_metadata_of_which_no_row_is_kept_is_an_error(rules: Row, metadata: Callable[..., list[str]]) -> None:
    with pytest.raises(ValueError, match=r"process 1 of 1 kept no row in a whole epoch \(dropped: none 9\)"):
        taken(stream_of(metadata(9), rules), 1)


def test_captions_are_cleaned_and_empty_ones_counted(tmp_path: Path, picture: str) -> None:
    texts = ["A &amp; B", None, " <br> ", "\u200b", "C"]
    path = parquet(tmp_path / "a.parquet", [{"url": picture, "text": text} for text in texts])
    items = taken(stream_of(path), 4)
    assert {item.pair.caption for item in items if item.pair} == {"A & B", "C"}
    assert sum(item.dropped["empty_caption"] for item in items) in range(3, 7)  # an epoch, and some of the next


def test_rows_without_an_address_are_counted(tmp_path: Path, picture: str) -> None:
    path = parquet(tmp_path / "a.parquet", [{"url": None}, {"url": picture}, {"url": ""}])
    assert added(taken(stream_of(path), 3)) == {"bad_url": 2}


def test_names_of_files_are_no_patterns(tmp_path: Path, picture: str) -> None:
    for name in ("a[1]?.parquet", "a1x.parquet"):
        parquet(tmp_path / "[odd] *" / name, [{"url": picture, "text": f"in {name}"}])
    [item] = taken(stream_of(str(tmp_path / "[odd] *" / "a[1]?.parquet")), 1)
    assert item.pair is not None
    assert item.pair.caption == "in a[1]?.parquet"


def test_a_file_with_damaged_pages_is_named(tmp_path: Path) -> None:
    table = coyo_table([{"text": f"{random.Random(number).random()}"} for number in range(3000)])
    path = Path(parquet(tmp_path / "torn.parquet", table))
    content = bytearray(path.read_bytes())
    content[1000 : len(content) // 2] = bytes(len(content) // 2 - 1000)
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"torn\.parquet cannot be read to its end"):
        taken(stream_of(str(path)), 3000)


# In which order


@pytest.mark.parametrize("files", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_every_kept_row_comes_once_an_epoch_over_all_parts(
    files: int, parts: int, metadata: Callable[..., list[str]]
) -> None:
    stream = stream_of(metadata(*[36, 25, 30][:files]), WIDE, block=3)
    wanted = {str(number) for number in range(sum([36, 25, 30][:files])) if number % 5}
    for number in (0, 1):
        keys = [key for part in range(parts) for key in epoch(stream, number, part=part, parts=parts)]
        assert len(keys) == len(wanted)
        assert set(keys) == wanted


def test_the_order_depends_on_seed_and_epoch_only(metadata: Callable[..., list[str]]) -> None:
    files = metadata(30, 40)
    first, second = epoch(stream_of(files, seed=1), 0), epoch(stream_of(files, seed=1), 1)
    through = [item.pair.key for item in taken(stream_of(files, seed=1), 140) if item.pair]
    assert through == first + second
    assert first != second
    assert sorted(first) == sorted(second)
    assert epoch(stream_of(files, seed=2), 0) != first
    assert first != sorted(first, key=int)


def test_processes_without_a_row_are_told_so(metadata: Callable[..., list[str]]) -> None:
    stream = stream_of(metadata(10), block=16)
    assert epoch(stream, 0, part=0, parts=2)
    with pytest.raises(ValueError, match=r"process 2 of 2 kept no row.*fewer data\.workers or data\.stream\.block"):
        taken(stream, 1, part=1, parts=2)


def test_an_empty_file_among_others_does_no_harm(metadata: Callable[..., list[str]]) -> None:
    stream = stream_of(metadata(0, 10, 0))
    assert sorted(map(int, epoch(stream, 1))) == list(range(10))


# Where it goes on


@pytest.mark.parametrize(("part", "parts"), [(0, 1), (2, 3)])
def test_a_stream_goes_on_after_any_item_as_if_it_had_never_stopped(
    part: int, parts: int, tmp_path: Path, picture: str
) -> None:
    draw = random.Random(1)
    rows = [
        {
            "id": number,
            "url": draw.choice([picture, picture, picture, "nonsense"]),
            "text": draw.choice(["", "one word", "two words"]),
            "width": draw.choice([100, 640, 640]),
        }
        for number in range(48)
    ]
    files = [parquet(tmp_path / "a.parquet", rows[:30]), parquet(tmp_path / "b.parquet", rows[30:])]
    stream = stream_of(files, WIDE, block=4 if parts == 1 else 2)
    whole = taken(stream, 60, part=part, parts=parts)
    assert whole[-1].after.epoch >= 2
    assert {"wide", "empty_caption", "bad_url"} == set(added(whole))
    for k in range(0, 24, parts):
        assert taken(stream, 8, whole[k].after, part=part, parts=parts) == whole[k + 1 : k + 9]


# Dead links


def links(tmp_path: Path, *urls: str) -> str:
    return parquet(tmp_path / "links.parquet", [{"url": url} for url in urls])


def test_dead_links_are_counted_by_reason_and_stop_nothing(bad_server: Any, tmp_path: Path) -> None:
    alive = [f"{bad_server.url}/ok/{number}.jpg" for number in range(4)]
    path = links(tmp_path, *alive, *(bad_server.url + page for page in DEAD.values()))
    items = taken(stream_of(path, limits=Limits(total_seconds=0.8, retries=0, window=8)), 16)
    assert added(items) == dict.fromkeys(DEAD, 2)
    assert sum(item.pair is not None for item in items) == 8
    assert all(item.dropped.total() == (item.pair is None) for item in items)


def test_an_epoch_of_dead_links_is_an_error_with_the_reasons(bad_server: Any, tmp_path: Path) -> None:
    stream = stream_of(links(tmp_path, *[f"{bad_server.url}/404"] * 9, "nonsense"))
    message = r"11 links of .*links\.parquet in a row gave no image \(bad_url \d, http_404 \d+\), the last was "
    with pytest.raises(ValueError, match=message):
        taken(stream, 100)
    half = taken(stream, 5)[-1].after
    with pytest.raises(ValueError, match=r"^16 links"):  # the rest of its epoch, a whole one, and the next one's first
        taken(stream, 100, half)


def test_a_lost_network_is_an_error_before_the_epoch_ends(
    bad_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "PATIENCE", 7)
    with pytest.raises(ValueError, match=r"^7 links .*http_404 7.*check the network.*resume=RUN"):
        taken(stream_of(links(tmp_path, *[f"{bad_server.url}/404"] * 30)), 100)
    mostly_dead = [f"{bad_server.url}/{'404' if number % 5 else 'ok/1.jpg'}" for number in range(30)]
    assert len(taken(stream_of(links(tmp_path, *mostly_dead), block=1), 90)) == 90


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({"window": 5}, 1 + 5),
        ({"ahead_bytes": 20_000, "connections": 4}, 1 + 20 + 4),
    ],  # a result is held for 1000 bytes
    ids=["window", "ahead_bytes"],
)
def test_a_consumer_that_takes_nothing_stops_the_downloads(
    limits: dict[str, int], most: int, bad_server: Any, tmp_path: Path
) -> None:
    second = f"{bad_server.url}/{'never' if 'window' in limits else 'ok/1.jpg'}"
    path = links(tmp_path, f"{bad_server.url}/ok/0.jpg", second, *[f"{bad_server.url}/ok/2.jpg"] * 400)
    in_order = type("InOrder", (CoyoStream,), {"_shuffled": lambda self, table, place: table.to_pylist()})
    stream = in_order(path, {}, Fetcher(Limits(**limits), LOCAL, AS_IT_CAME))
    with closing(stream.items()) as items:
        next(items)
        bad_server.pause()
        assert 2 <= bad_server.hits.total() <= most


def test_downloads_go_on_while_the_next_rows_are_read(
    metadata: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, begun = stream_of(metadata(20), block=10), threading.Event()
    blocks = CoyoStream._blocks

    def noted(self: CoyoStream, file: str) -> Iterator[pa.Table]:
        for number, block in enumerate(blocks(self, file)):
            if number == 1:
                begun.set()
            yield block

    monkeypatch.setattr(CoyoStream, "_blocks", noted)
    rows = stream._rows(Position(), 0, 1)
    with closing(rows):
        next(rows)
        assert begun.wait(10)  # the second block is read, though only the first row of the first one was taken


# The hub


@pytest.fixture
def hub(tmp_path: Path, metadata: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset `some/mini` that lies in a folder, as a hub's repository is laid out."""
    folder = tmp_path / "repository" / "data"
    folder.mkdir(parents=True)
    for path, name in zip(
        metadata(6, 5, 4), ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"), strict=True
    ):
        Path(path).rename(folder / f"{name}.parquet")
    load = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: load(str(tmp_path / "repository")))
    return folder


def test_a_split_of_a_hub_dataset_is_read(hub: Path) -> None:
    assert sorted(map(int, epoch(stream_of("some/mini"), 0))) == list(range(11))
    assert sorted(map(int, epoch(stream_of("some/mini", split="test"), 0))) == list(range(11, 15))
    with pytest.raises(ValueError, match=r"some/mini has no split dev, it has train, test: set data\.stream\.split"):
        stream_of("some/mini", split="dev").check()


@pytest.mark.parametrize("name", ["no/such", "shards/coyo"])
def test_what_is_neither_folder_nor_dataset_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=rf"{name} is no folder here, and cannot be read as a dataset of the hub"):
        stream_of(name).check()
    with pytest.raises(FileNotFoundError, match="no metadata file matches"):
        stream_of(f"{name}.parquet").check()


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(
    metadata: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata(5, 6)
    monkeypatch.chdir(tmp_path.parent.parent)
    assert len(epoch(stream_of(f"{tmp_path.parent.name}/{tmp_path.name}"), 0)) == 11


def test_only_the_columns_that_are_needed_are_read(
    metadata: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, load = [], datasets.load_dataset

    def noted(*words: Any, **options: Any) -> Any:
        asked.append(options["columns"])
        return load(*words, **options)

    monkeypatch.setattr(datasets, "load_dataset", noted)
    stream = stream_of(metadata(5), WIDE)
    tables = list(stream._blocks(stream.files[0]))
    assert tables[0].column_names == asked[0] == ["id", "url", "text", "width"]


# The end of a process


ABANDONED = """
import sys
from itertools import islice
from align_train.corpus.fetch import Fetcher
from align_train.corpus.fetch.client import Limits, Permissions
from align_train.corpus.stream import CoyoStream

fetcher = Fetcher(Limits(ahead_bytes=int(sys.argv[2])), Permissions(files=True))
stream = CoyoStream(sys.argv[1], {"wide": "width > 200"}, fetcher, block=4)
"""
FROM_ITEMS = "items = stream.items()"
FROM_LOADER = """
from torch.utils.data import DataLoader
from align_train.data import Augmentation, StreamedBatches
from align_train.data.stream import Share
from align_train.records import Preprocessing

batches = StreamedBatches(stream, Share(workers=2), Preprocessing(40, 32), Augmentation(), 4)
items = iter(DataLoader(batches, batch_size=None, num_workers=2))
"""


def test_a_script_that_takes_three_and_ends_does_end(metadata: Callable[..., list[str]]) -> None:
    """Whether the thread that reads is busy, waits for room, or belongs to a worker process."""
    [path] = metadata(40)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", f"{ABANDONED}{begin}\nprint(len(list(islice(items, 3))))", path, str(ahead_bytes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for begin, ahead_bytes in ((FROM_ITEMS, 10**9), (FROM_ITEMS, 5_000), (FROM_LOADER, 10**9))
    ]
    try:
        for script in started:
            said = script.communicate(timeout=120)
            assert (script.returncode, *said) == (0, "3\n", "")
    finally:
        for script in started:
            script.kill()


def test_worker_processes_are_forked_beside_busy_threads(metadata: Callable[..., list[str]]) -> None:
    files = metadata(40, 40)
    batches = StreamedBatches(stream_of(files, WIDE), Share(workers=2), Preprocessing(40, 32), Augmentation(), 4)
    with duckdb.connect(config={"threads": 4}) as connection, closing(stream_of(files, WIDE).items()) as items:
        connection.sql(f"SELECT sum(hash(id)) FROM read_parquet({files})").fetchall()
        for _ in range(2):
            loader = DataLoader(batches, batch_size=None, num_workers=2)
            assert [batch.position[0] for batch in islice(loader, 4) if batch.position] == [0, 1, 0, 1]
            next(items)


def test_what_a_worker_process_finds_wrong_is_told(metadata: Callable[..., list[str]]) -> None:
    batches = StreamedBatches(
        stream_of(metadata(6)), Share(workers=2), Preprocessing(40, 32), Augmentation(), batch_size=2
    )
    with pytest.raises(ValueError, match=r"process 2 of 2 kept no row in a whole epoch"):  # all rows are one block
        list(islice(DataLoader(batches, batch_size=None, num_workers=2), 4))


# Training


@pytest.fixture
def web(bad_server: Any, tmp_path: Path) -> Path:
    """A folder with metadata of 100 links in three files, of which some are dead and some rows too small."""
    pages = [f"/ok/{number}.jpg" for number in range(100)]
    pages[::7] = ["/404" if number % 2 else "/html.jpg" for number in range(15)]
    rows = [{"id": n, "url": bad_server.url + page, "width": 640 if n % 5 else 150} for n, page in enumerate(pages)]
    for number, (first, last) in enumerate(((0, 30), (30, 70), (70, 100))):
        parquet(tmp_path / "web" / f"{number}.parquet", rows[first:last], row_group_size=9)
    return tmp_path / "web"


@pytest.fixture(autouse=True)
def _quick_ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Statistics of batch norm are not what is tested here; and nothing stays behind."""
    monkeypatch.setattr(recalibration, "BATCHES", 1)
    yield
    GlobalHydra.instance().clear()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("align_train")]


def words(web: Path, folder: Path, *more: str) -> list[str]:
    """Overrides for a run of six steps."""
    return [
        "experiment=tiny", "data=coyo_stream", f"data.stream.metadata={web}", f"hydra.run.dir={folder}",
        "data.stream.fetcher.permissions.networks=[127.0.0.1/32]", "data.stream.fetcher.limits.retries=0",
        "data.stream.fetcher.limits.window=16", "data.stream.fetcher.limits.ahead_bytes=20000",
        "data.stream.block=8", "data.batch_size=8", "data.workers=0",
        "max_steps=6", "schedule.total_steps=6", "checkpoint_every=3", "validate_every=3", "export=false",
        "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", *more,
    ]  # fmt: skip


def run(web: Path, folder: Path, *more: str) -> Path:
    GlobalHydra.instance().clear()
    main(["train", *words(web, folder, *more)])
    return folder


def resumed(folder: Path, *more: str) -> Path:
    GlobalHydra.instance().clear()
    main(["train", f"resume={folder}", *more])
    return folder


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[str]:
    return [row["loss"] for row in metrics(folder) if row["loss"]]


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def streams_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_checkpoint(folder)["StreamData"]
    return state


def web_stream(web: Path) -> CoyoStream:
    return stream_of(str(web), {"short_side": "least(width, height) > 200"}, seed=1)


def used(web: Path, pairs: int, part: int, parts: int) -> list[Item]:
    """By the stream's own account, the items of a part up to the one that brings the last of so many pairs."""
    items = taken(web_stream(web), 80, part=part, parts=parts)
    brings = [number for number, item in enumerate(items, 1) if item.pair]
    return items[: brings[pairs - 1]]


@pytest.mark.parametrize(("workers", "micro_batch"), [(0, "null"), (0, "4"), (1, "null"), (2, "null"), (2, "4")])
def test_a_resumed_run_equals_one_never_stopped(
    workers: int,
    micro_batch: str,
    web: Path,
    tmp_path: Path,
    make_shards: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    more, parts = [f"data.workers={workers}", "model.vision.stochastic_depth=0.5"], max(workers, 1)
    more.append(f"step.micro_batch={micro_batch}")
    if workers == 1:  # shards for validation stand beside the stream, and change nothing
        more.append(f"data.validation={make_shards(24, name='validation')}/*.tar")
    whole, begun = run(web, tmp_path / "whole", *more), run(web, tmp_path / "parted", *more, "max_steps=3")
    assert len(losses(begun)) == 3
    if workers == 2:
        with pytest.raises(SystemExit):
            resumed(begun, "max_steps=6", "data.workers=3")
        told = "to 1 ranks of 2 workers, now there are 1 of 3: set data.workers=2"
        assert told in capsys.readouterr().err
    parted = resumed(begun, "max_steps=6", f"data.workers={workers}")
    assert losses(whole) == losses(parted)
    assert len(set(losses(whole))) == 6
    assert streams_state(whole) == streams_state(parted)
    assert streams_state(whole)["taken"] == (6 if micro_batch == "null" else 12)
    assert sorted(streams_state(whole)["positions"]) == list(range(parts))
    dropped = added([item for part in range(parts) for item in used(web, 6 * 8 // parts, part, parts)])
    assert {"short_side", "http_404", "not_an_image"} == set(dropped)
    assert result(whole)["dropped"] == result(parted)["dropped"] == dropped
    last = [row for row in metrics(whole) if row["dropped/short_side"]][-1]
    assert {reason: float(last[f"dropped/{reason}"]) for reason in dropped} == dropped
    assert len([row for row in metrics(parted) if row.get("validation/mean_r5")]) == (2 if workers == 1 else 0)
    assert (parted / "checkpoints" / "best.ckpt").is_file() == (workers == 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.stream.metadata=nowhere.parquet"], "no metadata file matches 'nowhere.parquet'"),
        (["data.batch_size=0"], "data.batch_size is 0"),
        (["rules=align_paper"], "shared_text, texts_per_image count over the whole corpus"),
        (["+rules.light='weight < 3'"], "0.parquet has no column weight, which the rule light needs"),
        (["data.stream.fetcher.permissions.networks=[]"], "links of "),
        (["data.stream.block=0"], "data.stream.block is 0"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    more: list[str], message: str, web: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(web, tmp_path / "run", *more)
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def rank_of_two(number: int, web: Path, folder: Path) -> None:
    """One of two processes that train together: two steps, and two more of the resumed run."""
    recalibration.BATCHES = 1
    keys: list[str] = []
    note = StreamData.on_after_batch_transfer
    StreamData.on_after_batch_transfer = lambda self, batch, index: (  # type: ignore[method-assign]
        keys.extend(batch.keys) or note(self, batch, index)
    )
    for more in (["max_steps=2"], ["max_steps=4", f"resume={folder}"]):
        given = words(web, folder, "trainer.devices=2", *more)
        overrides = [word for word in given if not word.startswith("hydra.")]
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            train(compose("train", [*overrides, f"folder={folder}"]))
    (folder / f"keys-{number}.json").write_text(json.dumps(keys))


def test_two_ranks_read_parts_of_their_own_and_go_on(web: Path, tmp_path: Path) -> None:
    on_ranks(2, rank_of_two, web, tmp_path)
    wanted = [used(web, 4 * 4, part, 2) for part in range(2)]  # steps, and a rank's half of the batch
    for number, items in enumerate(wanted):
        keys = json.loads((tmp_path / f"keys-{number}.json").read_text())
        assert keys == [item.pair.key for item in items if item.pair]
        assert streams_state(tmp_path)["positions"][number] == items[-1].after
    assert result(tmp_path)["dropped"] == added(wanted[0] + wanted[1])
    assert len(losses(tmp_path)) == 4
