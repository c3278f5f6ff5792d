"""What is read of a source: captions among several fields, rules on read, and what is broken or missing."""

import errno
import json
import logging
import tarfile
from collections import Counter
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import drawn_image, drawn_pair
from metadata import coyo_row
from reading import batches, keys, order_of, pair_members, sources, write_tar

from align_train.corpus.images import Unusable
from align_train.corpus.select.rules import AtMost, Keep
from align_train.corpus.shards import write_shards
from align_train.data import OrderSettings, Source, read_sources
from align_train.data.captions import Captions
from align_train.data.opening import Opener
from align_train.data.storage.cache import Cache
from align_train.records import Pair, Tally

RANDOM = np.random.default_rng(0)


def opened(read, **given):
    """Keys that are kept of each shard, and what is left out of all."""
    opener = Opener(read, **{"stall_seconds": 60.0, "max_quarantined": 1.0, **given})
    found = opener.open(range(len(opener.shards)))
    dropped = sum((shard.dropped for shard in found.values()), Tally())
    return {number: [shard.index.keys[row] for row in shard.rows] for number, shard in found.items()}, dropped, opener


# Captions


def test_the_caption_is_the_text_of_the_pair():
    assert Captions().choose({"txt": b" A caf\xc3\xa9 &amp; <b>bar</b>\n"}, RANDOM, "x") == "A café & bar"
    assert Captions(clean=False).choose({"txt": b" A <b>bar</b> &amp;\n"}, RANDOM, "x") == "A <b>bar</b> &amp;"
    assert Captions(clean=False).choose({"txt": b"\xff fine"}, RANDOM, "x") == "� fine"


def test_fields_are_drawn_by_their_probabilities():
    captions = Captions({"txt": 3, "json.alt": 1.0, "long.txt": 1})
    texts = {"txt": b"short", "json": b'{"alt": "alt", "number": 7}', "long.txt": b"long"}
    random = np.random.default_rng(0)
    found = Counter(captions.choose(texts, random, "x") for _ in range(5000))
    assert found["short"] / 5000 == pytest.approx(0.6, abs=0.03)  # four standard errors
    assert found["alt"] / 5000 == pytest.approx(0.2, abs=0.03)
    assert captions.kinds == ["txt", "json", "long.txt"]
    assert Captions({"json.number": 1}).choose(texts, random, "x") == "7"


def test_another_field_stands_in_for_one_that_is_missing_or_empty():
    captions = Captions({"txt": 1000, "json.alt": 0.001})
    assert captions.choose({"txt": b" <br> ", "json": b'{"alt": "here"}'}, RANDOM, "x") == "here"
    assert captions.choose({"json": b'{"alt": "here"}'}, RANDOM, "x") == "here"


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({}, "no_caption"),
        ({"json": b'{"other": 1}'}, "no_caption"),
        ({"json": b'{"alt": null}'}, "no_caption"),
        ({"txt": b" \n"}, "empty_caption"),
        ({"json": b'{"alt": ""}'}, "empty_caption"),
        ({"json": b"{"}, "corrupt_json"),
        ({"json": b"[1]"}, "corrupt_json"),
        ({"json": b"[" * 100_000}, "corrupt_json"),
    ],
)
def test_a_pair_without_a_caption_is_unusable(texts, reason):
    with pytest.raises(Unusable, match=rf"{reason}: cat in a\.tar"):
        Captions({"txt": 1, "json.alt": 1}).choose(texts, RANDOM, "cat in a.tar")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "captions names no field"),
        ({"txt": 0}, r"captions\.txt is 0: give a probability over 0"),
        ({"txt": "often"}, r"captions\.txt is 'often'"),
        ({"json": 1}, r"captions has the field 'json': write txt, or json\.NAME"),
        ({".txt": 1}, r"captions has the field '\.txt'"),
    ],
)
def test_wrong_captions_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Captions(fields)


def test_captions_of_a_source_are_drawn_anew_each_epoch(tmp_path):
    members = [(f"{n}.{kind}", content) for n in range(4) for kind, content in
               [("jpg", drawn_image(n)), ("txt", b"cat"), ("json", b'{"alt": "dog house"}')]]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    read = sources(pairs={"shards": str(path), "captions": {"txt": 1, "json.alt": 1}})
    found = list(batches(read, batch_size=4, steps=12))
    lengths = Counter(int(row.sum()) for batch in found for row in batch.attention_mask)
    assert lengths.keys() == {3, 4}
    assert 12 < lengths[3] < 36
    again = list(batches(read, batch_size=4, steps=12))
    assert [batch.attention_mask.tolist() for batch in found] == [batch.attention_mask.tolist() for batch in again]


# Rules

SCORES = [0.1, 0.2, 0.3, 0.4, None, 0.6, 0.7, 0.8]
ROWS = [coyo_row(n, width=100 * n, watermark_score=SCORES[n - 1], text=f"word {n} of it") for n in range(1, 9)]
WIDE = {"wide": "width >= 300"}


def coyo_pairs():
    return [
        Pair(str(row["id"]), drawn_image(row["id"]), row["text"], {k: row[k] for k in row if k not in ("id", "text")})
        for row in ROWS
    ]


@pytest.fixture
def coyo_shards(tmp_path):
    write_shards(coyo_pairs(), tmp_path / "coyo", "", 3)
    return tmp_path / "coyo"


def with_rules(folder, **rules):
    return sources(pairs={"shards": str(folder), "rules": rules})


@pytest.mark.parametrize("sidecar", [True, False])
def test_rules_look_at_the_sidecar_or_at_the_json(coyo_shards, sidecar):
    if not sidecar:
        for path in coyo_shards.glob("*.parquet"):
            path.unlink()
    kept, dropped, _ = opened(with_rules(coyo_shards, **WIDE, clean="watermark_score < 0.7"))
    assert kept == {0: ["3"], 1: ["4", "6"], 2: []}
    assert dropped == {"wide": 2, "clean": 3}  # of no score nothing is known


def test_nulls_are_kept_where_the_rule_says_so(coyo_shards):
    kept, dropped, _ = opened(with_rules(coyo_shards, clean=Keep("watermark_score < 0.7", nulls="keep")))
    assert list(chain(*kept.values())) == list("123456")
    assert dropped == {"clean": 2}


def test_what_rules_keep_is_an_epoch(coyo_shards):
    read = with_rules(coyo_shards, **WIDE)
    assert sorted(keys(order_of(read), 6)) == list("345678")
    found = list(batches(read, batch_size=3, steps=4))
    assert sum((batch.dropped for batch in found), Tally()) == {"wide": 4}  # twice an epoch


def test_the_json_stands_in_for_a_column_that_the_sidecar_lacks(coyo_shards):
    for path in coyo_shards.glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns("width"), path)
    assert opened(with_rules(coyo_shards, **WIDE))[1] == {"wide": 2}


def test_a_sidecar_in_another_order_and_with_failures(coyo_shards):
    for path in coyo_shards.glob("*.parquet"):
        rows = pq.read_table(path).to_pylist()
        failed = {**rows[0], "key": "x", "width": 999, "status": "failed", "error_message": "404"}
        rows = [failed, *({**row, "status": "success", "error_message": None} for row in reversed(rows))]
        pq.write_table(pa.Table.from_pylist(rows), path)
    kept, dropped, opener = opened(with_rules(coyo_shards, **WIDE))
    assert list(chain(*kept.values())) == list("345678")
    assert dropped == {"wide": 2}
    assert not opener.quarantine.names


def test_pairs_of_which_nothing_is_known_are_counted(coyo_shards):
    path = sorted(coyo_shards.glob("*.parquet"))[0]
    pq.write_table(pq.read_table(path).slice(1), path)
    kept, dropped, _ = opened(with_rules(coyo_shards, **WIDE))
    assert dropped == {"wide": 1, "no_metadata": 1}
    assert kept[0] == ["3"]


def test_json_that_is_none_is_counted(tmp_path):
    documents = [b'{"width": 500}', b"{", b'{"height": 2}', None]
    members = [
        member
        for number, document in enumerate(documents)
        for member in [*pair_members(number), *([(f"pair-{number:05d}.json", document)] if document else [])]
    ]
    write_tar(tmp_path / "a.tar", members)
    kept, dropped, _ = opened(with_rules(tmp_path / "a.tar", **WIDE))
    assert kept == {0: ["pair-00000"]}
    assert dropped == {"corrupt_json": 1, "no_metadata": 1, "wide": 1}


def test_a_column_that_nothing_has_is_an_error(coyo_shards):
    with pytest.raises(
        ValueError, match=r"00000\.tar has no column pwatermark, which the rule clean needs: its .*width"
    ):
        opened(with_rules(coyo_shards, clean="pwatermark < 0.5"))


def test_values_of_several_types_are_named(tmp_path):
    documents = [b'{"width": 500}', b'{"width": "wide"}']
    members = [m for n, d in enumerate(documents) for m in [*pair_members(n), (f"pair-{n:05d}.json", d)]]
    write_tar(tmp_path / "a.tar", members)
    _, _, opener = opened(with_rules(tmp_path / "a.tar", **WIDE))
    assert "width in its json files is int 1 times, str 1 times" in next(iter(opener.quarantine.names.values()))


def test_numbers_beyond_64_bits_are_named(tmp_path):
    write_tar(tmp_path / "a.tar", [*pair_members(0), ("pair-00000.json", b'{"width": 99999999999999999999999}')])
    _, _, opener = opened(with_rules(tmp_path / "a.tar", **WIDE))
    assert "width in its json files is int 1 times" in next(iter(opener.quarantine.names.values()))


def test_rules_over_the_whole_corpus_are_refused(coyo_shards):
    with pytest.raises(ValueError, match=r"data\.train\.pairs\.rules: often count over the whole corpus.*prepare"):
        with_rules(coyo_shards, often=AtMost(count="image_phash", per="text", at_most=10))


def test_every_source_has_its_own_rules(coyo_shards, make_shards):
    read = sources(coyo={"shards": str(coyo_shards), "rules": WIDE}, plain=make_shards(4))
    kept, dropped, _ = opened(read)
    assert list(chain(*kept.values())) == [*"345678", *(drawn_pair(n).key for n in range(4))]
    assert dropped == {"wide": 2}


# Missing and broken


def test_pairs_that_lack_something_are_counted(tmp_path):
    image = drawn_image(0)
    twice = [("a.jpg", image), ("a.txt", b"one"), ("a.jpg", image), ("a.txt", b"two")]
    rest = [("b.txt", b"no image"), ("c.json", b"{}"), ("d.jpg", image)]
    path = write_tar(tmp_path / "a.tar", [*twice, *rest])
    kept, dropped, _ = opened(sources(pairs=path))
    assert kept == {0: ["a"]}
    assert dropped == {"duplicate_key": 1, "no_image": 2, "no_caption": 1}


def broken_corpus(make_shards, broken):
    folder = make_shards(40, 4)
    for number in range(broken):
        (folder / f"{number:05d}.tar").write_bytes(b"<html>404</html>" * 100)
    return folder


def test_a_broken_tar_is_quarantined_and_the_run_goes_on(make_shards, caplog):
    folder = broken_corpus(make_shards, 1)
    with caplog.at_level(logging.WARNING):
        kept, _, opener = opened(sources(pairs=folder), max_quarantined=0.1)
    assert list(chain(*kept.values())) == [drawn_pair(n).key for n in range(4, 40)]
    (name,) = opener.quarantine.names
    assert name == str(folder / "00000.tar")
    assert "is not a tar file" in opener.quarantine.names[name]
    assert f"quarantined {name}" in caplog.text
    order = order_of(sources(pairs=folder))
    assert sorted(keys(order, 72, 9)) == sorted([drawn_pair(n).key for n in range(4, 40)] * 2)


def test_too_many_broken_tars_stop_with_the_list(make_shards):
    folder = broken_corpus(make_shards, 2)
    message = r"2 of 10 shards are broken, more than data\.reading\.max_quarantined=0\.1 of them"
    with pytest.raises(ValueError, match=message) as stopped:
        opened(sources(pairs=folder), max_quarantined=0.1)
    assert all(f"{number:05d}.tar: " in str(stopped.value) for number in range(2))


def test_a_shard_that_went_away_is_quarantined(make_shards):
    folder = make_shards(8, 4)
    read = sources(pairs=folder)
    (folder / "00001.tar").unlink()
    kept, _, opener = opened(read)
    assert list(kept) == [0]
    assert "No such file" in opener.quarantine.names[str(folder / "00001.tar")]


def test_a_fault_of_the_machine_is_no_shards_fault(make_shards, monkeypatch):
    def full(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("align_train.data.storage.shards.read_index", full)
    with pytest.raises(OSError, match=r"00000\.tar cannot be read now .*Too many open files.*resume=RUN"):
        opened(sources(pairs=make_shards(4)))


def test_a_size_that_is_none_breaks_a_tar_there(make_shards):
    folder = make_shards(8)
    tar = folder / "00000.tar"
    with tarfile.open(tar) as file:
        offset = file.getmembers()[6].offset
    with tar.open("r+b") as file:
        file.seek(offset + 130)
        file.write(b"9")
    kept, dropped, opener = opened(sources(pairs=folder))
    assert kept == {0: ["pair-00000", "pair-00001"]}
    assert dropped == {"truncated_shard": 6}
    assert str(tar) in opener.quarantine.names


def test_a_shard_that_was_mended_is_no_longer_in_quarantine(make_shards):
    read = sources(pairs=make_shards(4))
    opener = Opener(read)
    opener.quarantine.names[str(read[0].shards[0])] = "as a checkpoint has it"
    opener.open([0])
    assert not opener.quarantine.names


def test_a_truncated_tar_is_used_to_its_break_and_named(make_shards):
    folder = make_shards(8, 8)
    tar = folder / "00000.tar"
    with tar.open("r+b") as file:
        file.truncate(tar.stat().st_size // 2)
    kept, dropped, opener = opened(sources(pairs=folder))
    assert 0 < len(kept[0]) < 8
    assert dropped == {"truncated_shard": 8 - len(kept[0])}
    assert f"it ends too early: {8 - len(kept[0])} pairs are lost" in opener.quarantine.names[str(tar)]


# Settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shards": None}, r"data\.train\.pairs\.shards is None"),
        ({"repeat": 0}, r"data\.train\.pairs\.repeat is 0"),
        ({"repeat": True}, r"data\.train\.pairs\.repeat is True"),
        ({"weight": 0}, r"data\.train\.pairs\.weight is 0; it must be a number over 0, or null"),
        ({"weight": "heavy"}, r"data\.train\.pairs\.weight is 'heavy'"),
        ({"shard": "x"}, r"data\.train\.pairs has the unknown key 'shard'; known are shards, repeat, weight"),
    ],
)
def test_wrong_settings_are_named(make_shards, given, message):
    with pytest.raises(ValueError, match=message):
        sources(pairs={"shards": str(make_shards(1)), **given})


def test_sources_are_named_and_weighted_alike(make_shards):
    folder = str(make_shards(1))
    with pytest.raises(ValueError, match="names no source"):
        read_sources({}, Cache("unused"))
    with pytest.raises(ValueError, match="give b a weight too, or none any"):
        sources(a={"shards": folder, "weight": 1}, b={"shards": folder})


def test_defaults_are_written_once(make_shards):
    (source,) = sources(pairs=make_shards(1))
    assert source == Source("pairs", source.shards)
    assert OrderSettings() == OrderSettings(0, 16)
    assert json.dumps(dict(source.captions.fields)) == '{"txt": 1.0}'
