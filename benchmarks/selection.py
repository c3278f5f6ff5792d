"""Selection with the ALIGN paper's rules over synthetic metadata: rows a second, and peak memory under the limit.

python benchmarks/synthetic_coyo.py FOLDER --rows 20000000
python benchmarks/selection.py FOLDER [--rules align_paper,exact_duplicates] [--memory 4GiB] [--rounds 3]
"""

import argparse
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from align_train.corpus.select import Resources, select
from align_train.shipped import config_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rules", default="align_paper")
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        rules = instantiate(compose("prepare", [f"rules=[{given.rules}]"]).rules, _convert_="all")
    rates = []
    for _ in range(given.rounds):
        output = Path(tempfile.mkdtemp(dir=given.folder.parent))
        clock = time.perf_counter()
        funnel = select(str(given.folder), output, rules, Resources(given.memory, given.threads, str(output / "spill")))
        seconds = time.perf_counter() - clock
        shutil.rmtree(output)
        rates.append(funnel.rows / seconds)
        print(f"{funnel.rows:,} rows in {seconds:.1f} s: {rates[-1] / 1e6:.2f} million rows a second", flush=True)
    print(funnel.markdown())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"median {statistics.median(rates) / 1e6:.2f} million rows a second, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
