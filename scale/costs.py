"""The cost of a pre-training run: parameters, FLOPs, memory per GPU, and bytes sent between ranks.

    python train.py --preset llip-B-32 --dry-run

FLOPs are counted as in torch's FlopCounterMode, Llip's pairs as scale.llip_tiles computes them. Memory is
estimated without the overhead of the allocator; a test compares the activations with a measurement in fp32.
"""

import math

from torch import nn

import llip
from model import DualEncoder, tower_flops
from scale import llip_tiles as tiles
from util.text import number

GPU_BYTES = 0.9 * 80e9  # of a large GPU, available for tensors
GPU_FLOPS = 0.4 * 989e12  # per second, of an H100 in bf16 at 40 % of its peak
DECODED = 450  # images per second of an AMD EPYC's core: 500 x 375 JPEG of 62 kB, cropped to 224 px


def key_tokens(model: DualEncoder) -> int:
    """Llip's keys per image, which are compared with each caption's query. 0 for other models."""
    return len(model.k_proj) if model.conditional else 0


def activation_bytes(model: DualEncoder, half: bool, checkpointed: bool) -> int:
    """Bytes that autograd keeps of both towers for one pair.

    A block of width D and MLP width F keeps 9 D + 2 F numbers per token: two residual streams, the outputs of
    two norms, queries, keys, values, the mixed values before and after the heads are joined, and the hidden
    layer of the MLP before and after the activation. With half=True all but the residual streams are bf16.
    The last MLP runs only on the tokens that are used later. With checkpointing each block keeps only its
    input, and one block at a time is recomputed.
    """
    c, total = model.config, 0
    tokens, size = model.visual.tokens, 2 if half else 4
    for length, used, width, mlp, layers in (
        (tokens + c.patches, key_tokens(model) or tokens, c.vision_width, c.vision_mlp, c.vision_layers),
        (c.context_length, 1, c.text_width, c.text_mlp, c.text_layers),
    ):
        block = length * (2 * 4 * width + size * (7 * width + 2 * mlp))
        unused = (length - used) * (4 * width + size * (width + 2 * mlp))
        total += layers * (4 * length * width if checkpointed else block)
        total += block if checkpointed else -unused
    return total


def pair_bytes(model: DualEncoder, objective: str, rows: int, columns: int) -> int:
    """Bytes for all pairs of a rank: `rows` images of this rank and `columns` texts of all ranks.

    The logits take 3 numbers per pair: the cosine, the scaled logit, and the gradient. Llip also stores keys,
    values and their gradients, 4 M E numbers per image; 14 E numbers per text (gathered, normalised, times
    W_O, over tau, transposed, and gradients); and one tile. With the sigmoid loss it stores no logits.
    """
    logits, M, E = 3 * 4 * rows * columns, key_tokens(model), model.config.embed_dim
    if not M:
        return logits
    gram = tiles.tile_form(columns, M, model.heads, E) == "gram"
    features = 4 * rows * M * E + 14 * columns * E
    squares = 4 * E * E + gram * 3 * (model.heads * M) ** 2
    tile = tiles.GPU_TILES * tiles.TILE_BYTES
    return 4 * (features + squares) + tile + (objective == "infonce") * logits


def parameters(model: nn.Module) -> dict[str, int]:
    """The number of parameters of each part, and of all."""
    mixing = ("k_proj", "v_proj", "q_proj", "pred.", "K_norm", "V_norm", "Q_norm")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def count(*prefixes: str) -> int:
        return sum(size for name, size in sizes.items() if name.startswith(prefixes))

    image, mixed, whole = count("visual."), count(*mixing), count("")
    counts = {"image tower": image, "text tower": whole - image - mixed - count("logit_"), "mixing": mixed}
    return {part: size for part, size in counts.items() if size} | {"all": whole}


def step_flops(model: DualEncoder, c, objective: str) -> dict[str, float]:
    """FLOPs of one optimizer step over all ranks.

    A backward pass counts as two forward passes. One forward pass is added for each recomputation: of the
    blocks with checkpointing, of the towers with accumulation, of Llip's pairs with InfoNCE.
    """
    passes, N, config = 3 + c.grad_checkpointing + (c.accumulate > 1), c.batch_size, model.config
    one, pairs = tower_flops(config, model.visual.tokens), 3 * N * 2 * N * config.embed_dim
    if M := key_tokens(model):
        one = llip.flops(config, model.visual.tokens, 0, model.all_tokens)
        modes = (True, False) if objective == "infonce" else (True,)
        pairs = sum(tiles.flops(N, N, M, model.heads, config.embed_dim, train=mode) for mode in modes)
    return {"image tower": passes * N * one["image"], "text tower": passes * N * one["text"], "pairs": pairs}


def wire_bytes(model: DualEncoder, objective: str, batch_size: int, world: int) -> dict[str, float]:
    """Bytes that a rank receives per step: text features, their gradients, and an all-reduce of gradients."""
    E, N, others = model.config.embed_dim, batch_size, (world - 1) / world
    # Llip sends a query and a text feature per caption
    received = {"texts": 2 * others * N * E * (1 + model.conditional) * 4}
    received["gradients"] = 2 * others * parameters(model)["all"] * 4
    # the logits of the other direction, and their gradient
    if objective == "infonce":
        received["logits"] = 2 * others * N / world * N * 4
    return received


def report(model: DualEncoder, c, objective: str) -> tuple[list[str], list[dict]]:
    """Lines, and the rows of a table with one row for each number of ranks; c is the TrainConfig."""
    counts, flops = parameters(model), step_flops(model, c, objective)
    total, gigabytes = sum(flops.values()), lambda x: number(x / 1e9)
    rate = GPU_FLOPS * c.batch_size / total
    lines = [
        f"{c.preset or c.method} {c.model}: {c.steps:,} steps of {c.batch_size:,} pairs",
        "parameters  " + ", ".join(f"{k} {v:,}" for k, v in counts.items()),
        f"FLOPs/step  {total:.4g}: " + ", ".join(f"{k} {v:.3g} ({v / total:.0%})" for k, v in flops.items()),
        f"FLOPs in all {total * c.steps:.3g}",
        f"decoding    {math.ceil(rate / DECODED)} cores for {number(rate)} images/s, 40 % of an H100's peak",
        "",
        "per rank (1 GB is 1e9 bytes; memory is an estimate; GB/step are received):",
    ]
    pair, rows = activation_bytes(model, c.precision != "fp32", c.grad_checkpointing), []
    for world in (n for n in (1, 8, 32, 128, 256) if c.batch_size % (n * c.accumulate) == 0):
        local = c.batch_size // world
        states, pairs = 16 * counts["all"], pair_bytes(model, objective, local, c.batch_size)
        activations = pair * local // c.accumulate
        powers = [2**k for k in range(local.bit_length()) if local % 2**k == 0]
        fit = [n for n in powers if states + pairs + pair * local // n <= GPU_BYTES]
        held = {"weights, gradients, Adam": states, "activations": activations, "pairs": pairs}
        held["in all"] = sum(held.values())
        row = {"ranks": world, "pairs/rank": local} | {f"{k} GB": gigabytes(v) for k, v in held.items()}
        row["chunks for 80 GB"] = fit[0] if fit else ""
        received = wire_bytes(model, objective, c.batch_size, world)
        rows.append(row | {f"{k} GB/step": gigabytes(v) for k, v in received.items()})
    return lines, rows
