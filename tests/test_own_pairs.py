"""One's own pairs: every format in which they may lie, what is guessed of it, and what is refused."""

import csv
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import drawn_image
from reading import write_tar

from align_train.data.own_pairs import OpenedPairs, OwnPairs, Row
from align_train.data.own_pairs.class_folders import TEMPLATES
from align_train.data.own_pairs.formats import FORMATS

QUOTE = '"'
IMAGES = [drawn_image(number) for number in range(6)]
CAPTIONS = [
    ["a red cat", 'the cat, "red"', "cat"], ["ünï dog"], ["tree", "a tree"], ["boat"], ["house", "house; red"], ["sea"],
]  # fmt: skip
FILES = [f"{'sub/' if number % 2 else ''}{number}.jpg" for number in range(6)]
PAIRS = sorted((image, sorted(captions)) for image, captions in zip(IMAGES, CAPTIONS, strict=True))
ROWS = [{"image": name, "caption": text} for name, texts in zip(FILES, CAPTIONS, strict=True) for text in texts]
LISTS = [{"image": name, "caption": texts} for name, texts in zip(FILES, CAPTIONS, strict=True)]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nobody wants to hear of it."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the test's folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def write_images(folder: Path, names: Sequence[str] = FILES) -> Path:
    for name, image in zip(names, IMAGES, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)
    return folder


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=4)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def content(opened: OpenedPairs, part: str = "train") -> list[tuple[bytes, list[str]]]:
    """Each image with all its captions, sorted."""
    found: dict[bytes, list[str]] = {}
    for row in rows_of(opened, part):
        assert row.picture
        found.setdefault(row.picture.read(), []).extend(row.captions)
    return sorted((image, sorted(captions)) for image, captions in found.items())


def rows_of(opened: OpenedPairs, part: str = "train") -> list[Row]:
    return list(getattr(opened, part)())


def told(opened: OpenedPairs) -> str:
    return "\n".join(opened.told)


def bytes_rows() -> list[dict[str, Any]]:
    return [{"image": image, "caption": texts} for image, texts in zip(IMAGES, CAPTIONS, strict=True)]


def struct_rows() -> list[dict[str, Any]]:
    return [{**row, "image": {"bytes": row["image"], "path": "x.jpg"}} for row in bytes_rows()]


def dataset() -> datasets.Dataset:
    captions = datasets.Sequence(datasets.Value("string"))
    features = datasets.Features({"id": datasets.Value("int64"), "image": datasets.Image(), "caption": captions})
    images = [{"bytes": image, "path": None} for image in IMAGES]
    return datasets.Dataset.from_dict({"id": list(range(6)), "image": images, "caption": CAPTIONS}, features)


# Builders: each writes the six images and their captions into a folder, and says how one opens them


def table(suffix: str, rows: Callable[[], Sequence[Mapping[str, Any]]], folder: Path, **settings: Any) -> OwnPairs:
    write_images(folder)
    return OwnPairs(write_table(folder / f"birds{suffix}", rows()), **settings)


def several_columns(suffix: str, folder: Path) -> OwnPairs:
    rows = [
        {"id": n, "photo": name, "caption_1": texts[0], "caption_2": (*texts, "")[1], "caption_3": (*texts, "", "")[2]}
        for n, (name, texts) in enumerate(zip(FILES, CAPTIONS, strict=True))
    ]
    return table(suffix, lambda: rows, folder)


def images_elsewhere(folder: Path) -> OwnPairs:
    write_images(folder / "images")
    return OwnPairs(write_table(folder / "tables" / "birds.csv", ROWS), images=str(folder / "images"))


def absolute_paths(folder: Path) -> OwnPairs:
    write_images(folder / "images")
    rows = [{**row, "image": str(folder / "images" / str(row["image"]))} for row in ROWS]
    return OwnPairs(write_table(folder / "tables" / "birds.csv", rows))


def several_files(folder: Path) -> OwnPairs:
    for number in range(2):
        write_table(folder / f"{number}.parquet", struct_rows()[number::2])
    return OwnPairs(str(folder / "*.parquet"))


def image_folder(kind: str, folder: Path) -> OwnPairs:
    """With a metadata file in the folder and another one in the folder below it."""
    write_images(folder)
    rows = LISTS if kind in (".jsonl", ".parquet") else ROWS
    for place in ("", "sub/"):
        own = [row for row in rows if str(row["image"]).startswith("sub/") == bool(place)]
        named = [{"file_name": str(row["image"]).removeprefix("sub/"), "text": row["caption"]} for row in own]
        write_table(folder / place / f"metadata{kind}", named)
    return OwnPairs(str(folder))


def text_files(folder: Path) -> OwnPairs:
    write_images(folder)
    for name, texts in zip(FILES, CAPTIONS, strict=True):
        (folder / name).with_suffix(".txt").write_text("\r\n".join(texts) + "\n\n", encoding="utf-8")
    return OwnPairs(str(folder))


def saved(folder: Path) -> OwnPairs:
    dataset().save_to_disk(folder / "saved")
    return OwnPairs(str(folder / "saved"))


def saved_splits(folder: Path) -> OwnPairs:
    data = dataset()
    datasets.DatasetDict({"train": data, "val": data.select([0]), "test": data}).save_to_disk(folder / "saved")
    return OwnPairs(str(folder / "saved"))


def repository(folder: Path) -> OwnPairs:
    """As a dataset lies on the hub, read by load_dataset as a stream."""
    for name in ("train-00000-of-00001", "validation-00000-of-00001"):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        dataset().to_parquet(folder / "data" / f"{name}.parquet")
    return OwnPairs(str(folder))


def karpathy(folder: Path, **settings: Any) -> OwnPairs:
    """COCO's form: of the six images two are restval; and one of val."""
    write_images(folder)
    (folder / "val.jpg").write_bytes(IMAGES[0])
    splits = ["train", "restval", "train", "train", "restval", "train", "val", "test"]
    names, captions = [*FILES, "val.jpg", "test.jpg"], [*CAPTIONS, ["val"], ["test"]]
    entries = [
        {"filename": Path(name).name, "filepath": str(Path(name).parent), "split": split}
        | {"sentences": [{"raw": text, "tokens": []} for text in texts]}
        for name, texts, split in zip(names, captions, splits, strict=True)
    ]
    (folder / "dataset_toy.json").write_text(json.dumps({"images": entries, "dataset": "toy"}))
    return OwnPairs(str(folder / "dataset_toy.json"), **settings)


def tars(kind: str, pattern: str, folder: Path) -> OwnPairs:
    texts: dict[str, Callable[[list[str]], bytes]] = {
        "txt": lambda texts: "\n".join(texts).encode(),
        "json": lambda texts: json.dumps({"captions": texts, "width": 40}).encode(),
    }
    for tar in range(2):
        members = [
            member
            for number in range(tar, 6, 2)
            for member in ((f"{number}.jpg", IMAGES[number]), (f"{number}.{kind}", texts[kind](CAPTIONS[number])))
        ]
        write_tar(folder / f"0000{tar}.tar", members)
    return OwnPairs(str(folder / pattern))


BUILDERS: dict[str, Callable[[Path], OwnPairs]] = {
    "csv": partial(table, ".csv", lambda: ROWS),
    "tsv": partial(table, ".tsv", lambda: ROWS),
    "jsonl": partial(table, ".jsonl", lambda: ROWS),
    "jsonl of lists": partial(table, ".jsonl", lambda: LISTS),
    "parquet of paths": partial(table, ".parquet", lambda: ROWS),
    "parquet of lists": partial(table, ".parquet", lambda: LISTS),
    "parquet of bytes": partial(table, ".parquet", bytes_rows),
    "parquet of structs": partial(table, ".parquet", struct_rows),
    "parquet files": several_files,
    "several columns, csv": partial(several_columns, ".csv"),
    "several columns, parquet": partial(several_columns, ".parquet"),
    "images elsewhere": images_elsewhere,
    "absolute paths": absolute_paths,
    "imagefolder, jsonl": partial(image_folder, ".jsonl"),
    "imagefolder, csv": partial(image_folder, ".csv"),
    "imagefolder, parquet": partial(image_folder, ".parquet"),
    "text files": text_files,
    "saved dataset": saved,
    "saved splits": saved_splits,
    "repository": repository,
    "karpathy": karpathy,
    "tars of txt": partial(tars, "txt", ""),
    "tars of json": partial(tars, "json", "0000{0..1}.tar"),
    "tars by glob": partial(tars, "txt", "*.tar"),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_every_format_ends_in_the_same_pairs(build: Callable[[Path], OwnPairs], tmp_path: Path) -> None:
    opened = build(tmp_path / "own").open()
    assert content(opened) == PAIRS
    assert content(opened) == PAIRS  # each call begins anew
    assert opened.total in (None, len(rows_of(opened)))
    assert len({row.where for row in rows_of(opened)}) == len(rows_of(opened))
    assert "Change with pairs.format=" in opened.told[0]


def test_names_that_no_file_can_have_are_errors_of_their_rows(tmp_path: Path) -> None:
    rows = [{"image": name, "caption": "c"} for name in ("a\0.jpg", "\ud800.jpg", "a" * 5000 + ".jpg")]
    for row in rows_of(OwnPairs(write_table(tmp_path / "a.jsonl", rows), image_column="image").open()):
        assert row.picture
        with pytest.raises(OSError, match=r"no file can be called|too long"):
            row.picture.read()


def test_links_end_in_the_same_pairs_where_they_are_allowed(web: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    table = write_table(
        tmp_path / "links.csv", [{"url": f"{web}/{row['image']}", "text": row["caption"]} for row in ROWS]
    )
    problem = r"10 of 10 rows of .*links.csv are links \(column url\): allow them with pairs.allow_links=true, or fetch"
    with pytest.raises(ValueError, match=problem):
        OwnPairs(table).open()
    opened = OwnPairs(table, allow_links=True, networks=["127.0.0.0/8"]).open()
    assert content(opened) == PAIRS
    row = rows_of(OwnPairs(table, allow_links=True).open())[0]
    assert row.picture
    with pytest.raises(OSError, match=r"0\.jpg was not fetched: refused_address"):
        row.picture.read()


def test_a_link_that_is_dead_or_names_a_file_is_an_error_of_its_row(web: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(IMAGES[0])
    links = [f"{web}/gone.jpg", f"file://{secret}", f"FILE://{secret}", "ftp://127.0.0.1/a.jpg"]
    table = write_table(tmp_path / "links.jsonl", [{"image": link, "caption": "x"} for link in links])
    opened = OwnPairs(table, allow_links=True, networks=["127.0.0.0/8"]).open()
    for row, reason in zip(rows_of(opened), ["http_404", "scheme", "scheme", "scheme"], strict=True):
        assert row.picture
        with pytest.raises(OSError, match=reason):
            row.picture.read()


# What is guessed


def test_columns_without_usual_names_are_known_by_what_is_in_them_and_all_are_told(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [{"nr": n, "bild": row["image"], "legende": row["caption"], "jahr": "1990"} for n, row in enumerate(ROWS)]
    opened = OwnPairs(write_table(tmp_path / "birds.csv", rows)).open()
    assert content(opened) == PAIRS
    assert "images from bild, captions from legende; not used: nr, jahr" in told(opened)
    assert "pairs.image_column=" in told(opened)
    assert "pairs.caption_columns=" in told(opened)
    assert rows_of(opened)[2].where == "row 3 of birds.csv"


def test_a_usual_name_without_images_gives_way_to_one_with(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [{"path": "unknown", "filename": row["image"], "caption": row["caption"]} for row in ROWS]
    assert content(OwnPairs(write_table(tmp_path / "birds.csv", rows)).open()) == PAIRS


def test_overrides_are_taken_in_place_of_guesses(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [{"image": "no.jpg", "scan": name, "caption": "no", "a": "A", "b": "B", "kind": "owl"} for name in FILES]
    path = write_table(tmp_path / "birds.data.csv", rows)
    opened = OwnPairs(path, image_column="scan", caption_columns=["a", "b"], label_column="kind").open()
    assert content(opened) == sorted((image, ["A", "B"]) for image in IMAGES)
    assert {row.label for row in rows_of(opened)} == {"owl"}
    assert {row.captions for row in rows_of(OwnPairs(path, caption_columns="b").open())} == {("B",)}


@pytest.mark.parametrize(
    ("rows", "settings", "problem"),
    [
        ([{"image": "0.jpg", "size": "12", "page": "3"}], {}, "no captions column; its columns are image, size, page"),
        ([{"image": "0.jpg", "one": "a b", "two": "c d"}], {}, r"could be captions \(one, two\); .* Set pairs\.cap"),
        ([{"a": "0.jpg", "b": "sub/1.jpg", "caption": "c"}], {}, "which a, b could all be the images: set pairs"),
        ([{"a": "red", "caption": "c"}], {}, "the columns a, caption, of which none is the images"),
        ([{"image": "0.jpg", "caption": "c"}], {"image_column": "x"}, "no column x, which pairs.image_col"),
        ([{"image": "0.jpg", "caption": "c"}], {"caption_columns": ["y"]}, "no column y, which pairs.cap"),
        ([{"image": "0.jpg", "caption": "c"}], {"split": "train"}, "as table, which has no use for pairs.split"),
        ([{"image": "0.jpg", "label": "owl"}], {}, "or pairs.templates to write captions about label"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_told_are_refused_with_all_that_there_are(
    rows: list[dict[str, str]], settings: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    write_images(tmp_path)
    with pytest.raises(ValueError, match=problem):
        OwnPairs(write_table(tmp_path / "birds.csv", rows), **settings).open()


def test_a_row_without_image_or_caption_is_still_a_row(tmp_path: Path) -> None:
    rows = [{"image": "0.jpg", "caption": "c"}, {"image": "", "caption": "c"}, {"image": "gone.jpg", "caption": ""}]
    first, second, third = rows_of(OwnPairs(write_table(tmp_path / "birds.csv", rows)).open())
    assert (first.captions, second.picture, third.captions) == (("c",), None, ())
    assert third.picture
    assert third.picture.name == str(tmp_path / "gone.jpg")
    with pytest.raises(FileNotFoundError):
        third.picture.read()


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.csv", "image,caption\n1.jpg,b,c\n", "none of the first 1 rows can be read: .* line 2 has 3 fields"),
        ("a.csv", "image,caption,caption\n1.jpg,b,c\n", "has several columns called caption: give each"),
        ("a.jsonl", '{"image"\n', "line 1 is no JSON"),
        ("a.parquet", "image,caption\n", "is not readable parquet"),
        ("a.csv", "", "is empty: its first line should name the columns"),
        ("a.json", '{"images": [{"id": 1}], "annotations": []}', "as COCO's own files: give Karpathy's"),
        ("a.json", "[1]", r"a\.json has no list of images"),
        ("a.json", '{"images": [{}]}', "image 1 has no split"),
        ("a.tar", "no tar at all", "is not a tar file"),
        ("a.xlsx", "", r"ends with \.xlsx: correct pairs\.path, or set pairs\.format to one of: table, a \.csv"),
    ],
)
def test_malformed_files_are_named_with_the_place(name: str, text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=problem):
        OwnPairs(str(tmp_path / name)).open()


def test_what_is_no_format_is_told_with_what_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "flat", ["0.jpg", "1.jpg"])
    with pytest.raises(ValueError, match=r"has 2 images .*looked for state\.json.*tar_shards, tars, a folder of them"):
        OwnPairs(str(tmp_path / "flat")).open()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="birds is neither a file nor a folder"):
        OwnPairs("birds").open()
    with pytest.raises(ValueError, match=r"no/birds could not be opened as a dataset of the Hugging Face hub"):
        OwnPairs("no/birds").open()
    with pytest.raises(FileNotFoundError, match=r"there is no table birds\.csv"):
        OwnPairs("birds.csv").open()
    with pytest.raises(ValueError, match=f"pairs.format is excel: give one of {', '.join(FORMATS)}"):
        OwnPairs("flat", format="excel").open()
    with pytest.raises(ValueError, match=r"has no metadata\.jsonl"):
        OwnPairs("flat", format="imagefolder").open()


# Tables as people have them


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_delimiter_and_encoding_of_a_csv_are_seen_and_told(delimiter: str, encoding: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    lines = [[row["image"], row["caption"]] for row in ROWS]
    text = "\n".join(f"{delimiter} ".join(f'"{cell.replace(QUOTE, 2 * QUOTE)}"' for cell in line) for line in lines)
    (tmp_path / "birds.CSV").write_bytes(f"image{delimiter} caption\n{text}\n".encode(encoding))
    opened = OwnPairs(str(tmp_path / "birds.CSV")).open()
    assert content(opened) == PAIRS
    assert (f"{delimiter!r} divides its columns" in told(opened)) == (delimiter != ",")
    assert ("line 5 has the byte 0xfc, which is no UTF-8, so it is read as Windows-1252" in told(opened)) == (
        encoding == "cp1252"
    )
    assert content(OwnPairs(opened_path(tmp_path), delimiter="tab" if delimiter == "\t" else delimiter).open()) == PAIRS
    with pytest.raises(ValueError, match=r"pairs\.delimiter is ';;': give one character, or tab"):
        OwnPairs(opened_path(tmp_path), delimiter=";;").open()


def opened_path(folder: Path) -> str:
    return str(folder / "birds.CSV")


def test_a_csv_without_names_of_columns_loses_no_row(tmp_path: Path) -> None:
    write_images(tmp_path)
    with (tmp_path / "birds.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([row["image"], row["caption"]] for row in ROWS)
    opened = OwnPairs(str(tmp_path / "birds.csv")).open()
    assert content(opened) == PAIRS
    assert "the first line names an image, so it is a row, and the columns are called column 1, column 2" in told(
        opened
    )


@pytest.mark.parametrize(
    ("name", "broken", "reason"),
    [
        ("a.csv", b"1.jpg,b,c\n", "ragged_row"),
        ("a.csv", b'1.jpg,"b" c\n', "broken_row"),
        ("b.csv", b"1.jpg,\x81\n", "unreadable_text"),  # of Windows-1252 neither
        ("a.csv", b"1.jpg,caf\xe9\n", "unreadable_text"),
        ("a.jsonl", b'{"image"\n', "broken_row"),
        ("a.jsonl", b"[1]\n", "broken_row"),
        ("a.jsonl", b'{"image": "1.jpg", "caption": "caf\xe9"}\n', "unreadable_text"),
        ("a.jsonl", b'{"image": "1.jpg", "caption": [["nested"]]}\n', "no_text"),
        ("a.jsonl", b'{"image": ["1.jpg"], "caption": "b"}\n', "no_image"),
    ],
)
def test_one_broken_row_is_a_row_with_a_problem(name: str, broken: bytes, reason: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    good = [{"image": "0.jpg", "caption": "uni" if name == "b.csv" else "ünï"}, {"image": "2.jpg", "caption": "b"}]
    write_table(tmp_path / name, good)
    text = (tmp_path / name).read_bytes().replace(b"\\u00fcn\\u00ef", "ünï".encode())
    (tmp_path / name).write_bytes(text + broken + text.splitlines()[-1] + b"\n")
    *_, third, last = rows_of(OwnPairs(str(tmp_path / name)).open())
    assert third.problem
    assert (third.problem.reason, third.where) == (reason, f"row 3 of {name}")
    assert (last.captions, last.problem) == (("b",), None)


def test_what_says_nothing_is_no_caption_and_no_class(tmp_path: Path) -> None:
    rows = [{"image": "0.jpg", "caption": cell, "label": cell} for cell in ("a", "b", float("nan"), None, 42, ["c"])]
    found = rows_of(OwnPairs(write_table(tmp_path / "a.jsonl", rows)).open())
    assert [row.captions for row in found] == [("a",), ("b",), (), (), ("42",), ("c",)]
    assert [row.label for row in found[:5]] == ["a", "b", None, None, "42"]


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ({"raw": "a b", "tokens": ["a", "b"]}, ("a b",)),
        ([{"raw": "a b"}, {"raw": "c"}], ("a b", "c")),
        ({"raw": ["a b", "c"], "sentid": [1, 2]}, ("a b", "c")),
    ],
)
def test_of_karpathys_structs_the_raw_text_is_taken(cell: Any, captions: tuple[str, ...], tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.jsonl", [{"image": "0.jpg", "sentences": cell}])
    assert rows_of(OwnPairs(path).open())[0].captions == captions


@pytest.mark.parametrize("cell", [{"tokens": ["a"]}, [["a"]], 7])
def test_columns_that_hold_no_texts_are_refused_as_captions(cell: Any, tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.jsonl", [{"image": "0.jpg", "story": cell}])
    with pytest.raises(ValueError, match=r"the column story holds a .*, and captions are texts or lists of texts"):
        OwnPairs(path, caption_columns="story").open()


def test_lists_and_arrays_of_images_in_a_dataset_are_refused(tmp_path: Path) -> None:
    image = {"bytes": IMAGES[0], "path": None}
    kinds = {"lists": datasets.Sequence(datasets.Image()), "pixels": datasets.Array2D((1, 2), "uint8")}
    for (name, kind), cell in zip(kinds.items(), ([image, image], [[0, 0]]), strict=True):
        features = datasets.Features({"image": kind, "caption": datasets.Value("string")})
        datasets.Dataset.from_dict({"image": [cell], "caption": ["a"]}, features).save_to_disk(tmp_path / name)
        with pytest.raises(ValueError, match=r"the column image holds a list of .*, and an image is a path, a link"):
            OwnPairs(str(tmp_path / name)).open()


@pytest.mark.parametrize("cell", [["a.jpg", "b.jpg"], [[[0, 0], [1, 1]]], {"pixels": [1]}])
def test_columns_that_hold_no_image_are_refused(cell: Any, tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.jsonl", [{"image": cell, "caption": "a"}])
    with pytest.raises(ValueError, match=r"the column image holds a .*, and an image is a path, a link"):
        OwnPairs(path).open()


@pytest.mark.parametrize("cell", ["['a \"b\"', 'c, d']", '["a \\"b\\"", "c, d"]', "['a \"b\"'\n 'c, d']"])
def test_lists_written_as_text_are_several_captions(cell: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv", [{"image": "0.jpg", "raw": cell}, {"image": "1.jpg", "raw": "[a sign]"}][:1])
    opened = OwnPairs(path).open()
    assert rows_of(opened)[0].captions == ('a "b"', "c, d")
    assert "captions from raw (lists in brackets: raw)" in told(opened)
    path = write_table(tmp_path / "b.csv", [{"image": "0.jpg", "raw": "[a sign]"}])
    assert rows_of(OwnPairs(path).open())[0].captions == ("[a sign]",)


@pytest.mark.parametrize(
    ("there", "written"),
    [
        ("sub/a b.jpg", "sub\\a b.jpg"),
        ("a.jpg", " a.jpg "),
        ("a.JPG", "a.jpg"),
        ("a.jpg", "a.JPG"),
        ("a.jpg", "a.jpg#0"),
        ("u\u0308.jpg", "ü.jpg"),
        ("ü.jpg", "u\u0308.jpg"),
    ],
)
def test_names_as_other_systems_write_them_are_found(there: str, written: str, tmp_path: Path) -> None:
    write_images(tmp_path, [there])
    (row,) = rows_of(OwnPairs(write_table(tmp_path / "a.csv", [{"image": written, "caption": "a"}])).open())
    assert row.picture
    assert row.picture.read() == IMAGES[0]


def test_a_column_of_splits_keeps_the_test_rows_out(tmp_path: Path) -> None:
    splits = ["train", "restval", "val", "test"]
    rows = [{"image": f"{n}.jpg", "caption": name, "split": name} for n, name in enumerate(splits)]
    opened = OwnPairs(write_table(tmp_path / "a.csv", rows)).open()
    assert [row.captions[0] for row in rows_of(opened)] == ["train", "restval"]
    assert [row.captions[0] for row in rows_of(opened, "validation")] == ["val"]
    assert "trains on train and restval, validates on val" in told(opened)
    images = [{"bytes": image, "path": None} for image in IMAGES[:4]]
    data = datasets.Dataset.from_dict(
        {"image": images, "caption": splits, "split": splits}, split=datasets.NamedSplit("test")
    )
    data.save_to_disk(tmp_path / "saved")
    opened = OwnPairs(str(tmp_path / "saved")).open()
    assert [row.captions[0] for row in rows_of(opened)] == ["train", "restval"]
    assert [row.captions[0] for row in rows_of(opened, "validation")] == ["val"]
    assert "trains on rows whose column split is train" in told(opened)


def test_class_labels_in_parquet_are_named_as_in_a_dataset(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["owl", "wren"])})
    rows = {"image": [{"bytes": image, "path": None} for image in IMAGES[:2]], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "a.parquet")
    found = rows_of(OwnPairs(str(tmp_path / "a.parquet"), templates=["a {}"]).open())
    assert [(row.label, row.captions) for row in found] == [("wren", ("a wren",)), ("owl", ("a owl",))]


# Folders


@pytest.mark.timeout(20)
def test_links_between_folders_end_and_no_image_comes_twice(tmp_path: Path) -> None:
    class_folders(tmp_path)
    for loop in ("snowy_owl/loop", "wren/loop"):
        (tmp_path / loop).symlink_to(tmp_path, target_is_directory=True)
    elsewhere = write_images(tmp_path.parent / f"{tmp_path.name}_elsewhere", ["4.jpg"])
    (tmp_path / "bus").symlink_to(elsewhere, target_is_directory=True)
    opened = OwnPairs(str(tmp_path)).open()
    assert [row.label for row in rows_of(opened)] == ["bus", "snowy_owl", "snowy_owl", "wren", "wren"]
    assert "2 links to folders that are read already" in told(opened)


@pytest.mark.parametrize("table", ["captions.csv", "captions.txt"])
@pytest.mark.parametrize("place", ["Images", ""])
def test_a_table_beside_its_images_is_read_and_no_class_is_made_of_the_folder(
    table: str, place: str, tmp_path: Path
) -> None:
    write_images(tmp_path / place)
    written = write_table(tmp_path / "captions.csv", ROWS)
    Path(written).rename(tmp_path / table)
    opened = OwnPairs(str(tmp_path)).open()
    assert content(opened) == PAIRS
    assert f"the table is {tmp_path / table}, and paths of images start from {tmp_path / place}" in told(opened)


def test_a_single_folder_of_images_is_no_class_unless_pairs_format_says_so(tmp_path: Path) -> None:
    write_images(tmp_path / "Images", ["0.jpg", "1.jpg"])
    with pytest.raises(ValueError, match="images in several folders of classes"):
        OwnPairs(str(tmp_path)).open()
    assert {row.label for row in rows_of(OwnPairs(str(tmp_path), format="class_folders").open())} == {"Images"}


def test_folders_of_splits_are_known_in_any_case_beside_what_macos_leaves(tmp_path: Path) -> None:
    for name in ("Train", "Val", "__MACOSX"):
        class_folders(tmp_path / name)
    opened = OwnPairs(str(tmp_path)).open()
    assert {row.label for row in rows_of(opened)} == {"snowy_owl", "wren"}
    assert content(opened) == content(opened, "validation")


def test_a_mistyped_folder_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "birds").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data/brids is neither a file nor a folder, but data/birds is there"):
        OwnPairs("data/brids").open()
    with pytest.raises(ValueError, match=r"birds\.zip is neither"):
        OwnPairs("some/birds.zip").open()


def test_a_mistake_in_validation_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pairs\.validation=val: there is no table val"):
        OwnPairs(write_table(tmp_path / "a.csv", ROWS), validation="val").open()


def test_files_that_are_not_taken_are_counted(tmp_path: Path) -> None:
    image_folder(".jsonl", tmp_path)
    for name in (".hidden.jpg", "notes.md", "sub/more.md", "forgotten.png"):
        (tmp_path / name).write_bytes(b"x")
    lines = told(OwnPairs(str(tmp_path)).open())
    assert "1 of 7 images are named by no row" in lines
    assert "not taken: 3 files (2 with .md, 1 hidden)" in lines


def test_images_without_text_and_texts_without_image_are_rows(tmp_path: Path) -> None:
    text_files(tmp_path)
    (tmp_path / "0.txt").unlink()
    (tmp_path / "alone.txt").write_text("alone")
    opened = OwnPairs(str(tmp_path)).open()
    found = {row.where: row for row in rows_of(opened)}
    assert found[str(tmp_path / "0.jpg")].captions == ()
    assert found[str(tmp_path / "alone.txt")].picture is None
    assert opened.total == len(found) == 7
    (tmp_path / "2.txt").write_bytes(b"caf\xe9")
    problem = {row.where: row for row in rows_of(opened)}[str(tmp_path / "2.jpg")].problem
    assert problem
    assert (problem.reason, "2.txt is not UTF-8" in str(problem)) == ("unreadable_text", True)


def class_folders(folder: Path) -> Path:
    write_images(folder, ["snowy_owl/0.jpg", "snowy_owl/deep/1.jpg", "wren/2.png", "wren/3.JPG"])
    return folder


def test_class_folders_have_all_templates_about_the_class(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "loose.jpg").write_bytes(IMAGES[4])
    opened = OwnPairs(str(tmp_path)).open()
    found = rows_of(opened)
    assert [row.label for row in found] == ["snowy_owl", "snowy_owl", "wren", "wren"]
    assert found[0].captions == tuple(text.replace("{}", "snowy owl") for text in TEMPLATES)
    assert len(TEMPLATES) == 8
    assert "4 images of 2 classes, snowy_owl, wren; captions are 8 templates" in told(opened)
    assert "folders without images, which are no classes: empty" in told(opened)
    assert "not taken: 1 files (1 with .jpg)" in told(opened)


@pytest.mark.parametrize("given", ["list", '["a {}", "{} b"]', '{"templates": ["a {}", "{} b"], "source": "me"}'])
def test_templates_are_given_as_list_or_file(given: str, tmp_path: Path) -> None:
    class_folders(tmp_path / "images")
    (tmp_path / "templates.json").write_text(given)
    templates = ["a {}", "{} b"] if given == "list" else str(tmp_path / "templates.json")
    opened = OwnPairs(str(tmp_path / "images"), templates=templates).open()
    assert rows_of(opened)[0].captions == ("a snowy owl", "snowy owl b")


@pytest.mark.parametrize(
    ("templates", "problem"),
    [
        (["a photo"], "'a photo' has not exactly one placeholder {}"),
        ([], "is no list of texts"),
        ([1], "is no list of texts"),
        ("gone.json", "which is no file"),
    ],
)
def test_templates_that_are_none_are_refused(templates: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        OwnPairs(str(class_folders(tmp_path)), templates=templates).open()


def test_templates_make_captions_of_labels_where_a_table_has_no_captions(tmp_path: Path) -> None:
    path = write_table(tmp_path / "birds.csv", [{"image": "0.jpg", "label": "snowy_owl"}])
    (row,) = rows_of(OwnPairs(path, templates=["a {}", "{} b"]).open())
    assert (row.captions, row.label) == (("a snowy owl", "snowy owl b"), "snowy_owl")
    with pytest.raises(
        ValueError, match=r"pairs\.templates make captions of the classes .* leave out pairs\.caption_col"
    ):
        OwnPairs(path, templates=["a {}"], caption_columns="label").open()
    path = write_table(tmp_path / "birds.csv", [{"image": "0.jpg", "text": "owl"}])
    with pytest.raises(ValueError, match=r"pairs\.templates make .*: set pairs\.label_column=NAME"):
        OwnPairs(path, templates=["a {}"]).open()


# Validation


def test_folders_of_splits_are_taken_as_such_unless_other_folders_lie_beside_them(tmp_path: Path) -> None:
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "valid")
    (tmp_path / "README.md").touch()
    opened = OwnPairs(str(tmp_path)).open()
    assert content(opened) == content(opened, "validation")
    assert {row.label for row in rows_of(opened)} == {"snowy_owl", "wren"}
    assert f"trains on {tmp_path / 'train'}, validates on {tmp_path / 'valid'}; not used: README.md" in told(opened)
    class_folders(tmp_path / "bus")
    opened = OwnPairs(str(tmp_path)).open()
    assert {row.label for row in rows_of(opened)} == {"train", "valid", "bus"}
    assert opened.validation is None


@pytest.mark.parametrize("name", ["csv", "imagefolder, jsonl", "text files", "tars of txt", "saved dataset"])
def test_validation_is_a_second_path_of_the_same_kind(name: str, tmp_path: Path) -> None:
    one, other = (BUILDERS[name](tmp_path / part) for part in ("one", "other"))
    opened = OwnPairs(one.path, validation=other.path).open()
    assert content(opened) == content(opened, "validation") == PAIRS


def test_splits_of_a_saved_dataset_are_used_and_told(tmp_path: Path) -> None:
    path = saved_splits(tmp_path).path
    opened = OwnPairs(path).open()
    assert content(opened, "validation") == [(IMAGES[0], sorted(CAPTIONS[0]))]
    assert "trains on the split train, validates on val; not used: test" in told(opened)
    assert "captions from caption; not used: id" in told(opened)
    opened = OwnPairs(path, split="val", validation="test").open()
    assert (len(rows_of(opened)), len(rows_of(opened, "validation"))) == (1, 6)
    with pytest.raises(ValueError, match="has no split dev: its splits are train, val, test"):
        OwnPairs(path, validation="dev").open()


def test_a_dataset_of_the_hub_is_streamed_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, load = repository(tmp_path / "hub").path, datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **settings: load(folder, **settings))
    opened = OwnPairs("some/birds").open()
    assert content(opened) == content(opened, "validation") == PAIRS
    assert "some/birds is read as dataset, since there is no such folder" in told(opened)


def test_class_labels_of_a_dataset_are_named(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["owl", "wren"])})
    rows = {"image": [{"bytes": image, "path": None} for image in IMAGES[:2]], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    found = rows_of(OwnPairs(str(tmp_path / "saved"), templates=["a {}"]).open())
    assert [(row.label, row.captions) for row in found] == [("wren", ("a wren",)), ("owl", ("a owl",))]


def test_links_in_a_dataset_need_the_permission_too(tmp_path: Path) -> None:
    rows = {"url": ["http://127.0.0.1:9/0.jpg"], "caption": ["a"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"1 of the first 1 rows of .* are links"):
        OwnPairs(str(tmp_path / "saved")).open()


def test_karpathys_splits_are_train_with_restval_and_val(tmp_path: Path) -> None:
    opened = karpathy(tmp_path).open()
    assert content(opened, "validation") == [(IMAGES[0], ["val"])]
    assert "trains on the split train and restval (restval is part of train, as is the custom for COCO)" in told(opened)
    assert "validates on val; not used: test" in told(opened)
    assert rows_of(karpathy(tmp_path, split="test").open())[0].where == "image 8 of dataset_toy.json"
    with pytest.raises(ValueError, match=r"no image in the split dev: its splits are train \(4\), restval \(2\), val"):
        karpathy(tmp_path, validation="dev").open()
    flat = OwnPairs(
        str(tmp_path / "dataset_toy.json"), images=str(write_images(tmp_path / "flat", [Path(f).name for f in FILES]))
    )
    assert content(flat.open()) == PAIRS


# Tars


def test_members_that_cannot_be_read_are_problems_of_their_rows(tmp_path: Path) -> None:
    members = [(f"{n}.jpg", IMAGES[n]) for n in range(3)]
    members += [("0.txt", b"a"), ("1.txt", b"caf\xe9"), ("2.json", b"{"), ("2.txt", b"c")]
    path = write_tar(tmp_path / "a.tar", sorted(members))
    problems = [row.problem for row in rows_of(OwnPairs(str(path)).open())]
    assert [problem and problem.reason for problem in problems] == [None, "unreadable_text", "broken_json"]


def test_tars_in_folders_of_splits_are_found(tmp_path: Path) -> None:
    for name in ("train", "val"):
        tars("txt", "", tmp_path / name)
    opened = OwnPairs(str(tmp_path)).open()
    assert content(opened) == content(opened, "validation") == PAIRS
    (tmp_path / "train").rename(tmp_path / "wds")
    with pytest.raises(ValueError, match=r"tars lie in folders of .*: set pairs\.path to one of these folders"):
        OwnPairs(str(tmp_path)).open()


def test_a_tar_without_pairs_is_refused_as_such(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.tar has no pair, or none of the first 20 can be read"):
        OwnPairs(str(write_tar(tmp_path / "a.tar", []))).open()


def test_files_beside_tars_are_counted(tmp_path: Path) -> None:
    path = tars("txt", "", tmp_path).path
    for name in ("00000.parquet", "readme.parquet", "readme.md"):
        pq.write_table(pa.table({"key": ["0", "2", "4"]}), tmp_path / name)
    assert "not taken: 3 files (2 with .parquet, 1 with .md)" in told(OwnPairs(path).open())


def test_members_of_tars_that_lack_something_are_rows(tmp_path: Path) -> None:
    image, label = ("a.jpg", IMAGES[0]), ("a.json", b'{"label": "owl", "where": "row 1"}')
    path = write_tar(tmp_path / "a.tar", [image, ("a.txt", b"one\ntwo"), label, ("b.jpg", IMAGES[1]), ("c.txt", b"c")])
    first, second, third = rows_of(OwnPairs(str(path)).open())
    assert (first.captions, first.label) == (("one", "two"), "owl")
    assert (second.captions, third.picture) == ((), None)
    assert third.where == f"c in {path}"


def test_tars_without_captions_are_refused_with_the_fields_that_there_are(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "a.tar", [("a.jpg", IMAGES[0]), ("a.json", b'{"legende": "owl"}')]))
    with pytest.raises(
        ValueError, match=r"has no captions: .* fields of the JSON are legende: set pairs.caption_columns"
    ):
        OwnPairs(path).open()
    assert rows_of(OwnPairs(path, caption_columns="legende").open())[0].captions == ("owl",)
    with pytest.raises(
        ValueError,
        match=r"no key\.json of the first 20 pairs has the field x of pairs\.caption_columns; they have legende",
    ):
        OwnPairs(path, caption_columns="x").open()


def test_a_tar_that_was_cut_off_tells_what_is_lost(tmp_path: Path) -> None:
    path = Path(tars("txt", "00000.tar", tmp_path).path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    opened = OwnPairs(str(path)).open()
    *_, last = rows_of(opened)
    assert last.picture is None
    assert last.where.endswith("00000.tar, of which the tar has lost the end")
    assert opened.total == len(rows_of(opened))


def test_a_format_that_is_named_wins_over_the_guess(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "wren" / "2.txt").write_text("a wren in a tree")
    assert "is read as text_files" in told(OwnPairs(str(tmp_path)).open())
    opened = OwnPairs(str(tmp_path), format="class_folders").open()
    assert {row.label for row in rows_of(opened)} == {"snowy_owl", "wren"}
    assert "not taken: 1 files (1 with .txt)" in told(opened)
