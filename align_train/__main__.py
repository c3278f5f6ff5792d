"""`python -m align_train` is `align-train`."""

from align_train.cli import main

if __name__ == "__main__":
    main()
