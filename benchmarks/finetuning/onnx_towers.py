"""The towers as ONNX under onnxruntime against the same export under plain transformers, on the CPU.

    python benchmarks/finetuning/onnx_towers.py RUN/hf [--rounds 9] [--threads 1]

RUN/hf was exported with onnx=true. Both take turns in every round, in one process; milliseconds and ratios are medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from transformers import AlignModel


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    towers = {
        name: onnxruntime.InferenceSession(options.folder / "onnx" / f"{name}.onnx", settings)
        for name in ("image", "text")
    }
    model = AlignModel.from_pretrained(options.folder).eval()
    side = towers["image"].get_inputs()[0].shape[-1]
    print("| tower | batch | transformers, ms | onnxruntime, ms | times as fast |\n|---|---|---|---|---|")
    for batch in (1, 32):
        pixels, ids = torch.rand(batch, 3, side, side) * 2 - 1, torch.randint(1, 30522, (batch, 16))
        mask = torch.ones_like(ids)
        fed = {"image": {"pixel_values": pixels.numpy()}}
        fed["text"] = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        plain: dict[str, Callable[[], object]] = {
            "image": lambda pixels=pixels: model.get_image_features(pixels),  # type: ignore[misc]
            "text": lambda ids=ids, mask=mask: model.get_text_features(ids, attention_mask=mask),  # type: ignore[misc]
        }
        for name, session in towers.items():
            with torch.inference_mode():
                rounds = [
                    (milliseconds(plain[name]), milliseconds(lambda s=session, x=fed[name]: s.run(None, x)))  # type: ignore[misc]
                    for _ in range(options.rounds + 1)
                ][1:]
            before, after = (statistics.median(column) for column in zip(*rounds, strict=True))
            ratio = statistics.median(one / other for one, other in rounds)
            print(f"| {name} | {batch} | {before:.1f} | {after:.1f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
