"""What is known of sources, judged: whether training would stop, or lose too much."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align_train.data.inspection.pairs import CaptionFacts, PairFacts
from align_train.data.inspection.sources import Epoch, OpenedFacts, ShardFacts
from align_train.data.sources import Source
from align_train.records import Tally

MANY = 0.1  # share of captions that are cut, or of tokens that are unknown, which is worth a note


@dataclass(frozen=True)
class Findings:
    """What is known of a source."""

    shards: ShardFacts
    opened: OpenedFacts
    pairs: PairFacts
    captions: CaptionFacts
    repeats: Mapping[str, Mapping[str, Any]]
    error: str = ""

    @property
    def lost(self) -> float:
        """Share of the pairs that cannot be used, of those that rules keep; by the sample."""
        lost = sum(self.opened.lost.values())
        before = lost / max(lost + self.opened.usable, 1)
        return before + (1 - before) * (1 - self.pairs.usable / max(self.pairs.read, 1)) if self.pairs.read else before


def epochs(sources: Sequence[Source], pairs: Sequence[int]) -> dict[str, Epoch]:
    """The sequences that training draws from: one of all sources, or with weights one of each.

    Args:
        sources: all with weights, or none.
        pairs: of an epoch of each source.
    """
    if sources[0].weight is None:
        return {"+".join(source.name for source in sources): Epoch(sum(pairs), 1.0)}
    weights = [source.weight or 1.0 for source in sources]
    return {
        source.name: Epoch(count, weight / sum(weights))
        for source, count, weight in zip(sources, pairs, weights, strict=True)
    }


def faults(
    found: Mapping[str, Findings], sequences: Mapping[str, Epoch], batch_size: int, max_quarantined: float
) -> list[str]:
    """What training would stop with, or lose more than max_quarantined by: a sentence each, with the remedy."""
    said = [f"{name}: {error}" for name, facts in found.items() if (error := facts.opened.error or facts.error)]
    said += _broken(found, max_quarantined)
    for name, facts in found.items():
        reasons = Tally(facts.opened.lost) + Tally(facts.pairs.unusable)
        if not facts.opened.usable:
            if said and (facts.opened.error or len(facts.opened.broken) == facts.opened.shards):
                continue  # that is why
            rules = Tally(facts.opened.filtered).described()
            said.append(
                f"{name}: the shards that were opened have no pair to train with (left out by rules: {rules}; "
                f"unusable: {Tally(reasons).described()}): check that they are the right files, the rules, and "
                f"data.train.{name}.captions"
            )
        elif facts.lost > max_quarantined:
            said.append(
                f"{name}: {facts.lost:.1%} of the pairs cannot be used ({Tally(reasons).described()} of those looked "
                f"at), more than data.reading.max_quarantined={max_quarantined:g}: write or fetch the shards again, or "
                "allow more"
            )
    for name, epoch in sequences.items():
        if 0 < epoch.pairs < batch_size * epoch.share:
            said.append(
                f"{name}: an epoch has {epoch.pairs} pairs, and a batch takes {batch_size * epoch.share:.4g} of them: "
                "make data.batch_size or the weight smaller, since a pair twice in a batch is its own negative"
            )
    return said


def _broken(found: Mapping[str, Findings], max_quarantined: float) -> list[str]:
    """Whether more shards are broken than may be: those that were found, or as many as the sample makes likely."""
    count = sum(facts.shards.count for facts in found.values())
    known = {name: why for facts in found.values() for name, why in broken_shards(facts).items()}
    likely = sum(len(facts.opened.broken) / facts.opened.shards * facts.shards.count for facts in found.values())
    worst = round(max(len(known), likely))
    if max(len(known), likely) <= max_quarantined * count:
        return []
    many = f"{len(known)}" if worst == len(known) else f"about {worst} (by the sample)"
    first, why = next(iter(known.items()))
    return [
        f"{many} of {count} shards are broken, more than data.reading.max_quarantined={max_quarantined:g} of them; the "
        f"first: {first}: {why}. Write or fetch them again, take them off the list, or allow more"
    ]


def broken_shards(facts: Findings) -> dict[str, str]:
    """Names of the shards that are known to be broken, with the reason."""
    return {**facts.shards.broken, **facts.opened.broken}


def notes(found: Mapping[str, Findings], max_tokens: int) -> list[str]:
    """What training goes on with, and users may want to know."""
    said = []
    for name, facts in found.items():
        if facts.captions.unknown > MANY:
            said.append(
                f"{name}: {facts.captions.unknown:.0%} of the tokens are [UNK]: the vocabulary is BERT's, lower-case "
                "English, and knows little of these captions"
            )
        if facts.captions.cut > MANY:
            said.append(
                f"{name}: model.preprocessing.max_tokens={max_tokens} cuts {facts.captions.cut:.0%} of the captions; "
                f"95% have {facts.captions.tokens.p95} tokens or fewer"
            )
    return said
