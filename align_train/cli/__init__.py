"""The command line: `align-train VERB [hydra overrides]`. Help answers at once: nothing heavy is imported here."""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from align_train import __version__


@dataclass(frozen=True)
class Verb:
    """A word of the command line: what it does, and two commands that can be run as they stand."""

    does: str
    examples: tuple[str, str]


VERBS = {
    "prepare": Verb(
        "write tar shards that training reads, from the sample corpus, COYO's metadata or a dataset of your own",
        (
            "align-train prepare",
            "align-train prepare source=dataset source.pairs.path=imagefolder source.pairs.data_dir=photos "
            "source.folder=shards/photos",
        ),
    ),
    "train": Verb(
        "train, score and export a model; resume=RUN goes on with a run that was stopped",
        ("align-train train", "align-train train experiment=tiny seed=2"),
    ),
    "finetune": Verb(
        "fine-tune a trained model on pairs of your own, and say what it forgot; resume=RUN goes on",
        (
            "align-train finetune pairs.path=shards/sample/held_out_concepts/shards start.model=outputs/sample",
            "align-train finetune pairs.path=photos.csv start.model=kakaobrain/align-base tuning=lora",
        ),
    ),
    "doctor": Verb(
        "check what training would read and run on, without training: shards, captions, speed, machines",
        (
            "align-train doctor",
            "align-train doctor data=shards data.train.pairs.shards=shards/sample/emoji/shards model=align_tiny",
        ),
    ),
    "evaluate": Verb(
        "score a run, a checkpoint or a Hugging Face folder",
        (
            "align-train evaluate checkpoint=outputs/sample/RUN",
            "align-train evaluate checkpoint=outputs/sample/RUN/hf device=cpu",
        ),
    ),
    "export": Verb(
        "write a folder that plain transformers loads, and prove it equal",
        (
            "align-train export checkpoint=outputs/sample/RUN",
            "align-train export checkpoint=outputs/sample/RUN/checkpoints/best.ckpt folder=exported/best",
        ),
    ),
}
PLANNED = {
    "serve": "answer image and text queries over HTTP (not built yet)",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb. Exits with 2 where the words are wrong, 1 where the work failed, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb, overrides = (words[0], words[1:]) if words else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(_help())
    elif verb in ("-V", "--version"):
        print(f"align-train {__version__}")
    elif verb in PLANNED:
        sys.exit(f"align-train {verb}: {PLANNED[verb]}")
    elif verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        print(f"align-train: no verb {verb!r}, {hint}", file=sys.stderr)
        sys.exit(2)
    elif {"-h", "--help"} & set(overrides):
        print(_verb_help(verb))
    else:
        import_module("align_train.cli.hydra_app").run(verb, overrides)


def _help() -> str:
    verbs = "\n".join(f"  {name:<9} {verb.does}" for name, verb in VERBS.items())
    planned = "\n".join(f"  {name:<9} {does}" for name, does in PLANNED.items())
    return f"""align-train {__version__}: train ALIGN dual encoders on image-text pairs

usage: align-train VERB [key=value ...]

{verbs}
{planned}

examples:
  {VERBS["train"].examples[0]}
  {VERBS["train"].examples[1]}

`align-train VERB --help` says more; `align-train VERB --cfg job` prints every setting."""


def _verb_help(verb: str) -> str:
    first, second = VERBS[verb].examples
    return f"""align-train {verb}: {VERBS[verb].does}

usage: align-train {verb} [key=value ...]

examples:
  {first}
  {second}

Settings are Hydra overrides of configs/{verb}.yaml, where each has a comment:
  align-train {verb} --cfg job             print every setting of this command
  align-train {verb} --info defaults       which file sets what
  align-train {verb} --config-dir FOLDER   add a folder of your own YAML files"""
