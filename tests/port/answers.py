"""What the port computes for each file of tests/golden: {case/key: array}, the input of check.py.

Every function takes the port as a module, so that it also runs with a port that has a deliberate error.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
from tape import Array, gradients

FOLDER = Path(__file__).resolve().parent.parent / "golden"
FILES = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))["files"]
DTYPE = np.float32


def load_check():
    spec = importlib.util.spec_from_file_location("golden_check", FOLDER / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load_check()


class Recorded:
    """One file: inputs as leaves of the tape, weights by name, configuration, and the names of gradients."""

    def __init__(self, case):
        self.facts = FILES[case + ".npz"]
        self.config, self.constants = self.facts["config"], self.facts["constants"]
        self.x, self.w = {}, {}
        for key, value in check.load(case).items():
            kind, _, name = key.partition(".")
            if kind == "out":
                continue
            value = Array(value.astype(DTYPE)) if value.dtype.kind == "f" else value
            (self.w if kind == "w" else self.x)[name] = value

    def weight_gradients(self, loss, norms, prefix):
        """The norms of all gradients, and the gradients that the manifest lists under the prefix."""
        names = self.facts["grad_norms_order"]
        found = dict(zip(names, gradients(loss, [self.w[name] for name in names])))
        out = {norms: np.array([np.sqrt((found[name] ** 2).sum()) for name in names])}
        for key in self.facts["arrays"]:
            name = key.removeprefix("out." + prefix)
            if name in found and key.startswith("out." + prefix):
                out[prefix + name] = found[name]
        return out


def input_gradients(loss, x, names, prefix):
    return {prefix + name: g for name, g in zip(names, gradients(loss, [x[name] for name in names]))}


def layers(port):
    r = Recorded("layers")
    x, w = r.x, r.w
    y = port.layer_norm(x["x"], w["ln.weight"], w["ln.bias"])
    loss = (y * x["cotangent"]).sum()
    found = {"layer_norm": y, "unit": port.unit(x["x"])}
    found |= {"softmax": port.softmax(x["scores"]), "log_softmax": port.log_softmax(x["scores"])}
    found |= {"quick_gelu": port.quick_gelu(x["activation"]), "gelu": port.gelu(x["activation"])}
    grads = gradients(loss, [x["x"], w["ln.weight"], w["ln.bias"]])
    return found | dict(zip([f"layer_norm.grad.{n}" for n in ("x", "weight", "bias")], grads))


def attention_kinds(port):
    x, found = Recorded("attention_kinds").x, {}
    for kind in ("qkv", "vvv", "qqv", "kkv", "dv"):
        mixed, weights = port.attend(x["q"], x["k"], x["v"], kind)
        found |= {f"{kind}.mixed": mixed, f"{kind}.weights": weights}
    return found


def losses_small(port):
    x, found = Recorded("losses_small").x, {}
    plain = x["image_features"] @ x["text_features"].T * x["scale"]
    biased = plain + x["bias"]
    losses = {
        "info_nce": port.info_nce(plain),
        "info_nce_rank": port.info_nce(plain[2:4], plain.T[2:4], 2),
        "siglip": port.siglip(biased),
        "siglip_rank": port.siglip(biased[2:4], 2),
        "info_nce_large": port.info_nce(40 * plain),
        "siglip_large": port.siglip(100 * plain),
    }
    for case, loss in losses.items():
        names = ["image_features", "text_features", "scale"] + ["bias"] * (case in ("siglip", "siglip_rank"))
        found |= input_gradients(loss, x, names, f"{case}.grad.") | {f"{case}.loss": loss}
    return found


def openclip_losses(case):
    def answer(port):
        x, found = Recorded(case).x, {}
        plain = x["image_features"] @ x["text_features"].T * x["scale"]
        biased = plain + x["bias"]
        losses = {"clip": port.info_nce(plain), "clip_with_bias": port.info_nce(biased)}
        losses |= {"siglip": port.siglip(biased), "siglip_nobias": port.siglip(plain)}
        losses["siglip_chunk"] = port.siglip(biased)
        for name, loss in losses.items():
            leaves = ["image_features", "text_features", "scale"] + ["bias"] * ("nobias" not in name)
            leaves = leaves[:3] if name == "clip" else leaves
            found |= input_gradients(loss, x, leaves, f"{name}.grad.") | {f"{name}.loss": loss}
        return found

    return answer


def clip_train_step(port):
    r = Recorded("clip_train_step")
    image = port.clip_image(r.w, r.config, r.x["image"])
    logits = port.clip_logits(r.w, image, port.clip_text(r.w, r.config, r.x["tokens"]))
    loss = port.info_nce(logits)
    return {"logits_per_image": logits, "loss": loss} | r.weight_gradients(loss, "grad_norms", "grad.")


def clip_texts(port):
    r = Recorded("clip_texts")
    image, text = (port.clip_image(r.w, r.config, r.x["image"]), port.clip_text(r.w, r.config, r.x["tokens"]))
    logits = port.clip_logits(r.w, image, text)
    loss = port.info_nce(logits)
    found = {"image_raw": image, "text_raw": text, "logits": logits, "loss": loss}
    return found | r.weight_gradients(loss, "grad_norms", "grad.")


def clip_vitA_io(port):
    r, w = Recorded("clip_vitA_io"), Recorded("clip_vitA_jit_fp16").w
    image, text = port.clip_image(w, r.config, r.x["image"]), port.clip_text(w, r.config, r.x["tokens"])
    logits = port.clip_logits(w, image, text)
    found = {"image_raw": image, "text_raw": text, "logits_per_image": logits, "logits_per_text": logits.T}
    files = ("statedict", "jit_fp32", "jit_fp16")
    return {f"clip_load.{file}.{key}": value for file in files for key, value in found.items()}


def llip_k4(port):
    r = Recorded("llip_k4")
    w, c, found = r.w, r.config, {}
    keys, values = port.llip_image(w, c, r.x["image"])
    queries, text = port.llip_text(w, c, r.x["tokens_all"])
    found |= {"K": keys, "V": values, "Q": queries, "text": text}
    pairs = port.llip_text(w, c, r.x["tokens"])
    for tau in (1, 5):
        found[f"z_tau{tau}"] = port.mix(w, keys, values, queries, tau)
        found[f"logits_tau{tau}"] = port.llip_logits(w, keys, values, queries, text, tau)
        loss = port.siglip(port.llip_logits(w, keys, values, *pairs, tau))
        found[f"loss_tau{tau}"] = loss
        found |= r.weight_gradients(loss, f"grad_norms_ws{tau}", f"grad_ws{tau}.")
    return found


def llip_ckpt_io(port):
    r, w = Recorded("llip_ckpt_io"), Recorded("llip_ckpt_orig_mod_module").w
    keys, values = port.llip_image(w, r.config, r.x["image"])
    queries, text = port.llip_text(w, r.config, r.x["tokens"])
    return {"K": keys, "Q": queries, "text": text, "z_tau5": port.mix(w, keys, values, queries, 5)}


def llip_variant(case):
    def answer(port):
        r = Recorded(case)
        w, c, tau = r.w, r.config, r.constants["temperature"]
        keys, values = port.llip_image(w, c, r.x["image"])
        queries, text = port.llip_text(w, c, r.x["tokens"])
        logits = port.llip_logits(w, keys, values, queries, text, tau)
        loss = port.siglip(logits)
        found = {"K": keys, "V": values, "Q": queries, "text_raw": text, "logits": logits, "loss": loss}
        found |= {"phi": port.mixing_weights(keys, queries, tau)}
        found |= {"z": port.mix(w, keys, values, queries, tau)}
        if "prompts" in r.x:
            classes = port.classes_of(*port.llip_text(w, c, r.x["prompts"]), r.x["prompt_class"])
            found |= {"class_Q": classes[0], "class_text": classes[1]}
            found["class_logits"] = port.llip_logits(w, keys, values, *classes, tau)
        return found | r.weight_gradients(loss, "grad_norms", "grad.")

    return answer


def llip_baseline(case):
    def answer(port):
        r, found = Recorded(case), {}
        image, tokens = port.pooled(r.w, r.config, r.x["image"], None)
        text = port.clip_text(r.w, r.config, r.x["tokens"])
        logits = port.clip_logits(r.w, image, text)
        for name, loss in (("siglip", port.siglip(logits)), ("clip", port.info_nce(logits))):
            found |= {f"{name}.loss": loss}
            found |= r.weight_gradients(loss, f"{name}.grad_norms", f"{name}.grad.")
        found |= {"image_raw": image, "tokens_raw": tokens}
        return found | {"image_features": port.unit(image), "text_features": port.unit(text)}

    return answer


def llip_learned(port):
    r = Recorded("llip_learned")
    image, _ = port.pooled(r.w, r.config, r.x["image"], r.constants["temperature"])
    text = port.clip_text(r.w, r.config, r.x["tokens"])
    logits = port.clip_logits(r.w, image, text)
    loss = port.siglip(logits)
    found = {"image_raw": image, "text_raw": text, "logits": logits, "loss": loss}
    return found | r.weight_gradients(loss, "grad_norms", "grad.")


def second_branch(port):
    r, found = Recorded("second_branch"), {}
    x, c = r.x, r.config
    for kind in ("dv", "vvv", "qqv", "kkv"):
        sizes = c["vision_layers"], c["vision_heads"], kind, 2, r.constants["aligned_layers"]
        plain, z, rows = port.two_paths(r.w, x["x"], *sizes)
        loss = (plain * x["cotangent_x"]).sum() + (z * x["cotangent_z"]).sum()
        loss = loss + (rows * x["cotangent_rows"]).sum()
        found |= {f"{kind}.x": plain, f"{kind}.z": z, f"{kind}.attention_rows": rows}
        found |= input_gradients(loss, x, ["x"], f"{kind}.grad.")
        found |= r.weight_gradients(loss, f"{kind}.grad_norms", f"{kind}.grad.")
    return found


def alignclip_options(port):
    r, found = Recorded("alignclip_options"), {}
    x, constants = r.x, r.constants
    text = port.unit(x["text_raw"])
    for form in ("mixture", "released", "uniform", "none"):
        found[f"targets.{form}"] = port.smoothing_targets(text, constants["epsilon"], form)
    found["zero.attention_loss"] = port.attention_alignment(x["attention_with_zero"], x["guidance"])
    options = {name: constants[name] for name in ("scale", "margin", "epsilon", "weight")}
    options |= {"form": "mixture", "temperature": 1.0, "detach": False, "similarity": "label"}
    changes = {"default": {}, "detach": {"detach": True}, "all": {"similarity": "all"}}
    changes["temperature0.1"] = {"temperature": 0.1}
    names = ["tokens_plain_raw", "tokens_branch_raw", "attention_rows"]
    for tag, change in changes.items():
        o = options | change
        parts = port.alignclip(*(x[name] for name in names), text, x["labels"], o)
        losses = ("classification_loss", "attention_loss", "similarity_loss", "total_loss")
        found |= {f"{tag}.{name}": value for name, value in zip(losses, parts)}
        grads = input_gradients(parts[3], x, names, f"{tag}.grad.")
        found |= {name.removesuffix("_raw"): g for name, g in grads.items()}
        maps = port.unit(x["tokens_branch_raw"][:, 1:]) @ text.T
        found[f"{tag}.guidance"] = port.guidance(maps, x["labels"], o["temperature"])
        found[f"{tag}.attention"] = port.cls_attention(x["attention_rows"])
    return found


def alignclip_aal(port):
    x = Recorded("alignclip_aal").x
    attention = port.cls_attention(x["attention_rows"][:5])
    loss = port.attention_alignment(attention, port.guidance(x["similarity_branch"], x["labels"]))
    names = ["attention_rows", "similarity_branch"]
    found = {"attention.loss": loss} | {
        key.replace("grad_attention_rows", "grad_cls_rows"): g
        for key, g in input_gradients(loss, x, names, "attention.grad_").items()
    }
    loss = port.similarity_alignment(x["similarity_plain"], x["similarity_branch"])
    names = ["similarity_plain", "similarity_branch"]
    return found | {"similarity.loss": loss} | input_gradients(loss, x, names, "similarity.grad_")


def alignclip_sls(port):
    x, found = Recorded("alignclip_sls").x, {}
    text = port.unit(x["text_raw"])
    found |= {"text_features": text, "distribution": port.smoothing_targets(text, 0, "mixture")}
    for epsilon in (0.9, 1.0, 0.5):
        targets = port.smoothing_targets(text, epsilon, "released")[x["labels"]]
        loss = port.soft_cross_entropy(x["logits"], targets)
        found[f"eps{epsilon}.loss"] = loss
        found |= input_gradients(loss, x, ["logits"], f"eps{epsilon}.grad_")
    return found


def alignclip_total(port):
    r, found = Recorded("alignclip_total"), {}
    x, c = r.x, r.constants
    text = port.unit(x["text_raw"])
    options = {name: c[name] for name in ("scale", "margin", "epsilon")}
    options |= {"form": "released", "temperature": 1.0, "detach": False, "similarity": "all"}
    for weight in (10, 1):
        leaves = x["tokens_plain"], x["tokens_branch"], x["attention_rows"]
        given = leaves[0], leaves[1], leaves[2][:5]
        parts = port.alignclip(*given, text, x["labels"], options | {"weight": weight})
        names = ("cls_loss", "attention_align_loss", "similarity_align_loss", "total_loss")
        found |= {f"w{weight}.{name}": value for name, value in zip(names, parts)}
        grads = gradients(parts[3], leaves)
        names = ("tokens_plain", "tokens_branch", "attention_rows")
        found |= {f"w{weight}.grad_{name}": g for name, g in zip(names, grads)}
    return found


def clipood_mms(port):
    x, found = Recorded("clipood_mms").x, {}
    for tag in ("lam0.3_temp100", "lam0.1_temp100", "lam0.0_temp100", "lam0.3_temp10"):
        margin, scale = (float(part) for part in tag[3:].split("_temp"))
        text, labels = x["text_features"], x["labels"]
        logits = port.margin_metric_logits(port.unit(x["features"]), text, labels, scale, margin)
        onehot = Array(np.eye(len(text), dtype=DTYPE)[labels])
        loss = port.soft_cross_entropy(logits, onehot)
        found |= {f"{tag}.loss": loss} | input_gradients(loss, x, ["features"], f"{tag}.grad_")
        # the accuracy is that of the logits with margin
        found[f"{tag}.train_acc_percent"] = DTYPE(100 * (logits.data.argmax(1) == labels).mean())
    return found


# quick ones first
CASES = {
    "layers": layers,
    "attention_kinds": attention_kinds,
    "losses_small": losses_small,
    "alignclip_options": alignclip_options,
    "alignclip_sls": alignclip_sls,
    "clipood_mms": clipood_mms,
    "openclip_losses_a": openclip_losses("openclip_losses_a"),
    "openclip_losses_b": openclip_losses("openclip_losses_b"),
    "alignclip_aal": alignclip_aal,
    "alignclip_total": alignclip_total,
    "clip_texts": clip_texts,
    "llip_small": llip_variant("llip_small"),
    "llip_norm": llip_variant("llip_norm"),
    "llip_all_tokens": llip_variant("llip_all_tokens"),
    "llip_learned": llip_learned,
    "second_branch": second_branch,
    "clip_vitA_io": clip_vitA_io,
    "llip_ckpt_io": llip_ckpt_io,
    "llip_baseline_avg": llip_baseline("llip_baseline_avg"),
    "llip_baseline_register": llip_baseline("llip_baseline_register"),
    "clip_train_step": clip_train_step,
    "llip_k4": llip_k4,
}


def answers(port, case):
    """{case/key: array} of one file."""
    found = CASES[case](port)
    return {f"{case}/{key}": v.data if isinstance(v, Array) else v for key, v in found.items()}
