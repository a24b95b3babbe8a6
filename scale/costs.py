"""What a run will cost, before it costs anything: parameters, FLOPs, bytes on the wire, memory per GPU.

    python train.py --preset llip-B-32 --dry-run

Models are built on the meta device, so that the parameter counts are those of the real thing. FLOPs are
counted as torch's FlopCounterMode does (tests hold them equal). Memory is an estimate by formula, held to a
measurement within 10 % by a test (fp32, not checkpointed); what the allocator adds (fragments, work
buffers) is not in it.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

import llip
from model import CONFIGS, Config, tower_flops
from scale import llip_tiles as tiles
from tasks import build_model
from util.report import format_table
from util.text import number

GPU_BYTES = 0.9 * 80e9  # what a usual large GPU leaves to tensors


def activation_bytes(
    config: Config, tokens: int, half: bool, checkpointed: bool, used: int | None = None
) -> int:
    """What autograd keeps of both towers for one pair, in bytes.

    A block keeps, per token, of width D and MLP width F: two residual streams, two norms' outputs, queries,
    keys, values, the mixed values before and after merging heads, and the MLP's hidden layer before and
    after its activation: 9 D + 2 F numbers; residual streams stay fp32 under autocast. The last block's MLP
    keeps what leaves the tower only: used image tokens (these unless given), a text's end. Checkpointed:
    one stream per block, and the one block that is being computed again.
    """
    c, total = config, 0
    for length, picked, width, mlp, layers in (
        (tokens + c.patches, used or tokens, c.vision_width, c.vision_mlp, c.vision_layers),
        (c.context_length, 1, c.text_width, c.text_mlp, c.text_layers),
    ):
        small = 2 if half else 4
        block = length * (2 * 4 * width + small * (7 * width + 2 * mlp))
        unused = (length - picked) * (4 * width + small * (width + 2 * mlp))
        total += layers * (4 * length * width if checkpointed else block)
        total += block if checkpointed else -unused
    return total


def mixed_tokens(c, config: Config) -> int:
    """Keys that a caption's query meets in an image; 0 where the pooling does not look at the caption."""
    if c.method != "llip" or c.pooling != "text":
        return 0
    return c.mixture_tokens + config.patches * c.all_tokens


def pair_bytes(c, config: Config, rows: int, columns: int) -> int:
    """What the pairs of one rank take beside the towers: its images against every rank's texts.

    Logits, as made, scaled, and their gradient: 3 numbers a pair. Llip under the sigmoid loss holds no
    logits but one tile; keys, values and their gradients, 4 M E numbers an image; and of the texts 14 E: as
    gathered, made unit, through W_O, over tau, transposed for the tiles, and the gradients of most of them.
    """
    logits = 3 * 4 * rows * columns
    E, M, H = config.embed_dim, mixed_tokens(c, config), c.mixture_heads
    if not M:
        return logits
    latent, columns = c.text_tokens, columns * max(1, c.text_tokens)
    squares = 4 * E * E
    if tiles.form(columns, M, H, E) == "gram":
        squares += 3 * (H * M) ** 2
    sides = 4 * rows * M * E + 14 * columns * E
    tile = tiles.GPU_TILES * tiles.TILE_BYTES
    # InfoNCE, and a mean over latent tokens, need the logits of all pairs at once
    held = c.objective == "infonce" or latent > 0
    return 4 * (sides + squares) + tile + held * max(1, latent) * logits


def chunks_that_fit(each: int, fixed: int, local: int) -> int | str:
    """The fewest chunks (--accumulate) at which a rank's pairs fit into GPU_BYTES; "" if none does."""
    powers = (2**k for k in range(local.bit_length()) if local % 2**k == 0)
    return next((n for n in powers if fixed + each * local // n <= GPU_BYTES), "")


def parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part, and in all."""
    count = lambda keep: sum(p.numel() for n, p in model.named_parameters() if keep(n))  # noqa: E731
    mixing = ("k_proj", "v_proj", "q_proj", "pred.", "K_norm", "V_norm", "Q_norm")
    parts = {
        "image tower": count(lambda n: n.startswith("visual.")),
        "text tower": count(lambda n: not n.startswith(("visual.", "logit_", *mixing))),
        "mixing": count(lambda n: n.startswith(mixing)),
    }
    return {k: v for k, v in parts.items() if v} | {"all": count(lambda n: True)}


def step_flops(c, config: Config) -> dict[str, float]:
    """FLOPs of one optimizer step over all ranks; the backward pass counts as two forward passes.

    Recomputing adds one: the blocks under --grad-checkpointing, the towers under --accumulate, Llip's
    tiles of pairs under InfoNCE.
    """
    passes = 3 + c.grad_checkpointing + (c.accumulate > 1)
    N = c.batch_size
    if M := mixed_tokens(c, config):
        one = llip.flops(config, c.mixture_tokens, 0, c.all_tokens)
        texts = N * max(1, c.text_tokens)
        count = partial(tiles.flops, N, texts, M, c.mixture_heads, config.embed_dim)
        again = c.objective == "infonce" or c.text_tokens
        pairs = count(train=True) + (count(train=False) if again else 0)
    else:
        one = tower_flops(config, c.mixture_tokens if c.method == "llip" else 1)
        pairs = 3 * N * 2 * N * config.embed_dim
    return {"image tower": passes * N * one["image"], "text tower": passes * N * one["text"], "pairs": pairs}


def wire_bytes(c, config: Config, total: int, world: int) -> dict[str, float]:
    """Bytes that a rank receives per step: texts out and their gradients back, weights' gradients.

    Llip sends a query and a text feature per caption (2 E), never the M keys and values of an image.
    """
    E, N = config.embed_dim, c.batch_size
    sent = 2 * E * max(1, c.text_tokens) if mixed_tokens(c, config) else E
    others = (world - 1) / world
    found = {"texts": 2 * others * N * sent * 4, "gradients": 2 * others * total * 4}
    if c.objective == "infonce":  # the other half of the logits, and its gradient
        found["logits"] = 2 * others * N / world * N * 4
    return found


def describe(c) -> str:
    """The whole report as text; c is a resolved TrainConfig."""
    if c.init or c.epochs:
        raise ValueError("--dry-run counts a model of --model over --steps: leave out --init and --epochs")
    config = CONFIGS[c.model]
    if c.image_size:
        config = replace(config, image_size=c.image_size)
    with torch.device("meta"):
        model = build_model(c, config)
    counts = parameters(model)
    flops = step_flops(c, config)
    lines = [f"{c.preset or c.method} {c.model}: {c.steps:,} steps of {c.batch_size:,} pairs"]
    lines.append(f"samples     {c.steps * c.batch_size:,}")
    lines.append("parameters  " + ", ".join(f"{k} {v:,}" for k, v in counts.items()))
    share = {k: f"{v:.3g} ({v / sum(flops.values()):.0%})" for k, v in flops.items()}
    lines.append(f"FLOPs/step  {sum(flops.values()):.4g}: " + ", ".join(f"{k} {v}" for k, v in share.items()))
    lines.append(f"FLOPs in all {sum(flops.values()) * c.steps:.3g}")
    half = c.precision != "fp32"
    tokens = c.mixture_tokens if c.method == "llip" else 1
    used = tokens + config.patches * (c.method == "llip" and c.all_tokens)
    each = activation_bytes(config, tokens, half, c.grad_checkpointing, used)
    rows = []
    for world in (1, 8, 32, 128, 256):
        if c.batch_size % (world * c.accumulate):
            continue
        local = c.batch_size // world
        memory = {
            "weights, gradients, Adam": 16 * counts["all"],
            "activations": each * local // c.accumulate,
            "pairs": pair_bytes(c, config, local, c.batch_size),
        }
        wire = wire_bytes(c, config, counts["all"], world)
        row = {"ranks": world, "pairs/rank": local}
        row |= {f"{k} GB": number(v / 1e9) for k, v in memory.items()}
        row["in all GB"] = number(sum(memory.values()) / 1e9)
        fixed = memory["weights, gradients, Adam"] + memory["pairs"]
        row["chunks for 80 GB"] = chunks_that_fit(each, fixed, local)
        rows.append(row | {f"{k} GB/step": number(v / 1e9) for k, v in wire.items()})
    lines += [
        "",
        "per rank (1 GB is 1e9 bytes; memory is an estimate; GB/step are received):",
        format_table(rows),
    ]
    return "\n".join(lines)
