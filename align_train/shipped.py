"""Where the files that ship inside the package lie: the configs, the sample corpus, the vocabulary."""

from pathlib import Path

_PACKAGE = Path(__file__).parent

SAMPLE_PARTS = (
    "clipart", "emoji", "validation", "test_unseen_rendering", "test_unseen_concept", "held_out_concepts",
)  # fmt: skip


def config_folder() -> Path:
    """The folder of YAML configs: inside an installed wheel, else at the top of the checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def sample_corpus() -> Path:
    """The shipped corpus of 11,058 pairs as one parquet file with image bytes."""
    return _PACKAGE / "corpus" / "sample" / "pairs.parquet"


def sample_metadata_file(part: str) -> Path:
    """The metadata of one of SAMPLE_PARTS as a parquet file in COYO's schema; its links are `package:KEY`.

    `clipart` and `emoji` together are the training part.

    Raises:
        ValueError: no such part.
        FileNotFoundError: the package is not whole.
    """
    if part not in SAMPLE_PARTS:
        raise ValueError(f"the sample has no part {part}: choose one of {', '.join(SAMPLE_PARTS)}")
    path = sample_corpus().with_name(f"{part}.parquet")
    if not path.is_file():
        raise FileNotFoundError(f"the sample lacks {path}: reinstall align-train, it ships this file")
    return path


def vocabulary() -> Path:
    """bert-base-uncased's WordPiece vocabulary, 30,522 lines (Apache-2.0, Google)."""
    return _PACKAGE / "data" / "bert-base-uncased-vocab.txt"
