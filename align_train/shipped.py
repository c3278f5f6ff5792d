"""Where the files that ship inside the package lie: the configs, the sample corpus, the vocabulary."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def config_folder() -> Path:
    """The folder of YAML configs: inside an installed wheel, else at the top of the checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def sample_corpus() -> Path:
    """The shipped corpus of 11,058 pairs as one parquet file with image bytes."""
    return _PACKAGE / "corpus" / "sample" / "pairs.parquet"


def vocabulary() -> Path:
    """bert-base-uncased's WordPiece vocabulary, 30,522 lines (Apache-2.0, Google)."""
    return _PACKAGE / "data" / "bert-base-uncased-vocab.txt"
