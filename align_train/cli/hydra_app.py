"""A verb as a Hydra application, and errors as one line."""

import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align_train import signals
from align_train.cli.attempts import attempt, end_unsettled
from align_train.cli.jobs import Job
from align_train.cli.resuming import FOLDER, continued, value_of
from align_train.processes import check_job_name
from align_train.shipped import config_folder

# What a user can cause; everything else is a defect, and shows its traceback.
EXPECTED = (ValueError, FloatingPointError, OmegaConfBaseException, OSError)
TRACEBACK = "ALIGN_TRAIN_TRACEBACK"
RUNS = ("train", "finetune")  # verbs that can be stopped and gone on with
# flags of Hydra: those that take the next word with them, and those with which nothing is run
TAKE = {"-c", "-p", "-cp", "-cn", "-cd", "--cfg", "--package", "--config-path", "--config-name", "--config-dir"}
TAKE |= {"--experimental-rerun"}
LOOK = {"-c", "-i", "-h", "-sc", "--cfg", "--info", "--help", "--hydra-help", "--version", "--shell-completion"}


def run(verb: str, overrides: Sequence[str]) -> None:
    """Compose configs/VERB.yaml with the overrides and call `align_train.cli.VERB.VERB` with it."""
    _quieten()
    _share_the_machine()
    if verb in RUNS:
        with signals.listening():
            _run(verb, overrides)
    else:
        _run(verb, overrides)


def _run(verb: str, overrides: Sequence[str]) -> None:
    overrides, flags = split_flags(overrides)
    overrides = [with_quotes(word) for word in overrides]
    looks = any(flag.partition("=")[0] in LOOK for flag in flags)
    given = sys.argv
    program = given[0] if given else "align-train"
    try:
        if verb in (*RUNS, "evaluate"):
            check_job_name()
        composed = [*continued(overrides, looks), "hydra.output_subdir=null"] if verb in RUNS else list(overrides)
    except EXPECTED as error:
        _fail(verb, error)
    function = _imported(verb)

    entered = False

    def task(config: DictConfig) -> None:
        nonlocal entered
        entered = True
        sys.argv = [program, verb, *overrides, *flags]  # what Lightning starts further local ranks with
        try:
            check_complete(config)
            with attempt_at(config) if verb in RUNS else nullcontext():
                function(config)
        except InstantiationException as error:  # the settings do not make what they name
            _fail(verb, error.__cause__ or error)
        except EXPECTED as error:
            _fail(verb, error)
        except KeyboardInterrupt:  # where no step can be finished first
            print(f"align-train {verb}: interrupted", file=sys.stderr)
            sys.exit(130)
        except signals.Asked as asked:
            print(f"align-train {verb}: told to end ({asked.wish.name})", file=sys.stderr)
            raise

    sys.argv = [program, *composed, *flags]
    try:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=verb)(task)()
    except SystemExit as end:
        if not entered and (folder := value_of(composed, FOLDER)):
            end_unsettled(Path(folder), f"exit status {end.code}")
        raise
    finally:
        sys.argv = given


def _imported(verb: str) -> Callable[[DictConfig], None]:
    """The verb's function, without looking for garbage meanwhile.

    Torch, Lightning and what they bring are half a million objects, all of which stay. Looking through them again and
    again took 0.7 s of 7.5 s (docs/log.md, 2026-11-22).
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        function: Callable[[DictConfig], None] = getattr(import_module(f"align_train.cli.{verb}"), verb)
        return function
    finally:
        if collected:
            gc.enable()


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides, and the flags of Hydra with what they take: argparse finds no override that follows a flag."""
    overrides, flags, before = list[str](), list[str](), ""
    for word in words:
        taken = before in TAKE or (before in ("-i", "--info") and word[:1] not in "~-" and "=" not in word)
        (flags if taken or word.startswith("-") else overrides).append(word)
        before = "" if taken else word
    return overrides, flags


def attempt_at(config: DictConfig) -> AbstractContextManager[None]:
    """Note this start of a run in its folder."""
    return attempt(Path(config.folder), Job.current(), config.recovery.failures)


def with_quotes(word: str) -> str:
    """An override with quotes around a value that holds a brace range, in which Hydra would look for a dictionary."""
    key, equals, value = word.partition("=")
    braces = re.fullmatch(r"[^\s'\"\[\],{}$](?:[^\s'\"\[\],{}$]|\{[^\s'\"{}]*\})*", value) and "{" in value
    return f'{key}="{value}"' if equals and braces else word


def check_complete(config: DictConfig) -> None:
    """Raise ValueError naming every setting that still has to be given."""
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ValueError(f"these settings have no default, give them: {' '.join(f'{key}=...' for key in missing)}")


def _fail(verb: str, error: BaseException) -> None:
    if os.environ.get(TRACEBACK):
        raise error
    print(f"align-train {verb}: {type(error).__name__}: {told(error)}", file=sys.stderr)
    print(f"(set {TRACEBACK}=1 for the traceback)", file=sys.stderr)
    sys.exit(1)


def told(error: BaseException) -> str:
    """What an error says; of one from a worker process of the DataLoader, what was raised there."""
    says = str(error).rstrip()
    return says.splitlines()[-1].partition(": ")[2] if "Original Traceback" in says else says


def _quieten() -> None:
    """Silence what is known and harmless; the rest is shown."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # the number of workers is a setting with a measured default
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # the sampler begins at the trainer's step
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
    # a machine that has Slurm, and a run that is no job
    warnings.filterwarnings("ignore", "The `srun` command is available on your system but is not used")
    # a resumed run goes on in its own folder
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    # lightning 2.6 beside torch 2.13: its own use of a name that torch has deprecated
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")


def _share_the_machine() -> None:
    """Settings of threads, which must stand before torch is imported; the user's own stay."""
    # Threads that spin while they wait take the core from whatever they wait for: with one other busy process on two
    # cores a step takes seconds. Spinning briefly, then sleeping, is as fast alone (docs/log.md, 2026-11-21).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes tokenize; forked threads would hang
