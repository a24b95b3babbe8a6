"""Records arrays for which no official code exists: loops over the definition in fp64, numpy only.

    python tests/golden/record.py     # writes attention_kinds.npz into this folder

attention_kinds: the five attention structures alone. Vaswani et al. 2017, eq. 1, with other matrices for Q
and K: qkv is plain attention, vvv that of CLIP Surgery, and dv (D-V of AlignCLIP) has the identity for
the weights.
"""

import math
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
KINDS = {"qkv": "qk", "vvv": "vv", "qqv": "qq", "kkv": "kk", "dv": ""}


def attention_kinds() -> dict[str, np.ndarray]:
    """Inputs (B, H, L, K); weights (B, H, L, L) and mixed values (B, H, L, K) of each kind."""
    rng = np.random.default_rng(0)
    B, H, L, K = 2, 3, 5, 4
    # float32 values, so that every port starts from the same numbers
    given = {name: rng.normal(0, 1.5, (B, H, L, K)).astype(np.float32) for name in "qkv"}
    arrays = {f"in.{name}": value for name, value in given.items()}
    for kind, pair in KINDS.items():
        weights, mixed = np.zeros((B, H, L, L)), np.zeros((B, H, L, K))
        for b in range(B):
            for h in range(H):
                x = {name: value[b, h].astype(np.float64) for name, value in given.items()}
                for i in range(L):
                    if kind == "dv":
                        weights[b, h, i, i] = 1
                    else:
                        left, right = (x[name] for name in pair)
                        terms = [math.exp(float(left[i] @ right[j]) / math.sqrt(K)) for j in range(L)]
                        weights[b, h, i] = np.array(terms) / math.fsum(terms)
                    for j in range(L):
                        mixed[b, h, i] += weights[b, h, i, j] * x["v"][j]
        arrays[f"out.{kind}.weights"] = weights.astype(np.float32)
        arrays[f"out.{kind}.mixed"] = mixed.astype(np.float32)
    return arrays


if __name__ == "__main__":
    np.savez(FOLDER / "attention_kinds.npz", **attention_kinds())
