"""Rules on Arrow batches as they come, with the same SQL as over files."""

from types import TracebackType

import numpy as np
import pyarrow as pa

from align_train.corpus.select.duckdb_engine import FUNCTIONS, check_rules
from align_train.corpus.select.plan import Plan
from align_train.records import Tally


class RowFilter:
    """Keeps the rows of a batch that all rules keep; a context manager, to be used by one thread at a time.

    Args:
        plan: rules that look at one row.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __enter__(self) -> "RowFilter":
        import duckdb

        self._connection, self._checked = duckdb.connect(config={"threads": 1}), False
        for function in FUNCTIONS:
            self._connection.execute(function)
        for name, table in self.plan.given.items():
            self._connection.register(name, table)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def kept(self, batch: pa.Table) -> tuple[pa.Table, Tally]:
        """The rows that are kept, in their order, and the others counted by the first rule that drops them.

        Raises:
            ValueError: a rule does not work on these rows; it is named.
        """
        import duckdb

        if not self.plan.rules or not batch.num_rows:
            return batch, Tally()
        self._connection.register("corpus", batch.append_column("_row", pa.array(np.arange(batch.num_rows))))
        if not self._checked:
            check_rules(self._connection, self.plan)
            self._checked = True
        verdicts = ", ".join(f"k{i}" for i in range(len(self.plan.rules)))
        try:
            for table, (_, query) in self.plan.tables.items():
                self._connection.execute(f"CREATE OR REPLACE TEMP TABLE {table} AS {query}")
            judged = f"SELECT _row, {verdicts} FROM ({self.plan.judged('corpus', '_row')})"
            columns = self._connection.execute(judged).fetchnumpy()
        except duckdb.Error as error:
            check_rules(self._connection, self.plan, limit="")
            raise ValueError(f"the rules {', '.join(self.plan.rules)} do not work together: {error}") from error
        rows, left, dropped = columns["_row"], np.ones(batch.num_rows, bool), Tally()
        for i, name in enumerate(self.plan.rules):
            passes = left.copy()
            passes[rows] &= columns[f"k{i}"]  # rows come in whatever order a join leaves them
            if count := int(left.sum() - passes.sum()):
                dropped[name] = count
            left = passes
        return batch.filter(pa.array(left)), dropped
