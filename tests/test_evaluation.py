"""Embedding in any split, embeddings kept and used again, the retrieval exam, and the contact sheet."""

import errno
import hashlib
import json
import logging
import os
import threading

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from conftest import drawn_image, drawn_pair, on_ranks, small_text
from PIL import Image
from test_models import small

from align_train.data import AlignInputs, find_shards, load_tokenizer
from align_train.data.images import pixels_of
from align_train.data.testsets import CaptionedImages, HubDataset, ShardPairs
from align_train.data.testsets.files import ImageFiles
from align_train.data.testsets.shard_images import ShardImages
from align_train.distributed import on_all_ranks, on_rank_zero
from align_train.evaluation import EmbeddingFolder, Encoder, Encoding, Retrieval, contact_sheet, reading
from align_train.evaluation import embedded as storing
from align_train.evaluation.contact_sheet import GAP, RIGHT, TEXT_WIDTH, TILE, WRONG
from align_train.evaluation.embedded import Embedded
from align_train.evaluation.matched import Matched, embed_captioned
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
    return Known(lambda row: direction(caption_of.get(code(row), "").encode()), text)


def encoder_of(model, folder=None, **settings):
    return Encoder(model, AlignInputs(model.preprocessing), torch.device("cpu"), Encoding(**settings), folder)


def real():
    """A small ALIGN that takes every word."""
    return small(text=small_text(2) | {"vocabulary": 30522}).eval()


def exam(folder, **settings):
    return Retrieval(ShardPairs(str(folder / "*.tar"), name="drawn"), **settings)


def score(exercise, model, **settings):
    return exercise.take(encoder_of(model, **settings)).score


def recalls(found):
    return {name: value.value for name, value in found.values.items() if "_r" in name and "rank" not in name}


def spoil(folder, number, content):
    """Write `content` over the image of a pair of a single shard."""
    (shard,) = find_shards(str(folder))
    span = shard.index().span("image", number)
    with shard.path.open("r+b") as file:
        file.seek(span.offset)
        file.write(content)


def test_perfect_embeddings_score_one(make_shards, perfect):
    found = score(exam(make_shards(40)), perfect)
    assert set(recalls(found)) == {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    assert set(recalls(found).values()) == {1.0}
    assert found.values["i2t_median_rank"].value == found.values["t2i_median_rank"].value == 1
    assert found.values["i2t_r5"].chance == found.values["t2i_r5"].chance == pytest.approx(5 / 40)
    assert (found.kind, found.counts, found.dropped) == ("retrieval", {"images": 40, "captions": 40}, {})


def test_constant_embeddings_score_zero(make_shards):
    found = score(exam(make_shards(20)), Known(constant, constant))
    assert set(recalls(found).values()) == {0.0}
    assert found.values["i2t_median_rank"].value == 20


def test_unrelated_embeddings_score_about_chance(make_shards):
    found = score(exam(make_shards(100), ks=(10, 50)), Known(by_chance, by_chance))
    assert set(recalls(found)) == {"i2t_r10", "i2t_r50", "t2i_r10", "t2i_r50"}
    for name in recalls(found):
        value = found.values[name]
        assert abs(value.value - value.chance) < 0.17  # over three standard deviations
        assert value.low < value.value < value.high


def test_a_score_says_what_it_is_of(make_shards, perfect):
    facts = score(exam(make_shards(8), benchmark="coco"), perfect).facts
    assert (facts["data"], facts["benchmark"]) == ("drawn", "coco")
    assert len(facts["data_sha256"]) == len(facts["split_sha256"]) == 64
    assert (
        score(exam(make_shards(8, name="again", pairs_per_shard=3)), perfect).facts["data_sha256"]
        == facts["data_sha256"]
    )
    fewer = score(exam(make_shards(7, name="fewer")), perfect).facts
    assert fewer["data_sha256"] != facts["data_sha256"]
    assert fewer["split_sha256"] != facts["split_sha256"]


def embedded(folder, model, **settings):
    made = encoder_of(model, **settings)
    test = ShardPairs(str(folder / "*.tar")).open()
    return made.images(test.images, "drawn"), made.texts(test.captions, "drawn")


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 5, "threads": 3}, {"batch_size": 23}])
def test_batches_and_threads_change_nothing(make_shards, settings):
    folder, model = make_shards(23, pairs_per_shard=9), real()
    whole, parts = embedded(folder, model), embedded(folder, model, **settings)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.rows, other.rows, atol=1e-6, rtol=0)
    assert torch.equal(whole[0].hashes, parts[0].hashes)
    exact = embedded(folder, Known(by_chance, by_chance), **settings)
    for one, other in zip(embedded(folder, Known(by_chance, by_chance)), exact, strict=True):
        assert torch.equal(one.rows, other.rows)  # in order, each in its own row


def test_threads_that_finish_in_any_order(make_shards, monkeypatch):
    """Small parts and many threads: whoever reads first, rows are those of their images."""
    folder, model = make_shards(30), Known(by_chance, by_chance)
    expected, _ = embedded(folder, model)
    monkeypatch.setattr(reading, "TOGETHER", 2)
    found, _ = embedded(folder, model, threads=5, batch_size=7)
    assert torch.equal(found.rows, expected.rows)


def one_rank(number, folder, shards):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=number, world_size=3)
    found = {}
    for batch_size in (1, 2, 64):
        torch.manual_seed(0)
        images, texts = embedded(shards, real(), batch_size=batch_size)
        found[batch_size] = (images.rows, images.hashes, texts.rows, dict(images.lost))
    scored = score(exam(shards, skip_unusable=True), Known(by_chance, by_chance))
    found["score"] = (recalls(scored), scored.counts, dict(scored.dropped))
    try:
        score(exam(shards), Known(by_chance, by_chance))
    except ValueError as error:
        found["refused"] = str(error)

    def failing(self, place):
        if number == 1 and place == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return read(self, place)

    read, ShardImages.read = ShardImages.read, failing
    for batch_size in (1, 64):
        try:
            embedded(shards, Known(by_chance, by_chance), batch_size=batch_size)
        except OSError as error:
            found[f"full, {batch_size} a batch"] = str(error)
    ShardImages.read = read

    def only_here():
        if number == 1:
            raise ValueError("a disk of this rank alone")

    for name, work in (("all", on_all_ranks), ("zero", on_rank_zero)):
        try:
            found[name] = work(only_here) if name == "all" else work(lambda: number + 7)
        except ValueError as error:
            found[name] = str(error)
    torch.save(found, folder / f"{number}.pt")
    dist.destroy_process_group()


def test_three_ranks_embed_each_once_and_in_order(make_shards, tmp_path):
    shards = make_shards(11, pairs_per_shard=11)
    spoil(shards, 7, b"<html>")
    on_ranks(3, one_rank, tmp_path, shards)
    found = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(3)]
    torch.manual_seed(0)
    images, texts = embedded(shards, real())
    for batch_size in (1, 2, 64):
        rows, hashes, text, lost = found[0][batch_size]
        torch.testing.assert_close(rows, images.rows, atol=1e-6, rtol=0)
        torch.testing.assert_close(text, texts.rows, atol=1e-6, rtol=0)
        assert torch.equal(hashes, images.hashes)
        for other in found:
            assert other[batch_size][3] == lost == {7: "corrupt_image"}
            assert other is found[0] or not len(other[batch_size][0])
    alone = score(exam(shards, skip_unusable=True), Known(by_chance, by_chance))
    for other in found:
        assert other["score"] == (recalls(alone), alone.counts, {"corrupt_image": 1})
        assert other["refused"].startswith("1 of the 11 images of drawn cannot be used")
        assert other["all"] == "a disk of this rank alone"
        for name in ("full, 1 a batch", "full, 64 a batch"):
            assert other[name].startswith("pair-00004 in ")
            assert "No space left on device" in other[name]
        assert other["zero"] == 7


def test_images_that_cannot_be_used_are_named(make_shards, perfect):
    folder = make_shards(10)
    spoil(folder, 3, b"<html>")
    spoil(folder, 8, b"<html>")
    told = r"2 of the 10 images of drawn cannot be used \(corrupt_image 2\).*pair-00003, pair-00008.*skip_unusable=true"
    with pytest.raises(ValueError, match=told):
        score(exam(folder), perfect)
    found = score(exam(folder, skip_unusable=True), perfect, batch_size=1)  # batches without an image
    assert found.dropped == {"corrupt_image": 2}
    assert found.counts == {"images": 8, "captions": 8}
    assert found.values["t2i_r1"].value == 1.0


def test_an_exam_without_a_usable_image_is_an_error(make_shards, perfect):
    folder = make_shards(1)
    spoil(folder, 0, b"<html>")
    with pytest.raises(ValueError, match=r"1 of the 1 images of drawn cannot be used \(corrupt_image 1\)"):
        score(exam(folder, skip_unusable=True), perfect)


def refusing(monkeypatch, *numbers, error):
    """The shards' images of these numbers cannot be read."""
    read = ShardImages.read

    def one(self, number):
        if number in numbers:
            raise error
        return read(self, number)

    monkeypatch.setattr(ShardImages, "read", one)


def test_images_that_cannot_be_read_are_lost_and_told_of_by_name(make_shards, perfect, monkeypatch, caplog):
    refusing(monkeypatch, 2, 7, error=OSError(errno.EIO, "Input/output error"))
    folder = make_shards(10)
    told = r"2 of the 10 images of drawn cannot be used \(unreadable 2\).*pair-00002, pair-00007.*skip_unusable=true"
    with pytest.raises(ValueError, match=told):
        score(exam(folder), perfect)
    shown = [each.message for each in caplog.records if each.levelno == logging.WARNING]
    assert len(shown) == 2
    assert shown[0].startswith("pair-00002 in ")
    assert shown[0].endswith("cannot be read: [Errno 5] Input/output error")
    found = score(exam(folder, skip_unusable=True), perfect)
    assert (found.dropped, found.counts["images"]) == ({"unreadable": 2}, 8)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE])
def test_what_the_machine_lacks_is_no_fault_of_an_image(make_shards, perfect, monkeypatch, number):
    refusing(monkeypatch, 2, error=OSError(number, "cannot"))
    with pytest.raises(OSError, match=r"pair-00002 in .*cannot be read: \[Errno \d+\] cannot. Free what this machine"):
        score(exam(make_shards(4), skip_unusable=True), perfect)


def test_a_disk_that_gives_up_is_no_fault_of_an_image(make_shards, perfect, monkeypatch):
    refusing(monkeypatch, 2, error=TimeoutError(errno.ETIMEDOUT, "Connection timed out"))
    with pytest.raises(TimeoutError, match="Connection timed out"):
        score(exam(make_shards(4), skip_unusable=True), perfect)


def test_a_disk_that_does_not_answer_is_named(make_shards, perfect, monkeypatch):
    folder = make_shards(4)
    ended = threading.Event()
    monkeypatch.setattr(reading, "_read", lambda *given: ended.wait(30))
    with pytest.raises(TimeoutError, match=r"no answer for 0.1 seconds near .*pair-00000.*check its disk or network"):
        score(exam(folder), perfect, stall_seconds=0.1)
    ended.set()


def test_pairs_are_left_out_by_sidecar_column(make_shards, perfect):
    folder = make_shards(20, pairs_per_shard=8)
    found = score(exam(folder, exclude={"parity": ["odd"]}), perfect)
    assert found.counts == {"images": 10, "captions": 10}
    assert found.values["i2t_r5"].chance == 0.5
    assert found.facts["excluded"] == {"parity": ["odd"]}
    assert (found.facts["left_out"], found.dropped) == ({"excluded": 10}, {})
    whole = score(exam(folder), perfect).facts
    assert whole["left_out"] == {}
    assert found.facts["split_sha256"] != whole["split_sha256"]
    spoil(make_shards(20, pairs_per_shard=20, name="spoilt"), 1, b"<html>")
    spoilt = score(exam(folder.with_name("spoilt"), exclude={"parity": ["odd"]}, skip_unusable=True), perfect)
    assert (spoilt.facts["left_out"], spoilt.dropped) == ({"excluded": 9}, {"corrupt_image": 1})
    both = exam(folder, exclude={"parity": ["odd"], "key": [drawn_pair(0).key]})
    assert score(both, perfect).counts["images"] == 9
    with pytest.raises(ValueError, match="no image of drawn is left: exclude takes all of them"):
        score(exam(folder, exclude={"parity": ["odd", "even"]}), perfect)
    with pytest.raises(ValueError, match="exclude names parity, but only tar shards have sidecars"):
        score(Retrieval(CaptionedImages, exclude={"parity": ["odd"]}), perfect)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(make_shards, training):
    model = Known(constant, constant).train(training)
    image, text = embedded(make_shards(3), model)
    assert set(model.modes) == {False}
    assert model.training is training
    assert not image.rows.requires_grad
    assert not text.rows.requires_grad


def test_embeddings_come_in_float32(make_shards):
    image, text = embedded(
        make_shards(2), Known(lambda row: constant(row).bfloat16(), lambda row: constant(row).double())
    )
    assert image.rows.dtype == text.rows.dtype == torch.float32


def test_low_precision_is_asked_for(make_shards):
    folder, model = make_shards(6), real()
    (exact, _), (low, _) = embedded(folder, model), embedded(folder, model, precision="bf16")
    assert 0 < (exact.rows - low.rows).abs().max() < 0.1
    for wrong, told in (
        ({"precision": "fp8"}, "encoding.precision is 'fp8': choose float32 or bf16"),
        ({"batch_size": 0}, "encoding.batch_size is 0"),
        ({"threads": "two"}, "encoding.threads is 'two'"),
    ):
        with pytest.raises(ValueError, match=told):
            Encoding(**wrong)


def counted(monkeypatch):
    """Names of what was embedded, as it happens."""
    seen = []
    for name in ("_images", "_texts"):
        plain = getattr(Encoder, name)
        monkeypatch.setattr(Encoder, name, lambda *given, plain=plain, name=name: (seen.append(name), plain(*given))[1])
    return seen


def test_what_was_embedded_once_is_not_embedded_again(make_shards, perfect, monkeypatch):
    folder, seen = make_shards(12), counted(monkeypatch)
    made = encoder_of(perfect)
    first = exam(folder).take(made).score
    without = exam(folder, exclude={"parity": ["odd"]}).take(made).score
    assert seen == ["_images", "_texts"]
    assert (first.counts["images"], without.counts["images"]) == (12, 6)
    exam(make_shards(12, name="others", first=3)).take(made)  # the same keys or not: other files
    assert len(seen) == 4


def test_embeddings_are_kept_and_used_again(make_shards, perfect, monkeypatch, tmp_path):
    shards, kept = make_shards(12), EmbeddingFolder(tmp_path / "kept", {"weights_sha256": "a"})
    spoil(shards, 5, b"<html>")
    exercise = exam(shards, skip_unusable=True)
    before = exercise.take(encoder_of(perfect, kept)).score
    files = sorted(kept.path.iterdir())
    assert [file.name.rpartition("-")[0] for file in files] == ["drawn-images", "drawn-texts"]
    table = pq.read_table(files[0])
    assert table.column_names == ["key", "embedding", "hash", "lost"]
    assert table["key"].to_pylist() == [drawn_pair(number).key for number in range(12)]
    assert table["lost"].to_pylist() == [None] * 5 + ["corrupt_image"] + [None] * 6
    assert json.loads(table.schema.metadata[b"align_train"]) == {"weights_sha256": "a"}
    assert pq.read_table(files[1])["key"].to_pylist()[0] == drawn_pair(0).caption
    seen = counted(monkeypatch)
    assert exercise.take(encoder_of(perfect, kept)).score == before
    assert seen == []
    exercise.take(encoder_of(perfect, EmbeddingFolder(kept.path, {"weights_sha256": "b"})))
    assert seen == ["_images", "_texts"]
    files[0].write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"drawn-images-.*\.parquet holds no embeddings of align_train"):
        exercise.take(encoder_of(perfect, kept))


def test_kept_embeddings_come_back_bit_by_bit_from_many_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(storing, "TOGETHER", 4)
    folder, rows = EmbeddingFolder(tmp_path, {}), torch.randn(11, 5)
    for hashes, lost in ((torch.arange(11) - 5, {3: "unreadable", 10: "corrupt_image"}), (storing.NO_HASHES, {})):
        folder.write(tmp_path / "some.parquet", [str(number) for number in range(11)], Embedded(rows, hashes, lost))
        assert pq.read_metadata(tmp_path / "some.parquet").num_row_groups == 3
        found = folder.read(tmp_path / "some.parquet")
        assert torch.equal(found.rows, rows)
        assert torch.equal(found.hashes, hashes)
        assert found.lost == lost


def test_nothing_is_copied_where_all_images_count(make_shards, perfect):
    made, data = encoder_of(perfect), ShardPairs(str(make_shards(6)))
    images, texts = made.images(data.open().images, "one"), made.texts(data.open().captions, "one")
    matched = embed_captioned(data, made, skip_unusable=False)
    assert matched.image.data_ptr() == images.rows.data_ptr()
    assert matched.text.data_ptr() == texts.rows.data_ptr()


def photos(folder, *numbers):
    folder.mkdir(exist_ok=True)
    for place, number in enumerate(numbers):
        (folder / f"{place}.jpg").write_bytes(drawn_image(number))
        os.utime(folder / f"{place}.jpg", ns=(0, 0))


def test_one_relative_path_in_two_working_directories_is_two_images(perfect, monkeypatch, tmp_path):
    kept, seen = EmbeddingFolder(tmp_path / "kept", {}), counted(monkeypatch)
    images, hashes = ImageFiles(("a",), ("0.jpg",)), []
    for number, name in enumerate(("one", "two")):
        photos(tmp_path / name, number)
        monkeypatch.chdir(tmp_path / name)
        hashes.append(encoder_of(perfect, kept).images(images, "photos").hashes)
    assert not torch.equal(*hashes)
    assert seen == ["_images", "_images"]
    assert torch.equal(encoder_of(perfect, kept).images(images, "photos").hashes, hashes[1])
    assert len(seen) == 2


def test_a_file_that_changed_under_its_name_is_embedded_anew(perfect, monkeypatch, tmp_path):
    kept, seen = EmbeddingFolder(tmp_path / "kept", {}), counted(monkeypatch)
    photos(tmp_path / "set", 0, 1)
    images, made = (
        ImageFiles(("a", "b"), (str(tmp_path / "set/0.jpg"), str(tmp_path / "set/1.jpg"))),
        encoder_of(perfect, kept),
    )
    before = made.images(images, "photos")
    assert made.images(images, "photos") is before
    (tmp_path / "set/1.jpg").write_bytes(drawn_image(2))
    after = made.images(images, "photos")
    assert torch.equal(after.rows[0], before.rows[0])
    assert not torch.equal(after.rows[1], before.rows[1])
    assert len(seen) == len(list(kept.path.iterdir())) == 2


def test_an_image_that_could_not_be_read_is_read_another_time(perfect, tmp_path):
    photos(tmp_path / "set", 0, 1)
    kept, paths = EmbeddingFolder(tmp_path / "kept", {}), [str(tmp_path / "set" / f"{number}.jpg") for number in (0, 1)]
    images = ImageFiles(("a", "b"), tuple(paths))
    os.rename(paths[1], tmp_path / "away.jpg")
    assert encoder_of(perfect, kept).images(images, "photos").lost == {1: "unreadable"}
    assert not kept.path.exists()
    os.rename(tmp_path / "away.jpg", paths[1])
    assert encoder_of(perfect, kept).images(images, "photos").lost == {}
    assert len(list(kept.path.iterdir())) == 1


def test_two_splits_of_a_dataset_are_embedded_each(perfect, tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image  # slow, and ranks import this module

    features = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee"])})
    rows = [{"image": [drawn_image(first), drawn_image(first + 1)], "label": [0, 1]} for first in (0, 2)]
    splits = {name: Dataset.from_dict(each, features) for name, each in zip(("train", "test"), rows, strict=True)}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    made = encoder_of(perfect, EmbeddingFolder(tmp_path / "kept", {}))
    train, test = (HubDataset(str(tmp_path / "saved"), split).open() for split in splits)
    found = [made.images(each.images, "dataset").hashes for each in (train, test)]
    assert not torch.equal(*found)


def frame_colours(path, line, place):
    """Colours of a tile's frame, one pixel in from the corner of four: only a thick frame reaches there."""
    with Image.open(path) as sheet:
        left, top = TEXT_WIDTH + place * (TILE + GAP), GAP + line * (TILE + GAP)
        return sheet.getpixel((left, top)), sheet.getpixel((left + 3, top + 3))


def test_contact_sheet_frames_the_right_image(make_shards, perfect, tmp_path):
    draw = exam(make_shards(12, pairs_per_shard=5)).take(encoder_of(perfect)).draw
    path = draw(tmp_path / "sheet.png", queries=3, best=4)
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
    test, rows = ShardPairs(str(make_shards(4))).open(), torch.arange(4)
    text = 0.6 * torch.eye(4) + 0.8 * torch.eye(4).roll(-1, 1)
    matched = Matched(test, rows, rows, torch.eye(4), text, rows, Tally(), {})
    path = contact_sheet(matched, tmp_path / "sheet.png", queries=4, best=3)
    frames = [[frame_colours(path, line, place)[0] for place in range(3)] for line in range(4)]
    assert frames == [[WRONG, RIGHT, WRONG]] * 4


def test_contact_sheet_of_fewer_pairs_than_it_has_room_for(make_shards, tmp_path):
    folder = make_shards(3)
    spoil(folder, 1, b"<html>")
    path = exam(folder, skip_unusable=True).take(encoder_of(Known(by_chance, by_chance))).draw(tmp_path / "sheet.png")
    with Image.open(path) as sheet:
        assert sheet.size == (TEXT_WIDTH + 2 * (TILE + GAP) + GAP, 2 * (TILE + GAP) + GAP)
        texts = [sheet.crop((0, GAP + n * (TILE + GAP), TEXT_WIDTH, (n + 1) * (TILE + GAP))) for n in range(2)]
    assert texts[0].tobytes() != texts[1].tobytes()  # no caption twice
