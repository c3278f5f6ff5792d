"""One's own pairs of images and captions: read in any usual form, checked, and written as shards."""

from align_train.data.own_pairs import report
from align_train.data.own_pairs.checking import CheckSettings, check_pairs
from align_train.data.own_pairs.findings import Findings, read_findings
from align_train.data.own_pairs.opened import OpenedPairs
from align_train.data.own_pairs.own_pairs import OwnPairs
from align_train.data.own_pairs.rows import Picture, Row

__all__ = [
    "CheckSettings",
    "Findings",
    "OpenedPairs",
    "OwnPairs",
    "Picture",
    "Row",
    "check_pairs",
    "read_findings",
    "report",
]
