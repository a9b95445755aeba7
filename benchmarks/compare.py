"""Is the second of two runs of a benchmark faster than the first, row by row?

python benchmarks/compare.py A.json B.json

Every row that both files have gets the ratio of its medians, B over A: below 1 the second run is better.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from harness.comparison import report_or_error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", metavar="A.json")
    parser.add_argument("second", metavar="B.json")
    parser.add_argument("--any-device", action="store_true", help="compare rows of different devices too")
    args = parser.parse_args(arguments)
    return report_or_error(args.first, args.second, args.any_device)


if __name__ == "__main__":
    sys.exit(main())
