"""Records arrays for which this folder has no official recording: loops over the definitions in fp64.

    python tests/golden/record.py     # writes the files of CASES and their entries in manifest.json

The loops use numpy and torch (for the gradients) and nothing of this project, so that both the project and
a port can be compared with them. Inputs are drawn in float32, and weights in float16, so that every port
starts from the same numbers. The recorded outputs are the fp64 results rounded to float32.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
KINDS = {"qkv": "qk", "vvv": "vv", "qqv": "qq", "kkv": "kk", "dv": ""}
# rtol of every array, and how many times the effect of one ulp in every input is allowed as atol
RTOL, ULPS = 2e-5, 12


@dataclass
class Case:
    """One file: inputs (name -> array), compute(inputs in fp64) -> outputs, and what the manifest says."""

    inputs: dict
    compute: object
    sizes: dict
    # name -> (shape in letters, meaning); weights and gradients of weights need no entry
    notes: dict
    config: dict = field(default_factory=dict)
    constants: dict = field(default_factory=dict)


# Definitions, one row, token or head at a time -----------------------------------------------------------


def total(terms):
    return torch.stack(list(terms)).sum(0)


def softmax(scores: list) -> Tensor:
    terms = torch.stack([torch.exp(s) for s in scores])
    return terms / terms.sum()


def log_softmax(row: Tensor) -> Tensor:
    return row - torch.log(torch.exp(row).sum())


def unit(row: Tensor) -> Tensor:
    return row / torch.sqrt((row * row).sum())


def layer_norm(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The variance is divided by the width; 1e-5 is added to it inside the root."""
    out = []
    for row in rows:
        centred = row - row.sum() / len(row)
        variance = (centred * centred).sum() / len(row)
        out.append(centred / torch.sqrt(variance + 1e-5) * weight + bias)
    return torch.stack(out)


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.stack([torch.mv(weight, row) + bias for row in rows])


def mix(q: Tensor, k: Tensor, v: Tensor, kind: str, causal: bool = False) -> tuple[Tensor, Tensor]:
    """One head of one sequence, (L, K) each: mixed values (L, K) and weights (L, L)."""
    if kind == "dv":
        return v, torch.eye(len(v), dtype=v.dtype)
    left, right = ({"q": q, "k": k, "v": v}[name] for name in KINDS[kind])
    weights = []
    for i, row in enumerate(left):
        seen = right[: i + 1] if causal else right
        w = softmax([(row * other).sum() / math.sqrt(len(row)) for other in seen])
        weights.append(torch.cat([w, w.new_zeros(len(right) - len(w))]))
    mixed = [total(w * row for w, row in zip(row_weights, v)) for row_weights in weights]
    return torch.stack(mixed), torch.stack(weights)


def attention(w, name, rows: Tensor, heads: int, kind: str, causal: bool) -> tuple[Tensor, Tensor]:
    """LN1 x (L, D) -> the attention's output (L, D) and its weights (H, L, L)."""
    q, k, v = linear(rows, w[name + "in_proj_weight"], w[name + "in_proj_bias"]).chunk(3, 1)
    parts = [mix(*x, kind, causal) for x in zip(*(y.chunk(heads, 1) for y in (q, k, v)))]
    joined = torch.cat([mixed for mixed, _ in parts], 1)
    out = linear(joined, w[name + "out_proj.weight"], w[name + "out_proj.bias"])
    return out, torch.stack([weights for _, weights in parts])


def block(w, name, x: Tensor, heads: int, branch: str = "", causal: bool = False):
    """(L, D) -> the sequence after the block, the branch's output or None, the attention (H, L, L)."""
    normed = layer_norm(x, w[name + "ln_1.weight"], w[name + "ln_1.bias"])
    side = attention(w, name + "attn.", normed, heads, branch, causal)[0] if branch else None
    out, weights = attention(w, name + "attn.", normed, heads, "qkv", causal)
    x = x + out
    hidden = layer_norm(x, w[name + "ln_2.weight"], w[name + "ln_2.bias"])
    hidden = quick_gelu(linear(hidden, w[name + "mlp.c_fc.weight"], w[name + "mlp.c_fc.bias"]))
    return x + linear(hidden, w[name + "mlp.c_proj.weight"], w[name + "mlp.c_proj.bias"]), side, weights


def image_tower(w, c: dict, image: Tensor) -> Tensor:
    """(3, S, S) -> all tokens after ln_post, before any projection."""
    p, side = c["patch"], c["image_size"] // c["patch"]
    first = w["visual.class_embedding"]
    tokens = list(first) if first.dim() == 2 else [first]
    for r in range(side):
        for s in range(side):
            pixels = image[:, r * p : (r + 1) * p, s * p : (s + 1) * p]
            tokens.append(torch.stack([(kernel * pixels).sum() for kernel in w["visual.conv1.weight"]]))
    x = torch.stack(tokens) + w["visual.positional_embedding"]
    x = layer_norm(x, w["visual.ln_pre.weight"], w["visual.ln_pre.bias"])
    for i in range(c["vision_layers"]):
        x = block(w, f"visual.transformer.resblocks.{i}.", x, c["vision_heads"])[0]
    return layer_norm(x, w["visual.ln_post.weight"], w["visual.ln_post.bias"])


def text_tower(w, c: dict, tokens: Tensor) -> Tensor:
    """(L,) -> the feature (D,) after ln_final of the first token with the highest id."""
    x = torch.stack([w["token_embedding.weight"][t] for t in tokens.tolist()])
    x = x + w["positional_embedding"][: len(x)]
    for i in range(c["text_layers"]):
        x = block(w, f"transformer.resblocks.{i}.", x, c["text_heads"], causal=True)[0]
    end = tokens.tolist().index(max(tokens.tolist()))
    return layer_norm(x, w["ln_final.weight"], w["ln_final.bias"])[end]


def info_nce(logits: Tensor) -> Tensor:
    rows = [-log_softmax(row)[i] for i, row in enumerate(logits)]
    columns = [-log_softmax(column)[i] for i, column in enumerate(logits.t())]
    return (total(rows) + total(columns)) / (2 * len(logits))


def siglip(logits: Tensor, offset: int = 0) -> Tensor:
    terms = [
        torch.log1p(torch.exp(-(1 if j == i + offset else -1) * logit))
        for i, row in enumerate(logits)
        for j, logit in enumerate(row)
    ]
    return total(terms) / len(logits)


def kl(target: Tensor, other: Tensor) -> Tensor:
    return (target * (torch.log(target) - torch.log(other))).sum()


# Weights and inputs --------------------------------------------------------------------------------------


class Draw:
    """Random arrays: float16 values for weights, float32 for inputs."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape, std=1.0, mean=0.0, dtype=np.float32):
        return np.asarray(self.rng.normal(mean, std, shape), dtype)

    def weight(self, *shape, std=None, mean=0.0):
        std = shape[-1] ** -0.5 if std is None else std
        return self(*shape, std=std, mean=mean, dtype=np.float16)

    def norm(self, name: str, width: int) -> dict:
        return {
            f"w.{name}.weight": self.weight(width, std=0.2, mean=1),
            f"w.{name}.bias": self.weight(width, std=0.1),
        }

    def blocks(self, prefix: str, layers: int, width: int, mlp: int) -> dict:
        w = {}
        for i in range(layers):
            name = f"w.{prefix}resblocks.{i}."
            w |= {
                name + "attn.in_proj_weight": self.weight(3 * width, width),
                name + "attn.in_proj_bias": self.weight(3 * width, std=0.3),
                name + "attn.out_proj.weight": self.weight(width, width),
                name + "attn.out_proj.bias": self.weight(width, std=0.1),
            }
            w |= self.norm(name[2:] + "ln_1", width) | self.norm(name[2:] + "ln_2", width)
            w |= {
                name + "mlp.c_fc.weight": self.weight(mlp, width),
                name + "mlp.c_fc.bias": self.weight(mlp, std=0.1),
                name + "mlp.c_proj.weight": self.weight(width, mlp),
                name + "mlp.c_proj.bias": self.weight(width, std=0.1),
            }
        return w

    def towers(self, c: dict, tokens: int | None) -> dict:
        """Both towers without projections; embeddings are small: the variance of a row is near 1e-5."""
        D, T, p, small = c["vision_width"], c["text_width"], c["patch"], 3e-3
        patches = (c["image_size"] // p) ** 2
        w = {
            "w.visual.conv1.weight": self.weight(D, 3, p, p, std=small / (3 * p * p) ** 0.5),
            "w.visual.class_embedding": self.weight(*([tokens] if tokens else []), D, std=small),
            "w.visual.positional_embedding": self.weight((tokens or 1) + patches, D, std=small),
            "w.token_embedding.weight": self.weight(c["vocab_size"], T, std=small),
            "w.positional_embedding": self.weight(c["context_length"], T, std=small),
        }
        w |= self.norm("visual.ln_pre", D) | self.norm("visual.ln_post", D) | self.norm("ln_final", T)
        w |= self.blocks("visual.transformer.", c["vision_layers"], D, c["vision_mlp"])
        return w | self.blocks("transformer.", c["text_layers"], T, c["text_mlp"])


def sizes_of(embed: int, **changes) -> dict:
    """The configuration of the small models: the towers differ in width and heads."""
    c = dict(embed=embed, image_size=8, patch=4, vision_width=24, vision_layers=2, vision_heads=3)
    c |= dict(vision_mlp=48, context_length=11, vocab_size=40, text_width=20, text_layers=2, text_heads=2)
    return c | dict(text_mlp=40, activation="quick_gelu", layer_norm_eps=1e-5) | changes


# 38 starts a text and 39 ends it
TEXTS = [
    [38, 5, 17, 39, 0, 0, 0, 0, 0],
    [38, 8, 39, 21, 3, 39, 7, 0, 0],  # two end tokens: the first one counts
    [38, 4, 0, 11, 39, 0, 0, 0, 0],  # a 0 inside
    [38, 9, 30, 2, 14, 6, 33, 27, 39],  # no padding
    [38, 39, 0, 0, 0, 0, 0, 0, 0],  # empty
    [38, 12, 0, 0, 25, 39, 39, 0, 0],
    [38, 31, 19, 16, 39, 1, 1, 1, 1],  # padded with another number
]


def gradients(outputs: dict, loss: Tensor, w: dict, full: list[str], tag: str = "") -> None:
    """Adds the gradients of the loss for the weights w: the norms of all, and the whole arrays of some."""
    names = sorted(name for name, value in w.items() if value.requires_grad)
    found = torch.autograd.grad(loss, [w[name] for name in names], retain_graph=True, allow_unused=True)
    found = {n: torch.zeros_like(w[n]) if g is None else g for n, g in zip(names, found)}
    outputs[f"out.grad_norms{tag}"] = torch.stack([found[name].norm() for name in names])
    for name in full:
        outputs[f"out.grad{tag}.{name}"] = found[name]


def weights_of(x: dict) -> dict:
    return {name[2:]: value for name, value in x.items() if name.startswith("w.")}


# The cases -----------------------------------------------------------------------------------------------


def attention_kinds() -> Case:
    B, H, L, K = 2, 3, 5, 4
    rng = np.random.default_rng(0)
    inputs = {f"in.{name}": rng.normal(0, 1.5, (B, H, L, K)).astype(np.float32) for name in "qkv"}

    def compute(x):
        out = {}
        for kind in KINDS:
            parts = [mix(*(x["in." + n][b, h] for n in "qkv"), kind) for b in range(B) for h in range(H)]
            out[f"out.{kind}.weights"] = torch.stack([p[1] for p in parts]).view(B, H, L, L)
            out[f"out.{kind}.mixed"] = torch.stack([p[0] for p in parts]).view(B, H, L, K)
        return out

    notes = {f"in.{name}": ("B H L K", word) for name, word in zip("qkv", ("queries", "keys", "values"))}
    for kind in KINDS:
        notes[f"out.{kind}.weights"] = "B H L L", "weights, sum to 1 over the last axis; dv: the identity"
        notes[f"out.{kind}.mixed"] = "B H L K", "weights times values"
    constants = {"scale": "1/sqrt(K)", "mask": "none"}
    return Case(inputs, compute, dict(B=B, H=H, L=L, K=K), notes, constants=constants)


def layers() -> Case:
    """LayerNorm and normalisation of rows with variances near 1e-5, softmax of large scores, activations."""
    draw, N, D = Draw(1), 5, 12
    std = np.array([1e-3, 10**-2.5, 10**-2.5, 1e-2, 1])[:, None]
    rows = draw(N, D).astype(np.float64)
    rows = (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)
    mean = np.array([0, 0, 2, 0, 0.5])[:, None]
    inputs = {"in.x": (std * (rows + mean)).astype(np.float32)}
    inputs |= draw.norm("ln", D) | {"in.cotangent": draw(N, D), "in.activation": draw(N, D, std=2)}
    inputs["in.scores"] = draw(N, D, mean=100, std=4)

    def compute(x):
        y = layer_norm(x["in.x"], x["w.ln.weight"], x["w.ln.bias"])
        loss = (y * x["in.cotangent"]).sum()
        grads = torch.autograd.grad(loss, [x["in.x"], x["w.ln.weight"], x["w.ln.bias"]], retain_graph=True)
        a = x["in.activation"]
        return {
            "out.layer_norm": y,
            "out.layer_norm.grad.x": grads[0],
            "out.layer_norm.grad.weight": grads[1],
            "out.layer_norm.grad.bias": grads[2],
            "out.unit": torch.stack([unit(row) for row in x["in.x"]]),
            "out.quick_gelu": quick_gelu(a),
            "out.softmax": torch.stack([softmax(list(row)) for row in x["in.scores"]]),
            "out.log_softmax": torch.stack([log_softmax(row) for row in x["in.scores"]]),
            "out.gelu": a * (1 + torch.erf(a / math.sqrt(2))) / 2,
        }

    shape = "N D"
    notes = {
        "in.x": (shape, "rows; their variances are near 1e-6, 1e-5, 1e-5 (with a mean), 1e-4 and 1"),
        "in.cotangent": (shape, "the gradients are those of sum(cotangent * layer_norm)"),
        "in.activation": (shape, "input of the activations"),
        "in.scores": (shape, "input of the softmax, near 100: exp overflows in fp32"),
        "out.softmax": (shape, "softmax over the last axis"),
        "out.log_softmax": (shape, "its logarithm"),
        "out.layer_norm": (shape, "LayerNorm of x with w.ln, eps 1e-5 inside the root"),
        "out.layer_norm.grad.x": (shape, "gradient for x"),
        "out.layer_norm.grad.weight": ("D", "gradient for w.ln.weight"),
        "out.layer_norm.grad.bias": ("D", "gradient for w.ln.bias"),
        "out.unit": (shape, "x divided by its L2 norm, without an epsilon"),
        "out.quick_gelu": (shape, "x sigmoid(1.702 x)"),
        "out.gelu": (shape, "x (1 + erf(x / sqrt(2))) / 2, the exact form"),
    }
    return Case(inputs, compute, dict(N=N, D=D), notes, constants={"layer_norm_eps": 1e-5})


def losses_small() -> Case:
    """InfoNCE near 1 and SigLIP with a bias near -2, and both for the rows of one of two processes."""
    draw, B, E, rank = Draw(2), 5, 6, slice(2, 4)
    both = [draw(B, E, std=0.6) for _ in range(2)]
    both[1] += 0.7 * both[0]
    inputs = {
        f"in.{name}_features": (x / np.sqrt((x**2).sum(1, keepdims=True))).astype(np.float32)
        for name, x in zip(("image", "text"), both)
    }
    inputs |= {"in.scale": np.float32(2.5), "in.bias": np.float32(-1.9)}

    def compute(x):
        leaves = {
            "image_features": x["in.image_features"],
            "text_features": x["in.text_features"],
            "scale": x["in.scale"],
            "bias": x["in.bias"],
        }
        cosines = x["in.image_features"] @ x["in.text_features"].t()
        logits = x["in.scale"] * cosines
        biased = logits + x["in.bias"]
        rows = [-log_softmax(logits[i])[i] - log_softmax(logits[:, i])[i] for i in range(2, 4)]
        losses = {
            "info_nce": info_nce(logits),
            "info_nce_rank": total(rows) / (2 * len(rows)),
            "siglip": siglip(biased),
            "siglip_rank": siglip(biased[rank], 2),
            "info_nce_large": info_nce(40 * logits),
            "siglip_large": siglip(100 * logits),
        }
        out = {}
        for name, loss in losses.items():
            out[f"out.{name}.loss"] = loss
            grads = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
            for leaf, grad in zip(leaves, grads):
                if grad is not None:
                    out[f"out.{name}.grad.{leaf}"] = grad
        return out

    notes = {
        "in.image_features": ("B E", "unit image features; row i belongs to text i"),
        "in.text_features": ("B E", "unit text features"),
        "in.scale": ("", "scale (exponential)"),
        "in.bias": ("", "bias, only for siglip and siglip_rank"),
    }
    for name in ("info_nce", "info_nce_rank", "siglip", "siglip_rank", "info_nce_large", "siglip_large"):
        notes[f"out.{name}.loss"] = "", "loss, mean over its rows"
        for leaf, shape in {"image_features": "B E", "text_features": "B E", "scale": "", "bias": ""}.items():
            notes[f"out.{name}.grad.{leaf}"] = shape, "gradient of the loss; features are leaves"
    constants = {
        "rank": "the rows 2 and 3 of the five: losses of one process with offset 2, divided by 2 rows; "
        "info_nce_rank uses rows 2 and 3 of the logits and of their transpose",
        "large": "InfoNCE of 40 times the logits, and SigLIP of 100 times the logits without bias: exp "
        "overflows in fp32",
    }
    return Case(inputs, compute, dict(B=B, E=E), notes, constants=constants)


def clip_texts() -> Case:
    """CLIP whose towers differ in width and heads, on texts that are hard to pool."""
    c, draw, B = sizes_of(16, vision_layers=1), Draw(3), len(TEXTS)
    inputs = {"in.image": draw(B, 3, 8, 8), "in.tokens": np.array(TEXTS)} | draw.towers(c, None)
    inputs |= {"w.visual.proj": draw.weight(24, 16), "w.text_projection": draw.weight(20, 16)}
    inputs["w.logit_scale"] = np.float16(1.5)

    def compute(x):
        w = weights_of(x)
        image = torch.stack([image_tower(w, c, one)[0] @ w["visual.proj"] for one in x["in.image"]])
        text = torch.stack([text_tower(w, c, one) @ w["text_projection"] for one in x["in.tokens"]])
        cosines = torch.stack([torch.stack([(unit(i) * unit(t)).sum() for t in text]) for i in image])
        logits = torch.exp(w["logit_scale"]) * cosines
        loss = info_nce(logits)
        out = dict(zip(("image_raw", "text_raw", "logits", "loss"), (image, text, logits, loss)))
        out = {f"out.{name}": value for name, value in out.items()}
        full = ["logit_scale", "visual.class_embedding", "text_projection", "visual.ln_pre.bias"]
        gradients(out, loss, w, [*full, "token_embedding.weight", "positional_embedding"])
        return out

    notes = {
        "in.image": ("B 3 S S", "images, normalised"),
        "in.tokens": ("B L", "token ids; 39 is the end token. Rows: plain, two end tokens, a 0 inside, no "
                      "padding, empty, several zeros inside and two end tokens, padded with 1"),
        "out.image_raw": ("B E", "image features, not normalised"),
        "out.text_raw": ("B E", "text features, not normalised"),
        "out.logits": ("B B", "exp(logit_scale) * cosine, rows are images"),
        "out.loss": ("", "InfoNCE"),
    }  # fmt: skip
    sizes = dict(B=B, L=9, S=8, E=16)
    return Case(inputs, compute, sizes, notes, c, {"logit_scale": "w.logit_scale is the logarithm"})


def second_branch() -> Case:
    """AlignCLIP's second branch with each kind of attention, before the head."""
    draw, B, P, D, H, depth, first, aligned = Draw(4), 2, 6, 32, 4, 4, 2, 3
    inputs = {"in.x": draw(B, 1 + P, D, std=0.3)} | draw.blocks("transformer.", depth, D, 32)
    inputs |= {f"in.cotangent_{n}": draw(B, 1 + P, D) for n in ("x", "z")}
    inputs["in.cotangent_rows"] = draw(aligned, B, 1 + P, std=3)

    def compute(x):
        w, out = weights_of(x), {}
        for kind in ("dv", "vvv", "qqv", "kkv"):
            plain, branch, rows = [], [], []
            for sequence in x["in.x"]:
                z, own = None, []
                for i in range(depth):
                    z = sequence if i == first else z
                    name = f"transformer.resblocks.{i}."
                    sequence, side, weights = block(w, name, sequence, H, kind if i >= first else "")
                    z = z + side if i >= first else z
                    if i < aligned:
                        own.append(total(weights) / H)
                plain.append(sequence), branch.append(z), rows.append(torch.stack([m[0] for m in own]))
            plain, branch, rows = torch.stack(plain), torch.stack(branch), torch.stack(rows, 1)
            loss = (x["in.cotangent_x"] * plain).sum() + (x["in.cotangent_z"] * branch).sum()
            loss = loss + (x["in.cotangent_rows"] * rows).sum()
            out |= {f"out.{kind}.x": plain, f"out.{kind}.z": branch, f"out.{kind}.attention_rows": rows}
            out[f"out.{kind}.grad.x"] = torch.autograd.grad(loss, x["in.x"], retain_graph=True)[0]
            found = {}
            full = [f"transformer.resblocks.{i}.attn.in_proj_bias" for i in (1, 3)]
            full += [f"transformer.resblocks.3.{n}" for n in ("attn.out_proj.bias", "ln_1.weight")]
            gradients(found, loss, w, full)
            out |= {f"out.{kind}.{name[4:]}": value for name, value in found.items()}
        return out

    tokens = "B 1+P D"
    notes = {
        "in.x": (tokens, "input of the first block; token 0 is the class token"),
        "in.cotangent_x": (tokens, "the gradients are those of sum(cotangent_x * x) + the same for z, rows"),
        "in.cotangent_z": (tokens, "see in.cotangent_x"),
        "in.cotangent_rows": ("aligned B 1+P", "see in.cotangent_x"),
    }
    for kind in ("dv", "vvv", "qqv", "kkv"):
        notes[f"out.{kind}.x"] = tokens, "plain path after all blocks"
        notes[f"out.{kind}.z"] = tokens, "second branch after all blocks"
        notes[f"out.{kind}.attention_rows"] = (
            "aligned B 1+P",
            "the class token's attention in the first blocks of the plain path, mean over heads",
        )
        notes[f"out.{kind}.grad.x"] = tokens, "gradient for in.x"
    config = dict(vision_width=D, vision_layers=depth, vision_heads=H, vision_mlp=32)
    config |= dict(activation="quick_gelu", layer_norm_eps=1e-5)
    constants = {
        "first_dual_block": "2: index of the branch's first block, counted from 0; its input is the plain "
        "path before this block",
        "aligned_layers": aligned,
        "weights": "w.transformer.resblocks.0 to 3",
    }
    return Case(inputs, compute, dict(B=B, P=P, D=D, aligned=aligned), notes, config, constants)


def alignclip_options() -> Case:
    """One step of AlignCLIP from token features on: the defaults, a fixed teacher, another temperature."""
    draw, B, P, C, E, aligned = Draw(5), 3, 7, 4, 10, 2
    rows = np.exp(draw(aligned, B, 1 + P))
    inputs = {
        "in.text_raw": draw(1, E) + 0.35 * draw(C, E),
        "in.tokens_plain_raw": draw(B, 1 + P, E, std=2),
        "in.tokens_branch_raw": draw(B, 1 + P, E, std=2),
        "in.attention_rows": (rows / rows.sum(-1, keepdims=True)).astype(np.float32),
        "in.labels": np.array([2, 0, 2]),
        "in.attention_with_zero": np.array([[0.5, 0.25, 0.25, 0], [0, 0, 0.5, 0.5]], np.float32),
        "in.guidance": np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], np.float32),
    }
    margin, scale, epsilon, weight = 0.3, 20.0, 0.8, 10.0
    options = {"default": {}, "detach": {"detach": True}, "temperature0.1": {"temperature": 0.1}}
    options["all"] = {"over": "all"}

    def compute(x):
        text = torch.stack([unit(row) for row in x["in.text_raw"]])
        D = torch.stack([softmax([35 * (row * other).sum() for other in text]) for row in text])
        eye = torch.eye(C, dtype=D.dtype)
        mixture = epsilon * eye + (1 - epsilon) * D
        out = {
            "out.targets.mixture": mixture,
            "out.targets.released": torch.stack([
                torch.stack([eye[y, c] * epsilon if c == y else D[y, c] for c in range(C)]) for y in range(C)
            ]),
            "out.targets.uniform": epsilon * eye + (1 - epsilon) / C,
            "out.targets.none": eye,
        }  # fmt: skip
        smallest = x["in.attention_with_zero"].clamp_min(2.0**-126)
        pairs = zip(x["in.guidance"], smallest)
        out["out.zero.attention_loss"] = total(kl(target, a) for target, a in pairs) / 2
        labels = x["in.labels"].tolist()
        leaves = [x["in." + n] for n in ("tokens_plain_raw", "tokens_branch_raw", "attention_rows")]
        for tag, option in options.items():
            cls, attention, similarity = [], [], []
            for b, y in enumerate(labels):
                plain = [unit(row) for row in x["in.tokens_plain_raw"][b]]
                logits = torch.stack([scale * ((plain[0] - margin * text[y]) * t).sum() for t in text])
                cls.append(-(mixture[y] * log_softmax(logits)).sum())
                guide = [unit(row) for row in x["in.tokens_branch_raw"][b, 1:]]
                S = torch.stack([torch.stack([(row * t).sum() for t in text]) for row in plain[1:]])
                S_s = torch.stack([torch.stack([(row * t).sum() for t in text]) for row in guide])
                S_s = S_s.detach() if option.get("detach") else S_s
                G = softmax(list(S_s[:, y] / option.get("temperature", 1)))
                patches = [rows[b, 1:] for rows in x["in.attention_rows"]]
                A = total(row / row.sum() for row in patches) / aligned
                attention.append(kl(G, A))
                maps = range(C) if option.get("over") == "all" else [y]
                similarity.append(total(kl(softmax(list(S_s[:, c])), softmax(list(S[:, c]))) for c in maps))
                out.setdefault(f"out.{tag}.guidance", []).append(G)
                out.setdefault(f"out.{tag}.attention", []).append(A)
            for name in ("guidance", "attention"):
                out[f"out.{tag}.{name}"] = torch.stack(out[f"out.{tag}.{name}"])
            parts = [total(terms) / B for terms in (cls, attention, similarity)]
            loss = parts[0] + weight * (parts[1] + parts[2])
            names = ("classification_loss", "attention_loss", "similarity_loss", "total_loss")
            out |= {f"out.{tag}.{name}": value for name, value in zip(names, [*parts, loss])}
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
            for name, leaf, grad in zip(("tokens_plain", "tokens_branch", "attention_rows"), leaves, grads):
                out[f"out.{tag}.grad.{name}"] = torch.zeros_like(leaf) if grad is None else grad
        return out

    tokens = "B 1+P E"
    notes = {
        "in.text_raw": ("C E", "text features, not normalised"),
        "in.tokens_plain_raw": (tokens, "token features of the plain path, not normalised"),
        "in.tokens_branch_raw": (tokens, "token features of the second branch, not normalised"),
        "in.attention_rows": ("aligned B 1+P", "the class token's attention, mean over heads, rows sum to 1"),
        "in.labels": ("B", "class of each image"),
        "in.attention_with_zero": ("2 4", "attention with values of exactly 0"),
        "in.guidance": ("2 4", "guidance for in.attention_with_zero"),
        "out.zero.attention_loss": ("", "KL(guidance || attention); 0 counts as 2**-126"),
    }
    for form in ("mixture", "released", "uniform", "none"):
        notes[f"out.targets.{form}"] = "C C", f"smoothing targets in the form {form}, row y is for label y"
    for tag in options:
        notes[f"out.{tag}.guidance"] = "B P", "G, rows sum to 1"
        notes[f"out.{tag}.attention"] = "B P", "A, rows sum to 1"
        notes[f"out.{tag}.classification_loss"] = "", "margin softmax with the targets mixture"
        notes[f"out.{tag}.attention_loss"] = "", "KL(G || A), mean over images"
        notes[f"out.{tag}.similarity_loss"] = "", "KL(softmax_P S_s || softmax_P S), mean over images"
        notes[f"out.{tag}.total_loss"] = "", "classification + weight * (attention + similarity)"
        for name, shape in zip(
            ("tokens_plain", "tokens_branch", "attention_rows"), (tokens, tokens, "aligned B 1+P")
        ):
            notes[f"out.{tag}.grad.{name}"] = shape, "gradient of the total loss"
    constants = {
        "margin": margin, "scale": scale, "epsilon": epsilon, "smoothing_scale": 35, "weight": weight,
        "aligned_layers": aligned,
        "default": "targets mixture, similarity of the label's map, guidance temperature 1",
        "detach": "the same, without a gradient through S_s (into the guidance and the similarity target)",
        "temperature0.1": "the defaults with guidance temperature 0.1",
        "all": "the defaults with the similarity summed over all classes",
    }  # fmt: skip
    sizes = dict(B=B, P=P, C=C, E=E, aligned=aligned)
    return Case(inputs, compute, sizes, notes, constants=constants)


def llip(variant: str) -> Case:
    """Llip with B, H, M and K all different, towers with different heads, and a bias near -2."""
    E, H, M, tau = 20, 4, 3, 1.7
    layers = 1 if variant else 2
    c, draw, B = sizes_of(E, vision_layers=layers, text_layers=layers), Draw(6 + len(variant)), 6
    K, P, D, T, used = E // H, 4, c["vision_width"], c["text_width"], M + 4 * (variant == "all_tokens")
    learned = variant == "learned"
    inputs = {"in.image": draw(B, 3, 8, 8), "in.tokens": np.array(TEXTS[:B])} | draw.towers(c, M)
    inputs |= {"w.k_proj": draw.weight(used, D, E, std=0.3), "w.text_projection": draw.weight(T, E)}
    inputs["w.visual.proj" if learned else "w.v_proj"] = draw.weight(used, D, E, std=0.3)
    inputs["w.query" if learned else "w.q_proj"] = draw.weight(*([E] if learned else [T, E]), std=0.6)
    inputs |= {"w.pred.out_proj": draw.weight(E, E), "w.logit_scale": np.float16(1.8)}
    inputs["w.logit_bias"] = np.float16(-1.9)
    if variant == "norm":
        inputs |= draw.norm("K_norm", E) | draw.norm("V_norm", E) | draw.norm("Q_norm", E)
    if not variant:
        # row c of the prompts is of class PROMPT_CLASS[c]
        inputs |= {"in.prompts": np.array(TEXTS), "in.prompt_class": np.array([1, 0, 2, 1, 2, 1, 0])}

    def norm(w, name, rows):
        return layer_norm(rows, w[name + ".weight"], w[name + ".bias"]) if variant == "norm" else rows

    def per_head(w, key, value, query):
        """(M, E), (M, E), (E,) -> z (E,) and the weights (H, M)."""
        heads, phis = [], []
        for h in range(H):
            own = slice(h * K, (h + 1) * K)
            phi = softmax([(key[m, own] * query[own]).sum() / tau for m in range(used)])
            heads.append(total(phi[m] * value[m, own] for m in range(used)))
            phis.append(phi)
        return torch.cat(heads) @ w["pred.out_proj"], torch.stack(phis)

    def compute(x):
        w, out = weights_of(x), {}
        tokens = [image_tower(w, c, one)[:used] for one in x["in.image"]]
        each = lambda rows, name: torch.stack([row @ m for row, m in zip(rows, w[name])])  # noqa: E731
        keys = [norm(w, "K_norm", each(rows, "k_proj")) for rows in tokens]
        values = [norm(w, "V_norm", each(rows, "visual.proj" if learned else "v_proj")) for rows in tokens]
        split = lambda rows: torch.stack(rows).view(len(rows), used, H, K).transpose(1, 2)  # noqa: E731

        def encode(texts):
            rows = torch.stack([text_tower(w, c, one) for one in texts])
            return None if learned else norm(w, "Q_norm", rows @ w["q_proj"]), rows @ w["text_projection"]

        queries, text = encode(x["in.tokens"])
        if learned:
            z = torch.stack([per_head(w, k, v, w["query"])[0] for k, v in zip(keys, values)])
            z = z[:, None].expand(B, B, E)
            out["out.image_raw"] = z[:, 0]
        else:
            mixed = [[per_head(w, k, v, q) for q in queries] for k, v in zip(keys, values)]
            z = torch.stack([torch.stack([pair[0] for pair in row]) for row in mixed])
            phi = torch.stack([torch.stack([pair[1] for pair in row]) for row in mixed])
            out |= {"out.K": split(keys), "out.V": split(values), "out.Q": queries.view(B, H, K)}
            out |= {"out.phi": phi, "out.z": z}

        def logits_of(z, text):
            cosines = [[(unit(z[i, j]) * unit(t)).sum() for j, t in enumerate(text)] for i in range(B)]
            return (
                torch.exp(w["logit_scale"]) * torch.stack([torch.stack(r) for r in cosines]) + w["logit_bias"]
            )

        logits = logits_of(z, text)
        loss = siglip(logits)
        out |= {"out.text_raw": text, "out.logits": logits, "out.loss": loss}
        full = ["logit_scale", "logit_bias", "pred.out_proj", "visual.class_embedding", "text_projection"]
        full += ["query", "k_proj"] if learned else ["q_proj", "visual.ln_post.weight", "ln_final.bias"]
        full += [f"{n}_norm.weight" for n in "KVQ"] if variant == "norm" else []
        gradients(out, loss, w, full)
        if "in.prompts" in x:
            queries, text = encode(x["in.prompts"])
            groups = [[i for i, c in enumerate(x["in.prompt_class"].tolist()) if c == y] for y in range(3)]
            queries = torch.stack([total(queries[i] for i in own) / len(own) for own in groups])
            text = torch.stack([unit(total(unit(text[i]) for i in own) / len(own)) for own in groups])
            mixed = [[per_head(w, k, v, q)[0] for q in queries] for k, v in zip(keys, values)]
            out |= {"out.class_Q": queries.view(3, H, K), "out.class_text": text}
            out["out.class_logits"] = logits_of(torch.stack([torch.stack(row) for row in mixed]), text)
        return out

    tokens = "M+P" if variant == "all_tokens" else "M"
    notes = {
        "in.image": ("B 3 S S", "images, normalised"),
        "in.tokens": ("B L", "token ids; 39 is the end token, and some rows have two of them or a 0 inside"),
        "in.prompts": ("N L", "token ids of the prompts"),
        "in.prompt_class": ("N", "class of each prompt"),
        "out.K": (f"B H {tokens} K", "keys"),
        "out.V": (f"B H {tokens} K", "values"),
        "out.Q": ("B H K", "queries"),
        "out.phi": (f"B B H {tokens}", "mixing weights, image and text; they sum to 1 over the last axis"),
        "out.z": ("B B E", "mixed image features after W_O, image and text, not normalised"),
        "out.image_raw": ("B E", "pooled image features after W_O, not normalised"),
        "out.text_raw": ("B E", "text features, not normalised"),
        "out.logits": ("B B", "exp(logit_scale) * cosine + logit_bias, rows are images"),
        "out.loss": ("", "SigLIP"),
        "out.class_Q": ("C H K", "mean of the queries of a class's prompts, not normalised"),
        "out.class_text": ("C E", "unit mean of the unit text features of a class's prompts"),
        "out.class_logits": ("B C", "logits of images and classes"),
    }
    config = c | dict(mixture_tokens=M, mixture_heads=H, norm=variant == "norm")
    config |= dict(all_tokens=variant == "all_tokens") | (dict(pooling="learned") if learned else {})
    constants = {
        "temperature": tau,
        "logit_scale": "w.logit_scale is the logarithm",
        "logit_bias": "w.logit_bias",
        "mixing": "softmax over the tokens of (key . query) / temperature, without 1/sqrt(K)",
        "loss": "SigLIP over all pairs of in.image and in.tokens",
    }
    sizes = dict(B=B, L=9, S=8, E=E, H=H, M=M, K=K, P=P, D=D) | (dict(N=7, C=3) if not variant else {})
    return Case(inputs, compute, sizes, notes, config, constants)


def views() -> Case:
    """The tensors of views.pt, in which most are views of two storages."""
    inputs = {}
    expected = {f"out.{name}": tensor.contiguous() for name, tensor in view_tensors().items()}
    notes = {
        "out.plain": ("4 6", "the whole storage, float32"),
        "out.transposed": ("6 4", "the transpose: strides (1, 6)"),
        "out.offset": ("2 6", "rows 1 and 2: storage offset 6"),
        "out.transposed_offset": ("3 2", "offset 7 and strides (1, 6)"),
        "out.strided": ("4 2", "columns 1 and 4: offset 1 and strides (6, 3)"),
        "out.permuted": ("3 2 4", "float16, axes permuted: strides (4, 12, 1)"),
        "out.scalar": ("", "float16, offset 23"),
    }
    return Case(inputs, lambda x: expected, {}, notes, constants={"file": "views.pt, under state_dict"})


def view_tensors() -> dict[str, Tensor]:
    base, half = torch.from_numpy(Draw(20)(4, 6)), torch.from_numpy(Draw(21).weight(2, 3, 4))
    return {
        "plain": base,
        "transposed": base.t(),
        "offset": base[1:3],
        "transposed_offset": base[1:3, 1:4].t(),
        "strided": base[:, 1::3],
        "permuted": half.permute(1, 0, 2),
        "scalar": half[1, 2, 3],
    }


CASES = {
    "attention_kinds": attention_kinds,
    "layers": layers,
    "losses_small": losses_small,
    "clip_texts": clip_texts,
    "second_branch": second_branch,
    "alignclip_options": alignclip_options,
    "llip_small": lambda: llip(""),
    "llip_norm": lambda: llip("norm"),
    "llip_all_tokens": lambda: llip("all_tokens"),
    "llip_learned": lambda: llip("learned"),
    "views": views,
}
# weights of official .pt files, as .npz for ports without torch
COPIES = ("clip_vitA_jit_fp16", "llip_ckpt_orig_mod_module")


# Writing -------------------------------------------------------------------------------------------------


def outputs(case: Case, seed: int | None = None) -> dict[str, np.ndarray]:
    """The outputs in fp64; with a seed every float input is moved by one float32 ulp, up or down."""
    rng, x = np.random.default_rng(seed), {}
    for name, value in case.inputs.items():
        if value.dtype.kind == "f":
            value = np.asarray(value, np.float32)
            if seed is not None:
                value = np.nextafter(
                    value, np.where(rng.random(value.shape) < 0.5, -np.inf, np.inf), dtype=np.float32
                )
            x[name] = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        else:
            x[name] = torch.from_numpy(value)
    return {name: value.detach().numpy() for name, value in case.compute(x).items()}


def arrays(case: Case) -> dict[str, np.ndarray]:
    """Everything that the file of a case holds."""
    return case.inputs | {name: value.astype(np.float32) for name, value in outputs(case).items()}


def copy_of(name: str) -> dict[str, np.ndarray]:
    """The weights of a .pt file; prefixes of training wrappers are removed."""
    path = FOLDER / f"{name}.pt"
    if "jit" in name:
        state = torch.jit.load(str(path)).state_dict()
    else:
        state = torch.load(path, weights_only=True)["state_dict"]
    return {"w." + key.removeprefix("_orig_mod.module."): value.numpy() for key, value in state.items()}


def round_up(x: float) -> float:
    """One significant digit."""
    return (
        float(f"{math.ceil(x / 10 ** math.floor(math.log10(x))) * 10 ** math.floor(math.log10(x)):.0e}")
        if x
        else 0
    )


def entry(name: str, case: Case, found: dict[str, np.ndarray]) -> dict:
    """What the manifest says about one file."""
    exact = outputs(case)
    moved = [outputs(case, seed) for seed in (0, 1, 2)]
    described = {}
    for key, value in found.items():
        shape, meaning = case.notes.get(key, (None, "gradient of the loss for this parameter"))
        if "grad_norms" in key:
            meaning = "L2 norm of the gradient of each parameter, in the order of grad_norms_order"
            shape = "parameters"
        dims = (
            [int(s) if s.isdigit() else s for s in shape.split()] if shape is not None else list(value.shape)
        )
        described[key] = {"shape": dims, "dtype": str(value.dtype)}
        if not key.startswith("w."):
            described[key]["meaning"] = meaning
        if key.startswith("out."):
            effect = max(np.abs(m[key] - exact[key]).max(initial=0) for m in moved)
            described[key] |= {"rtol": RTOL, "atol": round_up(ULPS * float(effect))}
    weights = sorted(key[2:] for key in found if key.startswith("w."))
    norms = any("grad_norms" in key for key in found)
    source = f"{name} (loops in fp64; no official code)"
    producer = {"repository": "this repository", "commit": "the one that added the file"}
    test = "llip_variants" if name in ("llip_small", "llip_norm", "llip_all_tokens") else name
    producer |= {"file": "tests/golden/record.py", "function": source, "licence": "MIT"}
    return {
        "own": True,
        "producer": [producer],
        "sha256": "",
        "tests": [f"tests/test_golden_project.py::test_{test}"],
        "config": case.config,
        "constants": case.constants,
        "sizes": case.sizes | ({"parameters": len(weights)} if norms else {}),
        **({"grad_norms_order": weights} if norms else {}),
        "arrays": described,
    }


def save(name: str, found: dict[str, np.ndarray], facts: dict, manifest: dict) -> None:
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, **found)
    listed = {k: {"shape": list(v.shape), "dtype": str(v.dtype)} for k, v in found.items()}
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["files"][path.name] = {"arrays": listed} | facts | {"sha256": sha256}
    print(f"{path.name}: {len(found)} arrays, {path.stat().st_size} bytes")


def write_manifest(manifest: dict) -> None:
    """One array and one fact of a file per line."""
    line = lambda value: json.dumps(value, ensure_ascii=False)  # noqa: E731
    files = []
    for name in sorted(manifest["files"]):
        facts = manifest["files"][name]
        listed = ",\n".join(f"    {line(key)}: {line(value)}" for key, value in facts["arrays"].items())
        rest = [f"   {line(key)}: {line(value)},\n" for key, value in facts.items() if key != "arrays"]
        files.append(f'  {line(name)}: {{\n{"".join(rest)}   "arrays": {{\n{listed}\n   }}\n  }}')
    head = [f" {line(key)}: {line(value)},\n" for key, value in manifest.items() if key != "files"]
    text = "{\n" + "".join(head) + ' "files": {\n' + ",\n".join(files) + "\n }\n}\n"
    (FOLDER / "manifest.json").write_text(text, encoding="utf-8")


def main() -> None:
    manifest = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    for name, make in CASES.items():
        case = make()
        found = arrays(case)
        save(name, found, entry(name, case, found), manifest)
    for name in COPIES:
        facts = manifest["files"][f"{name}.pt"]
        kept = {key: facts[key] for key in ("producer", "sha256", "config", "constants", "sizes")}
        note = f"the weights of {name}.pt, without prefixes of names"
        kept |= {"tests": ["tests/test_golden_project.py::test_npz_copies"], "note": note}
        save(name, copy_of(name), kept, manifest)
    torch.save({"state_dict": view_tensors()}, FOLDER / "views.pt")
    facts = manifest["files"]["views.npz"]
    sha256 = hashlib.sha256((FOLDER / "views.pt").read_bytes()).hexdigest()
    listed = {
        key: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for key, tensor in view_tensors().items()
    }
    kept = {key: facts[key] for key in ("own", "producer", "tests", "config", "sizes")}
    kept |= {"sha256": sha256, "constants": {}, "note": "torch.save of views; views.npz has their values"}
    manifest["files"]["views.pt"] = kept | {"arrays": listed}
    write_manifest(manifest)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
