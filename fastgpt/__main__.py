"""``python -m fastgpt`` is the ``fastgpt`` command."""

from fastgpt.cli import main

main()
