"""One's own pairs checked before training: what is refused, skipped, told, and what ends in the shards."""

import errno
import json
import random
import tarfile
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import pytest
from conftest import drawn_image
from PIL import ExifTags, Image

from align_train.corpus.images import Unusable
from align_train.corpus.sample_corpus import unit_hash
from align_train.corpus.shards import ShardWriter
from align_train.data.own_pairs import report
from align_train.data.own_pairs.checking import CheckSettings, check_pairs
from align_train.data.own_pairs.findings import read_findings
from align_train.data.own_pairs.opened import OpenedPairs
from align_train.data.own_pairs.rows import Row
from align_train.data.testsets import ShardPairs
from align_train.records import Preprocessing

SIZES = Preprocessing(resize=40, crop=32, max_tokens=8)


@dataclass(frozen=True)
class Fake:
    """A picture: a file's content, or what is raised instead."""

    name: str
    content: bytes | Exception

    def read(self) -> bytes:
        if isinstance(self.content, Exception):
            raise self.content
        return self.content


class Counting:
    """A picture that counts how often it is read."""

    name, reads = "often.jpg", 0

    def read(self) -> bytes:
        self.reads += 1
        return drawn_image(77)


def row(number, captions=None, picture=None, label=None):
    """Row `number` of birds.csv, by default of an image and a caption that no other number has."""
    captions = (f"bird {number}",) if captions is None else captions
    picture = picture or Fake(f"{number}.jpg", drawn_image(number))
    return Row(f"row {number} of birds.csv", picture, captions, label)


def good(count, first=1):
    return [row(first + number) for number in range(count)]


def check(rows, folder, validation=None, **settings):
    told = ["birds.csv is a csv; images: file, captions: text"]
    opened = OpenedPairs(told, lambda: iter(rows), validation and (lambda: iter(validation)), len(rows))
    return check_pairs(opened, folder, CheckSettings(**settings), SIZES)


def records(folder, part):
    """Key to (image, captions, metadata) of all shards of a part."""
    found = {}
    for path in sorted((folder / part).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, kind = member.name.split(".")
                found.setdefault(key, {})[kind] = tar.extractfile(member).read()
    return {
        key: (next(iter(files.values())), files["txt"].decode().split("\n"), json.loads(files["json"]))
        for key, files in found.items()
    }


def captions_of(folder, part):
    return {tuple(captions) for _, captions, _ in records(folder, part).values()}


BROKEN = {
    "no_picture": (Row("row 3 of birds.csv", None, ("a bird",)), "no image is named"),
    "missing": (row(3, picture=Fake("3.jpg", FileNotFoundError(2, "no", "/d/3.jpg"))), "3.jpg, looked for at /d/3.jpg"),
    "unreadable": (row(3, picture=Fake("3.jpg", PermissionError(errno.EACCES, "denied"))), "3.jpg (denied)"),
    "corrupt_image": (row(3, picture=Fake("3.jpg", drawn_image(3)[:300])), "3.jpg ("),
    "not_an_image": (row(3, picture=Fake("3.jpg", b"<html>")), "3.jpg starts with b'<html>'"),
    "empty_image": (row(3, picture=Fake("3.jpg", b"")), "3.jpg has no bytes"),
    "no_caption": (row(3, ()), "3.jpg"),
    "empty_caption": (row(3, (" ", "<br>")), "3.jpg"),
    "ragged_row": (
        Row("row 3 of birds.csv", None, (), problem=Unusable("ragged_row", "line 4 has 3 fields")),
        "line 4 has 3 fields",
    ),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_row_that_cannot_be_used_is_skipped_counted_and_named(tmp_path, reason):
    broken, detail = BROKEN[reason]
    findings = check([*good(2), broken, *good(3, 4)], tmp_path / "pairs")
    assert (findings.rows, findings.images, findings.skipped) == (6, 5, {reason: 1})
    (problem,) = findings.problems
    assert (problem.reason, problem.where) == (reason, "row 3 of birds.csv")
    assert problem.detail.startswith(detail)
    assert f"{reason}: 1" in report.text(findings, (), ())
    assert "row 3 of birds.csv" in (tmp_path / "pairs" / "report.md").read_text()


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (ValueError("embedded null byte"), "3.jpg (embedded null byte)"),  # as of a name with one
        (OSError("http://a/3.jpg was not fetched: http_404"), "http://a/3.jpg was not fetched: http_404"),
    ],
)
def test_an_unreadable_picture_is_told_with_its_name_once(tmp_path, error, detail):
    findings = check([*good(2), row(3, picture=Fake("3.jpg", error))], tmp_path / "pairs")
    assert (findings.problems[0].reason, findings.problems[0].detail) == ("unreadable", detail)


def test_strict_refuses_after_all_rows_with_row_numbers_and_the_report(tmp_path):
    rows = [*good(2), BROKEN["missing"][0], *good(2, 4), row(6, ())]
    with pytest.raises(ValueError, match="2 of 6 rows") as caught:
        check(rows, tmp_path / "pairs", strict=True)
    message = str(caught.value)
    for part in ("missing 1, no_caption 1", "row 3 of birds.csv: missing: 3.jpg", "row 6 of birds.csv: no_caption",
                 "check.strict=false", str(tmp_path / "pairs" / "report.md")):  # fmt: skip
        assert part in message
    assert [path.name for path in tmp_path.rglob("*")] == ["pairs", "report.md"]
    assert read_findings(tmp_path / "pairs") is None
    assert check(rows, tmp_path / "pairs").images == 4  # the report alone does not stand in the way


def test_many_problems_are_all_counted_and_the_first_thousand_kept(tmp_path):
    rows = [*good(2), *(row(number, ()) for number in range(10, 1040))]
    findings = check(rows, tmp_path / "pairs")
    assert findings.skipped == {"no_caption": 1030}
    assert [problem.where for problem in findings.problems[::999]] == ["row 10 of birds.csv", "row 1009 of birds.csv"]
    assert "and 1,027 more" in report.text(findings, (), ())
    assert "and 30 more" in (tmp_path / "pairs" / "report.md").read_text()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no row: check pairs.path"),
        ([row(1, ()), row(2, ())], r"none of the 2 rows can be used \(no_caption 2\): check pairs.images"),
        (good(1), "one image only .* needs at least two"),
        ([row(1), row(1, ("another text",))], "of 2 rows there is one image only"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_with_a_report(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        check(rows, tmp_path / "pairs")
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == ["report.md"]


def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"5 of 5 images are for validation.*check\.validation_share smaller"):
        check(good(5), tmp_path / "pairs", validation_share=0.999999)
    with pytest.raises(ValueError, match=r"2 of 3 images are for validation.*add pairs to train on"):
        check(good(1), tmp_path / "pairs", validation=good(2, 5))


def test_a_record_is_an_image_with_all_its_captions_one_a_line(tmp_path):
    png = drawn_image(1, format="PNG")
    rows = [
        row(1, ("one\nline", "caf&eacute;", "", "one line"), Fake("a.png", png), "cat"),
        row(2),
        row(3, ("another", "café"), Fake("copy.png", png), "cat"),
    ]
    findings = check(rows, tmp_path / "pairs", validation_share=0)
    assert (findings.images, findings.captions, findings.empty_captions) == (2, 4, 1)
    found = records(tmp_path / "pairs", "train")
    assert sorted(found) == ["00000000", "00000001"]
    image, captions, metadata = found["00000000"]
    assert (image, captions) == (png, ["one line", "café", "another"])
    assert (metadata["label"], metadata["where"]) == ("cat", "row 1 of birds.csv")
    assert (findings.duplicate_images, findings.duplicate_rows) == (1, 1)
    assert findings.duplicate_examples == ("row 3 of birds.csv has the image of row 1 of birds.csv",)
    pairs = ShardPairs(str(tmp_path / "pairs" / "train"), by_line=True).open()
    assert sorted(pairs.captions) == ["another", "bird 2", "café", "one line"]


def test_captions_that_are_not_cleaned_are_one_line_still(tmp_path):
    rows = [row(1, ("a &amp;\r\nb\u2028c \ud800",)), row(2)]
    check(rows, tmp_path / "pairs", clean_captions=False, validation_share=0)
    assert ("a &amp; b c ?",) in captions_of(tmp_path / "pairs", "train")


def test_the_split_is_by_image_and_does_not_depend_on_the_order_of_rows(tmp_path):
    rows = [row(number, (f"{part} {number}",)) for number in range(40) for part in ("left", "right")]
    first = check(rows, tmp_path / "a", validation_share=0.3)
    random.Random(1).shuffle(rows)
    assert check(rows, tmp_path / "b", validation_share=0.3).validation_images == first.validation_images
    expected = {n for n in range(40) if unit_hash(drawn_image(n)) < 0.3}
    for folder in (tmp_path / "a", tmp_path / "b"):
        held_out = {tuple(sorted(captions)) for captions in captions_of(folder, "validation")}
        assert held_out == {(f"left {n}", f"right {n}") for n in expected}
        assert len(captions_of(folder, "train")) == 40 - len(expected)


@pytest.mark.parametrize(("count", "held_out"), [(12, 2), (4, 2), (3, 0)])
def test_two_images_are_held_out_of_four_however_small_the_share(tmp_path, count, held_out):
    findings = check(good(count), tmp_path / "pairs", validation_share=1e-9)
    assert findings.validation_images == held_out
    least = sorted(range(1, count + 1), key=lambda number: unit_hash(drawn_image(number)))[:held_out]
    assert captions_of(tmp_path / "pairs", "validation") == {(f"bird {number}",) for number in least}


def test_no_share_means_no_validation(tmp_path):
    findings = check(good(12), tmp_path / "pairs", validation_share=0)
    assert (findings.validation_images, findings.validation_from) == (0, "none")
    assert not (tmp_path / "pairs" / "validation").exists()


@pytest.mark.parametrize("held_out", [[row(50)], [row(50), row(51, ())], [row(51, ()), row(52, ())]])
def test_given_validation_that_leaves_fewer_than_two_images_is_refused_as_such(tmp_path, held_out):
    with pytest.raises(
        ValueError, match=r"of what was given for validation, [01] images can be used.*pairs.validation"
    ):
        check(good(12), tmp_path / "pairs", validation=held_out)


def test_an_image_of_validation_has_the_class_that_validation_says(tmp_path):
    held_out = [row(3, ("a dog",), label="dog"), row(50, label="dog")]
    findings = check([row(n, label="cat") for n in range(1, 6)], tmp_path / "pairs", validation=held_out)
    found = records(tmp_path / "pairs", "validation").values()
    assert {metadata["label"] for _, _, metadata in found} == {"dog"}
    assert {metadata["where"] for _, _, metadata in found} == {f"row {n} of birds.csv (validation)" for n in (3, 50)}
    assert findings.validation_images == 2


def test_rows_of_one_path_are_captions_and_only_files_of_equal_bytes_are_duplicates(tmp_path):
    rows = [
        row(1),
        row(1, ("another",)),
        row(1, ("another",)),
        row(2),
        row(3, picture=Fake("copy.jpg", drawn_image(2))),
    ]
    findings = check(rows, tmp_path / "pairs", validation_share=0)
    assert (findings.images, findings.captions, findings.repeated_captions) == (2, 4, 1)
    assert (findings.duplicate_images, findings.duplicate_rows) == (1, 1)
    assert findings.duplicate_examples == ("row 3 of birds.csv has the image of row 2 of birds.csv",)
    assert "1 image under several names" in report.text(findings, (), ())


def test_photos_that_lie_on_their_side_are_written_upright_and_counted(tmp_path):
    exif, content = Image.Exif(), BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(BytesIO(drawn_image(5, (40, 20)))) as image:
        image.save(content, "JPEG", exif=exif)
    findings = check([row(1, picture=Fake("a.jpg", content.getvalue())), row(2)], tmp_path / "a", validation_share=0)
    assert findings.turned == 1
    assert (tmp_path / "a" / "report.md").read_text().count("turned as EXIF says") == 1
    image, *_ = records(tmp_path / "a", "train")["00000000"]
    with Image.open(BytesIO(image)) as turned:
        assert turned.size == (20, 40)
        assert turned.getexif().get(ExifTags.Base.Orientation) is None


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_32_bits_are_left_out(tmp_path, mode):
    content = BytesIO()
    Image.new(mode, (8, 8)).save(content, "TIFF")
    findings = check([row(1, picture=Fake("a.tif", content.getvalue())), *good(2, 2)], tmp_path / "a")
    assert findings.skipped == {"pixels_of_32_bits": 1}


def test_given_validation_is_kept_and_training_does_not_see_its_images(tmp_path):
    rows, held_out = good(12), [row(3, ("as validation says it",)), row(50)]
    findings = check(rows, tmp_path / "pairs", validation=held_out)
    assert (findings.validation_images, findings.validation_from, findings.in_both) == (2, "given", 1)
    assert captions_of(tmp_path / "pairs", "validation") == {("as validation says it",), ("bird 50",)}
    assert captions_of(tmp_path / "pairs", "train") == {(f"bird {n}",) for n in range(1, 13) if n != 3}


def test_facts_of_captions_classes_and_sizes(tmp_path):
    rows = [row(n, ("a cat",), label="cat") for n in range(6)]
    rows += [row(n, (f"dog {n} runs and runs and runs",), label="dog") for n in (6, 7)]
    rows += [row(8, ("small",), Fake("s.jpg", drawn_image(8, (40, 20)))), row(7, ("a dog",), label="cat")]
    findings = check(rows, tmp_path / "pairs")
    assert (findings.shared_captions, findings.sharing, findings.text.frequent) == (1, 6, {"a cat": 6})
    # [CLS] dog 6 runs and runs and runs [SEP]; [CLS] a cat [SEP]; [CLS] small [SEP]
    assert findings.text.token_bins == {"3": 1, "4": 7, "5-6": 0, "7-8": 0, "9-12": 2}
    assert (findings.too_long, findings.text.cut) == (2, 0.2)
    assert findings.too_long_examples == tuple(f"row {n} of birds.csv: 9 tokens" for n in (6, 7))
    assert (list(findings.classes.items()), findings.rare_classes) == ([("cat", 6), ("dog", 2)], ["dog"])
    assert findings.label_conflicts == 1
    assert (findings.small, findings.width.max, findings.height.min) == (9, 40, 20)  # 40 x 30 and 40 x 20, crop 32
    text = report.text(findings, (), ("an epoch takes 3 min",))
    for part in (
        "9-12  2  ███",
        "6 images  a cat",
        "loss.skip_duplicates",
        "is 3 times the smallest",
        "an epoch takes",
    ):
        assert part in text


def test_several_threads_give_the_order_of_one(tmp_path):
    rows = [*good(30), BROKEN["corrupt_image"][0], *good(30, 20)]
    one, three = (check(rows, tmp_path / str(n), threads=n, pairs_per_shard=7) for n in (1, 3))
    assert one == three
    assert records(tmp_path / "1", "train") == records(tmp_path / "3", "train")
    assert len(one.shards) > 6


def test_rows_of_one_picture_that_follow_each_other_read_it_once(tmp_path):
    picture = Counting()
    rows = [row(number, picture=picture) for number in range(5)]
    findings = check([*rows, *good(3, 10)], tmp_path / "pairs", validation_share=0)
    assert (picture.reads, findings.images, findings.captions) == (1, 4, 8)


def test_findings_are_read_again_while_the_folder_is_whole(tmp_path):
    folder = tmp_path / "pairs"
    rows = [*good(12), row(13, ()), row(1, ("again",), label="a")]
    findings = check(rows, folder)
    assert read_findings(folder) == findings
    assert {path.name for path in folder.iterdir()} == {"train", "validation", "report.md", "findings.json"}
    assert json.loads((folder / "findings.json").read_text())["skipped"] == {"no_caption": 1}
    assert json.loads(json.dumps(asdict(findings)))["images"] == 12
    with pytest.raises(FileExistsError, match="prepared before"):
        check(rows, folder)
    (folder / "train" / "00000.tar").write_bytes(b"cut")
    assert read_findings(folder) is None
    assert read_findings(tmp_path / "nothing") is None


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"holds photo\.jpg"):
        check(good(3), tmp_path)
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"


def test_a_writer_that_dies_leaves_nothing_that_counts_as_whole(tmp_path, monkeypatch):
    def dies(writer, pair):
        if pair.caption == "bird 2":
            raise KeyboardInterrupt
        return add(writer, pair)

    add = ShardWriter.add
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", dies)
        with pytest.raises(KeyboardInterrupt):
            check(good(8), tmp_path / "pairs", pairs_per_shard=1)
    assert list(tmp_path.iterdir()) == []
    left = tmp_path / ".pairs.unfinished" / "train"  # as of a process that was killed
    left.mkdir(parents=True)
    (left / "00000.tar").write_bytes(b"half")
    assert read_findings(tmp_path / "pairs") is None
    assert check(good(8), tmp_path / "pairs").images == 8
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


def test_what_comes_from_data_cannot_become_markup(tmp_path):
    bad = Row("row 1 of a|b<i>.csv", Fake("\x1b[31m.jpg", FileNotFoundError()), ("x",))
    findings = check([bad, *good(3)], tmp_path / "pairs")
    assert "\x1b" not in report.text(findings, (), ())
    written = report.write(findings, ("estimate",), (), tmp_path / "pairs").read_text()
    assert r"row 1 of a\|b&lt;i&gt;.csv" in written


def test_large_images_make_smaller_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("align_train.data.own_pairs.writing.SHARD_BYTES", 3 * len(drawn_image(1)))
    assert len(check(good(12), tmp_path / "pairs", validation_share=0).shards) >= 4


@pytest.mark.parametrize("settings", [{"validation_share": 1}, {"threads": 0}, {"pairs_per_shard": 0}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ValueError, match=f"check.{next(iter(settings))} is"):
        CheckSettings(**settings)


def test_sixteen_bit_and_transparent_images_are_usable(tmp_path):
    files = []
    for mode in ("I;16", "RGBA", "P"):
        content = BytesIO()
        Image.new(mode, (8, 8)).save(content, "PNG")
        files.append(content.getvalue())
    rows = [row(number, picture=Fake("x.png", content)) for number, content in enumerate(files)]
    assert check(rows, tmp_path / "pairs", validation_share=0).images == 3
    assert not list(Path(tmp_path).glob(".*"))
