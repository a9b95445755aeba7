"""The table of an ablation: a line for each variant, mean and deviation over its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from signal_reid.figures import Table
from signal_reid.report.comparison import SUMMARY
from signal_reid.report.contents import Value
from signal_reid.report.history import Row, is_finite, label
from signal_reid.report.tables import csv_text

PAPER = ("mAP", "rank1", "rank5", "rank10")
"""The columns of a paper's table."""
BEST = ("best mAP", "its R-1")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


@dataclass(frozen=True)
class SeedResult:
    """What one training of a variant came to: rows of `metrics.jsonl`, or why there is none."""

    seed: int
    last: Row | None = None
    best: Row | None = None
    failure: str = ""


@dataclass(frozen=True)
class VariantResult:
    """What a variant came to.

    Args:
        name: of the variant.
        overrides: its settings.
        parameters: of its model.
        flops: of a sample's forward in training, as the method says.
        seeds: a result for each.
    """

    name: str
    overrides: Sequence[str]
    parameters: int
    flops: float
    seeds: Sequence[SeedResult]

    def values(self, name: str) -> list[float]:
        """A number of the last evaluation of each seed that has one, as a fraction; `best ...` of the best one."""
        if name in BEST:
            key = ("mAP", "rank1")[BEST.index(name)]
            rows = [seed.best for seed in self.seeds]
        else:
            key, rows = name, [seed.last for seed in self.seeds]
        return [float(row[key]) for row in rows if row is not None and is_finite(row.get(key))]

    @property
    def failures(self) -> list[str]:
        """Why seeds have no result, a line each."""
        return [f"{self.name}, seed {seed.seed}: {seed.failure}" for seed in self.seeds if seed.failure]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the deviation of fewer than two values, and the mean of none, are NaN."""
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def ablation_table(variants: Sequence[VariantResult]) -> Table:
    """The table for a page; numbers are in percent."""
    rows: list[list[Value]] = []
    for variant in variants:
        size = [f"{variant.parameters / 1e6:.2f}", f"{variant.flops / 1e9:.3g}"]
        measured = [_percent(variant.values(name), " ± ") for name in (*PAPER, *BEST)]
        rows.append([variant.name, *size, *measured])
    return Table("Ablation: last epoch, and the best one on the test set", ["variant", *_titles()], rows)


def markdown(variants: Sequence[VariantResult]) -> str:
    """The table as Markdown, the best of each column of results in bold."""
    header = ["variant", *_titles()]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for row in _marked(variants, " ± ", "**{}**"):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def latex(variants: Sequence[VariantResult]) -> str:
    """The table as LaTeX with the rules of the package booktabs, the best of each column of results in bold."""
    header = " & ".join(["variant", *map(_escaped, _titles())])
    rows = _marked(variants, r" $\pm$ ", r"\textbf{{{}}}", _escaped)
    lines = [f"\\begin{{tabular}}{{l{'r' * len(_titles())}}}", "\\toprule", f"{header} \\\\", "\\midrule"]
    lines += [" & ".join(row) + " \\\\" for row in rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def ablation_csv(variants: Sequence[VariantResult]) -> str:
    """A row for each variant: settings, sizes, number of seeds, mean and deviation of each number as fractions."""
    names = (*SUMMARY, *BEST)
    header: list[Value] = ["variant", "overrides", "parameters", "flops", "seeds"]
    keys = (*SUMMARY, "best_mAP", "best_rank1")
    header += [f"{key}_{what}" for key in keys for what in ("mean", "deviation")]
    rows = [header]
    for variant in variants:
        finished = len(variant.values("mAP"))
        row: list[Value] = [variant.name, " ".join(variant.overrides), variant.parameters, variant.flops, finished]
        for name in names:
            row += ["" if math.isnan(number) else number for number in mean_and_deviation(variant.values(name))]
        rows.append(row)
    return csv_text(rows)


def runs_csv(variants: Sequence[VariantResult]) -> str:
    """A row for each training: variant, seed, its last evaluation and its best one."""
    header: list[Value] = ["variant", "seed", "epoch", *SUMMARY, "best_epoch", "best_mAP", "best_rank1", "failure"]
    rows = [header]
    for variant in variants:
        for seed in variant.seeds:
            last, best = seed.last or {}, seed.best or {}
            row: list[Value] = [variant.name, seed.seed, *(last.get(name, "") for name in ("epoch", *SUMMARY))]
            rows.append([*row, *(best.get(name, "") for name in ("epoch", "mAP", "rank1")), seed.failure])
    return csv_text(rows)


def _titles() -> list[str]:
    return ["parameters, M", "GFLOP", *map(label, PAPER), *BEST]


def _marked(
    variants: Sequence[VariantResult], between: str, bold: str, escape: Callable[[str], str] = str
) -> list[list[str]]:
    """The rows as text, the largest mean of each column of results in bold."""
    columns = []
    for name in (*PAPER, *BEST):
        cells = [_percent(variant.values(name), between) for variant in variants]
        means = [mean_and_deviation(variant.values(name))[0] for variant in variants]
        largest = max((mean for mean in means if not math.isnan(mean)), default=math.nan)
        columns.append([bold.format(c) if mean == largest else c for c, mean in zip(cells, means, strict=True)])
    rows = []
    for i, variant in enumerate(variants):
        name = escape(variant.name)
        sizes = [f"{variant.parameters / 1e6:.2f}", f"{variant.flops / 1e9:.3g}"]
        rows.append([name, *sizes, *(column[i] for column in columns)])
    return rows


def _percent(values: Sequence[float], between: str) -> str:
    mean, deviation = mean_and_deviation(values)
    if math.isnan(mean):
        return "n/a"
    return f"{100 * mean:.1f}" + ("" if math.isnan(deviation) else f"{between}{100 * deviation:.1f}")


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
