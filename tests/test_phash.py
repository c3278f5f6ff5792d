"""pHash: what it holds still against, what it tells apart, and the lists of a folder."""

import io
import itertools
import json
import logging
import sys
import tarfile

import pytest
from conftest import drawn_image
from PIL import Image, ImageEnhance

from align_train.corpus.images import ImageSettings, Unusable, store_image
from align_train.corpus.phash import agreement, phash, phash_list, read_phash_list
from align_train.corpus.shards import write_shards
from align_train.records import Pair

# Every image_phash that is printed in COYO's README, in its dataset card and in Hugging Face's blog on ALIGN.
OF_COYO = [
    *("bac58374982e0fc7", "8374726575bc0f8a", "949d1fe559e2cc90", "e5ea35075ab912c6", "9311891e9437f4f3"),
    *("85b89c0166ee63be", "f2c48dabbf93810a", "e9e90c24f1d9c674", "d0693e966993ce61", "c9b6a7d8469c1959"),
    "9f91e133b1924e4e",
]


def encoded(image, format="JPEG", **options):
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def drawn(number, size=(200, 150)):
    return Image.open(io.BytesIO(drawn_image(number, size, "PNG")))


def distance(first, second):
    return (int(first, 16) ^ int(second, 16)).bit_count()


def test_hashes_stay_what_they_were():
    """Another version of imagehash or Pillow must not change what lists on disk mean. Made by imagehash 4.3.2."""
    pinned = ["fd42b0daaf94c164", "9c0cde34e2f79d80", "f0e6bb5970845437"]
    for number, expected in enumerate(pinned):
        assert distance(phash(drawn_image(number, (200, 150), "PNG")), expected) <= 2


@pytest.mark.parametrize(
    ("change", "most"),
    [
        (lambda image: encoded(image, quality=95), 2),
        (lambda image: encoded(image, quality=50), 4),
        (lambda image: encoded(image, "WEBP", quality=80), 4),
        (lambda image: encoded(image.resize((100, 75), Image.Resampling.BICUBIC)), 4),
        (lambda image: encoded(image.resize((346, 346), Image.Resampling.BILINEAR)), 4),
        (lambda image: encoded(ImageEnhance.Brightness(image).enhance(0.9)), 4),
        (lambda image: encoded(image.convert("L")), 2),
        (lambda image: store_image(encoded(image), ImageSettings(120)).content, 6),
    ],
    ids=["jpeg", "poor jpeg", "webp", "half size", "square", "darker", "grey", "stored"],
)
def test_small_changes_move_few_bits(change, most):
    for number in range(10):
        image = drawn(number)
        assert distance(phash(encoded(image, "PNG")), phash(change(image))) <= most


def test_different_images_are_far_apart():
    hashes = [phash(drawn_image(number, (200, 150))) for number in range(20)]
    distances = [distance(a, b) for a, b in itertools.combinations(hashes, 2)]
    assert min(distances) >= 14
    assert 29 < sum(distances) / len(distances) < 35


def test_hashes_have_the_form_of_coyos():
    """32 bits set, the first among them: what the docstring says of both."""
    for found in [phash(drawn_image(number, (200, 150))) for number in range(10)] + OF_COYO:
        assert found == f"{int(found, 16):016x}"
        assert int(found, 16).bit_count() == 32
        assert int(found, 16) >> 63 == 1


def test_pixels_are_those_of_training():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert phash(encoded(drawn(1), "PNG", exif=exif)) == phash(encoded(drawn(1), "PNG"))
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    clear.paste((200, 0, 0, 255), (0, 0, 20, 30))
    white = Image.new("RGB", (40, 40), "white")
    white.paste((200, 0, 0), (0, 0, 20, 30))
    assert phash(encoded(clear, "PNG")) == phash(encoded(white, "PNG"))
    with pytest.raises(Unusable, match="corrupt_image: cat"):
        phash(b"no image", "cat")


# Lists


@pytest.fixture
def folder(tmp_path):
    """Two images in folders below, and four files that have no pHash."""
    root = tmp_path / "images"
    (root / "a" / "deep").mkdir(parents=True)
    (root / "a" / "deep" / "1.jpg").write_bytes(drawn_image(1, (200, 150)))
    (root / "b é.dat").write_bytes(drawn_image(2, (200, 150), "PNG"))  # content decides, not the name
    (root / "captions.json").write_text("{}")
    (root / "a" / "empty.jpg").write_bytes(b"")
    (root / "a" / "page.jpg").write_bytes(b"<html>")
    (root / "a" / "cut.jpg").write_bytes(drawn_image(3, (200, 150))[:-500])
    return root


def test_a_list_of_a_folder(folder, tmp_path, caplog):
    output = tmp_path / "lists" / "flickr.txt"
    with caplog.at_level(logging.INFO):
        report = phash_list(folder, output)
    hashes = [phash(drawn_image(1, (200, 150))), phash(drawn_image(2, (200, 150), "PNG"))]
    head, *lines = output.read_text().splitlines()
    assert lines == [f"{hashes[0]}\ta/deep/1.jpg", f"{hashes[1]}\tb é.dat"]
    assert head.startswith("# imagehash 4.")
    assert "phash, hash_size 8" in head
    assert read_phash_list(output) == hashes
    assert (report.path, report.images) == (output, 2)
    assert report.unreadable == {"not_an_image": 2, "empty_image": 1, "corrupt_image": 1}
    for name in ("captions.json", "empty.jpg", "page.jpg", "cut.jpg"):
        assert any(name in record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "2 images" in caplog.text
    assert list(output.parent.iterdir()) == [output]


def test_a_list_inside_its_folder_is_the_same_when_written_again(folder):
    phash_list(folder, folder / "list.txt")
    first = (folder / "list.txt").read_bytes()
    assert phash_list(str(folder), str(folder / "list.txt")).unreadable["not_an_image"] == 2
    assert (folder / "list.txt").read_bytes() == first


def test_names_with_line_breaks_stay_on_their_line(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a\nb\tc\r.jpg").write_bytes(drawn_image(1))
    phash_list(tmp_path / "in", tmp_path / "list.txt")
    assert read_phash_list(tmp_path / "list.txt") == [phash(drawn_image(1))]


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_without_an_image_is_an_error_and_writes_nothing(tmp_path, made):
    if made:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "page.jpg").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=rf"in holds no image.*{'not_an_image 1' if made else 'none'}"):
        phash_list(tmp_path / "in", tmp_path / "list.txt")
    assert not (tmp_path / "list.txt").exists()


def test_bare_hashes_comments_and_either_case_are_read(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# mine\n\nBAC58374982E0FC7\n  8374726575bc0f8a \r\n949d1fe559e2cc90\tx\ty # z\n")
    assert read_phash_list(path) == OF_COYO[:3]


@pytest.mark.parametrize(
    "line",
    ["bac58374982e0fc", "bac58374982e0fc70", "gac58374982e0fc7", "cat.jpg\tbac58374982e0fc7", "0xbac58374982e0f"],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line):
    path = tmp_path / "list.txt"
    path.write_text(f"# comment\n8374726575bc0f8a\n{line}\n")
    with pytest.raises(ValueError, match=r"list\.txt, line 3: .* is no pHash"):
        read_phash_list(path)


def test_a_list_without_hashes_is_an_error(tmp_path):
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"list\.txt holds no pHash"):
        read_phash_list(tmp_path / "list.txt")


def test_without_imagehash_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    for call in (lambda: phash(drawn_image(1)), lambda: phash_list(tmp_path, tmp_path / "list.txt")):
        with pytest.raises(ValueError, match=r"pip install 'align-train\[phash\]'"):
            call()


# Agreement with COYO


def test_agreement_counts_the_bits_between_recorded_and_computed(tmp_path):
    def pair(number, flipped):
        image = encoded(drawn(number))
        recorded = f"{int(phash(image), 16) ^ (2**flipped - 1):016x}"
        return Pair(f"k{number}", image, "text", {"image_phash": recorded})

    write_shards([pair(1, 0), pair(2, 5), pair(3, 64), pair(4, 0)], tmp_path, pairs_per_shard=3)
    write_shards([Pair("k9", encoded(drawn(9)), "no hash")], tmp_path, prefix="b-")
    assert agreement(sorted(tmp_path.glob("*.tar"))) == {0: 2, 5: 1, 64: 1}


def test_agreement_of_nothing_is_an_error(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        content = json.dumps({"image_phash": OF_COYO[0]}).encode()
        member = tarfile.TarInfo("a.json")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match="no pair of these shards has an image and an image_phash"):
        agreement([tmp_path / "a.tar"])
