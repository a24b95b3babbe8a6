"""Spectra that are known, and the program for every kind of model."""

import math

import pytest
import torch
from PIL import Image
from small_models import evaluate_all

from evals import spectrum


def test_spectrum_of_a_known_covariance():
    """+-a_k along axis k, each equally often: the covariance is diagonal with a_k^2 / D, wherever centred."""
    scale = torch.tensor([4.0, 2.0, 1.0, 0.5])
    z = torch.cat([torch.diag(scale), -torch.diag(scale)]) + 7.0  # (8, 4)
    tokens = z.view(4, 2, 4)  # four images of two tokens
    values = spectrum.covariance_spectrum(tokens)
    torch.testing.assert_close(values, scale.double().square() / 4)
    row, logs = spectrum.spectrum_row("x", tokens)
    assert logs == pytest.approx([math.log(a * a / 4) for a in scale.tolist()])
    assert (row["tokens"], row["vectors"], row["width"]) == (2, 8, 4)
    assert row["ln s at D/2"] == logs[2]
    shares = [a * a / 21.25 for a in scale.tolist()]
    assert row["effective rank"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    z[:, 1] = z[:, 0]  # a direction that nothing points to
    assert spectrum.spectrum_row("x", z.view(4, 2, 4))[1][-1] is None


def test_spectrum_command(small_runs, tmp_path, capsys):
    result = evaluate_all(spectrum.main, small_runs, tmp_path)
    assert [row["vectors"] for row in result["rows"]] == [20, 20, 60, 60]
    assert all(len(v) == 16 for v in result["log_singular_values"].values())
    assert Image.open(tmp_path / "spectrum.png").width > 300
    assert f"drawn in {tmp_path / 'spectrum.png'}" in capsys.readouterr().out
    flags = ["--model", str(small_runs["clip"]), "--data", "scenes", "--limit", "9", "--device", "cpu"]
    assert spectrum.main(flags) == 2
    assert "9 x 1 vectors span less than the width 16" in capsys.readouterr().err
