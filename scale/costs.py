"""The cost of a pre-training run: parameters, FLOPs, memory per GPU, and bytes sent between ranks.

    python train.py --preset llip-B-32 --dry-run

All figures come from a model, which may be on the meta device, and the numbers of a run. FLOPs are counted
as in torch's FlopCounterMode, and tests compare the two. Memory is estimated by formulas; a test compares
the activations with a measurement in fp32. The estimate does not include the overhead of the allocator.
Llip's pairs are counted as scale.llip_tiles computes them.
"""

from functools import partial

from torch import nn

import llip
from model import DualEncoder, tower_flops
from scale import llip_tiles as tiles
from util.text import number

# the memory of a large GPU that is available for tensors
GPU_BYTES = 0.9 * 80e9


def key_tokens(model: DualEncoder) -> int:
    """Llip's keys per image, which are compared with each caption's query. 0 for other models."""
    if not model.conditional:
        return 0
    return model.visual.tokens + model.config.patches * model.all_tokens


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
    logits = 3 * 4 * rows * columns
    M, E = key_tokens(model), model.config.embed_dim
    if not M:
        return logits
    squares = 4 * E * E
    if tiles.tile_form(columns, M, model.heads, E) == "gram":
        squares += 3 * (model.heads * M) ** 2
    features = 4 * rows * M * E + 14 * columns * E
    tile = tiles.GPU_TILES * tiles.TILE_BYTES
    return 4 * (features + squares) + tile + (objective == "infonce") * logits


def chunks_that_fit(pair: int, fixed: int, local: int) -> int | str:
    """The smallest number of chunks (--accumulate) whose memory fits into GPU_BYTES, or "" if none fits.

    Args: pair: bytes of the activations of one pair;  fixed: other bytes;  local: pairs of a rank
    """
    powers = (2**k for k in range(local.bit_length()) if local % 2**k == 0)
    return next((n for n in powers if fixed + pair * local // n <= GPU_BYTES), "")


def parameters(model: nn.Module) -> dict[str, int]:
    """The number of parameters of each part, and of all."""
    mixing = ("k_proj", "v_proj", "q_proj", "pred.", "K_norm", "V_norm", "Q_norm")
    counts = {"image tower": 0, "text tower": 0, "mixing": 0, "all": 0}
    for name, parameter in model.named_parameters():
        part = "image tower" if name.startswith("visual.") else "text tower"
        part = "mixing" if name.startswith(mixing) else part
        counts["all"] += parameter.numel()
        if not name.startswith("logit_"):
            counts[part] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def step_flops(
    model: DualEncoder, batch_size: int, objective: str, accumulate: int = 1, checkpointed: bool = False
) -> dict[str, float]:
    """FLOPs of one optimizer step over all ranks.

    A backward pass counts as two forward passes. One forward pass is added for each recomputation: of the
    blocks with checkpointing, of the towers with accumulation, of Llip's pairs with InfoNCE.
    """
    passes, N, config = 3 + checkpointed + (accumulate > 1), batch_size, model.config
    if M := key_tokens(model):
        one = llip.flops(config, model.visual.tokens, 0, model.all_tokens)
        count = partial(tiles.flops, N, N, M, model.heads, config.embed_dim)
        pairs = count(train=True) + (count(train=False) if objective == "infonce" else 0)
    else:
        one = tower_flops(config, model.visual.tokens)
        pairs = 3 * N * 2 * N * config.embed_dim
    return {"image tower": passes * N * one["image"], "text tower": passes * N * one["text"], "pairs": pairs}


def wire_bytes(model: DualEncoder, objective: str, batch_size: int, world: int) -> dict[str, float]:
    """Bytes that a rank receives per step: text features and their gradients, and an all-reduce of gradients.

    Llip sends a query and a text feature per caption, 2 E numbers, and never the keys and values of an image.
    """
    E, N, others = model.config.embed_dim, batch_size, (world - 1) / world
    received = {"texts": 2 * others * N * E * (2 if key_tokens(model) else 1) * 4}
    received["gradients"] = 2 * others * parameters(model)["all"] * 4
    # the logits of the other direction, and their gradient
    if objective == "infonce":
        received["logits"] = 2 * others * N / world * N * 4
    return received


def report(
    model: DualEncoder,
    title: str,
    steps: int,
    batch_size: int,
    objective: str,
    accumulate: int = 1,
    half: bool = False,
    checkpointed: bool = False,
) -> tuple[list[str], list[dict]]:
    """The lines of the report, and the rows of its table: one for each number of ranks."""
    counts, gigabytes = parameters(model), lambda x: number(x / 1e9)
    flops = step_flops(model, batch_size, objective, accumulate, checkpointed)
    share = (f"{k} {v:.3g} ({v / sum(flops.values()):.0%})" for k, v in flops.items())
    lines = [
        f"{title}: {steps:,} steps of {batch_size:,} pairs",
        f"samples     {steps * batch_size:,}",
        "parameters  " + ", ".join(f"{k} {v:,}" for k, v in counts.items()),
        f"FLOPs/step  {sum(flops.values()):.4g}: " + ", ".join(share),
        f"FLOPs in all {sum(flops.values()) * steps:.3g}",
        "",
        "per rank (1 GB is 1e9 bytes; memory is an estimate; GB/step are received):",
    ]
    pair, rows = activation_bytes(model, half, checkpointed), []
    for world in (1, 8, 32, 128, 256):
        if batch_size % (world * accumulate):
            continue
        local = batch_size // world
        states, pairs = 16 * counts["all"], pair_bytes(model, objective, local, batch_size)
        activations = pair * local // accumulate
        row = {
            "ranks": world,
            "pairs/rank": local,
            "weights, gradients, Adam GB": gigabytes(states),
            "activations GB": gigabytes(activations),
            "pairs GB": gigabytes(pairs),
            "in all GB": gigabytes(states + activations + pairs),
            "chunks for 80 GB": chunks_that_fit(pair, states + pairs, local),
        }
        received = wire_bytes(model, objective, batch_size, world)
        rows.append(row | {f"{k} GB/step": gigabytes(v) for k, v in received.items()})
    return lines, rows
