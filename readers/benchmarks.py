"""Splits that papers fix: DomainBed's holdouts, and base and new classes."""

import hashlib

import numpy as np


def domainbed_split(
    n: int, env: int, holdout: float = 0.2, trial: int = 0, part: str | None = None
) -> tuple[list[int], list[int]]:
    """DomainBed's random split of the n images of one domain, in its own order.

    No equation; DomainBed domainbed/lib/misc.py seed_hash, split_dataset @b93c22a.
    Args:    env place of the domain among the sorted ones;  holdout fraction;  trial seed;
             part "base" or "open" for the classes of AlignCLIP's in-the-wild protocol
    Returns: (train, holdout) lists of indices
    """
    seed_of = (trial, env, part) if part else (trial, env)
    seed = int(hashlib.md5(str(seed_of).encode()).hexdigest(), 16) % 2**31
    keys = list(range(n))
    np.random.RandomState(seed).shuffle(keys)
    cut = int(n * holdout)
    return keys[cut:], keys[:cut]


def base_new_classes(count: int, rounding: str = "up") -> tuple[list[int], list[int]]:
    """Numbers of the base and of the new classes: the first half of the sorted ones, and the rest.

    PAPER: CoCoOp takes ceil(C/2) base classes ("up"); CLIPood and AlignCLIP in the wild take floor(C/2)
    ("down"), so that OfficeHome has 32 base and 33 open classes.
    """
    middle = (count + {"up": 1, "down": 0}[rounding]) // 2
    return list(range(middle)), list(range(middle, count))
