"""Fetch, resize and shard against img2dataset 1.47: images a second, and CPU seconds, from a local nginx, in one run.

    python benchmarks/fetch.py WORK [--photos FOLDER] [--count 8000] [--rounds 3]

WORK is a folder for photographs (made if none are given: noise with the spectrum of photographs, 500 x 375), the
metadata, the outputs and the peer's own environment. Needs nginx. Both programs read the same parquet, use two
processes, resize to 346 pixels on the shorter side (area), encode JPEG of quality 95, write webdataset tars of 1,000
and SHA-256.
CPU seconds are those of the program and its processes, starting included; the server's are not counted.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from align_train.corpus.coyo import SCHEMA

PEER = "img2dataset==1.47.0"
PORT = 8098
NGINX = """
worker_processes 1; daemon off; pid {work}/nginx.pid; error_log {work}/nginx.log;
events {{ worker_connections 4096; }}
http {{ access_log off; sendfile on; keepalive_requests 100000; types {{ image/jpeg jpg; }}
  server {{ listen 127.0.0.1:{port}; root {photos}; }} }}
"""
PEER_CALL = """
from img2dataset import download
if __name__ == "__main__":
    download(url_list={metadata!r}, input_format="parquet", url_col="url", caption_col="text", output_folder={output!r},
        output_format="webdataset", image_size=346, resize_mode="keep_ratio", encode_quality=95, processes_count=2,
        thread_count=32, number_sample_per_shard=1000, enable_wandb=False, compute_hash="sha256")
"""


def make_photos(folder: Path, count: int = 400) -> None:
    """Noise whose power falls with frequency as that of photographs."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    height, width = 375, 500
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    for number in tqdm(range(count), desc="photographs", unit="image"):
        spectrum = random.normal(size=(4, *frequency.shape)) + 1j * random.normal(size=(4, *frequency.shape))
        planes = np.fft.irfft2(spectrum / frequency**1.25, s=(height, width))
        planes = (planes - planes.mean((1, 2), keepdims=True)) / planes.std((1, 2), keepdims=True)
        pixels = np.clip(127 + 50 * (0.8 * planes[0] + 0.35 * planes[1:]), 0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{number:05d}.jpg", quality=87)


def write_metadata(path: Path, photos: Path, count: int) -> None:
    """Rows in COYO's schema whose links go round the photographs."""
    names = sorted(photo.name for photo in photos.glob("*.jpg"))
    columns: dict[str, list] = {name: [None] * count for name in SCHEMA.names}
    columns["id"] = list(range(count))
    columns["url"] = [f"http://127.0.0.1:{PORT}/{names[i % len(names)]}?{i}" for i in range(count)]
    columns["text"] = [f"photograph number {i}" for i in range(count)]
    pq.write_table(pa.table(columns, schema=SCHEMA), path)


@contextmanager
def nginx(work: Path, photos: Path) -> Iterator[None]:
    """The server, until the block ends."""
    config = work / "nginx.conf"
    config.write_text(NGINX.format(work=work, photos=photos.absolute(), port=PORT))
    server = subprocess.Popen(["nginx", "-c", str(config.absolute())])
    try:
        time.sleep(1)
        yield
    finally:
        server.terminate()
        server.wait()


def measured(command: list[str], work: Path) -> tuple[float, float]:
    """Seconds and CPU seconds of a command and its processes."""
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command,
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"},
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - clock, cpu


def peer(work: Path, metadata: Path) -> Callable[[], tuple[float, float]]:
    """Installs img2dataset into an environment of its own; what runs it."""
    python = work / "peer" / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(work / "peer")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PEER], check=True)
    output, script = work / "peer_shards", work / "peer_call.py"
    script.write_text(PEER_CALL.format(metadata=str(metadata.absolute()), output=str(output.absolute())))

    def run() -> tuple[float, float]:
        shutil.rmtree(output, ignore_errors=True)
        return measured([str(python), str(script.absolute())], work)

    return run


def ours(work: Path, metadata: Path) -> Callable[[], tuple[float, float]]:
    """What runs `align-train prepare`."""
    output = work / "shards"
    command = [
        sys.executable, "-m", "align_train", "prepare", "source=coyo", "rules=none",
        f"source.folder={output.absolute()}", f"source.metadata={metadata.absolute()}",
        "source.fetch.permissions.networks=[127.0.0.0/8]", "source.fetch.limits.per_host=32",
        "source.fetch.images.mode=keep_ratio", "source.fetch.rows_per_task=1000", "source.fetch.processes=2",
    ]  # fmt: skip

    def run() -> tuple[float, float]:
        shutil.rmtree(output, ignore_errors=True)
        return measured(command, work)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--photos", type=Path, help="a folder of .jpg files; made if not given")
    parser.add_argument("--count", type=int, default=8000, help="links")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    work, photos = given.work.absolute(), given.photos or given.work.absolute() / "photos"
    work.mkdir(parents=True, exist_ok=True)
    if not photos.is_dir():
        make_photos(photos)
    metadata = work / "metadata.parquet"
    write_metadata(metadata, photos, given.count)
    runs = {"img2dataset": peer(work, metadata), "align_train": ours(work, metadata)}
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    with nginx(work, photos):
        for _ in range(given.rounds):
            for name, run in runs.items():
                seconds, cpu = run()
                figures[name].append((given.count / seconds, 1000 * cpu / given.count))
                rate, cost = figures[name][-1]
                print(f"{name:<12} {rate:6.0f} images/s, {cost:.2f} CPU seconds a thousand", flush=True)
    pairs = list(zip(figures["img2dataset"], figures["align_train"], strict=True))
    faster = statistics.median(mine[0] / theirs[0] for theirs, mine in pairs)
    cheaper = statistics.median(theirs[1] / mine[1] for theirs, mine in pairs)
    print(f"median ratios: {faster:.2f} times the images a second, {cheaper:.2f} times the images a CPU second")


if __name__ == "__main__":
    main()
