"""A Spark cluster: the session that this process has or gets, and what Spark says when something fails."""

import logging
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def spark_session() -> "SparkSession":
    """The active session; if there is none, a new one on the cluster that Spark's own settings name.

    Those are `spark-submit --master ...`, `spark.master` in spark-defaults.conf (in SPARK_CONF_DIR or SPARK_HOME/conf),
    the environment variable MASTER, or PYSPARK_SUBMIT_ARGS; without any of them Spark uses the cores of this machine.

    Raises:
        ValueError: PySpark or Java is missing, or the cluster does not answer.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise ValueError(f"engine=spark needs PySpark ({error}): pip install 'align-train[spark]'") from error
    for logger in ("SQLQueryContextLogger", "DataFrameQueryContextLogger"):  # print as JSON what is raised anyway
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    logging.getLogger("py4j").setLevel(logging.WARNING)
    try:
        session = SparkSession.getActiveSession() or SparkSession.builder.appName("align-train").getOrCreate()
    except spark_errors() as error:
        raise ValueError(
            f"Spark does not start ({reason(error)}): it needs Java 17 or later, in JAVA_HOME or on the PATH, and the "
            "cluster that spark.master or MASTER names"
        ) from error
    if not isinstance(session, SparkSession):
        raise ValueError("engine=spark does not work through Spark Connect: unset SPARK_REMOTE, and set spark.master")
    return session


def spark_errors() -> tuple[type[Exception], ...]:
    """What PySpark raises: errors of its own, and those of its bridge to Java."""
    from py4j.protocol import Py4JError  # type: ignore[import-untyped]  # py4j has no types
    from pyspark.errors import PySparkException

    return PySparkException, Py4JError


def reason(error: Exception) -> str:
    """What went wrong, in one line, out of an error with the stacks of Java and, from executors, of Python."""
    text = str(error).strip()
    python = re.findall(r"^(?:\w+\.)*\w+(?:Error|Exception): \S.*", text, re.MULTILINE) if "Traceback (" in text else []
    java = re.findall(r"^(?:: |Caused by: )(?:(?:[\w$]+\.)+[\w$]+: )?(.+)", text, re.MULTILINE)
    told = [line for line in dict.fromkeys(java) if not line.startswith("Exception thrown in awaitResult")]
    return "; ".join(python[-1:] or told[:3]) or text.partition("\n")[0]
