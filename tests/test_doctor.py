"""`align-train doctor`: what it finds in corpora that are counted by hand, what it calls wrong, and its picture.

What it finds of the machine: test_doctor_machine.py.
"""

import itertools
import json
import logging
import socket
import sys
import threading
import time
from dataclasses import replace

import fsspec
import numpy as np
import pytest
from conftest import drawn_image, drawn_pair
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from reading import FULL, NONE, SMALL, pair_members, sources, write_tar

import align_train.cli.doctor.verb
from align_train.cli import main
from align_train.data import inspection, read_sources
from align_train.data.inspection.pairs import Sampling, Spread, caption_facts, pair_facts, read_pairs, repeats
from align_train.data.inspection.sample_sheet import (
    COLUMNS,
    GAP,
    HEIGHT,
    SIDE,
    Tile,
    caption_font,
    corner,
    sample_sheet,
    wrapped,
)
from align_train.data.inspection.sources import Epoch, SpeedFacts, check_shards, open_shards
from align_train.data.inspection.verdict import epochs
from align_train.data.storage.cache import Cache
from align_train.data.storage.shards import Shard
from align_train.shipped import config_folder

pytest_plugins = ["bad_server"]
HTML = b"<html>404</html>"


def raising(error):
    def fail(*_):
        raise error

    return fail


def looked(source, **settings):
    """A source's shards opened and its pairs read, all of them."""
    opened, facts = open_shards(source, {}, 100, 1, 20)
    return opened, facts, read_pairs(source, opened, Sampling(SMALL, NONE, **settings))


@pytest.fixture
def broken(tmp_path):
    """Eleven pairs: 3 is a web page, 7 cut off, 5's caption empty, 8 has none, 2 equals 1, the key of 1 comes again."""
    images = {3: HTML, 7: drawn_image(7)[:-300], 2: drawn_image(1)}
    members = [member for number in range(10) for member in pair_members(number, images.get(number))]
    texts = {"pair-00005.txt": b" ", "pair-00002.txt": drawn_pair(1).caption.encode()}
    members = [(name, texts.get(name, content)) for name, content in members if name != "pair-00008.txt"]
    return write_tar(tmp_path / "broken.tar", [*members, *pair_members(1)])


# Shards


def test_every_local_shard_is_looked_for(make_shards):
    folder = make_shards(6, 2)
    (source,) = sources(pairs=folder)
    (folder / "00001.tar").unlink()
    (folder / "00002.tar").write_bytes(b"")
    facts = check_shards(source.shards * 2, 1, 20)
    size = (folder / "00000.tar").stat().st_size
    assert (facts.count, facts.asked, facts.bytes) == (3, 3, size)
    assert facts.broken == {f"{folder}/00001.tar": "missing", f"{folder}/00002.tar": "empty"}


@pytest.fixture
def remote(make_shards):
    """Ten shards of two pairs in memory, as if far away, of which number 9 is missing."""
    folder, store = make_shards(20, 2), fsspec.filesystem("memory")
    for number in range(9):
        store.pipe(f"/far/{number:05d}.tar", (folder / f"{number:05d}.tar").read_bytes())
    yield "memory://far/{00000..00009}.tar"
    store.rm("/far", recursive=True)


def test_some_remote_shards_are_asked_for_and_only_the_opened_ones_fetched(remote, tmp_path):
    (source,) = read_sources({"pairs": {"shards": remote}}, Cache(tmp_path / "cache"))
    facts = check_shards(source.shards, 4, 20)
    assert (facts.count, facts.asked) == (10, 4)  # 0, 3, 6, 9
    assert facts.broken == {"memory://far/00009.tar": "missing"}
    assert not (tmp_path / "cache").exists()
    opened, _ = open_shards(source, facts.broken, 3, 1, 20)
    assert len([*(tmp_path / "cache").glob("*.tar")]) == len(opened) == 3


def test_shards_that_do_not_answer_are_waited_for_once(make_shards, monkeypatch):
    (source,) = sources(pairs=make_shards(8, 1))
    free = threading.Event()
    monkeypatch.setattr(inspection.sources, "_size", lambda address: free.wait(20) if "00000" not in address else 5)
    start = time.monotonic()
    facts = check_shards(source.shards, 1, 0.4)
    assert time.monotonic() - start < 2  # and not seven times 0.4
    free.set()
    assert list(facts.broken.values()) == ["no answer for 0.4 seconds"] * 7
    assert facts.bytes == 5


def test_a_server_that_does_not_answer_is_not_a_missing_file(tmp_path):
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        address = f"http://user:secret@127.0.0.1:{bound.getsockname()[1]}/a.tar"
        ((name, why),) = check_shards([Shard(address, Cache(tmp_path))], 1, 20).broken.items()
    assert "secret" not in name + why
    assert "Cannot connect" in why


def test_a_file_that_a_server_does_not_have_is_missing(bad_server, tmp_path):
    address = f"{bad_server.url}/404"
    facts = check_shards([Shard(address, Cache(tmp_path))], 1, 20)
    assert facts.broken == {address: "missing"}


def test_what_is_in_the_shards_is_counted(broken):
    (source,) = sources(pairs=broken)
    _, facts, _ = looked(replace(source, shards=source.shards * 3))
    assert (facts.shards, facts.usable, facts.epoch_pairs, facts.estimated) == (1, 9, 27, False)
    assert facts.lost == {"duplicate_key": 1, "no_caption": 1}
    assert facts.per_shard == {"mean": 9, "min": 9, "max": 9}
    assert (facts.broken, facts.filtered, facts.error) == ({}, {}, "")


def test_a_sample_of_shards_stands_for_all(tmp_path):
    for number, count in enumerate((1, 3, 5, 7)):
        write_tar(tmp_path / f"{number}.tar", [m for n in range(count) for m in pair_members(10 * number + n)])
    (source,) = sources(pairs={"shards": str(tmp_path), "repeat": 2})
    opened, facts = open_shards(source, {}, 3, 1, 20)
    counts = [1 + 2 * int(source.shards[number].path.stem) for number in opened]
    assert len(set(counts)) == 3
    assert facts.per_shard == {"mean": sum(counts) / 3, "min": min(counts), "max": max(counts)}
    assert (facts.epoch_pairs, facts.estimated) == (round(8 * sum(counts) / 3), True)
    assert open_shards(source, {}, 3, 1, 20)[1] == facts
    assert len({tuple(open_shards(source, {}, 3, seed, 20)[0]) for seed in range(8)}) > 1


def test_broken_shards_are_named_and_not_opened(make_shards, tmp_path):
    folder = make_shards(9, 3)
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: whole.index(b"pair-00005.txt")])
    (folder / "00002.tar").write_bytes(HTML * 100)
    (source,) = sources(pairs=folder)
    missing = {f"{folder}/00000.tar": "missing"}
    opened, facts = open_shards(source, missing, 100, 1, 20)
    assert list(opened) == [1]
    assert facts.broken[f"{folder}/00000.tar"] == "missing"
    assert "ends too early" in facts.broken[f"{folder}/00001.tar"]
    assert "is not a tar file" in facts.broken[f"{folder}/00002.tar"]
    assert (facts.usable, facts.lost) == (2, {"truncated_shard": 1})
    assert facts.per_shard == {"mean": 2 / 3, "min": 0, "max": 2}


def test_rules_are_no_loss(make_shards):
    (source,) = sources(pairs={"shards": str(make_shards(8)), "rules": {"odd": "parity = 'odd'"}})
    _, facts, seen = looked(source)
    assert (facts.usable, facts.filtered, facts.lost) == (4, {"odd": 4}, {})
    assert {int(pair.key[-1]) % 2 for pair in seen} == {1}


def test_a_rule_that_training_would_stop_with(make_shards):
    (source,) = sources(pairs={"shards": str(make_shards(8)), "rules": {"wide": "width > 3"}})
    _, facts, seen = looked(source)
    assert "width" in facts.error
    assert (facts.usable, seen) == (0, [])


def test_what_training_would_stop_with_is_told_once(doctor, make_shards):
    make_shards(8)
    rule = "data.train.pairs.rules={wide: 'width > 3'}"
    code, _, result = doctor("data=shards", "data.train.pairs.shards=shards", rule)
    assert (code, len(result["wrong"])) == (1, 1)
    assert result["wrong"][0].startswith("pairs: shards/00000.tar")


# Pairs


def test_pairs_are_read_as_training_reads_them(broken):
    (source,) = sources(pairs=broken)
    _, _, seen = looked(source)
    facts = pair_facts(seen)
    assert (facts.read, facts.usable) == (9, 6)
    assert facts.unusable == {"corrupt_image": 2, "empty_caption": 1}
    assert facts.examples["empty_caption"] == f"pair-00005 in {broken}"
    assert facts.examples["corrupt_image"] == next(pair.where for pair in seen if pair.lost == "corrupt_image")
    assert facts.formats == {"jpg": 6}
    assert (facts.width, facts.height) == (Spread(40, 40, 40, 40, 40), Spread(30, 30, 30, 30, 30))
    sizes = sorted(len(drawn_image(number)) for number in (0, 1, 1, 4, 6, 9))
    assert facts.bytes == Spread(sizes[0], sizes[2], sizes[5], sizes[5], sum(sizes) / 6)


def test_the_size_is_that_of_the_file(tmp_path):
    images = [drawn_image(0, (300, 200)), drawn_image(1, (50, 70), "PNG"), drawn_image(2, (90, 80), "WEBP")]
    path = write_tar(tmp_path / "a.tar", [m for n, image in enumerate(images) for m in pair_members(n, image)])
    _, _, seen = looked(sources(pairs=path)[0])
    sizes = {pair.key: (pair.format, pair.width, pair.height) for pair in seen}
    assert sizes == {"pair-00000": ("jpg", 300, 200), "pair-00001": ("png", 50, 70), "pair-00002": ("webp", 90, 80)}


def test_a_sample_of_pairs_is_drawn_by_the_seed(make_shards):
    (source,) = sources(pairs=make_shards(30, 7))
    draws = [looked(source, pairs=10, keep=4, seed=seed)[2] for seed in (1, 1, 2)]
    keys = [[pair.key for pair in seen] for seen in draws]
    assert keys[0] == keys[1] != keys[2]
    assert len(set(keys[0])) == 10
    assert [pair.pixels is not None for pair in draws[0]] == [True] * 4 + [False] * 6
    assert draws[0][0].pixels.shape == (10, 10, 3)


def test_pixels_are_augmented(make_shards):
    (source,) = sources(pairs=make_shards(4))
    opened, _ = open_shards(source, {}, 1, 1, 20)
    plain, changed = (read_pairs(source, opened, Sampling(SMALL, how)) for how in (NONE, FULL))
    assert not any(np.array_equal(one.pixels, other.pixels) for one, other in zip(plain, changed, strict=True))


def test_a_pair_that_is_not_read_in_time_is_named(make_shards, monkeypatch):
    free = threading.Event()
    monkeypatch.setattr(inspection.pairs, "training_pixels", lambda *_: free.wait(20))
    (source,) = sources(pairs=make_shards(1))
    with pytest.raises(TimeoutError, match=r"pair-00000 in .*00000\.tar was not read in 0.1 seconds: check its disk"):
        looked(source, stall_seconds=0.1)
    free.set()


def test_repeats_are_counted(broken, tmp_path):
    other = write_tar(tmp_path / "other.tar", [m for n in (0, 20) for m in pair_members(n)])
    (source,) = sources(pairs={"shards": [str(broken), str(other)]})
    opened, _, seen = looked(source)
    found = repeats(opened, seen)
    assert {name: facts["count"] for name, facts in found.items()} == {"keys": 1, "captions": 2, "images": 2}
    assert found["keys"]["example"] == "pair-00000"  # of both shards; pair-00001 comes twice in one
    assert found["captions"]["example"] in {drawn_pair(0).caption, drawn_pair(1).caption}
    assert found["images"]["example"].startswith("pair-0000")


def test_nothing_repeated_has_no_example(make_shards):
    opened, _, seen = looked(sources(pairs=make_shards(6, 3))[0])
    assert all(facts == {"count": 0, "example": ""} for facts in repeats(opened, seen).values())


# Captions


def test_lengths_of_captions():
    captions = ["cat", "cat", "a photo of a cat", "a photo of a cat and of a dog and of a house", "猫"]
    facts = caption_facts(captions, max_tokens=7)
    assert facts.words == Spread(1, 1, 13, 13, 21 / 5)
    assert facts.word_bins == {"1": 3, "2": 0, "3": 0, "4": 0, "5-6": 1, "7-8": 0, "9-12": 0, "13-16": 1}
    assert facts.tokens == Spread(3, 3, 15, 15, (3 + 3 + 7 + 15 + 3) / 5)
    assert facts.token_bins == {"3": 3, "4": 0, "5-6": 0, "7-8": 1, "9-12": 0, "13-16": 1}
    assert facts.cut == 1 / 5
    assert facts.unknown == 1 / 21
    assert facts.frequent == {"cat": 2}


def test_at_most_ten_captions_are_frequent():
    captions = [f"caption {number}" for number in range(14) for _ in range(number)]
    assert list(caption_facts(captions, 16).frequent.items()) == [(f"caption {n}", n) for n in range(13, 3, -1)]


def test_no_captions_are_no_error():
    facts = caption_facts([], 16)
    assert (facts.words.max, facts.word_bins, facts.cut, facts.unknown, facts.frequent) == (0, {}, 0, 0, {})


# Time


def test_epochs_are_of_all_sources_or_of_each_weight(make_shards):
    shards = str(make_shards(4))
    alike = sources(one=shards, two=shards)
    assert epochs(alike, [4, 6]) == {"one+two": Epoch(10, 1.0)}
    weighted = sources(one={"shards": shards, "weight": 3}, two={"shards": shards, "weight": 1})
    sequences = epochs(weighted, [30, 6])
    assert sequences == {"one": Epoch(30, 0.75), "two": Epoch(6, 0.25)}
    assert SpeedFacts(20.0, 5, 8).epoch_seconds(sequences) == {"one": 2.0, "two": 1.2}


# The picture


def test_the_sheet_shows_the_images(tmp_path):
    colours = [(5 * number, 255 - 5 * number, 100) for number in range(45)]
    sides = (10, 500)
    tiles = [
        Tile(np.full((sides[n % 2],) * 2 + (3,), c, np.uint8), f"caption {n}", "x/y") for n, c in enumerate(colours)
    ]
    with Image.open(sample_sheet(tiles, tmp_path / "sheet.png")) as sheet:
        assert sheet.size == (GAP + 8 * (SIDE + GAP), GAP + 5 * (HEIGHT + GAP))
        for number, colour in enumerate(colours[:40]):
            left, top = corner(number)
            image = np.asarray(sheet.crop((left, top, left + SIDE, top + SIDE)))
            assert (image == colour).all()
            below = np.asarray(sheet.crop((left, top + SIDE, left + SIDE, top + HEIGHT)))
            assert (below < 128).any()  # the caption


def test_a_sheet_of_few_is_small(tmp_path):
    tile = Tile(np.zeros((4, 4, 3), np.uint8), "", "")
    for count, rows in ((0, 1), (1, 1), (COLUMNS + 1, 2)):
        with Image.open(sample_sheet([tile] * count, tmp_path / "sheet.png")) as sheet:
            assert sheet.height == GAP + rows * (HEIGHT + GAP)


def test_long_captions_are_cut():
    font = caption_font(13)
    assert wrapped("a cat", font, SIDE, 4) == ["a cat"]
    for text in ("a cat sits on a mat " * 20, "x" * 300, "cat " + "https://example.com/" * 9):
        lines = wrapped(text, font, SIDE, 4)
        assert len(lines) == 4
        assert lines[-1].endswith("…")
        assert all(font.getlength(line) <= SIDE for line in lines)
        assert "".join(lines)[:-1].replace(" ", "") == text.replace(" ", "")[: len("".join(lines).replace(" ", "")) - 1]


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("Кошка on a قطة", "Кошка on a قطة"),
        ("café ☕", "café ☕"),
        ("一只猫 cat", "[3 CJK] cat"),
        ("कुत्ता", "[6 DEVANAGARI]"),
        ("한국", "[2 HANGUL]"),
    ],
)
def test_letters_that_the_font_lacks_are_counted(text, drawn):
    assert wrapped(text, caption_font(13), SIDE, 4) == [drawn]


# The command


@pytest.fixture
def doctor(tmp_path, monkeypatch, capsys):
    """Runs the command; its exit code, what it said, and doctor.json."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["align-train"])
    small = ["data.batch_size=4", "data.workers=0", "model=align_tiny", "machine=false", "hydra.run.dir=out"]

    def run(*words):
        GlobalHydra.instance().clear()
        code = 0
        try:
            main(["doctor", *small, *words])
        except SystemExit as stop:
            code = stop.code
        finally:
            GlobalHydra.instance().clear()
        result = tmp_path / "out" / "doctor.json"
        said = capsys.readouterr()
        return code, said.out + said.err, json.loads(result.read_text()) if result.exists() else {}

    return run


def test_a_sound_source(doctor, make_shards, tmp_path):
    make_shards(24, 8)
    code, said, result = doctor("data=shards", "data.train.pairs.shards=shards/*.tar", "data.train.pairs.repeat=2")
    assert code == 0
    assert (result["wrong"], result["notes"]) == ([], [])
    facts = result["sources"]["pairs"]
    assert facts["shards"]["count"] == facts["opened"]["shards"] == 3
    assert (facts["opened"]["usable"], facts["opened"]["epoch_pairs"]) == (24, 48)
    assert facts["pairs"]["usable"] == 24
    assert facts["captions"]["words"] == {"min": 3, "median": 3, "p95": 3, "max": 3, "mean": 3.0}
    assert facts["repeats"]["keys"]["count"] == 0
    speed = result["speed"]
    assert speed["images_per_second"] > 0
    assert (speed["batches"], speed["batch_size"]) == (5, 4)  # all six but the first
    assert speed["epoch_seconds"]["pairs"] == pytest.approx(48 / speed["images_per_second"])
    assert len(result["contact_sheet"]) == 24
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.height == GAP + 3 * (HEIGHT + GAP)
    assert "an epoch has 48 pairs" in said
    assert "24 read, 24 usable (100.0%)" in said
    assert "doctor.json and contact_sheet.png in" in said


def test_the_same_seed_gives_the_same_findings(doctor, make_shards):
    make_shards(40, 4)
    words = ["data=shards", "data.train.pairs.shards=shards", "opened=3", "pairs=5"]
    results = [doctor(*words, f"seed={seed}")[2] for seed in (1, 1, 2)]
    findings = [{name: value for name, value in result.items() if name != "speed"} for result in results]
    assert findings[0] == findings[1] != findings[2]
    assert findings[0]["sources"]["pairs"]["opened"]["estimated"]
    assert findings[0]["sources"]["pairs"]["pairs"]["read"] == 5


def test_a_broken_source(doctor, broken):
    code, said, result = doctor("data=shards", f"data.train.pairs.shards={broken}", "data.batch_size=9")
    assert code == 1
    (wrong,) = result["wrong"]
    reasons = "corrupt_image 2, duplicate_key 1, empty_caption 1, no_caption 1"
    assert wrong.startswith(f"pairs: 45.5% of the pairs cannot be used ({reasons} of those looked at)")
    assert f"wrong: {wrong}" in said
    assert "corrupt_image: 2, such as pair-0000" in said
    assert "skipped" not in said
    assert logging.getLogger("align_train.data").level == logging.NOTSET  # as before
    code, _, result = doctor(
        "data=shards", f"data.train.pairs.shards={broken}", "data.batch_size=9", "data.reading.max_quarantined=0.5"
    )
    assert (code, result["wrong"]) == (0, [])


def test_broken_shards_stop_training(doctor, make_shards, tmp_path):
    folder = make_shards(12, 3)
    (folder / "00004.tar").symlink_to(tmp_path / "nowhere.tar")  # a glob finds it
    (folder / "00003.tar").write_bytes(HTML * 100)
    words = ["data=shards", f"data.train.pairs.shards={folder}/*.tar"]
    code, said, result = doctor(*words)
    assert code == 1
    (wrong,) = result["wrong"]
    assert wrong.startswith("2 of 5 shards are broken, more than data.reading.max_quarantined=0.1 of them; the first")
    assert f"{folder}/00004.tar: missing. Write or fetch them again" in wrong
    assert f"  {folder}/00004.tar: missing\n" in said
    assert f"{folder}/00003.tar is not a tar file" in said
    assert doctor(*words, "data.reading.max_quarantined=0.4")[0] == 0


def test_a_sample_tells_of_broken_shards(doctor, make_shards):
    folder = make_shards(20, 2)
    for number in range(5):
        (folder / f"{number:05d}.tar").write_bytes(HTML * 100)
    words = ["data=shards", f"data.train.pairs.shards={folder}", "opened=8", "data.batch_size=2"]
    code, _, result = doctor(*words)
    known = len(result["sources"]["pairs"]["opened"]["broken"])
    assert 0 < known < 5
    assert code == 1
    told = f"about {round(known / 8 * 10)} (by the sample) of 10 shards are broken"
    assert result["wrong"][0].startswith(told)
    code, _, result = doctor(*words, f"data.reading.max_quarantined={known / 10}")  # those that are known might be
    assert code == 1
    assert result["wrong"][0].startswith(told)


def test_a_list_with_a_missing_shard_is_one_line(doctor, make_shards):
    make_shards(6, 3)
    code, said, result = doctor("data=shards", "data.train.pairs.shards='shards/{00000..00002}.tar'")
    assert (code, result) == (1, {})
    assert "1 of its 3 names have no file, the first is shards/00002.tar" in said
    assert "Traceback (" not in said


def test_rules_that_leave_nothing(doctor, make_shards):
    make_shards(6, 3)
    rule = "data.train.pairs.rules={other: \"parity = 'x'\"}"
    code, said, result = doctor("data=shards", "data.train.pairs.shards=shards", rule)
    assert code == 1
    assert "no pair to train with (left out by rules: other 6; unusable: none)" in result["wrong"][0]
    assert result["speed"] is None
    assert "not measured" in said


def test_a_batch_larger_than_an_epoch(doctor, make_shards):
    make_shards(6, 3)
    words = ["data=shards", "data.train.pairs.shards=shards", "data.batch_size=7"]
    code, _, result = doctor(*words)
    assert code == 1
    (wrong,) = result["wrong"]
    assert wrong.startswith("pairs: an epoch has 6 pairs, and a batch takes 7 of them: make data.batch_size")
    assert result["speed"]["batch_size"] == 6


def test_two_sources_with_weights(doctor, make_shards):
    make_shards(8, 4, "one")
    make_shards(16, 4, "two", first=8)
    code, said, result = doctor(
        "data=shards", "data.train.pairs.shards=one", "data.train.pairs.weight=1",
        "+data.train.more={shards: two, weight: 3}", "data.batch_size=8",
    )  # fmt: skip
    assert code == 0
    speed = result["speed"]
    assert set(speed["epoch_seconds"]) == set(result["sources"]) == {"pairs", "more"}
    assert speed["epoch_seconds"]["pairs"] == pytest.approx(8 * 4 / speed["images_per_second"])
    assert [tile["source"] for tile in result["contact_sheet"][:4]] == ["pairs", "more"] * 2
    assert "an epoch of more (16 pairs)" in said


def test_captions_that_the_vocabulary_does_not_know(doctor, tmp_path):
    members = [
        (f"{n}.{kind}", value) for n in range(8) for kind, value in (("jpg", drawn_image(n)), ("txt", "猫 龘".encode()))
    ]
    write_tar(tmp_path / "a.tar", members)
    code, said, result = doctor("data=shards", "data.train.pairs.shards=a.tar")
    assert code == 0
    assert "of the tokens are [UNK]" in result["notes"][0]
    assert "note: pairs:" in said
    assert result["contact_sheet"][0]["caption"] == "猫 龘"


def test_the_stream_has_no_shards(doctor):
    code, said, _ = doctor("data=coyo_stream")
    assert code == 1
    assert "data=coyo_stream has no shards to look at: try its rules with `align-train prepare source=coyo" in said


def test_rubbish_alone(doctor, tmp_path):
    write_tar(tmp_path / "a.tar", [member for n in range(8) for member in pair_members(n, HTML)])
    code, said, result = doctor("data=shards", "data.train.pairs.shards=a.tar")
    assert code == 1
    lost, stopped = result["wrong"]
    assert lost.startswith("pairs: 100.0% of the pairs cannot be used (corrupt_image 8 of those looked at)")
    assert "stood in for unusable ones among 4" in stopped
    assert "median" not in said
    assert result["contact_sheet"] == []


def test_what_a_worker_process_stops_at_is_one_line(doctor, make_shards, monkeypatch):
    make_shards(8, 4)
    told = (
        "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent ...):\nOSError: a disk: gone\n"
    )
    monkeypatch.setattr(align_train.cli.doctor.verb, "measure_speed", raising(OSError(told)))
    code, _, result = doctor("data=shards", "data.train.pairs.shards=shards")
    assert (code, result["wrong"], result["speed"]) == (1, ["reading stopped: a disk: gone"], None)


@pytest.mark.parametrize("use", ["threads", "processes"])
def test_the_speed_is_that_of_the_configured_workers(doctor, make_shards, use):
    make_shards(24, 8)
    words = ["data=shards", "data.train.pairs.shards=shards", "data.workers=1", f"data.reading.use={use}"]
    code, _, result = doctor(*words)
    assert (code, result["speed"]["batches"]) == (0, 5)  # all six but the first of the worker


def test_batches_are_smaller_where_reading_takes_long(doctor, make_shards, monkeypatch):
    make_shards(40, 8)
    clock = itertools.count()
    monkeypatch.setattr(align_train.cli.doctor.verb.time, "perf_counter", lambda: float(next(clock)))
    _, _, result = doctor("data=shards", "data.train.pairs.shards=shards", "seconds=0.2")
    assert result["speed"]["batch_size"] == 2  # 40 pairs a second, 0.2 seconds, 4 batches
    assert result["speed"]["batches"] == 3


def test_a_shard_that_stalls_is_named(doctor, make_shards, monkeypatch):
    make_shards(6, 3)
    free = threading.Event()
    index = Shard.index
    monkeypatch.setattr(
        Shard, "index", lambda shard, *kinds: ("00001" in str(shard) and free.wait(20)) or index(shard, *kinds)
    )
    code, _, result = doctor("data=shards", "data.train.pairs.shards=shards", "data.reading.stall_seconds=0.3")
    free.set()
    assert code == 1
    assert result["wrong"][0].startswith("pairs: shards/00001.tar did not answer for 0.3 seconds: check its disk")
    assert result["sources"]["pairs"]["opened"]["usable"] == 3
    assert result["speed"] is None


@pytest.mark.parametrize("name", ["sample", "shards", "coyo_stream"])
def test_the_data_settings_are_those_of_training(name):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        given = ["seed=3", "folder=x", f"data={name}"]
        ours, training = (OmegaConf.to_container(compose(verb, given)) for verb in ("doctor", "train"))
    assert (ours["data"], ours["model"]) == (training["data"], training["model"])
    assert ours.get("rules") == training.get("rules")


@pytest.mark.parametrize("word", ["opened=0", "pairs=x", "seconds=0"])
def test_numbers_out_of_range_are_named(doctor, make_shards, word):
    make_shards(6, 3)
    code, said, _ = doctor("data=shards", "data.train.pairs.shards=shards", word)
    assert code == 1
    assert f"{word.partition('=')[0]} is " in said
