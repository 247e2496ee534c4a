"""``python -m k2cli`` is ``k2``."""

from k2cli.cli import main

if __name__ == "__main__":
    main()
