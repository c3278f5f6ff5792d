"""Rules on Arrow batches as they come, with the same SQL as over files."""

from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from align_train.corpus.select.duckdb_engine import FUNCTIONS
from align_train.corpus.select.plan import Plan
from align_train.records import Tally


class RowFilter:
    """Keeps the rows of a batch that all rules keep; a context manager, to be used in one thread.

    Args:
        plan: rules that look at one row.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __enter__(self) -> "RowFilter":
        import duckdb

        self._connection = duckdb.connect(config={"threads": 1})
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
        """The rows that are kept, in their order, and the others counted by the first rule that drops them."""
        import duckdb

        if not self.plan.rules or not batch.num_rows:
            return batch, Tally()
        numbered = batch.append_column("_row", pa.array(np.arange(batch.num_rows)))
        try:
            self._connection.register("corpus", numbered)
            for table, (_, query) in self.plan.tables.items():
                self._connection.execute(f"CREATE OR REPLACE TEMP TABLE {table} AS {query}")
            judged = self._connection.sql(f"{self.plan.judged('corpus', '_row')} ORDER BY _row").to_arrow_table()
        except duckdb.Error as error:
            raise ValueError(f"the rules {', '.join(self.plan.rules)} do not work on this metadata: {error}") from error
        left, dropped = pa.array([True] * batch.num_rows), Tally()
        for i, name in enumerate(self.plan.rules):
            passes = pc.and_(left, judged[f"k{i}"])
            count = pc.sum(left).as_py() - pc.sum(passes).as_py()
            if count:
                dropped[name] = count
            left = passes
        return batch.filter(left), dropped
