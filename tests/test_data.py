"""Shards to batches: what is read, what is counted as unusable, and that pixels and ids are the reference's."""

import gc
import gzip
import io
import json
import logging
import os
import pickle
import struct
import tarfile
import tracemalloc
import warnings
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from conftest import drawn_image, drawn_pair
from PIL import Image
from torch.utils.data import DataLoader

from align_train.batch import Batch
from align_train.corpus.images import Unusable, decode
from align_train.data import (
    Augmentation,
    Collate,
    EvaluationPairs,
    GlobalBatches,
    Shard,
    TrainingPairs,
    evaluation_batches,
    find_shards,
    load_tokenizer,
)
from align_train.data.images import centre_crop, pixels_of, resize, resized
from align_train.data.pairs import Example
from align_train.data.shards import OpenShards
from align_train.data.tokens import tokenize
from align_train.records import Preprocessing, Tally

SMALL = Preprocessing(resize=12, crop=10, max_tokens=8)


def write_tar(path, members):
    """A tar of (name, content), without a sidecar."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pair_members(number, image=None):
    pair = drawn_pair(number)
    return [(f"{pair.key}.jpg", image or pair.image), (f"{pair.key}.txt", pair.caption.encode())]


def read_all(shard):
    """What each pair of a shard gives: its key, image and caption, or the reason why it is unusable."""
    found = []
    for number in range(len(shard)):
        try:
            found.append(shard.read(number))
        except Unusable as problem:
            found.append(problem.reason if str(shard.path) in str(problem) else "unnamed file")
    return found


def read_by_webdataset(path):
    samples = list(wds.WebDataset(str(path), shardshuffle=False))
    gc.collect()  # webdataset leaves its files to the collector; here, where the warning is expected
    return samples


# Shards


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("sidecar", [True, False])
def test_a_shard_reads_as_webdataset_reads_it(make_shards, sidecar):
    path = make_shards(7) / "00000.tar"
    if not sidecar:
        path.with_suffix(".parquet").unlink()
    samples = read_by_webdataset(path)
    assert len(samples) == 7
    assert read_all(Shard(path)) == [(s["__key__"], s["jpg"], s["txt"].decode()) for s in samples]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_tar_of_webdatasets_own_writer(tmp_path):
    path = tmp_path / "a.tar"
    long = "folder/" + "k" * 120  # its header does not fit into one block
    with wds.TarWriter(str(path)) as writer:
        for number, (key, extension) in enumerate([("a", "jpg"), ("sub/b", "PNG"), (long, "webp")]):
            image = drawn_image(number, format={"jpg": "JPEG"}.get(extension, extension))
            writer.write({"__key__": key, extension: image, "txt": f" ünï {number}\n", "json": {"number": number}})
    samples = read_by_webdataset(path)
    assert [sample["__key__"] for sample in samples] == ["a", "sub/b", long]
    images = [samples[0]["jpg"], samples[1]["png"], samples[2]["webp"]]
    expected = [(s["__key__"], image, s["txt"].decode().strip()) for s, image in zip(samples, images, strict=True)]
    assert read_all(Shard(path)) == expected


def test_the_sidecar_tells_the_length_without_a_look_at_the_tar(make_shards):
    path = make_shards(5) / "00000.tar"
    path.write_bytes(b"")
    shard = Shard(path)
    assert len(shard) == 5
    with pytest.raises(ValueError, match=r"00000\.tar is not a tar file \(empty file\)"):
        shard.read(0)


def test_a_sidecar_of_img2dataset_counts_its_successes(tmp_path):
    path = write_tar(tmp_path / "a.tar", pair_members(0) + pair_members(1))
    status = ["success", "failed_to_download", "success", "failed_to_resize"]
    rows = {"key": list("abcd"), "status": status, "error_message": [None, "404", None, "small"]}
    pq.write_table(pa.table(rows), path.with_suffix(".parquet"))
    assert len(Shard(path)) == 2


def test_a_column_named_status_alone_means_nothing(tmp_path):
    path = write_tar(tmp_path / "a.tar", pair_members(0) + pair_members(1))
    pq.write_table(pa.table({"key": ["a", "b"], "status": ["new", "old"]}), path.with_suffix(".parquet"))
    assert len(Shard(path)) == 2


def test_a_sidecar_that_is_no_parquet(make_shards):
    path = make_shards(2) / "00000.tar"
    path.with_suffix(".parquet").write_bytes(b"PAR1 it is not")
    with pytest.raises(ValueError, match=r"00000\.parquet is not readable parquet .*write the shard again"):
        len(Shard(path))


CUTS = {
    "image": (lambda image, text: image.offset_data + 100, 4),
    "image header": (lambda image, text: image.offset + 100, 4),
    "before a member": (lambda image, text: image.offset, 4),
    "caption": (lambda image, text: text.offset_data, 4),
    "after the caption": (lambda image, text: text.offset_data + 512, 5),
}


def cut_shard(folder, cut):
    """Cut off the tail of a shard of 8 pairs in its pair 4; returns its path and the number of pairs before the cut."""
    path = folder / "00000.tar"
    with tarfile.open(path) as tar:
        image, text = tar.getmembers()[12:14]
    place, whole_pairs = CUTS[cut]
    os.truncate(path, place(image, text))
    return path, whole_pairs


@pytest.mark.parametrize("cut", CUTS)
def test_a_truncated_shard_with_a_sidecar(make_shards, cut):
    whole = read_all(Shard(make_shards(8, name="whole") / "00000.tar"))
    path, pairs = cut_shard(make_shards(8), cut)
    assert read_all(Shard(path)) == whole[:pairs] + ["truncated_shard"] * (8 - pairs)


@pytest.mark.parametrize("cut", CUTS)
def test_a_truncated_shard_without_a_sidecar(make_shards, cut):
    whole = read_all(Shard(make_shards(8, name="whole") / "00000.tar"))
    path, pairs = cut_shard(make_shards(8), cut)
    path.with_suffix(".parquet").unlink()
    assert read_all(Shard(path)) == [*whole[:pairs], "truncated_shard"]  # how many are lost nothing tells


def test_a_truncated_shard_is_counted_in_batches(make_shards, caplog):
    path, pairs = cut_shard(make_shards(8), "image")
    with caplog.at_level(logging.WARNING):
        (batch,) = evaluation_batches([Shard(path)], SMALL, batch_size=8)
    assert len(batch) == pairs
    assert batch.dropped == {"truncated_shard": 4}
    assert str(path) in caplog.text


def test_a_header_broken_in_the_middle_is_not_silent(make_shards):
    path = make_shards(8) / "00000.tar"
    path.with_suffix(".parquet").unlink()
    with tarfile.open(path) as tar:
        place = tar.getmembers()[12].offset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xa5" * 512)
    assert read_all(Shard(path))[4:] == ["truncated_shard"]


@pytest.mark.parametrize("content", [b"", b"hello", b"<html>" * 300, gzip.compress(b"tar" * 900)])
def test_a_file_that_is_no_tar(tmp_path, content):
    path = tmp_path / "page.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"page\.tar is not a tar file .*write the shard again"):
        len(Shard(path))


def test_an_empty_tar_has_no_pair(tmp_path):
    path = write_tar(tmp_path / "a.tar", [])
    assert read_all(Shard(path)) == []
    with pytest.raises(ValueError, match="the 1 shards hold no pair"):
        TrainingPairs([Shard(path)], SMALL, Augmentation())
    with pytest.raises(ValueError, match="the 1 shards hold no pair"):
        EvaluationPairs([Shard(path)], SMALL)


def test_pairs_that_lack_something(tmp_path):
    image = drawn_image(0)
    members = [("a.jpg", image), ("b.txt", b"no image"), ("c.json", b"{}"), ("d.jpg", image), ("d.txt", b" \n")]
    path = write_tar(tmp_path / "a.tar", [*members, ("no-extension", b"x"), ("e.JPG", image), ("e.txt", b"\xff fine")])
    whole = ("e", image, "� fine")
    assert read_all(Shard(path)) == ["no_caption", "no_image", "no_image", "empty_caption", whole]


def test_of_two_pairs_with_one_key_none_hides_the_other(tmp_path):
    images = [drawn_image(number) for number in range(3)]
    path = write_tar(
        tmp_path / "a.tar",
        [("a.jpg", images[0]), ("a.txt", b"one"), ("a.jpg", images[1]), ("a.txt", b"two"), ("a.png", images[2])],
    )
    assert read_all(Shard(path)) == [("a", images[0], "one"), ("a", images[1], "two"), "no_caption"]


def test_members_of_a_pair_need_not_be_neighbours(tmp_path):
    images, texts = zip(*(pair_members(number) for number in range(3)), strict=True)
    assert read_all(Shard(write_tar(tmp_path / "a.tar", [*images, *texts]))) == [
        (drawn_pair(number).key, drawn_pair(number).image, drawn_pair(number).caption) for number in range(3)
    ]


def test_a_shard_can_be_closed_and_pickled(make_shards):
    shard = Shard(make_shards(3) / "00000.tar")
    whole = read_all(shard)
    copy = pickle.loads(pickle.dumps(shard))  # noqa: S301
    shard.close()
    shard.close()
    assert read_all(shard) == read_all(copy) == whole


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc")
def test_only_so_many_shards_are_open(make_shards):
    shards = find_shards(str(make_shards(12, pairs_per_shard=1)))
    reader, before = OpenShards(limit=3), open_files()
    keys = []
    for _ in range(2):
        for shard in shards:
            keys.append(reader.read(shard, 0)[0])
            assert open_files() - before <= 3
            assert sum("_index" in vars(shard) for shard in shards) <= 3
    assert keys == [drawn_pair(number).key for number in range(12)] * 2


def test_training_and_evaluation_bound_the_open_shards(make_shards):
    shards = find_shards(str(make_shards(6, pairs_per_shard=1)))
    training, evaluation = TrainingPairs(shards, SMALL, Augmentation()), EvaluationPairs(shards, SMALL)
    for pairs in (training, evaluation):
        pairs._open.limit = 2
        assert len({pairs[position].key for position in range(6)}) == 6
        assert sum("_descriptor" in vars(shard) for shard in shards) == 2
    assert TrainingPairs(shards, SMALL, Augmentation(), window=100)._open.limit >= 100  # a window stays open


def test_find_shards(make_shards, tmp_path):
    one, two = make_shards(3, 1, "one"), make_shards(2, 1, "t[w]o")
    ones = [one / f"0000{n}.tar" for n in range(3)]
    assert [shard.path for shard in find_shards(f"{one}/*.tar")] == ones
    assert [shard.path for shard in find_shards(str(one))] == ones  # a folder, for all its tars
    assert [shard.path for shard in find_shards([str(ones[2]), str(two)])] == [ones[2], *sorted(two.glob("*.tar"))]
    assert [shard.path for shard in find_shards(f"{tmp_path}/**/00002.tar")] == [ones[2]]


@pytest.mark.parametrize("pattern", ["missing/*.tar", "missing/00000.tar", "missing", "here", "here/*.tar"])
def test_no_shard_is_an_error_that_names_the_remedy(tmp_path, pattern):
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match="align-train prepare") as raised:
        find_shards([str(tmp_path / pattern)])
    assert repr(str(tmp_path / pattern)) in str(raised.value)


# Images


def encoded(image, format="PNG", **options):
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def decoded(content):
    image = decode(content)
    assert image.mode == "RGB"
    return np.array(image)


def png(width, height, depth, colour, rows=b"", extra=b""):
    """A PNG by hand: `rows` are its bytes before compression, each row led by its filter, 0."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("mode", "format"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "PNG"), ("LA", "TIFF")]
)
def test_transparency_lies_on_white(mode, format):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 200, 200, 255), (0, 0, 0, 0), (0, 0, 0, 128)])
    content = encoded(image.convert(mode), format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    assert decoded(content)[0].tolist() == [[200] * 3, [255] * 3, [127] * 3]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])])
def test_palettes_with_and_without_transparency(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.putdata([0, 1, 2])
    assert decoded(encoded(image))[0].tolist() == [[200, 0, 0], [0, 200, 0], [0, 0, 200]]
    blue = [0, 0, 200] if transparency == 1 else [127, 127, 227]
    assert decoded(encoded(image, transparency=transparency))[0].tolist() == [[200, 0, 0], [255, 255, 255], blue]


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_levels(mode):
    image = Image.new(mode, (4, 2), 255)
    image.paste(0, (0, 0, 2, 2))
    assert decoded(encoded(image))[1].tolist() == [[0] * 3, [0] * 3, [255] * 3, [255] * 3]


def test_cmyk_jpeg():
    colours = np.zeros((16, 16, 3), np.uint8)
    colours[:, :8] = (200, 40, 40)
    colours[:, 8:] = (30, 60, 180)
    found = decoded(encoded(Image.fromarray(colours).convert("CMYK"), "JPEG", quality=100))
    assert np.abs(found.astype(int) - colours).max() < 8


def test_sixteen_bits_keep_the_high_byte():
    levels = np.array([[0, 255, 256, 30_000, 65_535]], ">u2")
    rows = b"\0" + levels.tobytes()
    assert decoded(png(5, 1, 16, 0, rows))[0, :, 0].tolist() == [0, 0, 1, 117, 255]
    colours = b"\0" + struct.pack(">HHH", 65_535, 30_000, 0)
    assert decoded(png(1, 1, 16, 2, colours)).tolist() == [[[255, 117, 0]]]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_one_pixel(format):
    content = encoded(Image.new("RGB", (1, 1), (250, 250, 250)), format)
    assert np.abs(decoded(content).astype(int) - 250).max() < 4
    assert pixels_of(content, SMALL).shape == (10, 10, 3)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 6), colour) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 3
    assert np.abs(decoded(content).astype(int) - [255, 0, 0]).max() < 4


def test_rotation_in_exif_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    content = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    assert decoded(content).shape == (4, 8, 3)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html><html><body>404</body></html>",
        drawn_image(1)[:-200],
        drawn_image(1)[:30],
        drawn_image(1, format="PNG")[:80],
        drawn_image(1, format="GIF")[:40],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n",
    ],
    ids=["empty", "html", "truncated", "header only", "truncated png", "truncated gif", "postscript"],
)
def test_what_is_no_image_is_unusable(content):
    with pytest.raises(Unusable, match=r"corrupt_image: cat in a\.tar") as raised:
        decode(content, "cat in a.tar")
    assert raised.value.reason == "corrupt_image"


@pytest.mark.parametrize("side", [9_500, 40_000])  # Pillow warns of the one and refuses the other
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_huge_image_is_refused_by_its_header(side, action):
    content = png(side, side, 8, 2)
    tracemalloc.start()
    with warnings.catch_warnings(action=action), pytest.raises(Unusable, match="too_many_pixels: cat"):
        decode(content, "cat")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert len(content) < 200


def test_resize_is_the_references(large_golden):
    golden = np.load(large_golden / "resize.npz")
    for number in range(len(golden["sizes_wh"])):
        image = decode(golden[f"png{number}"].tobytes())
        assert image.size == tuple(golden["sizes_wh"][number])
        square = resize(image, 346, antialias=False)
        distance = np.array(square)[::8].astype(float) - golden[f"resize{number}_rows8"]
        assert np.abs(distance).max() <= 1
        assert np.abs(distance).mean() < 0.35  # rounding alone gives .25
        assert abs(distance.mean()) < 0.05
        crop = np.array(centre_crop(square, 289)).astype(float)
        assert np.abs(crop[::8] - golden[f"crop{number}_rows8"]).max() <= 1
        assert np.abs(crop.sum((0, 1)) - golden[f"crop{number}_sum"]).max() / 289**2 < 0.05
        assert (pixels_of(golden[f"png{number}"].tobytes(), Preprocessing()) == crop).all()


def test_antialiasing_is_another_filter(large_golden):
    golden = np.load(large_golden / "resize.npz")
    image = decode(golden["png5"].tobytes())  # 1024 pixels wide
    distance = np.array(resize(image, 346, antialias=True))[::8] - golden["resize5_rows8"]
    assert np.abs(distance).mean() > 2


def test_resize_by_hand():
    """Half-pixel centres: two pixels to four are 0, 1/4, 3/4 and 1 of the way; the aspect ratio is not kept."""
    image = Image.new("RGB", (2, 1))
    image.putdata([(0, 0, 0), (200, 100, 40)])
    square = np.array(resize(image, 4, antialias=False))
    assert square.shape == (4, 4, 3)
    assert square[3].tolist() == [[0, 0, 0], [50, 25, 10], [150, 75, 30], [200, 100, 40]]
    assert (np.array(resize(image, 4, antialias=True))[..., 0] == square[..., 0]).all()  # enlarging needs no filter


@pytest.mark.parametrize("name", ["jpeg_420", "jpeg_444", "jpeg_gray", "jpeg_exif6"])
def test_decoding_jpeg_is_near_the_references(large_golden, name):
    golden = np.load(large_golden / "decode.npz")
    found = decoded(golden[f"{name}|bytes"].tobytes()).astype(float)
    assert found.shape == golden[f"{name}|tf"].shape
    assert np.abs(found - golden[f"{name}|tf"]).mean() < 1.5  # their fast DCT against the accurate one


def test_decoding_png_is_the_references_but_for_transparency(large_golden):
    golden = np.load(large_golden / "decode.npz")
    content, reference = golden["png_rgba|bytes"].tobytes(), golden["png_rgba|tf"].astype(float)
    with Image.open(io.BytesIO(content)) as image:
        alpha = np.array(image)[..., 3:] / 255
    found = decoded(content)
    assert np.ptp(alpha) > 0.5
    assert np.abs(found - (alpha * reference + (1 - alpha) * 255)).max() <= 1


# Augmentation

NONE = Augmentation(flip=0.0)
FULL = Augmentation(flip=0.5, rotation=15, scale=0.1, shift=0.1, contrast=0.3, colour=20)


def ramp(size):
    """An image whose red is the column, and green the row."""
    rows, columns = np.mgrid[:size, :size].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], -1))


def augmented(augmentation, seed, size=24, crop=20):
    return np.array(augmentation(ramp(size), crop, np.random.default_rng(seed)))


@pytest.mark.parametrize("augmentation", [Augmentation(), FULL])
def test_the_generator_fixes_the_augmentation(augmentation):
    assert (augmented(augmentation, 3) == augmented(augmentation, 3)).all()
    assert len({augmented(augmentation, seed).tobytes() for seed in range(20)}) > 10


@pytest.mark.parametrize(
    "augmentation",
    [
        NONE,
        Augmentation(),
        FULL,
        Augmentation(rotation=180),
        Augmentation(scale=0.9),
        Augmentation(shift=1.0),
        Augmentation(contrast=1.0),
        Augmentation(colour=255),
    ],
)
@pytest.mark.parametrize(("size", "crop"), [(24, 20), (20, 20), (20, 1), (1, 1)])
def test_augmentation_gives_the_crop(augmentation, size, crop):
    for seed in range(5):
        pixels = augmented(augmentation, seed, size, crop)
        assert pixels.shape == (crop, crop, 3)
        assert pixels.dtype == np.uint8


def test_crops_cover_every_offset_and_no_other():
    corners = {tuple(augmented(NONE, seed)[0, 0, :2]) for seed in range(400)}
    assert corners == {(left, top) for left in range(5) for top in range(5)}


def test_flip_mirrors_left_and_right_at_its_rate():
    always, never = augmented(Augmentation(flip=1.0), 0, 20), augmented(NONE, 0, 20)
    assert (always == never[:, ::-1]).all()
    flipped = sum(augmented(Augmentation(flip=0.25), seed, 20)[0, 0, 0] > 0 for seed in range(800))
    assert 160 <= flipped <= 240  # 200, three standard deviations of 12


def test_without_changes_the_resized_image_comes_out():
    content = drawn_image(3, (50, 30), "PNG")
    whole = Preprocessing(resize=20, crop=20)
    expected = np.array(resize(decode(content), 20, antialias=False))
    assert (np.array(NONE(resized(content, whole), whole.crop, np.random.default_rng(0))) == expected).all()
    assert (pixels_of(content, whole) == expected).all()


def test_moving_by_nothing_changes_nothing():
    still = Augmentation(flip=0.0, rotation=1e-9, scale=1e-9, shift=1e-9)
    assert (augmented(still, 0, 20) == augmented(NONE, 0, 20)).all()


def test_a_turn_about_the_centre():
    """Whatever the angle, the middle of the ramp stays, and corners turned in from outside are white."""
    for seed in range(10):
        pixels = augmented(Augmentation(flip=0.0, rotation=45), seed, 31, 31)
        assert np.abs(pixels[15, 15].astype(int) - [15, 15, 0]).max() <= 1
    assert any((augmented(Augmentation(rotation=45), seed, 31, 31)[0, 0] == 255).all() for seed in range(10))


def test_shift_and_scale_are_bounded():
    for seed in range(50):
        moved = augmented(Augmentation(flip=0.0, shift=0.1), seed, 40, 40)[20, 20, :2].astype(int)
        assert np.abs(moved - 20).max() <= 5
    levels = [augmented(Augmentation(flip=0.0, scale=0.2), seed, 200, 200)[100, :, 0].astype(int) for seed in range(50)]
    zooms = [100 / (row[150] - row[50]) for row in levels]
    assert 0.78 < min(zooms) < 0.85
    assert 1.15 < max(zooms) < 1.22


def test_contrast_and_colour():
    flat = Image.new("RGB", (8, 8), (127, 127, 127))
    random = np.random.default_rng
    for seed in range(30):
        assert np.abs(np.array(Augmentation(contrast=0.5)(flat, 8, random(seed))).astype(int) - 127).max() <= 1
        tinted = np.array(Augmentation(colour=20)(flat, 8, random(seed))).astype(int) - 127
        assert np.abs(tinted).max() <= 20
        assert len(set(tinted[0, 0])) > 1  # each channel for itself
        assert len(np.unique(tinted.reshape(-1, 3), axis=0)) == 1  # the same over the whole image
    spread = [np.array(Augmentation(flip=0, contrast=0.5)(ramp(200), 200, random(n)))[0, :, 0] for n in range(30)]
    gains = [float(levels[190]) - float(levels[60]) for levels in spread]
    assert min(gains) < 0.7 * 130
    assert max(gains) > 0.95 * 130
    assert max(gains) <= 196


# Tokens


def test_the_vocabulary_that_ships():
    tokenizer = load_tokenizer()
    assert len(tokenizer) == 30_522
    ids, mask = tokenize(tokenizer, ["a photo of a cat", "A Photo OF a Càt"])
    assert ids.tolist() == [[101, 1037, 6302, 1997, 1037, 4937, 102]] * 2
    assert mask.tolist() == [[1] * 7] * 2
    assert ids.dtype == mask.dtype == torch.int64


def test_long_captions_are_cut_and_short_ones_padded_to_the_longest():
    ids, mask = tokenize(load_tokenizer(6), ["a photo of a cat and a dog", "cat"])
    assert ids.tolist() == [[101, 1037, 6302, 1997, 1037, 102], [101, 4937, 102, 0, 0, 0]]
    assert mask.tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert tokenize(load_tokenizer(6), ["cat"])[0].shape == (1, 3)


@pytest.mark.parametrize("content", ["", "cat\ndog\n", '{"model": {"vocab": {}}}'])
def test_a_wrong_vocabulary_is_an_error(tmp_path, content):
    path = tmp_path / "vocab.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"vocab\.txt has \d+ tokens, but the tokenizer has \d+"):
        load_tokenizer(path=path)


# Pairs and batches


@pytest.fixture
def broken_shard(tmp_path):
    """Twelve pairs of which number 3 is an HTML page and number 7 a truncated image."""
    images = {3: b"<html>404</html>", 7: drawn_image(7)[:-300]}
    return Shard(write_tar(tmp_path / "broken.tar", [m for n in range(12) for m in pair_members(n, images.get(n))]))


def training_batches(shard, workers, steps=6):
    pairs = TrainingPairs([shard], SMALL, FULL, seed=1)
    sampler = GlobalBatches(8, 0, steps)
    return list(DataLoader(pairs, batch_sampler=sampler, num_workers=workers, collate_fn=Collate(8)))


def test_an_unusable_pair_is_replaced_and_counted(broken_shard, caplog):
    with caplog.at_level(logging.WARNING):
        batches = training_batches(broken_shard, 0)
    assert [len(batch) for batch in batches] == [8] * 6
    dropped = sum((batch.dropped for batch in batches), Tally())
    assert dropped["corrupt_image"] >= 8  # 48 positions are four epochs with two broken pairs each
    assert {"pair-00003", "pair-00007"}.isdisjoint(key for batch in batches for key in batch.keys)
    assert "pair-00003 in" in caplog.text
    assert "broken.tar" in caplog.text


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
def test_workers_do_not_change_the_batches(broken_shard):
    alone = training_batches(broken_shard, 0)
    for workers in (1, 2):
        for one, other in zip(alone, training_batches(broken_shard, workers), strict=True):
            assert one.keys == other.keys
            assert one.dropped == other.dropped
            assert torch.equal(one.pixels, other.pixels)
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.attention_mask, other.attention_mask)


def test_replacements_and_augmentation_change_from_epoch_to_epoch(broken_shard):
    pairs = TrainingPairs([broken_shard], SMALL, FULL, seed=1)
    places = [[position for position in range(n * 12, n * 12 + 12) if pairs.order[position].row == 3] for n in range(8)]
    assert len({pairs[position].key for (position,) in places}) > 1
    looks = [pairs[position].pixels.tobytes() for position in range(24) if pairs.order[position].row == 0]
    assert len(looks) == len(set(looks)) == 2


def test_positions_follow_the_order(make_shards):
    pairs = TrainingPairs(find_shards(str(make_shards(10, 4))), SMALL, NONE, seed=2, window=2)
    keys = [pairs[position].key for position in range(20)]
    assert sorted(keys[:10]) == sorted(keys[10:]) == [drawn_pair(n).key for n in range(10)]
    numbers = [place.shard * 4 + place.row for place in (pairs.order[position] for position in range(20))]
    assert keys == [drawn_pair(n).key for n in numbers]
    again = TrainingPairs(pairs.shards, SMALL, NONE, seed=3, window=2)
    assert [again[position].key for position in range(20)] != keys


def test_shards_that_hold_rubbish_alone_are_an_error(tmp_path):
    pages = [member for n in range(3) for member in pair_members(n, b"<html>")]
    members = pages + [(f"{n}.txt", b"no image") for n in range(3)]
    pairs = TrainingPairs([Shard(write_tar(tmp_path / "a.tar", members))], SMALL, NONE)
    with pytest.raises(ValueError, match=r"20 pairs in a row .*corrupt_image \d+, no_image \d+.*a\.tar") as raised:
        pairs[0]
    assert "check these shards" in str(raised.value)


def test_evaluation_keeps_the_order_and_counts(broken_shard):
    batches = list(evaluation_batches([broken_shard], SMALL, batch_size=5))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    usable = [n for n in range(12) if n not in (3, 7)]
    assert [key for batch in batches for key in batch.keys] == [drawn_pair(n).key for n in usable]
    assert [batch.dropped["corrupt_image"] for batch in batches] == [1, 1, 0]
    pixels = torch.cat([batch.pixels for batch in batches]).permute(0, 2, 3, 1).numpy()
    for number, found in zip(usable, pixels, strict=True):
        assert (found == pixels_of(drawn_image(number), SMALL)).all()


def test_a_batch_without_a_usable_pair_is_a_tally(broken_shard):
    batches = list(evaluation_batches([broken_shard], SMALL, batch_size=1))
    assert len(batches) == 12
    assert batches[3] == Tally({"corrupt_image": 1})
    assert not isinstance(batches[3], Batch)
    assert len(batches[4]) == 1


def test_collate():
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (10, 10, 3), dtype=np.uint8) for _ in range(2)]
    first = Example("a", images[0], "a photo of a cat", Tally(corrupt_image=2))
    batch = Collate(64)([first, Tally(no_caption=1), Example("b", images[1], "cat", Tally(corrupt_image=1))])
    assert batch.keys == ("a", "b")
    assert batch.dropped == {"corrupt_image": 3, "no_caption": 1}
    assert batch.pixels.shape == (2, 3, 10, 10)
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    assert (batch.pixels[1, 2].numpy() == images[1][..., 2]).all()
    assert batch.input_ids.shape == (2, 7)
    assert batch.attention_mask.tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]


def test_metadata_does_not_disturb(make_shards):
    """The json of each pair is no caption, and unknown files beside it are passed over."""
    folder = make_shards(2)
    with tarfile.open(folder / "00000.tar") as tar:
        assert json.loads(tar.extractfile("pair-00001.json").read())["parity"] == "odd"
    assert read_all(Shard(folder / "00000.tar"))[1][2] == drawn_pair(1).caption


def test_kept_images_are_augmented_as_if_read_again(make_shards):
    shards = find_shards(str(make_shards(10, 4)))
    again, kept = (TrainingPairs(shards, SMALL, FULL, seed=1, keep=keep) for keep in (0, 7))
    for position in range(30):
        one, other = again[position], kept[position]
        assert (one.key, one.caption) == (other.key, other.caption)
        assert (one.pixels == other.pixels).all()
    assert len(kept._kept) == 7
