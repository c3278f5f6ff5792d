"""Rules compiled together: the tables they need, and one query that judges rows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from align_train.corpus.select.rules import Compiled, First, Rule, as_rules


@dataclass(frozen=True)
class Plan:
    """What an engine carries out.

    The order: register `given` and the view `corpus`, make each of `tables`, then judge rows with `judged`. A rule
    looks at the whole corpus or at one row, never at what other rules have left, so their order does not change what
    is kept; only First prefers a row that the others keep.
    """

    rules: Mapping[str, Rule]
    compiled: Mapping[str, Compiled]

    @staticmethod
    def of(rules: Mapping[str, Any]) -> "Plan":
        """Compile the rules; ValueError naming a rule that cannot be."""
        named = as_rules(rules)
        compiled = {name: rule.compiled(name, "", "") for name, rule in named.items() if not isinstance(rule, First)}
        others = " AND ".join(_passes(named[name], compiled[name]) for name in compiled) or "true"
        joins = " ".join(made.join for made in compiled.values())
        for name, rule in named.items():
            if isinstance(rule, First):
                compiled[name] = rule.compiled(name, others, joins)
        return Plan(named, {name: compiled[name] for name in named})

    @cached_property
    def columns(self) -> dict[str, list[str]]:
        """Each column that is read, with the rules that read it."""
        readers: dict[str, list[str]] = {}
        for name, made in self.compiled.items():
            for column in sorted(made.columns):
                readers.setdefault(column, []).append(name)
        return readers

    @cached_property
    def tables(self) -> dict[str, tuple[str, str]]:
        """Table to (rule, query), in the order to make them: those that First looks into come before it."""
        inner = [name for name, rule in self.rules.items() if not isinstance(rule, First)]
        outer = [name for name in self.rules if name not in inner]
        return {table: (name, query) for name in inner + outer for table, query in self.compiled[name].tables.items()}

    @cached_property
    def given(self) -> dict[str, pa.Table]:
        """Tables that come from files beside the corpus."""
        return {name: table for made in self.compiled.values() for name, table in made.given.items()}

    @property
    def whole_corpus(self) -> list[str]:
        """Names of the rules that need to see the whole corpus."""
        return [name for name, made in self.compiled.items() if made.whole_corpus]

    def judged(self, rows: str, carried: str) -> str:
        """A query: the expression `carried`, then for rule number i `u{i}` (it cannot tell) and `k{i}` (it keeps)."""
        verdicts = [
            f"{made.keep} IS NULL AS u{i}, {_passes(self.rules[name], made)} AS k{i}"
            for i, (name, made) in enumerate(self.compiled.items())
        ]
        joins = " ".join(made.join for made in self.compiled.values())
        return f"SELECT {', '.join([carried, *verdicts])} FROM {rows} {joins}"

    @property
    def kept(self) -> str:
        """Over the columns of `judged`: true where all rules keep the row."""
        return " AND ".join(f"k{i}" for i in range(len(self.rules))) or "true"

    def counts(self, judged: str) -> str:
        """One row of counts over the table `judged`: rows, then for each rule unknown, dropped alone, and in order."""
        columns, before = ["count(*)"], "true"
        for i in range(len(self.rules)):
            columns += [_count(f"u{i}"), _count(f"NOT k{i}"), _count(f"{before} AND NOT k{i}")]
            before += f" AND k{i}"
        return f"SELECT {', '.join(columns)} FROM {judged}"

    def check_columns(self, file: str, present: Iterable[str]) -> None:
        """ValueError naming the first rule whose column the file lacks."""
        present = list(present)
        for column, readers in self.columns.items():
            if column not in present:
                raise ValueError(
                    f"{file} has no column {column}, which the rule{'s' * (len(readers) > 1)} "
                    f"{', '.join(readers)} need{'s' * (len(readers) == 1)}; it has {', '.join(present)}. "
                    f"Leave the rule out, or give metadata that has the column"
                )


def _passes(rule: Rule, made: Compiled) -> str:
    return f"coalesce({made.keep}, {'true' if rule.nulls == 'keep' else 'false'})"


def _count(condition: str) -> str:
    return f"coalesce(sum(CASE WHEN {condition} THEN 1 ELSE 0 END), 0)"
