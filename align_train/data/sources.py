"""What training reads: named groups of shards, how their captions are chosen, and which pairs are kept."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from align_train.corpus.select.plan import Plan
from align_train.data.captions import Captions
from align_train.data.storage.cache import Cache
from align_train.data.storage.shards import Shard, find_shards

log = logging.getLogger(__name__)
LISTED = 50  # broken shards that a message lists


@dataclass(frozen=True)
class Source:
    """Shards that are read in one way.

    Attributes:
        name: what the source is called.
        shards: what it reads; a shard listed twice is seen twice an epoch.
        weight: share of the pairs of a batch, relative to other sources; None takes every pair once an epoch.
        captions: where captions come from.
        rules: which pairs are kept, as in configs/rules; only rules that look at one row.

    Raises:
        ValueError: a rule counts over the whole corpus.
    """

    name: str
    shards: Sequence[Shard]
    weight: float | None = None
    captions: Captions = field(default_factory=Captions)
    rules: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if whole := self.plan.whole_corpus:
            raise ValueError(
                f"data.train.{self.name}.rules: {', '.join(whole)} count over the whole corpus, which a shard does not "
                "show: use them in `align-train prepare`, or leave them out (rules=align_paper_rows)"
            )

    @cached_property
    def plan(self) -> Plan:
        """The rules, compiled."""
        return Plan.of(self.rules)

    @cached_property
    def kinds(self) -> list[str]:
        """Kinds of members that are looked for beside the image."""
        return list(dict.fromkeys([*self.captions.kinds, *(["json"] if self.rules else [])]))


_KEYS = ("shards", "repeat", "weight", "captions", "clean_captions", "by_line", "rules")


def read_sources(train: Mapping[str, Mapping[str, Any]], cache: Cache) -> list[Source]:
    """Sources from settings: name to `{shards, repeat, weight, captions, clean_captions, by_line, rules}`.

    Raises:
        FileNotFoundError: a pattern matches no shard.
        ValueError: a setting is wrong; the message names it.
    """
    sources = []
    for name, given in train.items():
        if unknown := set(given) - set(_KEYS):
            known = ", ".join(_KEYS)
            raise ValueError(f"data.train.{name} has the unknown key {sorted(unknown)[0]!r}; known are {known}")
        patterns, repeat, weight = given.get("shards"), given.get("repeat", 1), given.get("weight")
        if not patterns:
            raise ValueError(f"data.train.{name}.shards is {patterns!r}: give file names or globs of tar shards")
        if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
            raise ValueError(f"data.train.{name}.repeat is {repeat!r}; it must be a whole number of at least 1")
        if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0):
            raise ValueError(f"data.train.{name}.weight is {weight!r}; it must be a number over 0, or null")
        clean, by_line = given.get("clean_captions", True), given.get("by_line", False)
        captions = Captions(given.get("captions") or {"txt": 1.0}, clean, by_line)
        shards = find_shards(patterns, cache) * repeat
        sources.append(Source(name, shards, weight, captions, given.get("rules") or {}))
    if not sources:
        raise ValueError("data.train names no source: give at least one {shards: ..., repeat: 1}")
    if len({source.weight is None for source in sources}) > 1:
        without = ", ".join(source.name for source in sources if source.weight is None)
        raise ValueError(f"data.train has sources with and without a weight: give {without} a weight too, or none any")
    return sources


@dataclass
class Quarantine:
    """Shards that are broken, with the reason; the run goes on without them.

    Args:
        shards: how many there are in all.
        share: of them that may be broken.
        names: those known so far.
    """

    shards: int
    share: float = 0.1
    names: dict[str, str] = field(default_factory=dict)

    def add(self, shard: Shard, reason: str) -> None:
        """Note a shard, once.

        Raises:
            ValueError: there are more than the share; the message lists them.
        """
        if str(shard) in self.names:
            return
        self.names[str(shard)] = reason
        log.warning("quarantined %s: %s", shard, reason)
        if len(self.names) > self.share * self.shards:
            listed = "\n".join(f"  {name}: {why}" for name, why in islice(self.names.items(), LISTED))
            listed += f"\n  and {len(self.names) - LISTED} more" if len(self.names) > LISTED else ""
            raise ValueError(
                f"{len(self.names)} of {self.shards} shards are broken, more than data.reading.max_quarantined="
                f"{self.share:g} of them. Write or fetch them again, take them off the list, or allow more:\n{listed}"
            )
