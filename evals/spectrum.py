"""Spectrum: how slowly the singular values of the covariance of an image tower's features decay.

    python -m evals.spectrum --model runs/llip --more runs/clip --data scenes --out spectrum

Lavoie et al. 2024, Fig. 5 (5,000 validation images of ImageNet). The features are those of linear_probe.py.
"""

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import evaluate
from evals.linear_probe import encode
from util import plots
from util.evaluation import SeveralFlags, each_model, options_of, start, write_results
from util.flags import parse
from util.program import leave, program
from util.report import format_table


def covariance_spectrum(tokens: Tensor) -> Tensor:
    """Singular values of the covariance of all tokens of all images, descending: (N, M, D) -> (D,) fp64.

    Lavoie et al. 2024, Fig. 5: tokens concatenated on the batch axis, centred, C = Z^T Z / (N M).
    """
    z = tokens.flatten(0, 1).double()  # (N M, D)
    return torch.linalg.svdvals(torch.cov(z.t(), correction=0))


def spectrum_row(source: str, tokens: Tensor) -> tuple[dict, list]:
    """A row of the table, and the natural logarithms by rank; None where a value is 0 within rounding."""
    N, M, D = tokens.shape
    if N * M <= D:
        raise ValueError(f"{source}: {N} x {M} vectors span less than the width {D}: use more images")
    values = covariance_spectrum(tokens)
    zero = values[0] * D * torch.finfo(torch.float64).eps
    logs = [math.log(v) if v > zero else None for v in values.tolist()]
    row = {"model": source, "tokens": M, "vectors": N * M, "width": D}
    # Roy and Vetterli 2007, "The effective rank", eq. 4: D if all are equal, 1 if only one is not 0
    row["effective rank"] = torch.special.entr(values / values.sum()).sum().exp().item()
    for name, k in (("1", 0), ("D/4", D // 4), ("D/2", D // 2), ("3D/4", 3 * D // 4)):
        row[f"ln s at {name}"] = "0" if logs[k] is None else logs[k]
    return row, logs


@program
def main(argv: list[str]) -> None:
    flags = parse(SeveralFlags, argv, __doc__)
    device, rows, curves = start(flags, one_process=True), [], {}
    for source, model, _ in each_model(flags, device, partial(evaluate.open_model, towers=True)):
        dataset = evaluate.open_data(flags, model, "image")
        tokens = encode(model, dataset, **options_of(flags, f"spectrum {source}"))  # (N, M, D)
        row, curves[source] = spectrum_row(source, tokens)
        rows.append(row)
    print(format_table(rows, digits=2))
    content = {"task": "spectrum", "data": flags.data, "models": [*curves], "rows": rows}
    write_results(flags, content | {"log_singular_values": curves})
    if flags.out:
        lines = {name: [(k, v) for k, v in enumerate(logs) if v is not None] for name, logs in curves.items()}
        path = Path(flags.out) / "spectrum.png"
        plots.lines(path, {"ln of the covariance's singular values": lines}, xlabel="rank")
        print(f"drawn in {path}")


if __name__ == "__main__":
    leave(main())
