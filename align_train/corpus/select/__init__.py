"""Rows of metadata to the rows worth fetching, by named rules."""

from align_train.corpus.select.duckdb_engine import Resources
from align_train.corpus.select.rules import AtMost, FarFrom, First, FrequentWords, Keep, Rule
from align_train.corpus.select.selecting import select

__all__ = ["AtMost", "FarFrom", "First", "FrequentWords", "Keep", "Resources", "Rule", "select"]
