"""Encoded images to pixels: decoding, resizing and augmentation, and that they are the reference's."""

import io
import struct
import tracemalloc
import warnings
import zlib
from functools import partial

import numpy as np
import pytest
import simplejpeg
from conftest import drawn_image
from PIL import Image

from align_train.corpus.images import Unusable, decode, jpeg_pixels
from align_train.data.images import Augmentation, centre_crop, pixels_of, resize, resized, training_pixels
from align_train.records import Preprocessing

SMALL = Preprocessing(resize=12, crop=10, max_tokens=8)
NONE = Augmentation(flip=0.0)
FULL = Augmentation(flip=0.5, rotation=15, scale=0.1, shift=0.1, contrast=0.3, colour=20)
ANY = np.random.default_rng(0)  # where the numbers drawn do not matter


class Central(Augmentation):
    """The crop that is drawn is the central one."""

    def corner(self, width, height, crop, random):
        return (width - crop) // 2, (height - crop) // 2


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
        pixels = decoded(golden[f"png{number}"].tobytes())
        assert pixels.shape[1::-1] == tuple(golden["sizes_wh"][number])
        square = resize(pixels, 346, antialias=False)
        distance = square[::8].astype(float) - golden[f"resize{number}_rows8"]
        assert np.abs(distance).max() <= 1
        assert np.abs(distance).mean() < 0.35  # rounding alone gives .25
        assert abs(distance.mean()) < 0.05
        crop = centre_crop(square, 289).astype(float)
        assert np.abs(crop[::8] - golden[f"crop{number}_rows8"]).max() <= 1
        assert np.abs(crop.sum((0, 1)) - golden[f"crop{number}_sum"]).max() / 289**2 < 0.05
        assert (pixels_of(golden[f"png{number}"].tobytes(), Preprocessing()) == crop).all()


def test_the_crop_alone_is_the_references_too(large_golden):
    """Training computes no more than the crop; here it is the reference's central one."""
    golden = np.load(large_golden / "resize.npz")
    for number in range(len(golden["sizes_wh"])):
        crop = training_pixels(golden[f"png{number}"].tobytes(), Preprocessing(), Central(flip=0), ANY).astype(float)
        assert np.abs(crop[::8] - golden[f"crop{number}_rows8"]).max() <= 1
        assert np.abs(crop.sum((0, 1)) - golden[f"crop{number}_sum"]).max() / 289**2 < 0.05


@pytest.mark.parametrize("size", [(50, 30), (10, 90), (12, 12)])
def test_antialiasing_is_pillows_to_the_bit(size):
    content = drawn_image(1, size, "PNG")
    expected = np.array(decode(content).resize((12, 12), Image.Resampling.BILINEAR))
    whole = Preprocessing(resize=12, crop=10, antialias=True)
    assert (resize(decoded(content), 12, antialias=True) == expected).all()
    assert (resized(content, whole) == expected).all()
    assert (pixels_of(content, whole) == expected[1:11, 1:11]).all()
    assert (training_pixels(content, whole, Central(flip=0), ANY) == expected[1:11, 1:11]).all()


def test_antialiasing_is_another_filter(large_golden):
    golden = np.load(large_golden / "resize.npz")
    pixels = decoded(golden["png5"].tobytes())  # 1024 pixels wide
    distance = resize(pixels, 346, antialias=True)[::8] - golden["resize5_rows8"]
    assert np.abs(distance).mean() > 2


def test_resize_by_hand():
    """Half-pixel centres: two pixels to four are 0, 1/4, 3/4 and 1 of the way; the aspect ratio is not kept."""
    pixels = np.array([[(0, 0, 0), (200, 100, 40)]], np.uint8)
    square = resize(pixels, 4, antialias=False)
    assert square.shape == (4, 4, 3)
    assert square[3].tolist() == [[0, 0, 0], [50, 25, 10], [150, 75, 30], [200, 100, 40]]
    assert (resize(pixels, 4, antialias=True)[..., 0] == square[..., 0]).all()  # enlarging needs no filter


@pytest.mark.parametrize("shape", [(7, 13), (30, 30), (45, 200), (2, 700)])
def test_resize_interpolates_at_exact_coordinates(shape):
    """OpenCV before 5 rounds coordinates to 1/32 of a pixel, up to 4 levels on noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    down, across = (weights(side, 30) for side in shape)
    expected = np.einsum("yh,hwc,xw->yxc", down, pixels, across)
    assert np.abs(resize(pixels, 30, antialias=False) - expected).max() < 0.51


def weights(length, size):
    """The share (size, length) that each pixel has in each pixel of the result."""
    places = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(length)))


GOLDEN_JPEGS = ["jpeg_420", "jpeg_444", "jpeg_gray", "jpeg_exif6"]


@pytest.mark.parametrize("name", GOLDEN_JPEGS)
def test_decoding_jpeg_is_near_the_references(large_golden, name):
    golden = np.load(large_golden / "decode.npz")
    found = decoded(golden[f"{name}|bytes"].tobytes()).astype(float)
    assert found.shape == golden[f"{name}|tf"].shape
    assert np.abs(found - golden[f"{name}|tf"]).mean() < 1.5  # their fast DCT against the accurate one


@pytest.mark.parametrize("name", GOLDEN_JPEGS)
def test_the_faster_decoder_gives_the_same_pixels_on_the_references_files(large_golden, name):
    content = np.load(large_golden / "decode.npz")[f"{name}|bytes"].tobytes()
    found = jpeg_pixels(content)
    assert found is not None
    assert (found[0] == decoded(content)).all()


def test_decoding_png_is_the_references_but_for_transparency(large_golden):
    golden = np.load(large_golden / "decode.npz")
    content, reference = golden["png_rgba|bytes"].tobytes(), golden["png_rgba|tf"].astype(float)
    with Image.open(io.BytesIO(content)) as image:
        alpha = np.array(image)[..., 3:] / 255
    found = decoded(content)
    assert np.ptp(alpha) > 0.5
    assert np.abs(found - (alpha * reference + (1 - alpha) * 255)).max() <= 1


# JPEG at a fraction of its size


@pytest.fixture
def scales(monkeypatch):
    """The shapes that simplejpeg decoded to."""
    found, load = [], simplejpeg.decode_jpeg

    def watched(*arguments, **options):
        pixels = load(*arguments, **options)
        found.append(pixels.shape)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", watched)
    return found


@pytest.mark.parametrize(
    ("size", "read"),
    [
        ((23, 50), (23, 50)),  # 23 is less than twice 12
        ((24, 50), (12, 25)),
        ((25, 47), (13, 24)),
        ((48, 47), (24, 24)),
        ((48, 50), (12, 13)),
        ((95, 99), (24, 25)),
        ((96, 99), (12, 13)),
        ((400, 400), (50, 50)),
    ],
)
def test_a_jpeg_is_read_at_the_smallest_scale_that_has_the_pixels(size, read, scales):
    content = drawn_image(1, size)
    for function in (resized, partial(training_pixels, augmentation=NONE, random=ANY)):
        function(content, preprocessing=SMALL, reduce=True)
        function(content, preprocessing=SMALL, reduce=False)
    training_pixels(content, SMALL, NONE, ANY)
    pixels_of(content, SMALL)
    assert scales == [(*reversed(shape), 4) for shape in [read, size] * 3]


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(160, 160), (161, 163), (321, 329), (641, 655)])
def test_an_image_read_at_a_fraction_lies_where_the_whole_one_does(size, antialias, scales):
    """A ramp shows any shift: a level is a 255th of the side. Odd sides end within a pixel, which must be heeded."""
    across, down = (np.linspace(0, 255, n) for n in size)
    slope = np.stack(np.broadcast_arrays(across, down[:, None], 127), -1).astype(np.uint8)
    content = encoded(Image.fromarray(slope), "JPEG", quality=100)
    whole = Preprocessing(resize=80, crop=70, antialias=antialias)
    distance = resized(content, whole, reduce=True).astype(float) - resized(content, whole)
    assert len(set(scales)) == 2
    assert np.abs(distance).mean() < 0.6
    for part in (distance, distance[:8], distance[-8:], distance[:, :8], distance[:, -8:]):
        assert np.abs(part.mean((0, 1))).max() < 0.35


# From the file to the crop


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(), Augmentation(contrast=0.3, colour=20), Augmentation(flip=0.5, rotation=15, shift=0.1)],
)
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize(("size", "format"), [((384, 384), "JPEG"), ((771, 517), "JPEG"), ((50, 300), "PNG")])
def test_training_pixels_are_the_augmentation_of_the_resized_image(augmentation, antialias, reduce, size, format):
    content = drawn_image(7, size, format)
    preprocessing = Preprocessing(resize=173, crop=144, antialias=antialias)
    for seed in range(4):
        square = resized(content, preprocessing, reduce=reduce)
        expected = augmentation(square, 144, np.random.default_rng(seed)).astype(int)
        random = np.random.default_rng(seed)
        found = training_pixels(content, preprocessing, augmentation, random, reduce=reduce)
        distance = np.abs(found - expected)
        assert distance.max() <= (0 if antialias or augmentation.moves else 2 if augmentation.contrast else 1)
        assert (distance > 0).mean() < 0.002
        assert random.random() == after(augmentation, square, seed).random()


def after(augmentation, square, seed):
    """The generator as augmenting leaves it."""
    random = np.random.default_rng(seed)
    augmentation(square, 144, random)
    return random


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("augmentation", [Augmentation(flip=0), Augmentation(flip=1), FULL])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_results_are_whole_blocks_of_memory(augmentation, format, antialias):
    content, small = drawn_image(2, (60, 40), format), Preprocessing(resize=12, crop=10, antialias=antialias)
    square = resized(content, small)
    found = [square, augmentation(square, 10, ANY), training_pixels(content, small, augmentation, ANY)]
    for pixels in [*found, pixels_of(content, small), centre_crop(square, 10)]:
        assert pixels.flags["C_CONTIGUOUS"]
        assert pixels.flags["WRITEABLE"]
        assert pixels.dtype == np.uint8


def test_augmenting_leaves_the_image_as_it_is():
    square = ramp(20)
    for augmentation in (NONE, Augmentation(flip=1), FULL, Augmentation(flip=0, contrast=1, colour=50)):
        augmentation(square, 20, np.random.default_rng(0))[:] = 7
    assert (square == ramp(20)).all()


@pytest.mark.parametrize("reduce", [False, True])
def test_what_is_no_image_is_unusable_in_training_too(reduce):
    whole = encoded(Image.new("CMYK", (60, 40)), "JPEG")
    assert training_pixels(whole, SMALL, NONE, ANY, reduce=reduce).shape == (10, 10, 3)
    for content in (b"", b"<!DOCTYPE html>", drawn_image(1, (90, 90))[:-200], whole[:-200]):
        with pytest.raises(Unusable, match=r"corrupt_image: cat in a\.tar"):
            training_pixels(content, SMALL, NONE, ANY, "cat in a.tar", reduce)
        with pytest.raises(Unusable, match=r"corrupt_image: cat in a\.tar"):
            pixels_of(content, SMALL, "cat in a.tar")


# Augmentation


def ramp(size):
    """An image whose red is the column, and green the row."""
    rows, columns = np.mgrid[:size, :size].astype(np.uint8)
    return np.stack([columns, rows, np.zeros_like(rows)], -1)


def augmented(augmentation, seed, size=24, crop=20):
    return augmentation(ramp(size), crop, np.random.default_rng(seed))


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
    expected = resize(decoded(content), 20, antialias=False)
    assert (NONE(resized(content, whole), whole.crop, ANY) == expected).all()
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


class Drawn:
    """A generator whose uniform numbers are given, in their order."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def uniform(self, low, high, size=None):
        number = self.numbers.pop(0)
        assert np.size(number) == (size or 1)
        return np.array(number)

    def integers(self, low, high):
        return np.zeros(2, int)

    def random(self):
        return 0.9


@pytest.mark.parametrize("size", [20, 21])
def test_moves_by_hand(size):
    """The numbers are drawn in this order: degrees, share of size, shares of the side to the right and down."""
    image, moves = ramp(size), Augmentation(rotation=180, scale=1, shift=1)
    assert (moves(image, size, Drawn(180, 0, (0, 0))) == image[::-1, ::-1]).all()
    clockwise = moves(image, size, Drawn(90, 0, (0, 0)))
    assert (clockwise == np.rot90(image, -1)).all()
    moved = moves(image, size, Drawn(0, 0, (5 / size, 3 / size)))
    assert (moved[3:, 5:] == image[:-3, :-5]).all()
    assert (moved[:3] == 255).all()
    assert (moved[:, :5] == 255).all()
    larger = moves(image, size, Drawn(0, 1, (0, 0))).astype(float)
    assert np.abs(np.diff(larger[0, 1:, 0]) - 0.5).max() <= 0.5
    assert abs(larger[..., 0].mean() - (size - 1) / 2) < 0.3


def test_tones_by_hand():
    image = np.array([[(0, 100, 255), (127, 128, 200)]], np.uint8).repeat(2, 0)
    found = Augmentation(contrast=1, colour=50)(image, 2, Drawn(-0.5, (10, -20, 30)))
    assert found[0].tolist() == [[74, 94, 221], [137, 108, 194]]  # (level - 127.5) / 2 + 127.5 + tint


def test_shift_and_scale_are_bounded():
    for seed in range(50):
        moved = augmented(Augmentation(flip=0.0, shift=0.1), seed, 40, 40)[20, 20, :2].astype(int)
        assert np.abs(moved - 20).max() <= 5
    levels = [augmented(Augmentation(flip=0.0, scale=0.2), seed, 200, 200)[100, :, 0].astype(int) for seed in range(50)]
    zooms = [100 / (row[150] - row[50]) for row in levels]
    assert 0.78 < min(zooms) < 0.85
    assert 1.15 < max(zooms) < 1.22


def test_contrast_and_colour():
    flat = np.full((8, 8, 3), 127, np.uint8)
    random = np.random.default_rng
    for seed in range(30):
        assert np.abs(Augmentation(contrast=0.5)(flat, 8, random(seed)).astype(int) - 127).max() <= 1
        tinted = Augmentation(colour=20)(flat, 8, random(seed)).astype(int) - 127
        assert np.abs(tinted).max() <= 20
        assert len(set(tinted[0, 0])) > 1  # each channel for itself
        assert len(np.unique(tinted.reshape(-1, 3), axis=0)) == 1  # the same over the whole image
    spread = [Augmentation(flip=0, contrast=0.5)(ramp(200), 200, random(n))[0, :, 0] for n in range(30)]
    gains = [float(levels[190]) - float(levels[60]) for levels in spread]
    assert min(gains) < 0.7 * 130
    assert max(gains) > 0.95 * 130
    assert max(gains) <= 196
