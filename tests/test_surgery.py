"""Dense features against recordings of the official codes and against the formulas written out slowly."""

import copy
import gc
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from alignclip import two_paths
from attention import attend
from evals import surgery
from evals.surgery import METHODS, dense_features, feature_surgery, similarity_map
from llip import Llip, PooledTokens
from model import CLIP, CONFIGS, Config
from tokenizer import Tokenizer


def tiny(layers=4, vocab=50, **changes):
    return Config(16, 32, 8, 32, layers, 4, 64, 12, vocab, 16, 1, 2, 32, **changes)


def clip(layers=4, seed=0):
    """A small CLIP whose attention is far from uniform, in float64."""
    torch.manual_seed(seed)
    model = CLIP(tiny(layers)).double().eval()
    for block in model.visual.transformer.resblocks:
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# ---- against the official implementations


def dense_model(weights, hp=(32, 40, 8, 64, 8, 4, 256, 77, 49408, 64, 2, 2, 256)):
    model = CLIP(Config(*hp))
    visual = {k[len("w.visual.") :]: v for k, v in weights.items() if k.startswith("w.visual.")}
    model.visual.load_state_dict(visual)
    return model.visual


RECORDED = [  # file, method, image, array, blocks, first recorded token
    ("surgery", "surgery", "in.image", "tokens_vv6", None, 0),
    ("surgery", "surgery", "in.image", "tokens_vv1", 1, 0),
    ("surgery", "surgery", "in.image_hr", "tokens_hr", None, 0),
    ("surgery", "alignclip", "in.image", "tokens_dv6", None, 0),
    ("surgery", "alignclip", "in.image", "tokens_dv1", 1, 0),
    ("sclip", "sclip", "in.image", "tokens_csa", None, 0),
    ("sclip", "sclip", "in.image_rect", "tokens_csa_rect", None, 0),
    ("clearclip", "clearclip", "in.image", "ClearCLIP.ignore_residual1.last1", None, 1),
    ("clearclip", "clearclip", "in.image_rect", "ClearCLIP.rect", None, 1),
    ("clearclip", "maskclip", "in.image", "MaskCLIP.ignore_residual0.last1", None, 1),
    ("clearclip", "sclip", "in.image", "SCLIP.ignore_residual0.last1", None, 1),
    ("gem", "gem", "in.image", "default.gem", None, 0),
    ("gem", "gem", "in.image_hr", "default.gem_hr", None, 0),
    ("gem", "gem", "in.image_rect", "default.gem_rect", None, 0),
    ("gem", "gem", "in.image", "depth4.gem", 3, 0),  # its depth counts one more than the blocks
]


def test_dense_features_equal_the_official_codes(golden_arrays):
    visual = dense_model(golden_arrays("dense_clip_weights.npz"))
    for file, method, image, array, blocks, first in RECORDED:
        recorded = golden_arrays(file + ".npz")
        got = dense_features(visual, recorded[image], method, blocks)[:, first:]
        error = (got - recorded["out." + array]).abs().max()
        assert got.shape == recorded["out." + array].shape and error < 4e-5, (array, error)


def test_maps_equal_the_official_code(golden_arrays):
    g = golden_arrays("surgery.npz")
    tokens, text = g["out.tokens_vv6"], g["in.text_features"]
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(F.normalize(tokens, dim=-1) @ text.t(), g["out.similarity"], **close)
    torch.testing.assert_close(similarity_map(tokens, text), g["out.map_minmax"], **close)
    # text features of any length: only directions count
    torch.testing.assert_close(similarity_map(tokens, 3 * text, (50, 37)), g["out.map_upsampled"], **close)
    torch.testing.assert_close(feature_surgery(tokens, text), g["out.feature_surgery"], **close)
    torch.testing.assert_close(
        feature_surgery(tokens, text, g["in.redundant_features"]), g["out.feature_surgery_redundant"], **close
    )


# ---- against the formulas, one image and one head at a time


def heads_of(block, x):
    """LN1 x (L, D) as lists of per-head queries, keys and values (L, K)."""
    y = F.layer_norm(x, (32,), block.ln_1.weight, block.ln_1.bias)
    rows = y @ block.attn.in_proj_weight.t() + block.attn.in_proj_bias
    return y, *([part[:, 8 * h : 8 * h + 8] for h in range(4)] for part in rows.split(32, dim=1))


def soft(a, b, scale=8**-0.5):
    return torch.softmax(scale * a @ b.t(), dim=1)


def mixed(method, y, q, k, v):
    if method == "qkv":
        return soft(q, k) @ v
    if method == "surgery":
        return soft(v, v) @ v
    if method in ("alignclip", "maskclip"):
        return v
    if method == "sclip":
        return soft(q, q) @ v + soft(k, k) @ v
    if method == "clearclip":
        return soft(q, q) @ v
    if method == "kkv":
        return soft(k, k) @ v
    t, total = y.norm(dim=1).mean() * 8**-0.5, 0
    for s in (q, k, v):
        s = F.normalize(s, dim=1)
        s = F.normalize(soft(s, s, t) @ s, dim=1)
        total = total + soft(s, s, t) @ v / 3
    return total


def attention(block, x, method):
    y, q, k, v = heads_of(block, x)
    merged = torch.cat([mixed(method, y, q[h], k[h], v[h]) for h in range(4)], dim=1)
    return merged @ block.attn.out_proj.weight.t() + block.attn.out_proj.bias


def slow(visual, image, method, blocks):
    x = visual.embed(image[None])[0]
    stack = list(visual.transformer.resblocks)
    two = method in ("surgery", "alignclip", "gem")
    special, z = set(stack[-blocks:] if two else stack[-1:]), None
    for block in stack:
        other = attention(block, x, method) if block in special else None
        if two and other is not None:
            z = (x if z is None else z) + other
        plain = attention(block, x, "qkv") if two or other is None else other
        x = plain if method == "clearclip" and other is not None else x + plain
        if not (method == "clearclip" and other is not None):
            x = x + block.mlp(block.ln_2(x))
    if two:
        x = z if method == "gem" else torch.cat([x[:1], z[1:]])
    return visual.ln_post(x) @ visual.proj


@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_its_formula(method, images):
    visual = clip().visual
    got = dense_features(visual, images, method, blocks=2)
    for image, tokens in zip(images, got):
        torch.testing.assert_close(tokens, slow(visual, image, method, 2), rtol=1e-9, atol=1e-9)


def test_the_second_path_takes_any_structure(images):
    """Queries, keys and values of the plain path, whatever the second path makes of them."""
    visual = clip().visual
    for kind, formula in (("qkv", "qkv"), ("vvv", "surgery"), ("qqv", "clearclip"), ("kkv", "kkv")):
        got = dense_features(visual, images, kind, blocks=2)
        for image, tokens in zip(images, got):
            x = visual.embed(image[None])[0]
            *stack, first, last = visual.transformer.resblocks
            for block in stack:
                x = block(x[None])[0]
            z = x + attention(first, x, formula)
            x = first(x[None])[0]
            z = visual.head(z + attention(last, x, formula))
            torch.testing.assert_close(tokens[1:], z[1:], rtol=1e-9, atol=1e-9)
    for kind, method in (("vvv", "surgery"), ("dv", "alignclip")):
        got = dense_features(visual, images, kind)
        assert torch.equal(got, dense_features(visual, images, method))


def test_the_methods_differ_from_each_other_and_from_clip(images):
    model = clip()
    x = model.visual.transformer(model.visual.embed(images))
    found = [dense_features(model.visual, images, m) for m in METHODS] + [model.visual.head(x)]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert (one - other)[:, 1:].abs().max() > 0.01


def test_dv_is_the_attention_of_a_diagonal_mask_bit_for_bit(images):
    """MaskCLIP as others write it: a softmax that may look only at itself."""
    visual = clip().visual.float()
    block = visual.transformer.resblocks[-1]
    x = visual.embed(images.float())
    q, k, v = block.attn.project(block.ln_1(x), "qkv")
    only_self = torch.full((17, 17), float("-inf")).fill_diagonal_(0)
    assert torch.equal(attend(q, k, v, mask=only_self), attend(None, None, v, "dv"))


def test_maskclip_is_the_dv_branch_of_one_block_followed_by_its_mlp(images):
    visual = clip().visual
    x = visual.embed(images)
    block = visual.transformer.resblocks[-1]
    z = two_paths(visual, x, "dv", 3, 0)[1][:, 1:]
    z = z + block.mlp(block.ln_2(z))
    got = dense_features(visual, images, "maskclip")[:, 1:]
    torch.testing.assert_close(got, visual.head(z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers, expected", [(1, 1), (2, 2), (3, 2), (4, 3), (8, 6), (12, 6)])
def test_the_number_of_blocks_with_two_paths(layers, expected, images):
    visual = clip(layers).visual
    got = dense_features(visual, images, "alignclip")
    assert torch.equal(got, dense_features(visual, images, "alignclip", blocks=expected))
    for other in {expected - 1, expected + 1} & set(range(1, layers + 1)):
        assert not torch.allclose(got, dense_features(visual, images, "alignclip", blocks=other))


def test_the_model_stays_as_it_was_and_the_class_token_is_clips(images):
    model = clip()
    before = copy.deepcopy(model.state_dict())
    for method in METHODS:
        for size in ((32, 32), (40, 24)):
            tokens = dense_features(model.visual, torch.randn(1, 3, *size).double(), method)
            assert tokens.shape == (1, 1 + size[0] * size[1] // 64, 16)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    image = model.encode_image(images)
    for method in ("surgery", "alignclip"):
        cls = dense_features(model.visual, images, method)[:, 0]
        torch.testing.assert_close(cls, image, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(dense_features(model.visual, images, "gem")[:, 0], image)


def test_features_are_differentiable(images):
    with torch.enable_grad():
        model = clip()
        dense_features(model.visual, images, "alignclip").square().sum().backward()
    assert model.visual.transformer.resblocks[-1].attn.out_proj.weight.grad.abs().max() > 0


# ---- other sizes


def bare_positions(method, rows, columns, positions):
    """What embed adds to patch (i, j) when everything else is zero: (rows, columns)."""
    visual = clip().visual
    visual.ln_pre = torch.nn.Identity()
    for parameter in (visual.conv1.weight, visual.class_embedding):
        parameter.zero_()
    visual.positional_embedding.copy_(positions)
    x = METHODS[method].embed(visual, torch.zeros(1, 3, 8 * rows, 8 * columns).double())
    assert torch.equal(x[0, 0], visual.positional_embedding[0])
    return x[0, 1:, 0].view(rows, columns)


def keys(t, a=-0.75):
    """The cubic kernel of torch's bicubic."""
    t = abs(t)
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0


def test_sclip_and_clearclip_space_positions_by_their_factor():
    """TRAP in embed: row i is taken at (i + 1/2) side / (rows + 0.1) - 1/2, not at (i + 1/2) side / rows."""
    values = [3.0, -1.0, 4.0, 1.5]  # of the four rows; every column alike
    positions = torch.tensor([9.0] + [v for v in values for _ in range(4)]).view(17, 1).expand(17, 32)
    for method in ("sclip", "clearclip"):
        for rows in (3, 9):
            got = bare_positions(method, rows, 5, positions)
            for i in range(rows):
                at = (i + 0.5) * 4 / (rows + 0.1) - 0.5
                near = range(int(at // 1) - 1, int(at // 1) + 3)
                expected = sum(keys(at - n) * values[min(max(n, 0), 3)] for n in near)
                assert got[i].tolist() == pytest.approx([expected] * 5, abs=1e-5)


@pytest.mark.parametrize(
    "method, mode, antialias",
    [
        ("surgery", "bilinear", False),
        ("alignclip", "bilinear", False),
        ("maskclip", "bicubic", False),
        ("gem", "bicubic", True),
    ],
)
def test_position_interpolation_of_the_others(method, mode, antialias):
    positions = torch.randn(17, 1, generator=torch.Generator().manual_seed(0)).expand(17, 32)
    grid = positions[1:, :1].reshape(1, 1, 4, 4)
    for size in ((3, 2), (7, 5)):
        expected = F.interpolate(grid.double(), size, mode=mode, antialias=antialias)[0, 0]
        got = bare_positions(method, *size, positions)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_at_its_own_size_positions_are_untouched(method, images):
    visual = clip().visual
    assert torch.equal(METHODS[method].embed(visual, images), visual.embed(images))


def test_what_dense_features_refuses(images):
    visual = clip().visual
    with pytest.raises(ValueError, match="expected one of surgery"):
        dense_features(visual, images, "Surgery")
    for blocks in (0, 5, -1):
        with pytest.raises(ValueError, match=f"{blocks} blocks .* 1 to 4"):
            dense_features(visual, images, blocks=blocks)
    for model in (Llip(tiny(), 3, 2), PooledTokens(tiny(), 3), Llip(tiny(), 1, 2)):
        with pytest.raises(ValueError, match="llip_caption_map"):
            dense_features(model.visual, images)


# ---- maps


def planted(rows, columns, row, column):
    """Tokens of one image that all point to the first axis, but one patch to the second."""
    tokens = torch.zeros(1, 1 + rows * columns, 3)
    tokens[..., 0] = 1
    tokens[0, 1 + row * columns + column] = torch.tensor([0.0, 5.0, 0.0])
    return tokens


def test_similarity_map_finds_the_planted_patch():
    maps = similarity_map(planted(4, 4, 1, 2), torch.eye(3)[:2])
    assert maps.shape == (1, 4, 4, 2)
    assert maps[0, 1, 2].tolist() == [0, 1] and maps.sum((1, 2)).tolist() == [[15, 1]]
    maps = similarity_map(planted(4, 4, 1, 2), torch.eye(3)[1:2], size=(8, 12))
    assert maps.shape == (1, 8, 12, 1)
    assert divmod(int(maps[0, ..., 0].argmax()), 12) in [(2, 7), (3, 7)]
    with pytest.raises(ValueError, match="10 patches are not a square"):
        similarity_map(planted(2, 5, 1, 3), torch.eye(3))


def test_maps_are_stretched_before_they_are_resized():
    """TRAP in stretch: the peak of a resized map lies below 1 when it is between two pixels."""
    maps = similarity_map(planted(4, 4, 1, 2), torch.eye(3)[1:2], size=8)
    assert maps.shape == (1, 8, 8, 1) and maps.max() == 0.75**2


def test_a_map_without_differences_is_zero_and_finite():
    tokens = torch.ones(1, 5, 3)
    assert similarity_map(tokens, torch.eye(3), size=4).eq(0).all()
    assert similarity_map(torch.ones(1, 2, 3), torch.eye(3)).shape == (1, 1, 1, 3)


def test_feature_surgery_equals_its_definition_over_channels():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 7, generator=generator)
    text = torch.randn(3, 7, generator=generator)
    unit, words = F.normalize(tokens, dim=-1), F.normalize(text, dim=-1)
    for b in range(2):
        p = torch.softmax(1.5 * words @ unit[b, 0], 0)
        weights = p / p.mean()
        products = unit[b][:, None] * words[None] * weights[None, :, None]  # (L, C, E)
        expected = (products - products.mean(1, keepdim=True)).sum(-1)
        got = feature_surgery(tokens, text, scale=1.5)[b]
        torch.testing.assert_close(got, expected)
    less = feature_surgery(tokens, text[:1], redundant=2 * text[1:2])
    torch.testing.assert_close(less, unit @ (words[:1] - words[1:2]).t())


# ---- Llip


def llip(**options):
    torch.manual_seed(0)
    return Llip(tiny(), 3, 2, **options).double().eval()


CAPTIONS = torch.tensor([[48, 5, 49, 0], [48, 6, 49, 0], [48, 7, 8, 49]])


def test_token_maps_are_the_last_blocks_attention():
    model, images = llip(), torch.randn(2, 3, 32, 24).double()
    maps = surgery.llip_token_maps(model, images)
    assert maps.shape == (2, 4, 3, 3)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2, 3).double())
    x = model.visual.embed(images)
    for block in model.visual.transformer.resblocks:
        attn, x = block.attn(block.ln_1(x), need_weights=True)[1], block(x)
    for token in range(3):
        row = attn[1].mean(0)[token, 3:]
        torch.testing.assert_close(maps[1, ..., token].flatten(), row / row.sum())


def test_a_caption_sees_through_the_token_it_chooses(images):
    model = llip(temperature=1e-4)
    model.heads = 1  # then Phi is one choice, not one per head
    keys, queries = model.encode_image(images)[0], model.encode_text(CAPTIONS)[0]
    choice = torch.einsum("ihmk,jhk->ijm", keys, queries).argmax(-1)
    maps, tokens = (surgery.llip_caption_map(model, images, CAPTIONS), surgery.llip_token_maps(model, images))
    assert maps.shape == (2, 4, 4, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(maps[i, ..., j], tokens[i, ..., choice[i, j]])


def test_caption_maps_mix_token_maps_by_the_mean_weight_of_the_heads(images):
    model = llip(temperature=0.05)
    keys, queries = model.encode_image(images)[0], model.encode_text(CAPTIONS)[0]
    phi = model.mixing_weights(keys, queries)  # (B_img, B_txt, H, M)
    tokens = surgery.llip_token_maps(model, images)
    maps = surgery.llip_caption_map(model, images, CAPTIONS)
    expected = sum(tokens[1, ..., m] * (phi[1, 2, 0, m] + phi[1, 2, 1, m]) / 2 for m in range(3))
    torch.testing.assert_close(maps[1, ..., 2], expected)
    assert (maps[..., 0] - maps[..., 2]).abs().max() > 1e-6


def test_caption_maps_with_patches_as_keys(images):
    model = llip(temperature=0.05, all_tokens=True)
    maps = surgery.llip_caption_map(model, images, CAPTIONS)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2, 3).double())
    keys, queries = model.encode_image(images)[0], model.encode_text(CAPTIONS)[0]
    phi = model.mixing_weights(keys, queries).mean(2)
    tokens = surgery.llip_token_maps(model, images)
    expected = sum(tokens[0, ..., m] * phi[0, 1, m] for m in range(3)) + phi[0, 1, 3:].view(4, 4)
    torch.testing.assert_close(maps[0, ..., 1], expected)
    with pytest.raises(ValueError, match="9 patches, .* 16: use images of 32 pixels"):
        surgery.llip_caption_map(model, images[..., :24, :24], CAPTIONS)


# ---- the command line

TOKENIZER = Tokenizer.learn(["a dog on grass", "grass"], 520)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(words) of the command line on a model in memory -> (exit status, stdout, stderr)."""

    def run(*words, model=None, status=0):
        torch.manual_seed(0)
        model = model or CLIP(tiny(3, TOKENIZER.vocab_size)).eval()
        opened = lambda source, vocab="", **options: (model, TOKENIZER)  # noqa: E731
        monkeypatch.setattr(surgery.evaluate, "open_model", opened)
        out = tmp_path / "map.png"
        words = [str(w) for w in words]
        out.unlink(missing_ok=True)
        assert surgery.main(["--model", "run", "--out", str(out), *words]) == status
        stdout, stderr = capsys.readouterr()
        if status:
            assert stderr.startswith("error: ") and stderr.count("\n") == 1 and not out.exists()
            return stderr
        return Image.open(words[-1] if "--out" in words else out)

    return run


def picture(path, mode="RGB", size=(40, 30), **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    (image if mode == "I;16" else image.convert(mode)).save(path, **options)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_command_line_draws_a_sheet(method, run, tmp_path):
    page = run(picture(tmp_path / "a.png"), "a dog", "grass", "--method", method)
    assert page.size[0] == 3 * (256 + 6)
    pixels = np.asarray(page.convert("RGB")).astype(int)
    image, *maps = (pixels[30:210, x : x + 256] for x in (0, 262, 524))
    assert all(np.abs(image - one).mean() > 10 for one in maps)  # each map covers the image


def test_the_pictures_map_is_hot_where_the_map_is(tmp_path):
    maps = torch.zeros(4, 4, 1)
    maps[1, 3] = 1
    grey = Image.new("RGB", (80, 40), "#808080")
    surgery.map_sheet(tmp_path / "a.png", [(grey, maps, ["", ""])], "")
    page = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int).sum(-1)
    drawn = page[26 : 26 + 128, 262 : 262 + 256]  # below the title, beside the image
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert 32 <= row < 64 and column >= 192


@pytest.mark.parametrize(
    "name, mode, size",
    [
        ("a.png", "RGBA", (40, 30)),
        ("a.png", "LA", (40, 30)),
        ("a.png", "P", (40, 30)),
        ("a.png", "1", (40, 30)),
        ("a.png", "I;16", (40, 30)),
        ("a.jpg", "CMYK", (40, 30)),
        ("a.png", "RGB", (1, 1)),
        ("a.png", "RGB", (1, 900)),
        ("a.png", "RGB", (900, 1)),
    ],
)
def test_any_kind_of_image(name, mode, size, run, tmp_path):
    run(picture(tmp_path / name, mode, size), "a dog")


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_an_animation_shows_its_first_frame(name, run, tmp_path):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    page = run(tmp_path / name, "a dog")
    red, _, blue = page.convert("RGB").getpixel((100, 100))
    assert red > 200 and blue < 50


@pytest.mark.parametrize("name, order", [("a.png", "<u2"), ("a.tiff", "<u2"), ("a.tiff", ">u2")])
def test_sixteen_bits_keep_their_brightness(name, order, tmp_path):
    """Pillow's own conversion clips whatever is above 255 to white."""
    Image.fromarray(np.full((30, 40), 100 << 8, order)).save(tmp_path / name)
    assert surgery.read_image(tmp_path / name).getpixel((5, 5)) == (100, 100, 100)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.tiff"])
def test_every_cut_off_file_is_named(name, tmp_path):
    path = picture(tmp_path / name)
    whole = path.read_bytes()
    for length in (0, 3, 20, 300, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{name}: not a readable image"):
            surgery.read_image(path)


def test_a_file_is_closed_after_it_is_read(tmp_path):
    """An animation's file stays open after loading: a folder of them, and there are no files left."""
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        surgery.read_image(tmp_path / "a.gif")
        gc.collect()
    assert not caught


def test_texts_of_any_kind(run, tmp_path):
    run(picture(tmp_path / "1.png"), "a very long text " * 50, "two\nlines", "", "dog \u72ac \U0001f415")


def test_many_texts_wrap_and_the_sheet_stays_narrow(run, tmp_path):
    page = run(picture(tmp_path / "1.png"), *[f"text {n}" for n in range(60)])
    assert page.width <= 1600 and page.height > 200


def test_the_image_is_not_overwritten(run, tmp_path):
    image = picture(tmp_path / "1.png")
    before = image.read_bytes()
    for out in (image, f"{tmp_path}/../{tmp_path.name}/1.png"):
        assert "give another name" in run(image, "a dog", "--out", out, status=2)
    assert image.read_bytes() == before


def test_llip_on_the_command_line(run, tmp_path):
    config = tiny(3, TOKENIZER.vocab_size)
    run(picture(tmp_path / "a.png"), "a dog", model=Llip(config, 3, 2).eval())
    all_tokens = Llip(config, 3, 2, all_tokens=True).eval()
    run(tmp_path / "a.png", "a dog", model=all_tokens)
    message = run(tmp_path / "a.png", "a dog", "--size", 64, model=all_tokens, status=2)
    assert "use images of 32 pixels" in message
    pooled = PooledTokens(config, 3).eval()
    assert "pools 3 tokens" in run(tmp_path / "a.png", "a dog", model=pooled, status=2)


def test_clear_errors(run, tmp_path):
    image = picture(tmp_path / "a.png")
    assert "no.png: not a readable image (No such file" in run(tmp_path / "no.png", "a dog", status=2)
    assert "not a readable image" in run(tmp_path, "a dog", status=2)
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:900])
    assert "cut.png: not a readable image" in run(tmp_path / "cut.png", "a dog", status=2)
    (tmp_path / "text.png").write_text("hello")
    assert "text.png: not a readable image" in run(tmp_path / "text.png", "a dog", status=2)
    assert "take 16" in run(image, "a dog", "--size", 20, status=2)
    assert "take 8" in run(image, "a dog", "--size", -3, status=2)
    assert "ends in .png" in run(image, "a dog", "--out", tmp_path / "map.xyz", status=2)
    message = run(image, "a dog", model=CLIP(CONFIGS["tiny"]), status=2)
    assert f"the tokenizer has {TOKENIZER.vocab_size} tokens, the model 1024" in message
    for words in ([], ["a dog", "--methods", "gem"], ["a dog", "--method", "magic"]):
        with pytest.raises(SystemExit):
            surgery.main([str(image), *words, "--model", "m.pt", "--out", "x.png"])


def test_a_run_directory_and_checkpoints_that_lack_a_tower(tmp_path, capsys):
    import pretrained

    image, out, path = picture(tmp_path / "a.png"), tmp_path / "map.png", tmp_path / "checkpoint.pt"
    model = CLIP(tiny(3, TOKENIZER.vocab_size))
    TOKENIZER.save(tmp_path / "tokenizer.json")
    words = [str(image), "a dog", "--out", str(out), "--model"]
    torch.save({"state_dict": model.state_dict(), "model": pretrained.describe(model)}, path)
    for source in (tmp_path, path):  # the tokenizer lies beside the checkpoint
        assert surgery.main([*words, str(source)]) == 0 and out.exists()
        out.unlink()
    capsys.readouterr()
    state = model.state_dict()
    for part in ("image", "text"):
        some = {k: v for k, v in state.items() if k.startswith("visual.") == (part == "image")}
        torch.save(some, path)
        assert surgery.main([*words, str(path)]) == 2 and not out.exists()
        stderr = capsys.readouterr().err
        assert stderr.startswith("error: ") and stderr.count("\n") == 1 and "checkpoint.pt" in stderr
