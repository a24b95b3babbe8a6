"""The towers, Llip, the losses and AlignCLIP's second branch in NumPy.

Every fact in it is in docs/porting.md, tests/golden/README.md or a docstring. Weights are a dict with the
names of the checkpoints; c is the configuration of tests/golden/manifest.json. Shapes have the letters of
attention.py.
"""

import math

import numpy as np
from tape import Array, concatenate, constant, exp, log, maximum, sigmoid, softplus, sqrt

# Layers


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred / sqrt(variance + 1e-5) * weight + bias


def unit(x):
    return x / sqrt((x * x).sum(-1, keepdims=True))


def quick_gelu(x):
    return x * sigmoid(1.702 * x)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x.data / math.sqrt(2)).astype(x.data.dtype)) / 2


def softmax(x, axis=-1):
    terms = exp(x - x.data.max(axis, keepdims=True))
    return terms / terms.sum(axis, keepdims=True)


def log_softmax(x, axis=-1):
    x = x - x.data.max(axis, keepdims=True)
    return x - log(exp(x).sum(axis, keepdims=True))


def linear(w, name, x):
    return x @ w[name + "weight"].T + w[name + "bias"]


# Attention


def scores_of(a, b):
    return a @ b.transpose(0, 1, 3, 2) / math.sqrt(a.shape[-1])


def attend(q, k, v, kind="qkv", causal=False):
    """q, k, v (B, H, L, K) -> mixed values (B, H, L, K), weights (B, H, L, L)."""
    if kind == "dv":
        return v, Array(np.broadcast_to(np.eye(v.shape[2], dtype=v.data.dtype), (*v.shape[:3], v.shape[2])))
    if kind == "qkv":
        scores = scores_of(q, k)
    elif kind == "vvv":
        scores = scores_of(v, v)
    elif kind == "qqv":
        scores = scores_of(q, q)
    elif kind == "kkv":
        scores = scores_of(k, k)
    if causal:
        length = q.shape[2]
        scores = scores + np.triu(np.full((length, length), -np.inf, np.float32), 1)
    weights = softmax(scores)
    return weights @ v, weights


def project(w, name, x, heads):
    """(B, L, D) -> q, k, v, each (B, H, L, K)."""
    B, L, D = x.shape
    y = x @ w[name + "in_proj_weight"].T + w[name + "in_proj_bias"]
    parts = [y[..., i * D : (i + 1) * D] for i in range(3)]
    return [part.reshape(B, L, heads, D // heads).transpose(0, 2, 1, 3) for part in parts]


def merge(w, name, y):
    """(B, H, L, K) -> (B, L, D)."""
    B, H, L, K = y.shape
    return linear(w, name + "out_proj.", y.transpose(0, 2, 1, 3).reshape(B, L, H * K))


def block(w, name, x, heads, causal=False, branch=None):
    """The sequence after the block (B, L, D), the branch's attention output, the weights (B, H, L, L)."""
    q, k, v = project(w, name + "attn.", layer_norm(x, w[name + "ln_1.weight"], w[name + "ln_1.bias"]), heads)
    side = merge(w, name + "attn.", attend(q, k, v, branch)[0]) if branch else None
    mixed, weights = attend(q, k, v, "qkv", causal)
    x = x + merge(w, name + "attn.", mixed)
    hidden = layer_norm(x, w[name + "ln_2.weight"], w[name + "ln_2.bias"])
    x = x + linear(w, name + "mlp.c_proj.", quick_gelu(linear(w, name + "mlp.c_fc.", hidden)))
    return x, side, weights


def two_paths(w, x, depth, heads, branch, first_dual_block, layers):
    """x (B, L, D) -> plain path, second branch (B, L, D), attention rows (layers, B, L)."""
    z, rows = None, []
    for i in range(depth):
        before = x
        here = branch if i >= first_dual_block else None
        x, side, weights = block(w, f"transformer.resblocks.{i}.", x, heads, branch=here)
        if i == first_dual_block:
            z = before
        if here:
            z = z + side
        if i < layers:
            B, H, L, _ = weights.shape
            rows.append(weights[:, :, 0].mean(1).reshape(1, B, L))
    return x, z, concatenate(rows, 0)


# Towers


def image_tokens(w, c, images):
    """(B, 3, S, S) -> all tokens after ln_post (B, M + P, D); M is 1 for CLIP."""
    p, side, B = c["patch"], c["image_size"] // c["patch"], len(images)
    pixels = images.reshape(B, 3, side, p, side, p).transpose(0, 2, 4, 1, 3, 5)
    kernel = w["visual.conv1.weight"]
    patches = pixels.reshape(B, side * side, 3 * p * p) @ kernel.reshape(len(kernel), 3 * p * p).T
    first = w["visual.class_embedding"]
    first = first.reshape(1, -1, len(kernel)) + np.zeros((B, 1, 1), first.data.dtype)
    x = concatenate([first, patches], 1) + w["visual.positional_embedding"]
    x = layer_norm(x, w["visual.ln_pre.weight"], w["visual.ln_pre.bias"])
    for i in range(c["vision_layers"]):
        x = block(w, f"visual.transformer.resblocks.{i}.", x, c["vision_heads"])[0]
    return layer_norm(x, w["visual.ln_post.weight"], w["visual.ln_post.bias"])


def text_feature(w, c, tokens):
    """(B, L) ids -> the first end token after ln_final (B, D), before any projection."""
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"][: tokens.shape[1]]
    for i in range(c["text_layers"]):
        x = block(w, f"transformer.resblocks.{i}.", x, c["text_heads"], causal=True)[0]
    x = layer_norm(x, w["ln_final.weight"], w["ln_final.bias"])
    end = tokens.argmax(1)
    return x[np.arange(len(tokens)), end]


def clip_image(w, c, images):
    return image_tokens(w, c, images)[:, 0] @ w["visual.proj"]


def clip_text(w, c, tokens):
    return text_feature(w, c, tokens) @ w["text_projection"]


def scaled(w, cosines):
    logits = exp(w["logit_scale"]) * cosines
    return logits + w["logit_bias"] if "logit_bias" in w else logits


def clip_logits(w, image, text):
    return scaled(w, unit(image) @ unit(text).T)


# Llip


def each(tokens, weight):
    """Every token through its own matrix: (B, M, D), (M, D, E) -> (B, M, E)."""
    return (tokens.transpose(1, 0, 2) @ weight).transpose(1, 0, 2)


def maybe_norm(w, c, name, x):
    return layer_norm(x, w[name + ".weight"], w[name + ".bias"]) if c["norm"] else x


def llip_image(w, c, images):
    """(B, 3, S, S) -> keys and values, each (B, H, M, K)."""
    tokens, H = image_tokens(w, c, images), c["mixture_heads"]
    if not c["all_tokens"]:
        tokens = tokens[:, : c["mixture_tokens"]]
    keys = maybe_norm(w, c, "K_norm", each(tokens, w["k_proj"]))
    values = maybe_norm(w, c, "V_norm", each(tokens, w["v_proj"]))
    B, M, E = keys.shape
    return [x.reshape(B, M, H, E // H).transpose(0, 2, 1, 3) for x in (keys, values)]


def llip_text(w, c, tokens):
    """(B, L) -> queries (B, H, K) and text features (B, E), not normalised."""
    x, H = text_feature(w, c, tokens), c["mixture_heads"]
    queries = maybe_norm(w, c, "Q_norm", x @ w["q_proj"])
    return queries.reshape(len(tokens), H, -1), x @ w["text_projection"]


def mixing_weights(keys, queries, temperature):
    """(B_img, H, M, K), (B_txt, H, K) -> (B_img, B_txt, H, M)."""
    scores = keys @ queries.transpose(1, 2, 0)  # (B_img, H, M, B_txt)
    return softmax(scores.transpose(0, 3, 1, 2) / temperature)


def mix(w, keys, values, queries, temperature):
    """z (B_img, B_txt, E), not normalised."""
    phi = mixing_weights(keys, queries, temperature)
    y = phi.transpose(0, 2, 1, 3) @ values  # (B_img, H, B_txt, K)
    B, H, texts, K = y.shape
    return y.transpose(0, 2, 1, 3).reshape(B, texts, H * K) @ w["pred.out_proj"]


def llip_logits(w, keys, values, queries, text, temperature):
    z = mix(w, keys, values, queries, temperature)
    return scaled(w, (unit(z) * unit(text)).sum(-1))


def classes_of(queries, text, group):
    """Prompts to classes: (N, H, K), (N, E), classes (N,) -> (C, H, K), (C, E)."""
    N, H, K = queries.shape
    mean = (group == np.arange(group.max() + 1)[:, None]).astype(np.float32)
    mean = Array(mean / mean.sum(1, keepdims=True))
    return (mean @ queries.reshape(N, H * K)).reshape(-1, H, K), unit(mean @ unit(text))


def pooled(w, c, images, temperature):
    """The ladder of Fig. 3: M tokens without the caption, (B, E) not normalised; and all tokens (B, M, E)."""
    tokens = image_tokens(w, c, images)[:, : c["mixture_tokens"]]
    values = each(tokens, w["visual.proj"])
    if c["pooling"] == "register":
        return values[:, 0], values
    if c["pooling"] == "average":
        return values.mean(1), values
    B, M, E = values.shape
    H = c["mixture_heads"]
    keys, values = (x.reshape(B, M, H, E // H) for x in (each(tokens, w["k_proj"]), values))
    phi = softmax((keys * w["query"].reshape(H, E // H)).sum(-1) / temperature, 1)  # (B, M, H)
    y = (phi.reshape(B, M, H, 1) * values).sum(1)
    return y.reshape(B, E) @ w["pred.out_proj"], values


# Losses


def info_nce(logits, logits_t=None, offset=0):
    logits_t = logits.T if logits_t is None else logits_t
    rows = np.arange(len(logits))
    both = log_softmax(logits)[rows, rows + offset] + log_softmax(logits_t)[rows, rows + offset]
    return -both.mean() / 2


def siglip(logits, offset=0):
    rows, columns = logits.shape
    sign = 2 * np.eye(rows, columns, offset, dtype=logits.data.dtype) - 1
    return softplus(-(logits * sign)).sum() / rows


def margin_metric_logits(image, text, labels, scale, margin):
    return scale * (image - margin * text[labels]) @ text.T


def smoothing_targets(text, epsilon, form):
    """(C, E) -> (C, C), row y for label y."""
    onehot = np.eye(len(text), dtype=text.data.dtype)
    D = softmax(35 * text @ text.T)
    if form == "mixture":
        return epsilon * onehot + (1 - epsilon) * D
    if form == "released":
        return epsilon * onehot + (1 - onehot) * D
    return Array(epsilon * onehot + (1 - epsilon) / len(text) if form == "uniform" else onehot)


def soft_cross_entropy(logits, targets):
    return -(targets * log_softmax(logits)).sum(-1).mean()


def cls_attention(rows):
    """The class token's attention (layers, B, 1 + P) -> A (B, P)."""
    rows = rows[:, :, 1:]
    return (rows / rows.sum(-1, keepdims=True)).mean(0)


def guidance(maps, labels, temperature=1.0):
    """(B, P, C) -> G (B, P)."""
    return softmax(maps[np.arange(len(labels)), :, labels] / temperature)


def attention_alignment(attention, target):
    # an attention of exactly 0 counts as the smallest normal number
    attention = maximum(attention, np.finfo(np.float32).tiny)
    return (target * (log(target) - log(attention))).sum() / len(target)


def similarity_alignment(plain, guide, labels=None):
    if labels is not None:
        rows = np.arange(len(labels))
        plain, guide = (x[rows, :, labels].reshape(len(x), -1, 1) for x in (plain, guide))
    plain, guide = log_softmax(plain, 1), log_softmax(guide, 1)
    return (exp(guide) * (guide - plain)).sum() / len(plain)


def alignclip(plain, branch, rows, text, labels, o):
    """One step from token features (B, 1 + P, E) on: classification, attention, similarity, total.

    o has scale, margin, epsilon, form, weight, temperature, detach, and similarity: label or all.
    """
    plain, branch = unit(plain), unit(branch[:, 1:])
    targets = smoothing_targets(text, o["epsilon"], o["form"])[labels]
    logits = margin_metric_logits(plain[:, 0], text, labels, o["scale"], o["margin"])
    classification = soft_cross_entropy(logits, targets)
    maps, guide = plain[:, 1:] @ text.T, branch @ text.T
    guide = constant(guide) if o["detach"] else guide
    attention = attention_alignment(cls_attention(rows), guidance(guide, labels, o["temperature"]))
    similarity = similarity_alignment(maps, guide, labels if o["similarity"] == "label" else None)
    total = classification + o["weight"] * (attention + similarity)
    return classification, attention, similarity, total
