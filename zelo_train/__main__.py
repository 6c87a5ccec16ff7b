"""`python -m zelo_train` is the `zelo` command."""

from zelo_train.cli import main

if __name__ == "__main__":
    main()
