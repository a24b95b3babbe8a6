"""util/metrics.py: the detection of new classes, and the best constant answer."""

import pytest
import torch

from util.metrics import auroc, certainty, constant_answer


def test_auroc_by_hand_with_ties():
    known, new = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 0.0])
    # of the 6 pairs 3 > 2, 3 > 0, 1 > 0, 2 > 0 are right, 2 = 2 is half right and 1 < 2 wrong
    assert auroc(known, new) == pytest.approx(4.5 / 6) and auroc(new, known) == pytest.approx(1.5 / 6)
    assert auroc(known, known) == 0.5 and auroc(torch.ones(2), torch.ones(5)) == 0.5
    assert auroc(torch.tensor([float("nan")]), new) == 0.0  # NaN is the lowest score


@pytest.mark.parametrize("seed", range(3))
def test_auroc_equals_the_loop(seed):
    g = torch.Generator().manual_seed(seed)
    known, new = (torch.randint(0, 9, (n,), generator=g).float() for n in (40, 27))
    pairs = known[:, None] - new
    assert auroc(known, new) == pytest.approx(((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item())


def test_certainty_has_the_order_of_the_maximum_softmax_and_never_rounds():
    logits = 3 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    top = logits.softmax(1).amax(1)
    torch.testing.assert_close(certainty(logits).sigmoid(), top)
    sure, surer = torch.tensor([[100.0, 70.0, 0.0], [100.0, 60.0, 0.0]])
    assert sure.softmax(0)[0] == surer.softmax(0)[0] == 1.0
    a, b = certainty(torch.stack([sure, surer]))
    assert b - a == pytest.approx(10)


def test_the_best_constant_answer_is_the_most_frequent_class():
    assert constant_answer(torch.tensor([2, 2, 2, 5])) == 0.75
    # balanced classes give chance to the bit, so that it can be compared
    assert constant_answer(torch.arange(7).repeat(9)) == 1 / 7
