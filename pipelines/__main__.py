"""``python -m pipelines`` is ``h2t``."""

from pipelines.cli import main

main()
