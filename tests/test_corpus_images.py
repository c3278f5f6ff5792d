"""Fetched images as they are stored: sizes, pixels, what is sniffed, and what is refused and why."""

import io
import struct
import tracemalloc
import warnings
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from conftest import drawn_image
from PIL import Image, ImageFile

from align_train.corpus.images import ImageSettings, Unusable, decode, jpeg_pixels, store_image
from align_train.records import Tally

KEEP_RATIO = ImageSettings(size=40, mode="keep_ratio")
ORIGINAL = ImageSettings(mode="original", quality=100)


def encoded(image, format="PNG", **options):
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def noise(width, height, seed=0):
    """An image with the spectrum of photographs: amplitude falls as 1/f^1.25."""
    random = np.random.default_rng(seed)
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(down, across)
    frequency[0, 0] = 1
    spectrum = random.normal(size=(3, *frequency.shape, 2)) @ [1, 1j] / frequency**1.25
    pixels = np.fft.irfft2(spectrum, s=(height, width))
    pixels = 127 + 50 * (pixels - pixels.mean()) / pixels.std()
    return Image.fromarray(np.clip(pixels.transpose(1, 2, 0), 0, 255).astype(np.uint8))


def stored(content, settings=ORIGINAL):
    """The stored file, which must be what its record says: RGB JPEG of that size, with nothing but pixels in it."""
    result = store_image(content, settings, "cat")
    with Image.open(io.BytesIO(result.content)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (result.width, result.height))
        assert not image.info.keys() & {"exif", "comment", "icc_profile", "xmp", "dpi"}
        return np.array(image).astype(float)


def sizes(content, settings):
    result = store_image(content, settings)
    return (result.width, result.height), (result.original_width, result.original_height)


def reason(content, settings=KEEP_RATIO):
    with pytest.raises(Unusable, match=": cat") as raised:
        store_image(content, settings, "cat")
    return raised.value.reason


def rms(found, expected):
    return np.sqrt(((found - expected) ** 2).mean())


def area_weights(pixels, target):
    """(target, pixels): the share of each pixel in the stretch that a pixel of the target covers."""
    edges = np.arange(target + 1) * pixels / target
    left, right = edges[:-1, None], edges[1:, None]
    covered = np.minimum(right, np.arange(pixels) + 1) - np.maximum(left, np.arange(pixels))
    return np.clip(covered, 0, None) * target / pixels


def area_mean(image, size):
    pixels = np.asarray(image).astype(float)
    down, across = area_weights(image.height, size[1]), area_weights(image.width, size[0])
    return np.einsum("ij,jkc,lk->ilc", down, pixels, across, optimize=True)


# Sizes


@pytest.mark.parametrize(
    ("size", "settings", "expected"),
    [
        ((80, 60), {"mode": "square"}, (40, 40)),
        ((80, 30), {"mode": "square"}, (40, 40)),
        ((80, 30), {"mode": "square", "enlarge": False}, (40, 30)),
        ((20, 30), {"mode": "square", "enlarge": False}, (20, 30)),
        ((80, 60), {"mode": "keep_ratio"}, (53, 40)),
        ((60, 80), {"mode": "keep_ratio"}, (40, 53)),
        ((20, 10), {"mode": "keep_ratio"}, (80, 40)),
        ((90, 30), {"mode": "keep_ratio", "enlarge": False}, (90, 30)),
        ((90, 60), {"mode": "keep_ratio", "enlarge": False}, (60, 40)),
        ((80, 30), {"mode": "original"}, (80, 30)),
        ((1, 1), {"mode": "keep_ratio"}, (40, 40)),
        ((1, 1), {"mode": "original"}, (1, 1)),
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_the_size_under_which_an_image_is_stored(size, settings, expected, format):
    content = drawn_image(1, size, format)
    assert sizes(content, ImageSettings(size=40, **settings)) == (expected, size)


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (3, 1000)])
@pytest.mark.parametrize("mode", ["square", "keep_ratio", "original"])
@pytest.mark.parametrize("enlarge", [True, False])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_no_shape_is_stored_with_a_side_of_no_pixels(size, mode, enlarge, format):
    content = encoded(Image.new("RGB", size), format)
    stored(content, ImageSettings(size=2, mode=mode, enlarge=enlarge))


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (300, 60_000)])
def test_a_long_image_is_not_blown_up_into_a_bomb(size):
    assert reason(encoded(Image.new("L", size)), ImageSettings(size=346, mode="keep_ratio")) == "too_many_pixels"


def test_a_size_of_more_than_89_megapixels_is_refused():
    assert reason(encoded(Image.new("L", (1, 1))), ImageSettings(size=9_500)) == "too_many_pixels"


def test_what_jpeg_cannot_hold_may_be_stored_as_it_came():
    content = encoded(Image.new("1", (65_501, 1)))
    assert reason(content, ORIGINAL) == "too_many_pixels"
    assert store_image(content, ImageSettings(mode="original", reencode=False)).content == content


@pytest.mark.parametrize(
    ("setting", "value", "hint"),
    [
        ("size", 0, "1 to 65500"),
        ("size", 70_000, "1 to 65500"),
        ("quality", 101, "1 to 100"),
        ("quality", 0, "1 to 100"),
        ("max_pixels", 0, "1 to 89478485"),
        ("max_pixels", 200_000_000, "1 to 89478485"),
        ("mode", "crop", "square, keep_ratio, original"),
        ("filter", "nearest", "area, bilinear, bicubic, lanczos"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_choices(setting, value, hint):
    with pytest.raises(ValueError, match=rf"source\.images\.{setting} is .*{value}.*: choose {hint}"):
        ImageSettings(**{setting: value})


# Pixels


@pytest.mark.parametrize("ratio", [1.084, 1.45, 1.55, 2, 3.3])
def test_the_area_filter_is_near_to_the_exact_mean_over_the_area(ratio):
    image = noise(300, 220)
    settings = ImageSettings(size=round(220 / ratio), mode="keep_ratio", quality=100)
    expected = area_mean(image, settings.stored_size(*image.size))
    found = stored(encoded(image), settings)
    loss_of_jpeg = rms(stored(encoded(Image.fromarray(np.rint(expected).astype(np.uint8)))), expected)
    assert np.sqrt(max(0, rms(found, expected) ** 2 - loss_of_jpeg**2)) < 1.6
    assert np.abs(found.mean((0, 1)) - expected.mean((0, 1))).max() < 0.5
    box = np.asarray(image.resize(expected.shape[1::-1], Image.Resampling.BOX))
    assert rms(box, expected) > (2 if ratio % 1 else 0)  # why it is not Pillow's BOX


def test_filters_differ_and_enlarging_with_area_is_lanczos():
    small, large = encoded(noise(50, 40)), encoded(noise(150, 130))
    names = ["area", "bilinear", "bicubic", "lanczos"]
    reduced = {name: stored(large, ImageSettings(size=40, filter=name)) for name in names}
    enlarged = {name: stored(small, ImageSettings(size=90, filter=name)) for name in names}
    assert all(rms(reduced[a], reduced[b]) > 0.5 for a in names for b in names if a < b)
    grey = noise(50, 40).convert("L")
    as_img2dataset = cv2.resize(np.asarray(grey), (90, 90), interpolation=cv2.INTER_LANCZOS4)
    assert rms(stored(encoded(grey), ImageSettings(size=90))[..., 0], as_img2dataset) < 3  # of JPEG
    assert rms(enlarged["area"], enlarged["bilinear"]) > 0.5


@pytest.mark.parametrize(("ratio", "scale"), [(4.2, 2), (9, 4), (17.3, 8)])
@pytest.mark.parametrize("name", ["area", "lanczos"])
def test_a_large_jpeg_read_at_a_fraction_looks_as_read_in_full(ratio, scale, name, monkeypatch):
    content = encoded(noise(643, 481).convert("L"), "JPEG", quality=90)
    settings = ImageSettings(round(481 / ratio), "keep_ratio", filter=name, quality=100)
    read, load = [], simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: read.append(load(*a, **k)) or read[-1])
    found = stored(content, settings)
    assert read[0].shape == (-(-481 // scale), -(-643 // scale), 3)
    assert rms(found, stored(encoded(decode(content)), settings)) < 1.5
    assert sizes(content, settings)[1] == (643, 481)


def test_a_jpeg_below_four_times_the_size_is_read_in_full(monkeypatch):
    content = encoded(noise(150, 130), "JPEG")
    as_png = encoded(decode(content))
    assert (stored(content, ImageSettings(33)) == stored(as_png, ImageSettings(33))).all()


@pytest.mark.parametrize("size", [(61, 47), (64, 48), (1, 1), (7, 200)])
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
def test_the_fast_decoder_reads_every_subsampling_as_pillow_does(size, subsampling):
    pixels = np.array(noise(*size)) if size != (1, 1) else np.full((1, 1, 3), 99, np.uint8)
    grey = subsampling == "Gray"
    image = np.ascontiguousarray(pixels[..., :1]) if grey else pixels
    content = simplejpeg.encode_jpeg(image, 90, "GRAY" if grey else "RGB", "444" if grey else subsampling)
    same_as_pillow(content)


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"optimize": True},
        {"quality": 10},
        {"keep_rgb": True},
        {"restart_marker_rows": 1},
        {"comment": b"a comment", "icc_profile": b"profile" * 20, "dpi": (300, 300)},
        {"exif": b"Exif\0\0nothing"},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_fast_decoder_reads_every_kind_of_jpeg_as_pillow_does(mode, options):
    same_as_pillow(encoded(noise(61, 47).convert(mode), "JPEG", **options))


def test_the_fast_decoder_does_not_turn_images():
    exif = Image.Exif()
    exif[0x0112] = 6
    same_as_pillow(encoded(quartered(), "JPEG", exif=exif))


def same_as_pillow(content):
    expected = np.asarray(decode(content))
    height, width = expected.shape[:2]
    for colours in ("RGB", "RGBX"):
        pixels, extent = jpeg_pixels(content, colours=colours)
        assert pixels.shape == (height, width, len(colours))
        assert extent == (width, height)
        assert (pixels[..., :3] == expected).all()
    assert (pixels[..., 3] == 255).all()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html>",
        b"\xff\xd8\xff",
        drawn_image(1, format="PNG"),
        drawn_image(1)[:-50],
        drawn_image(1)[:30],
        encoded(Image.new("CMYK", (8, 8)), "JPEG"),
    ],
    ids=["empty", "html", "three bytes", "png", "cut", "header", "cmyk"],
)
def test_what_the_fast_decoder_does_not_read_is_left_to_pillow(content):
    assert jpeg_pixels(content) is None


def test_too_many_pixels_are_not_read_by_the_fast_decoder():
    content = bytearray(drawn_image(1))
    struct.pack_into(">HH", content, content.index(b"\xff\xc0") + 5, 9_500, 9_500)
    tracemalloc.start()
    assert jpeg_pixels(bytes(content)) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    with pytest.raises(Unusable, match="too_many_pixels"):
        decode(bytes(content))


@pytest.mark.filterwarnings("ignore")  # Pillow warns of broken tags
def test_no_broken_file_looks_otherwise_to_the_fast_decoder():
    random, read = np.random.default_rng(0), 0
    for number in range(400):
        content = np.frombuffer(drawn_image(number, (61, 47)), np.uint8).copy()
        content[random.integers(2, len(content))] = random.integers(256)
        found = jpeg_pixels(content.tobytes())
        if found is not None:
            read += 1
            assert (found[0] == np.asarray(decode(content.tobytes()))).all()
    assert read > 50


def test_quality_is_passed_on():
    content = encoded(noise(60, 60))
    lengths = [len(store_image(content, ImageSettings(60, quality=quality)).content) for quality in (30, 80, 95, 100)]
    assert lengths == sorted(set(lengths))


# EXIF, transparency, colours and frames


def quartered():
    """A 60 x 40 image with a corner of each colour: red and green above, blue and white below."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30], pixels[:20, 30:], pixels[20:, :30], pixels[20:, 30:] = (
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    )  # fmt: skip
    return Image.fromarray(pixels)


def corners(pixels):
    """The colours of the corners as letters: upper left, upper right, lower left, lower right."""
    names = {(255, 0, 0): "r", (0, 255, 0): "g", (0, 0, 255): "b", (255, 255, 255): "w"}
    found = [pixels[y, x] for y in (4, -5) for x in (4, -5)]
    return "".join(names[tuple((colour > 127) * 255)] for colour in found)


UPRIGHT = {1: "rgbw", 2: "grwb", 3: "wbgr", 4: "bwrg", 5: "rbgw", 6: "brwg", 7: "wgbr", 8: "gwrb"}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_and_not_kept(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(quartered(), format, exif=exif)
    upright = (60, 40) if orientation < 5 else (40, 60)
    assert corners(stored(content)) == UPRIGHT[orientation]
    assert sizes(content, ORIGINAL) == (upright, upright)
    assert sizes(content, ImageSettings(20, "keep_ratio"))[0] == ((30, 20) if orientation < 5 else (20, 30))
    assert corners(np.array(decode(content, upright=True))) == UPRIGHT[orientation]


def test_orientation_at_the_end_of_a_png_is_found():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(quartered(), exif=exif)
    start = content.index(b"eXIf") - 4
    end = start + 12 + struct.unpack_from(">I", content, start)[0]
    moved = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    assert corners(stored(moved)) == UPRIGHT[6]


def test_a_large_jpeg_read_at_a_fraction_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(quartered().resize((600, 400)), "JPEG", exif=exif)
    assert corners(stored(content, ImageSettings(40, "keep_ratio"))) == UPRIGHT[6]
    assert sizes(content, ImageSettings(40, "keep_ratio")) == ((40, 60), (400, 600))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nothing", b"Exif\0\0MM\0*\0\0\0\x08\0\x03\x01", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_loses_no_image(exif, format):
    jfif = {"dpi": (72, 72)} if format == "JPEG" else {}
    assert corners(stored(encoded(quartered(), format, exif=exif, **jfif))) == UPRIGHT[1]


def test_comments_and_profiles_are_not_stored():
    content = encoded(quartered(), "JPEG", comment=b"copyright", icc_profile=b"profile" * 20, dpi=(300, 300))
    with Image.open(io.BytesIO(content)) as image:
        assert image.info.keys() >= {"comment", "icc_profile", "dpi"}
    assert corners(stored(content)) == UPRIGHT[1]


@pytest.mark.parametrize(("mode", "format"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("LA", "PNG"), ("RGBA", "TIFF")])
def test_transparency_goes_on_white(mode, format):
    image = Image.new("RGBA", (32, 16), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (16, 0, 32, 16))
    pixels = stored(encoded(image.convert(mode), format))
    assert pixels[:, :14].max() < 12
    assert pixels[:, 18:].min() > 243


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_transparent_colour_of_a_palette_goes_on_white(transparency):
    image = Image.new("P", (32, 16), 0)
    image.putpalette([200, 0, 0, 0, 0, 0])
    image.paste(1, (16, 0, 32, 16))
    pixels = stored(encoded(image, transparency=transparency))
    assert np.abs(pixels[:, :12] - [200, 0, 0]).max() < 12
    assert pixels[:, 20:].min() > 243


def test_half_transparent_edges_do_not_darken_when_resized():
    """Flattened before it is resized: black under transparency must not leak into the white."""
    image = Image.new("RGBA", (90, 90), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (30, 30, 60, 60))
    assert stored(encoded(image), ImageSettings(31)).min() > 250


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr"])
def test_other_colour_spaces_become_rgb(mode):
    pixels = np.full((32, 32, 3), 255, np.uint8)
    pixels[:16] = 0
    content = encoded(Image.fromarray(pixels).convert(mode), "PNG" if mode == "1" else "JPEG")
    found = stored(content)
    assert found[:14].max() < 16
    assert found[18:].min() > 239


def test_colours_of_a_cmyk_jpeg():
    colours = np.zeros((32, 32, 3), np.uint8)
    colours[:, :16], colours[:, 16:] = (200, 40, 40), (30, 60, 180)
    found = stored(encoded(Image.fromarray(colours).convert("CMYK"), "JPEG", quality=100))
    assert np.abs(found[:, :12] - (200, 40, 40)).max() < 12
    assert np.abs(found[:, 20:] - (30, 60, 180)).max() < 12


def test_sixteen_bits_keep_the_high_byte():
    levels = np.full((16, 16), 30_000, np.uint16)
    assert np.abs(stored(encoded(Image.fromarray(levels))) - 30_000 / 256).max() < 2


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (32, 16), colour) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(stored(content) - [255, 0, 0]).max() < 12


# Stored as it came


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "settings", [{"mode": "original"}, {"size": 60}, {"size": 90, "mode": "keep_ratio", "enlarge": False}]
)
def test_a_file_that_needs_no_change_is_stored_byte_for_byte(format, settings):
    content = encoded(noise(60, 60), format)
    result = store_image(content, ImageSettings(**settings, reencode=False))
    assert result.content == content
    assert (result.width, result.height, result.original_width, result.original_height) == (60, 60, 60, 60)
    assert store_image(content, ImageSettings(**settings)).content != content


def test_what_needs_a_change_is_encoded_although_reencode_is_false():
    exif = Image.Exif()
    exif[0x0112] = 3
    turned, gif = encoded(quartered(), "JPEG", exif=exif), encoded(quartered(), "GIF")
    as_it_is = ImageSettings(mode="original", quality=100, reencode=False)
    assert corners(stored(turned, as_it_is)) == UPRIGHT[3]
    assert corners(stored(gif, as_it_is)) == UPRIGHT[1]
    assert stored(encoded(quartered(), "JPEG"), ImageSettings(20, reencode=False)).shape == (20, 20, 3)


@pytest.mark.parametrize("settings", [KEEP_RATIO, ImageSettings(mode="original", reencode=False), ImageSettings(8)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_file_cut_in_the_middle_is_refused_in_every_mode(settings, format):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    content = encoded(noise(200, 150), format)
    assert reason(content[: len(content) // 2], settings) == "corrupt_image"


# What is no image


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty_image"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not_an_image"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "not_an_image"),
        (b"\xff\xd8\xff", "corrupt_image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "corrupt_image"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "corrupt_image"),
        (b"GIF89a", "corrupt_image"),
    ],
)
def test_what_is_no_image_is_refused_by_its_content(content, expected):
    assert reason(content) == expected


def bomb(width, height):
    """The header of a PNG that announces many pixels and holds none."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("sides", [(10_000, 10_000), (40_000, 40_000), (65_535, 2_000)])
@pytest.mark.parametrize("settings", [KEEP_RATIO, ImageSettings(mode="original", reencode=False)])
def test_a_bomb_is_refused_by_its_header(sides, settings):
    tracemalloc.start()
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of the 100 megapixels, which are refused all the same
        assert reason(bomb(*sides), settings) == "too_many_pixels"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_the_limit_of_pixels_is_a_setting():
    content = encoded(noise(20, 10))
    stored(content, ImageSettings(max_pixels=200))
    assert reason(content, ImageSettings(max_pixels=199)) == "too_many_pixels"
    with pytest.raises(Unusable, match="too_many_pixels: cat has 20 x 10"):
        decode(content, "cat", max_pixels=199)


@pytest.mark.parametrize("error", [struct.error("short"), KeyError("tag"), IndexError("band"), ZeroDivisionError("0")])
def test_whatever_pillow_raises_is_a_corrupt_image(error, monkeypatch):
    def load(self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert reason(drawn_image(1, format="PNG")) == "corrupt_image"


@pytest.mark.filterwarnings("ignore")  # Pillow warns of broken tags
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_broken_files_are_never_more_than_unusable(format):
    """A hundred files with a few bytes changed: each is stored or refused with a reason, whatever Pillow raises."""
    random = np.random.default_rng(0)
    whole = encoded(noise(30, 20), format)
    refused = Tally()
    for _ in range(100):
        content = np.frombuffer(whole, np.uint8).copy()
        content[random.integers(8, min(300, len(whole)), 4)] = random.integers(0, 256, 4)
        try:
            stored(content.tobytes(), KEEP_RATIO)
        except Unusable as problem:
            refused[problem.reason] += 1
    assert refused["corrupt_image"] > 0
    assert refused.keys() <= {"corrupt_image", "too_many_pixels", "not_an_image"}
