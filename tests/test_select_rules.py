"""Rules against plain Python on random metadata, the SQL that users write, and what is refused."""

import random
import re
from collections import Counter, defaultdict
from itertools import pairwise

import pyarrow as pa
import pytest
from metadata import coyo_table, judged

from align_train.corpus.select import AtMost, FarFrom, First, FrequentWords, Keep
from align_train.corpus.select.plan import Plan

TEXTS = [
    "a red cat", "A  Red cat!", "it's \"quoted\", isn't it", "İstanbul ΣΑΣ ΟΔΟΣ", "i̇stanbul σας οδος", "naïve café",
    "nai\u0308ve", "日本語 テキスト", "😀 smile 😀", "", "   ", "...", "snake_case 42 \uff14\uff12 ²", "tab\tand\nline",
    "100% '; DROP TABLE corpus; --", "straße STRASSE", "один два ОДИН", "x", "NULL", "null", "rare zyx",
    "cat cat cat cat", "ǅungla ﬁn", "a\u0000b",
]  # fmt: skip
NEAR = ["ffff0000ffff0000", "0123456789abcdef"]


def flipped(phash, bits):
    return f"{int(phash, 16) ^ sum(1 << bit for bit in bits):016x}"


def random_rows(seed, count=240):
    """Rows with many nulls, texts and hashes that many share, and hashes near those of NEAR."""
    draw = random.Random(seed)
    hashes = [flipped(draw.choice(NEAR), draw.sample(range(64), draw.randrange(9))) for _ in range(30)]
    hashes += ["FFFF0000FFFF0001", "not a hash, sixt", "zzzzzzzzzzzzzzzz", "ffff", "", "ffff0000ffff00001"]
    ids = draw.sample(range(-50, 10_000), count)
    return [
        {
            "id": ids[number],
            "text": draw.choice([None, *TEXTS, *TEXTS[:3] * 4]),
            "image_phash": draw.choice([None, None, *hashes, *hashes[:2] * 6]),
            "width": draw.choice([None, 100, 200, 201, 640]),
            "clip_similarity_vitb32": draw.choice([None, 0.1, 0.25, 0.5]),
            "num_faces": draw.choice([None, 0, 1, 2]),
        }
        for number in range(count)
    ]


# What each class of rule says of all rows, in plain Python: True, False, or None where it cannot tell.


def by_keep(rule, rows, kept):
    return [None if row["clip_similarity_vitb32"] is None else row["clip_similarity_vitb32"] >= 0.25 for row in rows]


def by_at_most(rule, rows, kept):
    counted = defaultdict(set)
    for row in rows:
        counted[row[rule.per]].add(row[rule.count])
    return [None if row[rule.per] is None else len(counted[row[rule.per]] - {None}) <= rule.at_most for row in rows]


def by_far_from(rule, rows, kept):
    def far(phash):
        if not re.fullmatch("[0-9a-fA-F]{16}", phash or ""):
            return None
        return all((int(phash, 16) ^ int(other, 16)).bit_count() > rule.distance for other in NEAR)

    return [far(row["image_phash"]) for row in rows]


def by_frequent_words(rule, rows, kept):
    def grams(text):
        words = re.findall(r"\w+", text.replace("İ", "i").replace("Σ", "σ").lower())  # noqa: RUF001
        return words + [f"{first} {second}" for first, second in pairwise(words)]

    counts = Counter(gram for row in rows if row["text"] is not None for gram in grams(row["text"]))
    frequent = set(sorted(counts, key=lambda gram: (-counts[gram], gram.encode()))[: rule.most_frequent])
    return [None if row["text"] is None else set(grams(row["text"])) <= frequent for row in rows]


def by_first(rule, rows, kept):
    groups = defaultdict(list)
    for row, good in zip(rows, kept, strict=True):
        key = tuple(row[column] for column in rule.of)
        groups[key].append((not good, row["id"]))
    first = {key: min(group)[1] for key, group in groups.items()}
    keys = [tuple(row[column] for column in rule.of) for row in rows]
    return [None if None in key else first[key] == row["id"] for key, row in zip(keys, rows, strict=True)]


REFERENCE = {
    Keep: by_keep, AtMost: by_at_most, FarFrom: by_far_from, FrequentWords: by_frequent_words, First: by_first,
}  # fmt: skip


def reference(rules, rows):
    """Ids kept, and the counts that `Plan.counts` promises."""
    verdicts, everyone = {}, [True] * len(rows)
    others = everyone
    for name, rule in sorted(rules.items(), key=lambda item: isinstance(item[1], First)):
        told = REFERENCE[type(rule)](rule, rows, others)
        passes = [rule.nulls == "keep" if verdict is None else verdict for verdict in told]
        verdicts[name] = (told, passes)
        if not isinstance(rule, First):
            others = [a and b for a, b in zip(others, passes, strict=True)]
    counts, left = [len(rows)], everyone
    for name in rules:
        told, passes = verdicts[name]
        in_order = sum(a and not b for a, b in zip(left, passes, strict=True))
        counts += [told.count(None), passes.count(False), in_order]
        left = [a and b for a, b in zip(left, passes, strict=True)]
    return [row["id"] for row, kept in zip(rows, left, strict=True) if kept], counts


def some_rules(kind, nulls, folder):
    """A rule of each class, or one of them, with bounds at which it keeps some of the random rows and drops some."""
    listed = folder / "near.txt"
    listed.write_text("\n".join(NEAR))
    rules = {
        "good": Keep("clip_similarity_vitb32 >= 0.25", nulls),
        "shared": AtMost("image_phash", "text", 6, nulls),
        "captions": AtMost("text", "image_phash", 2, nulls),
        "first": First(["image_phash", "text"], nulls),
        "far": FarFrom([str(listed)], 4, nulls=nulls),
        "words": FrequentWords(45, nulls=nulls),
        "image": First(["image_phash"], nulls),
    }
    return {name: rule for name, rule in rules.items() if kind in (None, type(rule))}


@pytest.mark.parametrize("nulls", ["keep", "drop"])
@pytest.mark.parametrize("kind", [*REFERENCE, None], ids=lambda kind: kind.__name__ if kind else "all")
@pytest.mark.parametrize("seed", [0, 1])
def test_rules_agree_with_plain_python(kind, nulls, seed, tmp_path):
    rows, rules = random_rows(seed), some_rules(kind, nulls, tmp_path)
    rules = dict(random.Random(seed).sample(list(rules.items()), len(rules)))
    tables = [coyo_table(rows[:80]), coyo_table(rows[80:90]), coyo_table(rows[90:])]
    ids, counts = judged(tmp_path, tables, rules)
    wanted, wanted_counts = reference(rules, rows)
    assert [number for part in ids for number in part] == wanted
    assert counts == wanted_counts
    assert all(0 < count < len(rows) for count in [*counts[1::3], *counts[2::3]])  # the rows put every rule to the test


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7, 15])
def test_far_from_finds_every_hash_within_the_distance_and_none_beyond(distance, tmp_path):
    draw = random.Random(distance)
    (tmp_path / "list.txt").write_text("\n".join(NEAR))
    within = [flipped(draw.choice(NEAR), draw.sample(range(64), distance)) for _ in range(300)]
    beyond = [flipped(draw.choice(NEAR), draw.sample(range(64), distance + 1)) for _ in range(300)]
    rows = [{"image_phash": phash} for phash in (*within, *map(str.upper, within), *beyond)]
    (ids,), _ = judged(tmp_path, [rows], {"far": FarFrom([str(tmp_path / "list.txt")], distance)})
    assert ids == list(range(600, 900))


def test_first_prefers_a_row_that_the_other_rules_keep(tmp_path):
    rows = [{"text": "same", "image_phash": "0" * 16, "width": width} for width in (100, 300, 300)]
    rules = {"duplicates": First(["image_phash", "text"]), "wide": "width > 200"}
    assert judged(tmp_path, [rows], rules) == ([[1]], [3, 0, 2, 2, 0, 1, 0])


def test_rows_count_once_whatever_the_number_of_files(tmp_path):
    """Ten images share a text, five in each of two files."""
    tables = [[{"id": 5 * part + n, "text": "shared"} for n in range(5)] for part in range(2)]
    assert judged(tmp_path, tables, {"shared": AtMost("image_phash", "text", 9)})[0] == [[], []]
    assert judged(tmp_path, tables, {"shared": AtMost("image_phash", "text", 10)})[0] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
    ]


def test_frequent_words_of_equal_count_are_taken_alphabetically(tmp_path):
    rows = [{"text": text} for text in ("b", "a", "c", "c", "é", "z")]
    assert judged(tmp_path, [rows], {"words": FrequentWords(3)})[0] == [[0, 1, 2, 3]]
    assert judged(tmp_path, [rows], {"words": FrequentWords(4)})[0] == [[0, 1, 2, 3, 5]]


def test_frequent_words_know_the_letters_whose_lower_case_is_disputed(tmp_path):
    rows = [{"text": text} for text in ("İZMİR", "izmir", "ΟΔΟΣ", "οδοσ", "x")]
    assert judged(tmp_path, [rows], {"words": FrequentWords(2)})[0] == [[0, 1, 2, 3]]


def test_frequent_words_need_no_unique_id(tmp_path):
    rows = [{"id": number, "text": text} for number, text in [(1, "a"), (1, "a"), (1, "b"), (None, "b"), (None, "a")]]
    assert judged(tmp_path, [rows], {"words": FrequentWords(1)})[0] == [[1, 1, None]]


@pytest.mark.parametrize("name", ["select", "order", "group", "corpus", "judged", "été", "_x", "class"])
def test_any_identifier_names_a_rule(name, tmp_path):
    (tmp_path / "list.txt").write_text(NEAR[0])
    rules = {
        name: First(["text"]), f"{name}1": AtMost("id", "text", 1), f"{name}_2": FrequentWords(1),
        f"dropped_{name}": FarFrom([str(tmp_path / "list.txt")]), f"first_{name}": AtMost("id", "text", 2),
    }  # fmt: skip
    assert judged(tmp_path, [[{"text": "a"}, {"text": "a"}, {"text": "b"}]], rules)[1][0] == 3


@pytest.mark.parametrize("name", ["a b", "1st", "a-b", "", "drop;", 'x"', "a.b"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=re.escape(f"rules.{name} is no name for a rule: use letters")):
        Plan.of({name: "width > 3"})


def test_names_that_differ_only_in_case_are_refused():
    with pytest.raises(ValueError, match=r"two of the rules words, Words .* rename one"):
        Plan.of({"words": FrequentWords(3), "Words": FrequentWords(4)})


def odd_table():
    names = ["id", "my col", 'say "hi"', "Größe", "select", "meta"]
    columns = [
        [1, 2, 3],
        [2, 4, None],
        ["a", "a", "b"],
        ["ffff0000ffff0000"] * 3,
        ["x", "x", "x"],
        [{"b": 1}, {"b": 2}, None],
    ]
    return pa.table(dict(zip(names, columns, strict=True)))


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (Keep('"my col" > 3'), [2]),
        (Keep('"my col" > 3', "keep"), [2, 3]),
        (Keep('"say ""hi""" = \'a\' -- as it says'), [1, 2]),
        (Keep("Größe IS NULL OR \"select\" = 'x'"), [1, 2, 3]),
        (Keep("meta.b = 1"), [1]),
        (AtMost("my col", 'say "hi"', 1), [3]),
        (First(["select", 'say "hi"']), [1, 3]),
        (FrequentWords(1, 'say "hi"'), [1, 2]),
        (FarFrom(["near.txt"], column="Größe"), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_columns_may_have_any_name(rule, kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "near.txt").write_text(NEAR[0])
    assert judged(tmp_path, [odd_table()], {"odd": rule})[0] == [kept]


@pytest.mark.parametrize(
    "sql",
    [
        "width >", "width > 3)", "", "*", "width > 3; DROP TABLE corpus", "width IN (SELECT 3)", "EXISTS (SELECT 1)",
        "COLUMNS(*) > 3", "count(*) > 3", "width, height", "text = 'open", "width > 3 UNION SELECT 1",
    ],
)  # fmt: skip
def test_what_is_no_single_expression_is_refused_with_the_rules_name(sql):
    with pytest.raises(ValueError, match=r"^rules\.wide is not (an|one) SQL expression.*" + re.escape(sql)):
        Plan.of({"good": "height > 3", "wide": sql})


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("no_such_function(width) > 3", "no_such_function does not exist"),
        ("text > 3", "Cannot compare values of type VARCHAR and type INTEGER"),
        ("width > 3 FROM corpus", "syntax error"),
        ("width > 3 AS wide", "syntax error"),
        ("sum(width) > 3", "cannot contain aggregates"),
        ("row_number() OVER () > 3", "cannot contain window functions"),
        ("width > ?", "Values were not provided"),
        ("width", "gives INTEGER, not true or false: make it a condition"),
        ("text", "gives VARCHAR, not true or false"),
        ("NULL", "gives .*NULL.*, not true or false"),
    ],
)
def test_what_duckdb_refuses_is_told_with_the_rules_name_and_sql(sql, reason, tmp_path):
    with pytest.raises(ValueError, match=rf"^rules\.wide, .*{re.escape(sql)}.* {reason}") as refused:
        judged(tmp_path, [[{}]], {"good": "height > 3", "wide": sql})
    assert "LINE" not in str(refused.value)


@pytest.mark.parametrize("more", [{}, {"first": First(["text"])}], ids=["alone", "with_first"])
def test_a_rule_that_fails_on_some_row_is_named_with_the_file(more, tmp_path):
    tables = [[{"id": 1, "text": "12"}], [{"id": 2, "text": "a dozen"}, {"id": 3, "text": "a dozen"}]]
    with pytest.raises(
        ValueError, match=r"^rules\.number, 'text::INT > 3', fails on .*in-1\.parquet: .*'a dozen' to INT32"
    ):
        judged(tmp_path, tables, {"good": "height > 3", "number": "text::INT > 3", **more})


def test_a_rule_for_another_type_of_column_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^rule words: .*(replace|lower)\(INTEGER"):
        judged(tmp_path, [[{}]], {"words": FrequentWords(3, "width")})


def test_first_refuses_repeated_ids_and_names_one(tmp_path):
    rows = [{"id": number, "text": "same", "image_phash": "0" * 16} for number in (4, 7, 7, 7)]
    with pytest.raises(ValueError, match=r"^rules\.once: 3 rows .* have the id 7, .*ids must be unique"):
        judged(tmp_path, [rows], {"once": First(["image_phash", "text"])})
    with pytest.raises(ValueError, match=r"^rules\.once: 1 rows .* have the id None, .*ids must be unique"):
        judged(tmp_path, [[{"id": 1, "text": "a"}, {"id": None, "text": "a"}]], {"once": First(["text"])})


def test_a_missing_column_is_told_with_rule_and_file():
    plan = Plan.of({"good": "aesthetic > 3", "pretty": AtMost("id", "aesthetic", 3)})
    with pytest.raises(
        ValueError, match=r"^a\.parquet has no column aesthetic, which the rules good, pretty need; it has id"
    ):
        plan.check_columns("a.parquet", ["id", "text"])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Keep("width > 3", "ignore"), "nulls='ignore'.*keep or drop"),
        (lambda: AtMost("id", "text", 0), "at_most=0"),
        (lambda: First([]), "names no column"),
        (lambda: FarFrom(["x"], 16), "distance=16"),
        (lambda: FarFrom([]), "names no list"),
        (lambda: FrequentWords(0), "most_frequent=0"),
        (lambda: Plan.of({"wide": True}), r"rules\.wide is True: give an SQL expression"),
        (lambda: Plan.of({"wide": {"sql": "width > 3"}}), r"rules\.wide is \{.*_target_"),
    ],
)
def test_rules_with_wrong_settings_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()
