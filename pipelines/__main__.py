"""``python -m pipelines`` is the ``maxreel`` command."""

from pipelines.cli import main

if __name__ == "__main__":
    main()
