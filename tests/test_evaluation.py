"""The retrieval exam on models whose score is known, its table, and the contact sheet."""

import hashlib
import re

import pytest
import torch
from conftest import drawn_pair
from PIL import Image

from align_train.data import find_shards, load_tokenizer
from align_train.data.images import pixels_of
from align_train.evaluation import Embeddings, Retrieval, contact_sheet, embed, table
from align_train.evaluation.contact_sheet import GAP, RIGHT, TEXT_WIDTH, TILE, WRONG
from align_train.evaluation.retrieval import excluded_keys
from align_train.records import Preprocessing, Tally


def direction(content):
    """A random direction that `content` alone fixes."""
    seed = int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
    return torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(seed)), dim=0)


def code(row):
    return row.contiguous().numpy().tobytes()


class Known(torch.nn.Module):
    """A model whose embeddings tests choose: `image` and `text` map pixels and ids of one pair to a row."""

    preprocessing = Preprocessing(resize=12, crop=10, max_tokens=16)

    def __init__(self, image, text):
        super().__init__()
        self.image, self.text = image, text
        self.modes = []

    def encode_image(self, pixels):
        self.modes.append(self.training)
        return torch.stack([self.image(row) for row in pixels])

    def encode_text(self, input_ids, attention_mask):
        rows = [ids[: int(mask.sum())] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return torch.stack([self.text(row) for row in rows])


def constant(row):
    return torch.ones(64) / 8


def by_chance(row):
    return direction(code(row))


@pytest.fixture
def perfect():
    """Knows all drawn pairs: an image and its own caption have one embedding."""
    caption_of = {}
    for number in range(40):
        pair = drawn_pair(number)
        pixels = torch.from_numpy(pixels_of(pair.image, Known.preprocessing)).permute(2, 0, 1)
        caption_of[code(pixels)] = pair.caption
    assert len(caption_of) == 40

    def text(row):
        return direction(tokenizer.decode(row[1:-1]).encode())

    tokenizer = load_tokenizer(16)
    return Known(lambda row: direction(caption_of[code(row)].encode()), text)


def exam(folder, **settings):
    return Retrieval(str(folder / "*.tar"), **settings)


def spoil(folder, number, content):
    """Write `content` over the image of a pair of a single shard."""
    (shard,) = find_shards(str(folder))
    span = shard.index().span("image", number)
    with shard.path.open("r+b") as file:
        file.seek(span.offset)
        file.write(content)


def test_perfect_embeddings_score_one(make_shards, perfect):
    exercise = exam(make_shards(40))
    score = exercise.score(exercise.embed(perfect))
    assert set(score.recall) == {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    assert set(score.recall.values()) == {1.0}
    assert score.chance["i2t_r5"] == score.chance["t2i_r5"] == pytest.approx(5 / 40)
    assert (score.pairs, score.dropped) == (40, {})


def test_constant_embeddings_score_zero(make_shards):
    exercise = exam(make_shards(20))
    score = exercise.score(exercise.embed(Known(constant, constant)))
    assert set(score.recall.values()) == {0.0}


def test_unrelated_embeddings_score_about_chance(make_shards):
    exercise = exam(make_shards(100), ks=(10, 50))
    score = exercise.score(exercise.embed(Known(by_chance, by_chance)))
    assert set(score.recall) == {"i2t_r10", "i2t_r50", "t2i_r10", "t2i_r50"}
    for name, recall in score.recall.items():
        assert abs(recall - score.chance[name]) < 0.17  # over three standard deviations


def test_the_batch_size_changes_nothing(make_shards):
    folder = make_shards(23, pairs_per_shard=9)
    model = Known(by_chance, by_chance)
    whole = exam(folder, batch_size=64).embed(model)
    for batch_size in (1, 5, 23):
        parts = exam(folder, batch_size=batch_size).embed(model)
        assert parts.keys == whole.keys == tuple(drawn_pair(number).key for number in range(23))
        assert torch.equal(parts.image, whole.image)
        assert torch.equal(parts.text, whole.text)
        assert exam(folder).score(parts) == exam(folder).score(whole)


def test_pairs_are_left_out_by_sidecar_column(make_shards, perfect):
    folder = make_shards(20, pairs_per_shard=8)
    embeddings = exam(folder, exclude={"parity": ["odd"]}).embed(perfect)
    assert embeddings.keys == tuple(drawn_pair(number).key for number in range(0, 20, 2))
    assert embeddings.image.shape == embeddings.text.shape == (10, 64)
    score = exam(folder).score(embeddings)
    assert score.pairs == 10
    assert score.recall["i2t_r1"] == 1.0
    both = exam(folder, exclude={"parity": ["odd"], "key": [drawn_pair(0).key]})
    assert both.embed(perfect).keys == embeddings.keys[1:]
    assert len(exam(folder, exclude={"parity": ["prime"]}).embed(perfect).keys) == 20


def test_an_exclusion_that_cannot_be_followed_is_an_error(make_shards):
    folder = make_shards(4)

    def never(row):
        raise AssertionError("the exclusion is to be checked before the first batch")

    model = Known(never, never)
    with pytest.raises(ValueError, match=r"exclude names the column 'colour', but .*00000\.tar has no sidecar with it"):
        exam(folder, exclude={"colour": ["red"]}).embed(model)
    with pytest.raises(ValueError, match=r"exclude of 'parity' is the text 'odd'.*\[odd\]"):
        exam(folder, exclude={"parity": "odd"}).embed(model)
    (folder / "00000.parquet").unlink()
    with pytest.raises(ValueError, match=r"exclude names the column 'parity', but .*00000\.tar has no sidecar"):
        exam(folder, exclude={"parity": ["odd"]}).embed(model)
    assert excluded_keys(find_shards(str(folder)), {}) == set()  # without an exclusion no sidecar is needed


def test_dropped_pairs_are_counted(make_shards, perfect):
    folder = make_shards(10)
    spoil(folder, 3, b"<html>")
    spoil(folder, 8, b"<html>")
    exercise = exam(folder, batch_size=4)
    score = exercise.score(exercise.embed(perfect))
    assert score.dropped == {"corrupt_image": 2}
    assert score.pairs == 8
    assert score.recall["t2i_r1"] == 1.0
    assert exam(folder, batch_size=1).embed(perfect).dropped == {"corrupt_image": 2}  # batches without a pair


def test_an_exam_without_a_usable_pair_is_an_error(make_shards, perfect):
    folder = make_shards(1)
    spoil(folder, 0, b"<html>")
    with pytest.raises(ValueError, match=r"none of its pairs could be used \(corrupt_image 1\)"):
        exam(folder).embed(perfect)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(make_shards, training):
    model = Known(constant, constant).train(training)
    embeddings = exam(make_shards(3)).embed(model)
    assert model.modes == [False]
    assert model.training is training
    assert not embeddings.image.requires_grad


def test_embeddings_come_in_float32(make_shards):
    model = Known(lambda row: constant(row).bfloat16(), lambda row: constant(row).double())
    embeddings = exam(make_shards(2)).embed(model)
    assert embeddings.image.dtype == embeddings.text.dtype == torch.float32


def test_missing_shards_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing/"):
        exam(tmp_path / "nothing").embed(Known(constant, constant))
    with pytest.raises(ValueError, match="drawn: none of its pairs"):
        embed(Known(constant, constant), [Tally(no_image=1)], name="drawn")


def scores():
    """Four pairs: the second text finds a wrong image."""
    image = torch.eye(4)
    text = torch.eye(4)
    text[1] = torch.tensor([0.0, 0.6, 0.8, 0.0])
    exercise = Retrieval("", ks=(1, 2, 5))
    return {"drawn": exercise.score(Embeddings(tuple("abcd"), image, text, Tally()))}


def test_table():
    lines = table(scores()).splitlines()
    assert len(lines) == 3
    heads = [f"{way} R@{k}" for way in ("image to text", "text to image") for k in (1, 5)]
    assert re.split("  +", lines[0].replace("pairs", " pairs")) == ["exam", "pairs", *heads]
    assert re.split("  +", lines[1]) == [
        "drawn",
        "4",
        "100.0 (25.00)",
        "100.0 (100.00)",
        "75.0 (25.00)",
        "100.0 (100.00)",
    ]
    assert len(lines[0]) == len(lines[1])  # columns are aligned
    assert "random order" in lines[2]


def test_a_cut_off_that_an_exam_has_not_is_a_dash():
    lines = table(scores(), ks=(2, 10)).splitlines()
    assert lines[1].split() == ["drawn", "4", "100.0", "(50.00)", "-", "100.0", "(50.00)", "-"]


def frame_colours(path, line, place):
    """Colours of a tile's frame, one pixel in from the corner of four: only a thick frame reaches there."""
    with Image.open(path) as sheet:
        left, top = TEXT_WIDTH + place * (TILE + GAP), GAP + line * (TILE + GAP)
        return sheet.getpixel((left, top)), sheet.getpixel((left + 3, top + 3))


def test_contact_sheet_frames_the_right_image(make_shards, perfect, tmp_path):
    folder = make_shards(12, pairs_per_shard=5)
    embeddings = exam(folder).embed(perfect)
    path = contact_sheet(embeddings, find_shards(str(folder)), tmp_path / "sheet.png", queries=3, best=4)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == (TEXT_WIDTH + 4 * (TILE + GAP) + GAP, 3 * (TILE + GAP) + GAP)
    for line in range(3):
        assert frame_colours(path, line, 0) == (RIGHT, RIGHT)  # the best image is the right one
        for place in range(1, 4):
            corner, inner = frame_colours(path, line, place)
            assert corner == WRONG
            assert inner != RIGHT
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["sheet.png"]


def test_contact_sheet_frames_it_where_it_was_found(make_shards, tmp_path):
    """The right image comes second here: texts lie nearer to the image before theirs."""
    folder = make_shards(4)
    shards = find_shards(str(folder))
    text = 0.6 * torch.eye(4) + 0.8 * torch.eye(4).roll(-1, 1)
    embeddings = Embeddings(tuple(drawn_pair(n).key for n in range(4)), torch.eye(4), text, Tally())
    path = contact_sheet(embeddings, shards, tmp_path / "sheet.png", queries=4, best=3)
    frames = [[frame_colours(path, line, place)[0] for place in range(3)] for line in range(4)]
    assert frames == [[WRONG, RIGHT, WRONG]] * 4


def test_contact_sheet_of_fewer_pairs_than_it_has_room_for(make_shards, tmp_path):
    folder = make_shards(3)
    spoil(folder, 1, b"<html>")
    embeddings = exam(folder).embed(Known(by_chance, by_chance))
    assert len(embeddings.keys) == 2
    path = contact_sheet(embeddings, find_shards(str(folder)), tmp_path / "sheet.png")
    with Image.open(path) as sheet:
        assert sheet.size == (TEXT_WIDTH + 2 * (TILE + GAP) + GAP, 2 * (TILE + GAP) + GAP)
        texts = [sheet.crop((0, GAP + n * (TILE + GAP), TEXT_WIDTH, (n + 1) * (TILE + GAP))) for n in range(2)]
    assert texts[0].tobytes() != texts[1].tobytes()  # no caption twice
