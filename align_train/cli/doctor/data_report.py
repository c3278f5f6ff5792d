"""What `align-train doctor` prints of its findings."""

from collections.abc import Iterator, Mapping

from align_train.cli.doctor.wording import line
from align_train.data.inspection.pairs import CaptionFacts, PairFacts, Spread
from align_train.data.inspection.sources import Epoch, SpeedFacts
from align_train.data.inspection.verdict import Findings, broken_shards
from align_train.records import Tally

BAR, SHOWN = 40, 100  # characters of the longest bar, and of a caption
MOST = 20  # broken shards that are listed


def report(
    found: Mapping[str, Findings], sequences: Mapping[str, Epoch], speed: SpeedFacts | None, max_tokens: int
) -> str:
    """All of it as text, source by source, then the speed."""
    lines = [each for name, facts in found.items() for each in _source(name, facts, max_tokens)]
    return "\n".join([*lines, *_speed(found, sequences, speed)])


def _source(name: str, facts: Findings, max_tokens: int) -> Iterator[str]:
    shards, opened, pairs = facts.shards, facts.opened, facts.pairs
    broken = broken_shards(facts)
    yield f"{name}"
    looked = "all" if shards.asked == shards.count else f"{shards.asked:,}"
    yield line("shards", f"{shards.count:,}; {looked} were looked for: {shards.bytes / 1e6:,.1f} MB")
    yield line("", f"broken: {len(broken) or 'none'}")
    yield from (line("", f"  {shard}: {why.removeprefix(f'{shard}: ')}") for shard, why in list(broken.items())[:MOST])
    if len(broken) > MOST:
        yield line("", "  and others, see doctor.json")
    opened_of = "all" if opened.shards == shards.count else f"{opened.shards:,} of {shards.count:,}"
    yield line("opened", f"{opened_of} shards: {opened.usable:,} usable pairs")
    yield line("", f"left out by rules: {Tally(opened.filtered).described()}")
    yield line("", f"unusable: {Tally(opened.lost).described()}")
    low, high, mean = (opened.per_shard[which] for which in ("min", "max", "mean"))
    yield line("", f"usable pairs a shard: mean {mean:,.1f}, min {low:,}, max {high:,}")
    yield line("", f"an epoch has {'about ' * opened.estimated}{opened.epoch_pairs:,} pairs")
    share = f" ({pairs.usable / pairs.read:.1%})" if pairs.read else ""
    yield line("pairs", f"{pairs.read:,} read, {pairs.usable:,} usable{share}")
    for reason, count in pairs.unusable.items():
        yield line("", f"{reason}: {count}, such as {pairs.examples[reason]}")
    if pairs.usable:
        yield from _images(pairs)
        yield from _captions(facts.captions, max_tokens)
    again = ", ".join(f"{what} {found['count']:,}" for what, found in facts.repeats.items())
    yield line("repeats", f"of what was looked at: {again}")
    for what, found in facts.repeats.items():
        if found["count"]:
            yield line("", f"{what}, such as {_cut(found['example'])}")
    yield ""


def _images(pairs: PairFacts) -> Iterator[str]:
    yield line("", f"formats: {Tally(pairs.formats).described()}")
    for what, spread in (("width", pairs.width), ("height", pairs.height), ("bytes", pairs.bytes)):
        yield line("", f"{what}: {_spread(spread)}")


def _captions(captions: CaptionFacts, max_tokens: int) -> Iterator[str]:
    for what, spread, bins in (
        ("words", captions.words, captions.word_bins),
        ("tokens", captions.tokens, captions.token_bins),
    ):
        yield line("captions" if what == "words" else "", f"{what}: {_spread(spread)}")
        most = max(bins.values(), default=1)
        for name, count in bins.items():
            yield line("", f"{name:>8} {count:>6} {'#' * -(-BAR * count // most)}")
    yield line("", f"cut at {max_tokens} tokens: {captions.cut:.1%}; unknown tokens ([UNK]): {captions.unknown:.1%}")
    for caption, count in captions.frequent.items():
        yield line("", f"{count:>5} times {_cut(caption)}")


def _speed(found: Mapping[str, Findings], sequences: Mapping[str, Epoch], speed: SpeedFacts | None) -> Iterator[str]:
    if speed is None:
        yield line("speed", "not measured")
        return
    yield line(
        "speed",
        f"{speed.images_per_second:,.0f} images/s in {speed.batches} batches of {speed.batch_size}: reading alone, "
        "on this machine, for one rank, without a model",
    )
    about = "about " if any(facts.opened.estimated for facts in found.values()) else ""
    for name, seconds in speed.epoch_seconds(sequences).items():
        yield line("", f"an epoch of {name} ({about}{sequences[name].pairs:,} pairs) takes about {_duration(seconds)}")


def _spread(spread: Spread) -> str:
    return (
        f"mean {spread.mean:,.1f}, min {spread.min:,}, median {spread.median:,}, p95 {spread.p95:,}, max {spread.max:,}"
    )


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
