"""`align-train doctor`: what would break a run, found without one."""

from align_train.cli.doctor.verb import doctor

__all__ = ["doctor"]
