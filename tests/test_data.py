"""Plans to batches: what is read, what is counted as unusable, and how captions become ids."""

import json
import logging
import os
import tarfile
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import drawn_image, drawn_pair
from reading import NONE, SMALL, batches, keys, order_of, pair_members, sources, write_tar

from align_train.batch import Batch
from align_train.data import BatchPlans, Collate, EvaluationBatches, PairReader, Reading, Shard, load_tokenizer
from align_train.data.captions import Captions
from align_train.data.images import pixels_of
from align_train.data.pairs import Example
from align_train.data.storage.cache import Cache
from align_train.data.tokens import tokenize
from align_train.records import Tally

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


def test_tokens_are_those_of_transformers():
    random = np.random.default_rng(0)
    words = [
        "a",
        "photo",
        "of",
        "Ünïcode",
        "汉字",
        "naïve",
        "don't",
        "re-use",
        "3.14",
        "&amp;",
        "[SEP]",
        "😀",
        "\u200b",
        "zzzqqq",
    ]
    tokenizer = load_tokenizer(12)
    for length in (1, 5, 40):
        captions = [" ".join(random.choice(words, random.integers(1, length + 1))) for _ in range(50)]
        theirs = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        ids, mask = tokenize(tokenizer, captions)
        assert torch.equal(ids, theirs["input_ids"])
        assert torch.equal(mask, theirs["attention_mask"])


@pytest.mark.parametrize("content", ["", "cat\ndog\n", '{"model": {"vocab": {}}}'])
def test_a_wrong_vocabulary_is_an_error(tmp_path, content):
    path = tmp_path / "vocab.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"vocab\.txt has \d+ tokens, but the tokenizer has \d+"):
        load_tokenizer(path=path)


# Training batches


@pytest.fixture
def broken_shard(tmp_path):
    """Twelve pairs of which number 3 is an HTML page and number 7 a truncated image."""
    images = {3: b"<html>404</html>", 7: drawn_image(7)[:-300]}
    return write_tar(tmp_path / "broken.tar", [m for n in range(12) for m in pair_members(n, images.get(n))])


def equal(one, other):
    return one.keys == other.keys and one.dropped == other.dropped and torch.equal(one.pixels, other.pixels)


def test_batches_follow_the_order(make_shards):
    read = sources(pairs=make_shards(10, 4))
    found = [key for batch in batches(read, batch_size=5, steps=4, augmentation=NONE) for key in batch.keys]
    assert found == keys(order_of(read, seed=1), 20, 5)
    assert sorted(found[:10]) == sorted(found[10:]) == [drawn_pair(n).key for n in range(10)]


def test_an_unusable_pair_is_replaced_and_counted(broken_shard, caplog):
    with caplog.at_level(logging.WARNING):
        found = list(batches(sources(pairs=broken_shard)))
    assert [len(batch) for batch in found] == [8] * 6
    dropped = sum((batch.dropped for batch in found), Tally())
    assert dropped["corrupt_image"] >= 8  # 48 pairs are four epochs with two broken ones each
    assert {"pair-00003", "pair-00007"}.isdisjoint(key for batch in found for key in batch.keys)
    assert "pair-00003 in" in caplog.text
    assert "broken.tar" in caplog.text


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches(broken_shard, world_size):
    whole = list(batches(sources(pairs=broken_shard), seed=7))
    ranks = [
        list(batches(sources(pairs=broken_shard), seed=7, rank=r, world_size=world_size)) for r in range(world_size)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        in_turn = list(chain(*zip(*(part.keys for part in parts), strict=True)))  # dealt out one by one
        usable = [key == other for key, other in zip(batch.keys, in_turn, strict=True)]
        assert sum(usable) >= 6  # what stands in for the two broken ones may be another
        pixels = torch.stack([part.pixels for part in parts], 1).flatten(0, 1)
        assert torch.equal(batch.pixels[usable], pixels[usable])
        assert sum((part.dropped for part in parts), Tally()).keys() <= {"corrupt_image"}


def test_what_stands_in_and_augmentation_change_from_epoch_to_epoch(broken_shard):
    found = list(batches(sources(pairs=broken_shard), batch_size=12, steps=8))
    assert len({tuple(sorted(batch.keys)) for batch in found}) > 1
    seen = [pair for batch in found for pair in zip(batch.keys, batch.pixels, strict=True)]
    looks = [image.numpy().tobytes() for key, image in seen if key == "pair-00001"]
    assert len(looks) == len(set(looks)) >= 8


def test_what_stands_in_is_not_of_the_batch_and_every_usable_pair_has_its_turn(tmp_path):
    """A fifth of the pairs is broken, and the others are seen once an epoch beside standing in."""
    bad = set(range(0, 200, 5))
    for shard in range(4):
        numbers = range(50 * shard, 50 * shard + 50)
        members = [member for n in numbers for member in pair_members(n, b"<html>" if n in bad else None)]
        write_tar(tmp_path / f"{shard}.tar", members)
    read = sources(pairs=tmp_path)
    found = [
        list(batches(read, batch_size=40, steps=5, rank=rank, world_size=2, shuffle_shards=4)) for rank in range(2)
    ]
    turns = set()
    for step, parts in enumerate(zip(*found, strict=True)):
        seen = [key for part in parts for key in part.keys]
        planned = [window[pair].key for window, pair in order_of(read, seed=1, shuffle_shards=4).take(200)[0]]
        assert len(set(seen)) == 40
        turns |= set(seen) & set(planned[40 * step : 40 * step + 40])
    assert turns == {drawn_pair(n).key for n in range(200) if n not in bad}


def test_a_shard_that_goes_while_it_is_read_is_counted(make_shards):
    folder = make_shards(40, 4)
    found = batches(sources(pairs=folder), batch_size=8, steps=4, shuffle_shards=10)
    next(found)
    gone = sorted(folder.glob("*.tar"))[:3]
    for path in gone:
        path.rename(path.with_suffix(".gone"))
    # those that were open can be read on
    dropped = sum((batch.dropped for batch in found), Tally())
    assert set(dropped) <= {"shard_gone"}


def test_shards_that_all_went_are_named(make_shards):
    folder = make_shards(8, 4)
    read = sources(pairs=folder)
    (plan,) = BatchPlans(order_of(read), 4, 0, 1)
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match=r"the last was shard_gone: pair-0000\d in .*0000\d\.tar"):
        PairReader(read, SMALL, NONE)[plan]


def test_only_the_first_of_each_reason_are_named(tmp_path, caplog):
    members = [m for n in range(80) for m in pair_members(n, b"<html>" if n % 4 == 0 else None)]
    with caplog.at_level(logging.WARNING):
        found = list(batches(sources(pairs=write_tar(tmp_path / "a.tar", members)), batch_size=40, steps=2))
    assert sum(batch.dropped["corrupt_image"] for batch in found) >= 20
    assert caplog.text.count("skipped corrupt_image") == 10
    assert caplog.text.count("further pairs with corrupt_image are counted, not told") == 1


def test_shards_that_hold_rubbish_alone_are_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", [member for n in range(3) for member in pair_members(n, b"<html>")])
    with pytest.raises(ValueError, match=r"stood in for unusable ones among 2, .*corrupt_image.*a\.tar.*doctor"):
        list(batches(sources(pairs=path), batch_size=2))


def test_bytes_are_counted(make_shards):
    (batch,) = batches(sources(pairs=make_shards(4)), batch_size=4, steps=1)
    pairs = [drawn_pair(number) for number in range(4)]
    assert batch.bytes == sum(len(pair.image) + len(pair.caption) for pair in pairs)


def test_kept_images_are_augmented_as_if_read_again(make_shards):
    read = sources(pairs=make_shards(10, 4))
    reading = Reading(keep_decoded=7, cache=Cache("unused"))
    again, kept = batches(read, batch_size=10), batches(read, batch_size=10, reading=reading)
    for number, (one, other) in enumerate(zip(again, kept, strict=True)):
        assert equal(one, other)
        assert (other.bytes < one.bytes) == (number > 0)


def test_metadata_does_not_disturb(make_shards):
    """The json of each pair is no caption, and unknown files beside it are passed over."""
    folder = make_shards(2)
    with tarfile.open(folder / "00000.tar") as tar:
        assert json.loads(tar.extractfile("pair-00001.json").read())["parity"] == "odd"
    (batch,) = batches(sources(pairs=folder), batch_size=2, steps=1)
    assert sorted(batch.keys) == ["pair-00000", "pair-00001"]
    captions = dict(zip(batch.keys, batch.input_ids.tolist(), strict=True))
    expected = tokenize(load_tokenizer(8), [drawn_pair(n).caption for n in range(2)])[0].tolist()
    assert [captions["pair-00000"], captions["pair-00001"]] == expected


def test_a_shard_that_shrinks_while_it_is_read_is_counted(make_shards):
    folder = make_shards(16)
    found = batches(sources(pairs=folder), batch_size=8, steps=2)
    next(found)
    tar = folder / "00000.tar"
    with tar.open("r+b") as file:
        file.truncate(tar.stat().st_size // 2)
    assert next(found).dropped["truncated_shard"] > 0


# Evaluation


def test_evaluation_of_a_stalled_shard_is_named(tmp_path, make_shards):
    pipe = tmp_path / "stalls.tar"
    os.mkfifo(pipe)
    with pytest.raises(TimeoutError, match=r"no answer from .*stalls\.tar for 0\.2 seconds"):
        EvaluationBatches([Shard(pipe)], SMALL, stall_seconds=0.2)
    os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))  # let the thread go
    tar = make_shards(4) / "00000.tar"
    found = EvaluationBatches([Shard(tar)], SMALL, stall_seconds=0.3)
    tar.unlink()
    os.mkfifo(tar)
    with pytest.raises(TimeoutError, match=r"no answer from pair-00000 in .*00000\.tar"):
        list(found)
    os.close(os.open(tar, os.O_RDWR | os.O_NONBLOCK))


def test_evaluation_takes_the_most_probable_caption(tmp_path):
    document = [("a.jpg", drawn_image(0)), ("a.txt", b"cat"), ("a.json", b'{"alt": "dog house"}')]
    shard = Shard(write_tar(tmp_path / "a.tar", document))
    (plain,) = EvaluationBatches([shard], SMALL)
    (other,) = EvaluationBatches([shard], SMALL, captions=Captions({"txt": 1, "json.alt": 2}))
    assert [int(batch.attention_mask.sum()) for batch in (plain, other)] == [3, 4]


def test_evaluation_keeps_the_order_and_counts(broken_shard):
    found = list(EvaluationBatches([Shard(broken_shard)], SMALL, batch_size=5))
    assert [len(batch) for batch in found] == [4, 4, 2]
    usable = [n for n in range(12) if n not in (3, 7)]
    assert [key for batch in found for key in batch.keys] == [drawn_pair(n).key for n in usable]
    assert [batch.dropped["corrupt_image"] for batch in found] == [1, 1, 0]
    pixels = torch.cat([batch.pixels for batch in found]).permute(0, 2, 3, 1).numpy()
    for number, image in zip(usable, pixels, strict=True):
        assert (image == pixels_of(drawn_image(number), SMALL)).all()


def test_a_batch_without_a_usable_pair_is_a_tally(broken_shard):
    found = list(EvaluationBatches([Shard(broken_shard)], SMALL, batch_size=1))
    assert len(found) == 12
    assert found[3] == Tally({"corrupt_image": 1})
    assert not isinstance(found[3], Batch)
    assert len(found[4]) == 1


def test_evaluation_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="the 1 shards hold no pair"):
        EvaluationBatches([Shard(write_tar(tmp_path / "a.tar", []))], SMALL)


def test_collate():
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (10, 10, 3), dtype=np.uint8) for _ in range(2)]
    first = Example("a", images[0], "a photo of a cat", b"8 bytes.", Tally(corrupt_image=2), 5)
    other = Example("b", images[1], "cat", b"8 others", Tally(corrupt_image=1), 7)
    batch = Collate(64)([first, Tally(no_caption=1), other])
    assert batch.keys == ("a", "b")
    assert batch.bytes == 12
    assert batch.dropped == {"corrupt_image": 3, "no_caption": 1}
    assert batch.pixels.shape == (2, 3, 10, 10)
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    assert (batch.pixels[1, 2].numpy() == images[1][..., 2]).all()
    assert batch.input_ids.shape == (2, 7)
    assert batch.attention_mask.tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]
    assert batch.lengths.tolist() == [7, 3]
