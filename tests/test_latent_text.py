"""lab/latent_text.py: causality of the latent tokens, the mean over them, and the method."""

import json

import pytest
import torch
from test_llip import SIZES

from baselines.methods import METHODS
from lab.latent_text import LatentTextLlip
from llip import Llip
from train import configure, main


def test_latent_text_tokens_attend_to_the_words_and_no_word_attends_to_them():
    torch.manual_seed(0)
    model = LatentTextLlip(SIZES, 3, 2, text_tokens=3).double().eval()
    end = SIZES.vocab_size - 1
    tokens = torch.tensor([[1, 2, end, 0, 0], [1, 2, 3, 4, end]])
    queries, text = model.encode_text(tokens)
    assert queries.shape[:2] == text.shape[:2] == (2, 3)
    alone = model.encode_text(tokens[:1, :3])  # padding and longer neighbours change nothing
    torch.testing.assert_close(queries[:1], alone[0])
    torch.testing.assert_close(text[:1], alone[1])
    assert not torch.allclose(text[0], text[1])
    words = model.text_features_of(model.token_embedding(tokens), tokens.argmax(-1))
    with torch.no_grad():
        model.text_tokens.mul_(3)
    again = model.text_features_of(model.token_embedding(tokens), tokens.argmax(-1))
    torch.testing.assert_close(words, again)


def test_latent_text_logits_are_the_mean_over_the_tokens():
    torch.manual_seed(0)
    model = LatentTextLlip(SIZES, 3, 2, text_tokens=2).double().eval()
    side = model.encode_image(torch.rand(4, 3, 16, 16, dtype=torch.float64))
    queries, text = model.encode_text(torch.tensor([[1, 2, SIZES.vocab_size - 1]] * 3))
    logits = model.pair_logits(side, (queries, text))
    each = [Llip.pair_logits(model, side, (queries[:, t], text[:, t])) for t in (0, 1)]
    torch.testing.assert_close(logits, (each[0] + each[1]) / 2)
    classes = model.ensemble_text((queries, text), torch.tensor([0, 1, 1]))
    assert model.pair_logits(side, classes).shape == (4, 2)


@pytest.mark.slow
def test_the_method_trains_and_its_flag_belongs_to_it_alone(tmp_path, capsys):
    assert [name for name, method in METHODS.items() if "text_tokens" in method.flags()] == ["latent"]
    flags = ["--method", "latent", "--text-tokens", "2", "--train-size", "24", "--batch-size", "8"]
    flags += ["--steps", "2", "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "run")]
    assert main(flags) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= results["aspects"]["i2t_map"] <= 1
    assert configure(method="latent", text_tokens=2)[1].text_tokens == 2
    assert main(["--method", "llip", "--text-tokens", "2"]) == 2
    assert "latent" in capsys.readouterr().err
