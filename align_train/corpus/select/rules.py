"""Rules: which rows of the metadata are kept. A rule is an SQL expression over the columns, or a count over the corpus.

SQL is DuckDB's, https://duckdb.org/docs/current/sql/introduction; the Spark engine has sqlglot translate it. Whatever
a rule cannot tell, because a value is missing (null), is kept or dropped as its `nulls` says, and counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

import pyarrow as pa

from align_train.corpus.phash import read_phash_list

Nulls = Literal["keep", "drop"]


@dataclass(frozen=True)
class Compiled:
    """A rule as SQL.

    Attributes:
        keep: boolean over a row and what is joined to it; null where the rule cannot tell.
        columns: columns of the metadata that the rule reads.
        join: brings the rule's table to each row; every row finds one match at most.
        tables: name to query over the view `corpus`, in the order they are made.
        given: tables that do not come from the corpus.
        unique_ids: a table of `tables` whose column `_repeated` is true where an id came twice.
        whole_corpus: True if the rule depends on other rows too, so that it cannot judge a stream as it comes.
    """

    keep: str
    columns: frozenset[str]
    join: str = ""
    tables: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, pa.Table] = field(default_factory=dict)
    unique_ids: str | None = None
    whole_corpus: bool = False


class Rule(Protocol):
    """What a rule offers; a new kind of rule is a new class."""

    @property
    def nulls(self) -> Nulls:
        """What becomes of rows that it cannot judge."""

    def described(self) -> str:
        """One line for the report."""

    def compiled(self, name: str, others: str, joins: str) -> Compiled:
        """The rule as SQL; `others` is what all rules but those of class First keep, over `corpus` with `joins`."""


@dataclass(frozen=True)
class Keep:
    """Rows for which an SQL expression over the columns is true: `least(width, height) > 200`.

    Args:
        sql: a boolean expression of DuckDB.
        nulls: `drop` or `keep` rows for which it is null.
    """

    sql: str
    nulls: Nulls = "drop"

    def __post_init__(self) -> None:
        _check_nulls(self.nulls)

    def described(self) -> str:
        """The expression."""
        return " ".join(self.sql.split())

    def compiled(self, name: str, others: str, joins: str) -> Compiled:
        """As Rule says."""
        return Compiled(f"({self.sql}\n)", columns_of(name, self.sql))  # on its own line: it may end in a comment


@dataclass(frozen=True)
class AtMost:
    """Rows whose value of `per` comes with at most `at_most` different values of `count`, in the whole corpus.

    `count=image_phash per=text at_most=10` drops every row of a text that more than ten images share.

    Args:
        count: column whose different values are counted.
        per: column by which they are counted.
        at_most: how many are allowed.
        nulls: `drop` or `keep` rows without a value of `per`.
    """

    count: str
    per: str
    at_most: int
    nulls: Nulls = "keep"

    def __post_init__(self) -> None:
        _check_nulls(self.nulls)
        if self.at_most < 1:
            raise ValueError(f"a rule has at_most={self.at_most}, which keeps nothing: give a number of at least 1")

    def described(self) -> str:
        """In words."""
        return f"at most {self.at_most:,} different {self.count} per {self.per}, counted over the corpus"

    def compiled(self, name: str, others: str, joins: str) -> Compiled:
        """As Rule says."""
        table, per, count = f"dropped_{name}", quoted(self.per), quoted(self.count)
        # A hash may take two values for one, which only lets more values through to the exact count.
        query = f"""
            SELECT {per} AS _key FROM corpus
            WHERE {per} IS NOT NULL AND hash({per}) IN (
                SELECT hash({per}) FROM corpus WHERE {per} IS NOT NULL
                GROUP BY hash({per}) HAVING count(*) > {self.at_most})
            GROUP BY {per} HAVING count(DISTINCT {count}) > {self.at_most}"""
        return Compiled(
            keep=f"CASE WHEN {per} IS NOT NULL THEN {table}._key IS NULL END",
            columns=frozenset({self.count, self.per}),
            join=f"LEFT JOIN {table} ON {per} = {table}._key",
            tables={table: query},
            whole_corpus=True,
        )


@dataclass(frozen=True)
class First:
    """One row of those that agree in the columns `of`: the lowest id among those that the rules of other classes keep.

    Args:
        of: columns that make two rows the same, such as [image_phash, text].
        nulls: `drop` or `keep` rows with a null in one of them.
    """

    of: Sequence[str]
    nulls: Nulls = "keep"

    def __post_init__(self) -> None:
        _check_nulls(self.nulls)
        if not self.of:
            raise ValueError("a rule of class First names no column in `of`: give at least one")

    def described(self) -> str:
        """In words."""
        return f"the first row of each ({', '.join(self.of)})"

    def compiled(self, name: str, others: str, joins: str) -> Compiled:
        """As Rule says."""
        table, columns = f"first_{name}", [quoted(column) for column in self.of]
        keys = ", ".join(columns)
        known = " AND ".join(f"{column} IS NOT NULL" for column in columns)
        named = ", ".join(f"{column} AS _key{number}" for number, column in enumerate(columns))
        query = f"""
            SELECT {named}, coalesce(min(CASE WHEN {others} THEN id END), min(id)) AS _kept,
                count(*) > count(DISTINCT id) AS _repeated
            FROM corpus {joins}
            WHERE {known} AND hash({keys}) IN (
                SELECT hash({keys}) FROM corpus WHERE {known} GROUP BY hash({keys}) HAVING count(*) > 1)
            GROUP BY {keys} HAVING count(*) > 1"""
        same = " AND ".join(f"{column} = {table}._key{number}" for number, column in enumerate(columns))
        return Compiled(
            keep=f"CASE WHEN {known} THEN {table}._kept IS NULL OR {table}._kept = id END",
            columns=frozenset({"id", *self.of}),
            join=f"LEFT JOIN {table} ON {same}",
            tables={table: query},
            unique_ids=table,
            whole_corpus=True,
        )


@dataclass(frozen=True)
class FarFrom:
    """Rows whose image differs from every image of the given lists, by Hamming distance of 64-bit perceptual hashes.

    Lists are written by `align-train prepare source=phash_list`. Two hashes within a distance d agree in at least one
    of d + 1 groups of hexadecimal digits, so only hashes that share a group are compared.

    Args:
        lists: files of hashes.
        distance: bits of 64; rows at this distance or nearer are dropped. 0 to 15.
        column: the column of hashes, 16 hexadecimal digits each.
        nulls: `drop` or `keep` rows without a hash of 16 digits.
    """

    lists: Sequence[str]
    distance: int = 4
    column: str = "image_phash"
    nulls: Nulls = "keep"

    def __post_init__(self) -> None:
        _check_nulls(self.nulls)
        if not 0 <= self.distance <= 15:
            raise ValueError(f"a rule of class FarFrom has distance={self.distance}: give 0 to 15 bits of 64")
        if not self.lists:
            raise ValueError(
                "a rule of class FarFrom names no list: write one with align-train prepare source=phash_list"
            )

    def described(self) -> str:
        """In words."""
        return f"{self.column} more than {self.distance} bits from every hash of {', '.join(map(str, self.lists))}"

    def compiled(self, name: str, others: str, joins: str) -> Compiled:
        """As Rule says."""
        table, given, column = f"near_{name}", f"given_{name}", quoted(self.column)
        hashes = sorted({phash for path in self.lists for phash in read_phash_list(path)})
        edges = [16 * group // (self.distance + 1) for group in range(self.distance + 2)]
        groups = list(pairwise(edges))
        rows = [(number, phash[a:b], phash) for phash in hashes for number, (a, b) in enumerate(groups)]
        near = " UNION ALL ".join(
            f"SELECT {column} AS _key FROM corpus JOIN {given} ON _group = {number} "
            f"AND lower(substr({column}, {a + 1}, {b - a})) = _digits "
            f"WHERE length({column}) = 16 AND phash_distance({column}, _phash) <= {self.distance}"
            for number, (a, b) in enumerate(groups)
        )
        names = ("_group", "_digits", "_phash")
        columns = zip(*rows, strict=True) if rows else ([], [], [])
        types = (pa.int32(), pa.string(), pa.string())
        return Compiled(
            keep=f"CASE WHEN length({column}) = 16 AND phash_distance({column}, {column}) = 0 "
            f"THEN {table}._key IS NULL END",
            columns=frozenset({self.column}),
            join=f"LEFT JOIN {table} ON {column} = {table}._key",
            tables={table: f"SELECT DISTINCT _key FROM ({near})"},
            given={given: pa.table([pa.array(c, t) for c, t in zip(columns, types, strict=True)], names=names)},
        )


@dataclass(frozen=True)
class FrequentWords:
    """Rows whose text has only words and pairs of neighbouring words that are frequent in the corpus itself.

    ALIGN paper, section 3.1: texts with a token outside the 100 million most frequent unigrams and bigrams of the raw
    corpus are dropped. A word is a run of letters, digits and underscores, in lower case; of equally frequent ones at
    the end of the list the alphabetically first are in.

    Args:
        most_frequent: how many words and pairs count as frequent.
        text: the column of texts.
        nulls: `drop` or `keep` rows without a text.
    """

    most_frequent: int = 100_000_000
    text: str = "text"
    nulls: Nulls = "drop"

    def __post_init__(self) -> None:
        _check_nulls(self.nulls)
        if self.most_frequent < 1:
            raise ValueError(f"a rule has most_frequent={self.most_frequent}, which keeps nothing: give at least 1")

    def described(self) -> str:
        """In words."""
        return f"{self.text} of the {self.most_frequent:,} most frequent words and pairs of words of the corpus"

    def compiled(self, name: str, others: str, joins: str) -> Compiled:
        """As Rule says."""
        frequent, rare, text = f"frequent_{name}", f"rare_{name}", quoted(self.text)
        words = f"(SELECT {text} AS _key, words_of({text}) AS _words FROM corpus)"  # a column: computed once a row
        grams = f"(SELECT _key, unnest(grams_of(_words)) AS _gram FROM {words} AS words)"
        tables = {
            frequent: f"""
                SELECT _gram FROM {grams} AS grams
                GROUP BY _gram ORDER BY count(*) DESC, _gram LIMIT {self.most_frequent}""",
            rare: f"""
                SELECT DISTINCT _key FROM {grams} AS grams
                WHERE NOT EXISTS (SELECT 1 FROM {frequent} WHERE {frequent}._gram = grams._gram)""",
        }
        return Compiled(
            keep=f"CASE WHEN {text} IS NOT NULL THEN {rare}._key IS NULL END",
            columns=frozenset({self.text}),
            join=f"LEFT JOIN {rare} ON {text} = {rare}._key",
            tables=tables,
            whole_corpus=True,
        )


def as_rules(rules: Mapping[str, Any]) -> dict[str, Rule]:
    """Rules by name, where bare text stands for `Keep(text)`."""
    for name, rule in rules.items():
        if not str(name).isidentifier():
            raise ValueError(f"rules.{name} is no name for a rule: use letters, digits and underscores")
        if not isinstance(rule, str) and not hasattr(rule, "compiled"):
            raise ValueError(f"rules.{name} is {rule!r}: give an SQL expression, or a _target_ such as AtMost")
    if len({name.lower() for name in rules}) < len(rules):  # SQL does not tell upper from lower case
        raise ValueError(
            f"two of the rules {', '.join(rules)} have the same name but for upper and lower case: rename one"
        )
    return {name: Keep(rule) if isinstance(rule, str) else rule for name, rule in rules.items()}


def quoted(column: str) -> str:
    """The name of a column as SQL, whatever letters it has."""
    return '"' + column.replace('"', '""') + '"'


def columns_of(name: str, sql: str) -> frozenset[str]:
    """The columns that an expression reads; ValueError, naming the rule, where it is no single SQL expression."""
    import sqlglot
    from sqlglot import expressions

    try:
        parsed = sqlglot.parse_one(f"SELECT {sql}", dialect="duckdb")
    except sqlglot.errors.SqlglotError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"rules.{name} is not an SQL expression ({reason}): {sql}") from error
    alone = isinstance(parsed, expressions.Select) and len(list(parsed.find_all(expressions.Query))) == 1
    if not alone or len(parsed.expressions) != 1 or parsed.find(expressions.Star):
        raise ValueError(f"rules.{name} is not one SQL expression over the columns: {sql}")
    return frozenset(column.parts[0].name for column in parsed.find_all(expressions.Column))  # `a.b`: a field of a


def _check_nulls(nulls: str) -> None:
    if nulls not in ("keep", "drop"):
        raise ValueError(f"a rule has nulls={nulls!r}; it says what becomes of missing values: keep or drop")
