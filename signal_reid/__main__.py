"""`python -m signal_reid` is the program."""

from signal_reid.cli import main

main()
