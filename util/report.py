"""What a program shows while it works and when it is done: progress lines and tables."""

import re
import sys
import time

from util.text import duration, printable


class Progress:
    """Share, rate and time left, one line every ten seconds; label "" for none, total 0 if unknown."""

    def __init__(self, label: str, total: int, unit: str):
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.start = self.shown = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now, finished = time.monotonic(), self.total > 0 and self.done >= self.total
        if not self.label or (now - self.shown < 10 and not finished):
            return
        self.shown, spent = now, max(now - self.start, 1e-9)
        rate = self.done / spent
        share = f"{self.done:,} of {self.total:,}" if self.total else f"{self.done:,}"
        left = f"ETA {duration((self.total - self.done) / rate)}" if self.total else ""
        left = f"done in {duration(spent)}" if finished else left
        print(f"{self.label}  {share} {self.unit}  {rate:,.1f}/s  {left}", file=sys.stderr, flush=True)


# also nothing, 1,024 and "0.31 +- 0.02" or "0.31 ± 0.02"
NUMBER = re.compile(r"|[-+]?[\d,]*\.?\d+(e[-+]?\d+)?( (\+-|±) [\d,.e-]+)?|nan|-?inf")


def format_table(rows: list[dict], digits: int = 3) -> str:
    """Rows of {column: value} as an aligned Markdown table; a value that a row lacks stays empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    values = [[row.get(column, "") for column in columns] for row in rows]
    table = [[f"{v:.{digits}f}" if isinstance(v, float) else printable(v) for v in line] for line in values]
    widths = [max(3, *(len(line[n]) for line in [columns, *table])) for n in range(len(columns))]
    right = [rows != [] and all(NUMBER.fullmatch(line[n]) for line in table) for n in range(len(columns))]

    def line(cells: list[str]) -> str:
        padded = [x.rjust(w) if r else x.ljust(w) for x, w, r in zip(cells, widths, right)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right)]
    return "\n".join([line(columns), line(rule), *map(line, table)])


def results_table(results: dict[str, dict]) -> str:
    """{"retrieval": result, "zeroshot": result} as a table in percent; sizes and standard errors below."""
    rows, sizes = [], []
    for task, result in results.items():
        domains = {f"top1 {name}": value for name, value in result.get("domains", {}).items()}
        chance = result["chance"] | dict.fromkeys(domains, result["chance"].get("top1"))
        beside = {"chance": chance, "constant": result.get("constant", {})}
        beside["at most"] = result.get("ceiling", {})
        for name in chance:
            row = {"task": task, "figure": name, "%": 100.0 * (result | domains)[name]}
            rows.append(row | {column: 100.0 * of[name] for column, of in beside.items() if name in of})
        if "images" in result:
            counts = [f"{k.replace('_', ' ')} {v:,}" for k, v in result.items() if isinstance(v, int)]
            # of a share of one half, the largest that there is
            error = result.get("standard_error", 0.5 / result["images"] ** 0.5)
            sizes.append(f"{task}: {'  '.join(counts)}  standard error at most {100 * error:.1f}")
    return "\n".join([format_table(rows, digits=2), *sizes])
