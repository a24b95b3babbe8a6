"""Compares arrays of a port with the recordings of this folder. It needs numpy only.

    python tests/golden/check.py MINE.npz [--only PREFIX] [--values]

PREFIX selects arrays, for example llip_k4 or llip_k4/out.pred. With --values gradients may be missing.

MINE.npz holds arrays named case/key. The case is the name of a golden file without .npz. The key is the
name of its array or an alias of manifest.json, with or without "out.": llip_k4/out.pred_ws5, llip_k4/pred_ws5
and llip_k4/z_tau5 are the same array. Every framework can write such a file:

    np.savez("MINE.npz", **{"llip_k4/K": np.asarray(keys), "llip_k4/loss_tau5": np.asarray(loss)})

Each line has the largest error divided by its tolerance; 1 is the limit. Cases that MINE.npz does not
mention are listed and do not fail. Arrays that need a file outside this folder may be missing. The exit
status is 1 if an array is wrong, unknown, or missing in a case that MINE.npz mentions, and 2 if the
arguments are wrong. A Python program can read a case with check.load.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent


def expected_arrays(only: str = "") -> dict[str, dict]:
    """Case -> {key: description}, for the outputs of every .npz file."""
    files = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))["files"]
    return {
        name.removesuffix(".npz"): {
            key: array
            for key, array in entry["arrays"].items()
            if key.startswith("out.")
            if f"{name.removesuffix('.npz')}/{key}".startswith(only)
        }
        for name, entry in files.items()
        if name.endswith(".npz")
    }


def load(case: str) -> dict[str, np.ndarray]:
    """The arrays of a file under their names and aliases; float16 is only a storage format here."""
    arrays = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))["files"][f"{case}.npz"][
        "arrays"
    ]
    found = {}
    with np.load(FOLDER / f"{case}.npz") as file:
        for key, array in arrays.items():
            value = file[key]
            value = value.astype(np.float32) if value.dtype == np.float16 else value
            found |= dict.fromkeys([key, *array.get("aliases", [])], value)
    return found


def compare(got: np.ndarray, expected: np.ndarray, array: dict) -> tuple[float, str]:
    """Largest error divided by the tolerance, and a remark where the arrays cannot be compared."""
    if got.shape != expected.shape:
        return np.inf, f"the shape is {got.shape}, expected {expected.shape}"
    if got.dtype.kind not in "fiub":
        return np.inf, f"the type {got.dtype} is not a number"
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(got).all():
        return np.inf, "not finite"
    error = np.abs(got - expected)
    limit = array["atol"] + array["rtol"] * np.abs(expected)
    # a tolerance of 0 allows no error
    ratio = np.divide(error, limit, out=np.where(error > 0, np.inf, 0.0), where=limit > 0)
    return float(ratio.max(initial=0)), ""


def check(mine: dict[str, np.ndarray], only: str = "", values: bool = False) -> tuple[list[str], int]:
    """Lines of the report, and the number of arrays that are wrong, missing or unknown."""
    wanted, lines, bad, checked = expected_arrays(only), [], 0, 0
    aliases = {
        (case, alias): key
        for case, arrays in wanted.items()
        for key, array in arrays.items()
        for alias in array.get("aliases", [])
    }
    names = {}
    for name in mine:
        case, _, key = name.partition("/")
        key = key if key.startswith("out.") else "out." + key
        names[case, aliases.get((case, key), key)] = name
    for case in sorted({case for case, _ in names} & set(wanted)):
        recorded = np.load(FOLDER / f"{case}.npz")
        for key, array in wanted[case].items():
            if (case, key) not in names and ("needs" in array or (values and "grad" in key)):
                continue
            if (case, key) not in names:
                lines.append(f"MISSING        {case}/{key}")
                bad += 1
                continue
            ratio, remark = compare(mine[names[case, key]], recorded[key], array)
            checked += 1
            bad += ratio > 1
            word = "WRONG" if ratio > 1 else "ok"
            lines.append(f"{word:5} {ratio:8.3g} {case}/{key}" + (f": {remark}" if remark else ""))
    for (case, key), name in names.items():
        if key not in wanted.get(case, {}) and f"{case}/{key}".startswith(only):
            lines.append(f"UNKNOWN        {name}")
            bad += 1
    absent = [case for case, arrays in wanted.items() if arrays and case not in {case for case, _ in names}]
    if absent:
        lines.append("cases without arrays: " + ", ".join(absent))
    if not any(wanted.values()):
        lines.append(f"no recorded array starts with {only}")
    lines.append(f"{checked} arrays compared, {bad} wrong, missing or unknown")
    return lines, bad + (checked == 0)


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("mine", metavar="MINE.npz")
    parser.add_argument("--only", metavar="PREFIX", default="")
    parser.add_argument("--values", action="store_true", help="gradients may be missing")
    options = parser.parse_args(argv)
    try:
        with np.load(options.mine) as file:
            mine = dict(file)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        print(f"{options.mine}: not an .npz file that can be read: {error}", file=sys.stderr)
        return 2
    lines, bad = check(mine, options.only, options.values)
    print("\n".join(lines))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
