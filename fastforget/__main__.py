"""`python -m fastforget` is the same as the command `fastforget`."""

from fastforget.cli import main

main()
