"""Metrics of retrieval, ranking, classification and maps.

recall_at_k, average_precision and classification_metrics define the numbers on whole matrices. Recall and
Relevance compute the same numbers from batches of images. In retrieval, ties count against the model: an item
with the score of the right answer is ranked before it. NaN is the lowest score.
"""

import math

import torch
from torch import Tensor

from scale.distributed import gather_rows

KS = (1, 5, 10)
MAP_FIGURES = ("lift", "pointing", "area", "iou")


def no_nan(scores: Tensor) -> Tensor:
    """NaN becomes the lowest score; every comparison with NaN is false, so it would count as a hit."""
    return scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def hit_rates(place: Tensor, name: str, ks: tuple[int, ...]) -> dict[str, float]:
    """Share of queries with fewer than k items before their right answer; place (N,) counts those items."""
    return {f"{name}@{k}": (place < k).cpu().double().mean().item() for k in ks}


def not_below(scores: Tensor, own: Tensor) -> Tensor:
    """Number of items not below the best own item of their row: (Q, N), (Q, N) bool -> (Q,)."""
    best = scores.masked_fill(~own, -math.inf).amax(1, keepdim=True)  # (Q, 1)
    count = ((scores >= best) & ~own).sum(1)
    return count.masked_fill(~own.any(1), torch.iinfo(count.dtype).max)


def recall_at_k(scores: Tensor, image_of_text: Tensor, ks: tuple[int, ...] = KS) -> dict[str, float]:
    """Recall of retrieval in both directions.

    No equation; LAION-AI/CLIP_benchmark metrics/zeroshot_retrieval.py @48de38c, except for ties.
    Args:    scores (N_img, N_txt);  image_of_text (N_txt,) long, the image of each caption, in any order
    Returns: "i2t@k": share of images with any of their captions among the k best;  "t2i@k": share of captions
             with their image among the k best. An image without a caption is a miss.
    Raises:  ValueError if the shapes or the indices do not fit.
    """
    images, texts = scores.shape
    if image_of_text.shape != (texts,) or not set(image_of_text.tolist()) <= set(range(images)):
        raise ValueError(f"image_of_text: need one of {images} images for each of {texts} texts")
    scores = no_nan(scores)
    own = torch.arange(images, device=scores.device)[:, None] == image_of_text  # (N_img, N_txt)
    i2t, t2i = not_below(scores, own), not_below(scores.t(), own.t())  # (N_img,), (N_txt,)
    return hit_rates(i2t, "i2t", ks) | hit_rates(t2i, "t2i", ks)


def places(logits: Tensor, target: Tensor) -> Tensor:
    """Rank of the right class, 0 first: (B, C), (B,) -> (B,).

    REF: of tied classes the lower number comes first, as with argmax. ImageNet has two pairs of equal names.
    """
    logits = no_nan(logits)
    right = logits.gather(1, target[:, None])  # (B, 1)
    before = torch.arange(logits.shape[1], device=logits.device) < target[:, None]  # (B, C)
    return ((logits > right) | ((logits == right) & before)).sum(1)  # (B,)


def accuracy(place: Tensor, target: Tensor) -> dict[str, float]:
    """The result of classification_metrics, from the rank of each image's class (N,) and that class (N,)."""
    hits = torch.bincount(target, (place == 0).double())  # (C,)
    counts = torch.bincount(target)  # (C,)
    top = {f"top{k}": (place < k).double().mean().item() for k in (1, 5)}
    return top | {"mean_per_class": (hits / counts)[counts > 0].mean().item()}


def constant_answer(target: Tensor) -> float:
    """Accuracy of the best constant answer: the share of the most frequent class in labels (N,)."""
    return torch.bincount(target).max().item() / len(target)


def classification_metrics(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Accuracies of a classifier in [0, 1].

    No equation; LAION-AI/CLIP_benchmark metrics/zeroshot_classification.py @48de38c, except for ties.
    Args:    logits (N, C);  target (N,) long
    Returns: "top1", "top5", "mean_per_class": the mean over classes of the accuracy on their images
    Raises:  ValueError if there are no images, or the shapes or the labels do not fit.
    """
    N, C = logits.shape
    if target.shape != (N,) or not N or not set(target.tolist()) <= set(range(C)):
        raise ValueError(f"target: need one of {C} classes for each of {N} > 0 images")
    return accuracy(places(logits, target), target)


def certainty(logits: Tensor) -> Tensor:
    """Log odds of the maximum softmax probability p of each row: (B, C) -> (B,) ln p / (1 - p).

    TRAP: p itself rounds to 1 in fp32 when the best logit leads by 17. Its log odds keep the order.
    """
    best, others = logits.topk(logits.shape[1], 1).values.split([1, logits.shape[1] - 1], 1)
    return best[:, 0] - others.logsumexp(1)


def auroc(known: Tensor, new: Tensor) -> float:
    """Probability that a random score of known (P,) is above one of new (N,); ties count one half."""
    known, new = no_nan(known.cpu()), no_nan(new.cpu()).sort().values
    below, not_above = (torch.searchsorted(new, known, right=right) for right in (False, True))  # (P,) each
    return (below + not_above).double().mean().item() / (2 * len(new))


def ordered_hits(scores: Tensor, relevant: Tensor) -> Tensor:
    """Relevance in descending order of score: (B, N) float scores, (B, N) bool -> (B, N) bool."""
    # TRAP: two stable sorts, with the irrelevant first, so that they also come first in a tie
    order = relevant.byte().argsort(dim=1, stable=True)  # (B, N)
    ranked = scores.gather(1, order).argsort(dim=1, descending=True, stable=True)  # (B, N)
    return relevant.gather(1, order.gather(1, ranked))  # (B, N)


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """Average precision of each row:  AP = (1/R) sum_r (r / rank of the r-th relevant column)

    Args: scores (B, N), relevant (B, N) bool.   Returns: (B,) double, NaN for a row without relevant columns.
    """
    # MPS has no float64
    hits = ordered_hits(no_nan(scores), relevant).cpu().double()  # (B, N)
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1, device=hits.device)  # (B, N)
    return (precision * hits).sum(1) / hits.sum(1)  # (B,)


def chance_of_hit(right: int, count: int, k: int) -> float:
    """Probability that k random items of `count` contain one of the `right` ones."""
    k = min(k, count)
    return 1 - math.comb(count - right, k) / math.comb(count, k)


def chance_of_precision(right: Tensor, count: int) -> Tensor:
    """Expected average precision of a random order of `count` items, of which right (B,) are relevant.

    (H + (count - H) (right - 1) / (count - 1)) / count,  H = 1 + 1/2 + ... + 1/count
    """
    harmonic = (1 / torch.arange(1, count + 1, dtype=torch.float64)).sum()
    return (harmonic + (count - harmonic) * (right - 1).double() / max(count - 1, 1)) / count


def keep_best(best: Tensor, scores: Tensor) -> Tensor:
    """The k highest scores of each column: those so far (T, k), and more rows (b, T) -> (T, k)."""
    return torch.cat([best, scores.t()], 1).topk(best.shape[1], 1).values


def best_of_ranks(best: Tensor) -> Tensor:
    """keep_best over the rows of all ranks: (T, k) -> (T, k), highest first."""
    return gather_rows(best[None]).transpose(0, 1).flatten(1).topk(best.shape[1], 1).values


class Recall:
    """recall_at_k from a stream of score rows.

    Whether the rank of a caption's image is below k is decided by the k + 1 best scores of its column.
    Args: image_of_text (N_txt,) ascending;  column (N_txt,): the score column of each text. Equal texts
          share one column, so that they tie exactly.
    """

    def __init__(self, images: int, image_of_text: Tensor, column: Tensor, ks: tuple, device):
        self.images, self.ks = images, ks
        self.owner, self.column = image_of_text.to(device), column.to(device)  # (N_txt,) each
        self.best = torch.full((len(column.unique()), min(max(ks) + 1, images)), -math.inf, device=device)
        self.own, self.i2t = [self.best.new_zeros(0)], [self.owner.new_zeros(0)]

    def add(self, first: int, scores: Tensor) -> None:
        """scores (b, T) of images first, first + 1, ... of this rank's share."""
        scores, images = no_nan(scores), torch.arange(first, first + len(scores), device=scores.device)
        own, every = images[:, None] == self.owner, scores[:, self.column]  # (b, N_txt) each
        self.own.append(every[own])
        self.i2t.append(not_below(every, own))
        self.best = keep_best(self.best, scores)

    def metrics(self) -> dict[str, float]:
        """The result of recall_at_k for the rows of all ranks."""
        i2t, own = (gather_rows(torch.cat(parts)) for parts in (self.i2t, self.own))  # (N_img,), (N_txt,)
        t2i = (best_of_ranks(self.best)[self.column] >= own[:, None]).sum(1) - 1  # (N_txt,)
        return hit_rates(i2t, "i2t", self.ks) | hit_rates(t2i, "t2i", self.ks)

    def chance(self) -> dict[str, float]:
        captions, texts = torch.bincount(self.owner).tolist(), len(self.owner)
        i2t = {f"i2t@{k}": sum(chance_of_hit(n, texts, k) for n in captions) / self.images for k in self.ks}
        return i2t | {f"t2i@{k}": chance_of_hit(1, self.images, k) for k in self.ks}


class Relevance:
    """Ranking metrics for known relevance; relevant (N_img, T) bool: which texts are true of which images.

    i2t_map   mean over images of the average precision of ranking all distinct texts
    i2t_p@1   share of images whose best text is true of them
    t2i_p@10  mean over texts of the share of true images among the ten best; a text that is true of 4 images
              cannot exceed 0.4, hence ceiling()
    """

    def __init__(self, relevant: Tensor, device, k: int = 10):
        self.relevant, self.device, self.k = relevant, device, min(k, len(relevant))
        self.true = self.false = torch.full((relevant.shape[1], self.k), -math.inf, device=device)
        self.rows = [torch.zeros(0, 2, dtype=torch.float64)]

    def add(self, first: int, scores: Tensor) -> None:
        """scores (b, T) of images first, first + 1, ... of this rank's share."""
        scores = no_nan(scores)
        relevant = self.relevant[first : first + len(scores)].to(self.device)  # (b, T)
        true, false = scores.masked_fill(~relevant, -math.inf), scores.masked_fill(relevant, -math.inf)
        top = (true.amax(1) > false.amax(1)).cpu().double()  # (b,)
        self.rows.append(torch.stack([average_precision(scores, relevant), top], 1))
        self.true, self.false = keep_best(self.true, true), keep_best(self.false, false)

    def metrics(self) -> dict[str, float]:
        rows = gather_rows(torch.cat(self.rows))  # (N_img, 2)
        rows = rows[rows[:, 0].isfinite()]  # without images that no text is true of
        both = torch.cat([best_of_ranks(self.false), best_of_ranks(self.true)], 1)  # (T, 2 k)
        is_true = torch.arange(2 * self.k, device=self.device).expand_as(both) >= self.k
        top = ordered_hits(both, is_true)[:, : self.k]  # (T, k)
        i2t_map, i2t_p1 = rows.mean(0).tolist()
        return {"i2t_map": i2t_map, "i2t_p@1": i2t_p1, f"t2i_p@{self.k}": top.cpu().double().mean().item()}

    def chance(self) -> dict[str, float]:
        rights, share = self.relevant.sum(1), self.relevant.double().mean().item()
        i2t_map = chance_of_precision(rights[rights > 0], self.relevant.shape[1]).mean().item()
        return {"i2t_map": i2t_map, "i2t_p@1": share, f"t2i_p@{self.k}": share}

    def ceiling(self) -> dict[str, float]:
        share = self.relevant.sum(0).clamp(max=self.k).double().mean() / self.k
        return {f"t2i_p@{self.k}": share.item()}


def map_figures(maps: Tensor, masks: Tensor) -> Tensor:
    """The MAP_FIGURES of each map whose mask is not empty.

    lift      share of the map's mass on the foreground / share of the area; 1 is chance
    pointing  is the highest place on the foreground? Ties count in part. Chance: area
    area      the foreground's share of the image
    iou       intersection over union with the part of the map above half of its range
    Args: maps (N, H, W) >= 0, of any scale;  masks (N, H, W), nonzero on the foreground   Returns: (N', 4)
    """
    maps, masks = maps.flatten(1).cpu().double(), masks.flatten(1).cpu() != 0  # (N, H W)
    maps, masks = maps[masks.any(1)], masks[masks.any(1)]
    area = masks.double().mean(1)  # (N',)
    mass = torch.where(maps.sum(1, keepdim=True) > 0, maps, 1.0)  # (N', H W), of an empty map uniform
    lift = (mass * masks).sum(1) / mass.sum(1) / area
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    top = maps == high
    pointing = (top & masks).sum(1).double() / top.sum(1)
    found = (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny) >= 0.5  # (N', H W)
    iou = (found & masks).sum(1).double() / (found | masks).sum(1)
    return torch.stack([lift, pointing, area, iou], 1)
