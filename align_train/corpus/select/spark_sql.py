"""DuckDB's SQL as Spark's, with the same results. sqlglot knows the words; what it leaves different is settled here."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import sqlglot
from sqlglot import expressions as sql

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Kinds of numbers: whole and decimal, 32 bit and 64 bit floating point; None is what a NULL has.
Kind = Literal["exact", "float", "double", "unknown"]

_LETTER = r"\p{L}\p{N}_"
_HASH = r"\A[0-9a-fA-F](_?[0-9a-fA-F]){0,15}\z"  # DuckDB reads 12_34 as it reads 1234

_COMPARISONS = (sql.EQ, sql.NEQ, sql.GT, sql.GTE, sql.LT, sql.LTE, sql.Between, sql.In)
_ARITHMETIC = (sql.Add, sql.Sub, sql.Mul, sql.Div, sql.Mod, sql.Neg, sql.Abs, sql.Paren)
_CHOICES = (sql.Least, sql.Greatest, sql.Coalesce, sql.Nullif)

# What means the same to both, with what is settled here; a rule that uses anything else is warned of.
_SAME = (
    *(*_COMPARISONS, *_ARITHMETIC, *_CHOICES, sql.Case, sql.If, sql.And, sql.Or, sql.Not, sql.Is, sql.Like),
    *(sql.Column, sql.Identifier, sql.Literal, sql.Boolean, sql.Null),
    *(sql.Length, sql.Replace, sql.Contains, sql.StartsWith, sql.EndsWith),
)


def translated(query: str, kinds: Mapping[str, Kind] = {}, letter: str = _LETTER) -> str:
    """A query of DuckDB as one of Spark.

    Args:
        query: the query.
        kinds: of numbers in the columns of the metadata.
        letter: what words consist of; see `letters`.

    Raises:
        ValueError: Spark has nothing like it.
    """
    try:
        tree = sqlglot.parse_one(query, dialect="duckdb")
        _settle_numbers(tree, kinds)
        _settle_patterns(tree)
        tree = tree.transform(partial(_settle_functions, letter=letter))
        return tree.sql("spark", identify=True, unsupported_level=sqlglot.ErrorLevel.RAISE)
    except sqlglot.errors.SqlglotError as error:
        raise ValueError(f"Spark has nothing like it: {str(error).splitlines()[0]}") from error


def unproven(expression: str) -> set[str]:
    """Parts of a rule's expression that may mean something else to Spark than to DuckDB."""
    tree = sqlglot.parse_one(expression, dialect="duckdb")
    nodes = tree.walk(prune=lambda node: not isinstance(node, _SAME))
    return {node.sql("duckdb") for node in nodes if not isinstance(node, _SAME)}


def letters(session: "SparkSession") -> str:
    """The inside of Java's character class of letters, digits and underscore as DuckDB knows them.

    They know different editions of Unicode: Java 17 lacks 4,913 letters and digits that DuckDB 1.5 knows.
    """
    import duckdb

    everything = "".join(chr(code) for code in range(1, 0x40000) if not 0xD800 <= code < 0xE000)  # none lies beyond
    query = rf"SELECT regexp_replace(:everything, r'[{_LETTER}]+', '')"
    java = session.sql(query, {"everything": everything}).collect()[0][0]
    query = rf"SELECT regexp_replace(?, '[{_LETTER}]+', '', 'g')"
    ours = duckdb.connect().execute(query, [everything]).fetchall()[0][0]
    missing, extra = _ranges(set(java) - set(ours)), _ranges(set(ours) - set(java))
    # Java tries one range after the other: not for ASCII, which the two agree on.
    more = rf"[[^\x00-\x7F]&&[{missing}]]" if missing else ""
    return _LETTER + more + (rf"&&[\x00-\x7F[^{extra}]]" if extra else "")


def _ranges(characters: Collection[str]) -> str:
    codes = {ord(character) for character in characters}
    first = sorted(code for code in codes if code - 1 not in codes)
    last = sorted(code for code in codes if code + 1 not in codes)
    return "".join(rf"\x{{{a:X}}}-\x{{{b:X}}}" for a, b in zip(first, last, strict=True))


def _settle_numbers(node: "sql.Expr", kinds: Mapping[str, Kind]) -> Kind | None:
    """Make Spark compute with the numbers that DuckDB computes with; returns the kind of this one.

    Where a 32-bit float meets 0.7 or 7, DuckDB makes that a float too and Spark makes both doubles, so that a float of
    0.7 is less than 0.7.
    """
    operands, others = _parts(node)
    found = [(operand, _settle_numbers(operand, kinds)) for operand in operands]
    for other in others:
        _settle_numbers(other, kinds)
    if isinstance(node, sql.Column):
        return "unknown" if node.table else kinds.get(node.name, "unknown")  # `a.b`: a field of a
    if isinstance(node, sql.Literal):
        return "unknown" if node.is_string else "double" if "e" in node.name.lower() else "exact"
    if isinstance(node, sql.Length):
        return "exact"
    if isinstance(node, sql.Null):
        return None
    among = {kind for _, kind in found}
    widest: Kind = next((kind for kind in ("unknown", "double", "float") if kind in among), "exact")
    if widest == "float":
        for operand, kind in found:
            if kind == "exact":
                operand.replace(sql.cast(operand.copy(), "FLOAT"))
    if isinstance(node, sql.Div):
        return _settle_division(node, widest)
    return widest if found and not isinstance(node, _COMPARISONS) else "unknown"


def _settle_division(node: sql.Div, kind: Kind) -> Kind:
    """Division in 64 bits, which by zero gives infinity or NaN and no error; where both are floats, rounded to 32."""
    if kind == "unknown":
        return kind
    dividend, divisor = sql.cast(node.this.copy(), "DOUBLE"), node.expression
    is_zero = sql.EQ(this=divisor.copy(), expression=sql.Literal.number(0))
    over_zero = sql.Mul(
        this=dividend.copy(), expression=sql.Pow(this=divisor.copy(), expression=sql.Literal.number(-1))
    )
    divided = sql.case().when(is_zero, over_zero).else_(sql.Div(this=dividend, expression=divisor.copy()))
    node.replace(sql.cast(divided, "FLOAT") if kind == "float" else divided)
    return "float" if kind == "float" else "double"


def _parts(node: "sql.Expr") -> tuple[Sequence["sql.Expr"], Sequence["sql.Expr"]]:
    """What must be of one kind, and what else there is below a node."""
    if isinstance(node, sql.Case):
        branches = node.args["ifs"]
        values = [branch.args["true"] for branch in branches] + [node.args.get("default")]
        return [value for value in values if value], [branch.this for branch in branches]
    if isinstance(node, sql.If):
        return [value for name in ("true", "false") if (value := node.args.get(name))], [node.this]
    below = list(node.iter_expressions())
    return (below, []) if isinstance(node, (*_COMPARISONS, *_ARITHMETIC, *_CHOICES)) else ([], below)


def _settle_patterns(tree: "sql.Expr") -> None:
    """A backslash stands for itself in DuckDB's LIKE, and takes the next character's meaning in Spark's."""
    for like in tree.find_all(sql.Like, sql.ILike):
        if not isinstance(like.parent, sql.Escape) and like.expression.is_string:
            like.expression.replace(sql.Literal.string(like.expression.name.replace("\\", "\\\\")))


def _settle_functions(node: "sql.Expr", letter: str) -> "sql.Expr":
    """The functions of `duckdb_engine.FUNCTIONS`, and `hash`, as expressions of Spark."""
    if not isinstance(node, sql.Anonymous) or node.name.lower() not in _FUNCTIONS:
        return node
    arguments = [argument.sql("spark", identify=True) for argument in node.expressions]
    return sqlglot.parse_one(_FUNCTIONS[node.name.lower()](letter, *arguments), dialect="spark")


def _phash_distance(letter: str, a: str, b: str) -> str:
    bits = [f"CAST(conv(replace({phash}, '_', ''), 16, -10) AS BIGINT)" for phash in (a, b)]
    return f"CASE WHEN {a} RLIKE r'{_HASH}' AND {b} RLIKE r'{_HASH}' THEN bit_count({bits[0]} ^ {bits[1]}) END"


def _words_of(letter: str, text: str) -> str:
    # In lower case once they are found: lower case too depends on the edition of Unicode, but not that of letters.
    found = f"regexp_extract_all(replace(replace({text}, 'İ', 'i'), 'Σ', 'σ'), r'[{letter}]+', 0)"  # noqa: RUF001
    return f"transform({found}, _word -> lower(_word))"


def _grams_of(letter: str, words: str) -> str:
    pairs = f"greatest(size({words}) - 1, 0)"
    left, right = f"slice({words}, 1, {pairs})", f"slice({words}, 2, {pairs})"
    return f"concat({words}, zip_with({left}, {right}, (_a, _b) -> _a || ' ' || _b))"


_FUNCTIONS: Mapping[str, Callable[..., str]] = {
    "hash": lambda letter, *keys: f"xxhash64({', '.join(keys)})",
    "phash_distance": _phash_distance,
    "words_of": _words_of,
    "grams_of": _grams_of,
}
