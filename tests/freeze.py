"""Hashes of what the package does, to see that a restructuring changes nothing.

    python -m tests.freeze write [--only=PATTERN] [--file=tests/frozen.json]
    python -m tests.freeze check [--only=PATTERN] [--strict]

`write` computes the hashes (those that match PATTERN, a shell pattern or a part of a name) into the
file; `check` computes them again, prints each name that differs and exits 1 if there is one.

Programs are those of a run on four devices, lowered to StableHLO and never compiled. Each has two
hashes. NAME is of the graph: what every result depends on, whatever the order of independent
operations, the names of functions, and which of them are inlined. NAME:text is of the text, with
symbols numbered as they come; where only that differs `check` says so and goes on, or fails if
--strict. NAME:state is of the paths, shapes and types of a training state, as checkpoints have it.
The hashes depend on JAX's version, which the file holds.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import fnmatch
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.mlir import ir
from PIL import Image

from configs import common
from flax_cnns import run
from flax_cnns.config import (
    FIELDS,
    add_missing_fields,
    find_problems,
    flatten,
    reset_inert_fields,
    to_plain,
    validate,
)
from flax_cnns.data import pipeline
from flax_cnns.data.load import load_dataset
from flax_cnns.layers import Conv, inside_control_flow
from flax_cnns.models.registry import FAMILIES, create_model, init_variables, list_models
from flax_cnns.runs.build import (
    build_components,
    make_augment_and_mix,
    make_train_step,
    train_batches,
)
from flax_cnns.runs.evaluate import evaluate_run
from flax_cnns.runs.plan import RunPlan
from flax_cnns.runs.predict import make_predictor_from_run, predict
from flax_cnns.studies.ablation.plan import make_rows
from flax_cnns.train import optimizers, parallel, precise_bn

FILE = pathlib.Path(__file__).with_name("frozen.json")
Jobs = dict[str, Callable[[], Mapping[str, str]]]  # a name, or its beginning: {name: hash}


def plan_of(parts: Any) -> tuple[Any, Any, float]:
    """(shapes of the state, the optimizer, steps an epoch) as a run of `parts` has them."""
    plan = RunPlan(parts)
    target = plan.make_abstract_state()
    return target, plan.make_optimizer(target.variables), plan.steps_per_epoch


# ---------------------------------------------------------------------------- hashes


def digest(content: Any) -> str:
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content, sort_keys=True, default=_as_json)
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:16]


def _as_json(value: Any) -> Any:
    if isinstance(value, (np.ndarray, jax.Array)):
        return [str(value.dtype), list(value.shape), digest(np.asarray(value).tobytes())]
    if isinstance(value, functools.partial):
        return ["partial", _as_json(value.func), value.args, value.keywords]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name"))
        return [type(value).__name__, {name: getattr(value, name) for name in fields}]
    return getattr(value, "__name__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def program(name: str, lowered: Any) -> dict[str, str]:
    module = lowered.compiler_ir("stablehlo")
    return {name: Graph(module).digest(), f"{name}:text": digest(plain_text(str(module)))}


def plain_text(text: str) -> str:
    """Of a module: functions and values are numbered as they come, names of results left out."""
    text = re.sub(r'(, )?jax\.result_info = "[^"]*"', "", text)
    text = re.sub(r"^module @\S+", "module", text, flags=re.MULTILINE)
    own = set(re.findall(r"func\.func \w+ (@[\w.$-]+)", text))
    numbers: dict[str, str] = {}

    def number(match: re.Match) -> str:
        symbol = match[0]
        if symbol[0] == "@" and symbol not in own:
            return symbol  # of a library's function
        return numbers.setdefault(symbol, f"{symbol[0]}{len(numbers)}")

    return re.sub(r"%[\w.$-]+|@[\w.$-]+", number, text)


class Graph:
    """The hash of a module's results in terms of its arguments.

    An operation's hash is of its name, its attributes, its regions and the hashes of its operands;
    a call's is that of what the function returns. So neither order nor names nor dead code count.
    """

    LEFT_OUT = ("sym_name", "callee", "sym_visibility", "arg_attrs", "res_attrs", "function_type")

    def __init__(self, module: ir.Module):
        self.functions = {
            ir.StringAttr(op.attributes["sym_name"]).value: op.operation
            for op in module.body.operations
            if op.operation.name == "func.func"
        }
        self.rest = [str(op) for op in module.body.operations if op.operation.name != "func.func"]
        self.seen: dict[Any, list[str]] = {}

    def digest(self) -> str:
        main = self.functions["main"]
        facts = [*self.rest, self._attribute(main.attributes["function_type"])]
        for name in ("arg_attrs", "res_attrs"):
            if name in main.attributes:
                text = str(main.attributes[name])
                facts.append(re.sub(r'(, )?jax\.result_info = "[^"]*"', "", text))
        count = len(main.regions[0].blocks[0].arguments)
        return digest([facts, self._call("main", [f"argument {i}" for i in range(count)], 0)])

    def _call(self, name: str, given: list[str], depth: int) -> list[str]:
        key = (name, tuple(given), depth)
        if key not in self.seen:
            block = self.functions[name].regions[0].blocks[0]
            self.seen[key] = self._block(block, given, {}, depth)
        return self.seen[key]

    def _attribute(self, attribute: ir.Attribute) -> str:
        def replace(match: re.Match) -> str:
            if match[1] not in self.functions:
                return match[0]
            count = len(self.functions[match[1]].regions[0].blocks[0].arguments)
            return digest(self._call(match[1], [f"inner {i}" for i in range(count)], 0))

        text = str(attribute)
        return re.sub(r"@([\w.$-]+)", replace, text) if "@" in text else text

    def _block(self, block: ir.Block, given: list[str], known: dict, depth: int) -> list[str]:
        """The hashes of what the block's last operation takes."""
        known = known | dict(zip(block.arguments, given, strict=True))
        last: list[str] = []
        for op in block.operations:
            op = op.operation
            operands = [known[value] for value in op.operands]
            if op.name in ("func.call", "call"):
                name = ir.FlatSymbolRefAttr(op.attributes["callee"]).value
                known |= dict(zip(op.results, self._call(name, operands, depth), strict=True))
                continue
            attributes = sorted(
                (name, self._attribute(op.attributes[name]))
                for name in op.attributes
                if name not in self.LEFT_OUT
            )
            types = [str(result.type) for result in op.results]
            inner = [self._region(region, known, depth + 1) for region in op.regions]
            own = digest([op.name, attributes, types, operands, inner])
            known |= {result: f"{own}.{i}" for i, result in enumerate(op.results)}
            last = operands if not types else last
        return last

    def _region(self, region: ir.Region, known: dict, depth: int) -> list[list[str]]:
        return [
            self._block(
                block,
                [f"{depth}.{i} {v.type}" for i, v in enumerate(block.arguments)],
                known,
                depth,
            )
            for block in region.blocks
        ]


def leaves(tree: Any) -> list[tuple]:
    """(path, shape, type) of each leaf, as checkpoints name them."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), list(x.shape), str(x.dtype))
        for path, x in found
    ]


# ---------------------------------------------------------------------------- training steps


def base(**fields: Any) -> Any:
    """A run on noise; fields with __ for dots."""
    config = common.get_config()
    config.data.mock = 40
    config.data.batch_size, config.data.eval_batch_size = 8, 4
    return change(config, fields)


def change(config: Any, fields: Mapping[str, Any]) -> Any:
    with config.unlocked(), config.ignore_type():
        for name, value in fields.items():
            section, path = config, name.replace("__", ".").split(".")
            for part in path[:-1]:
                section = section[part]
            section[path[-1]] = value
    return config


def abstract(parts: Any, size: int, evaluating: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch, as `parallel.shard_batch` makes it."""
    loader = parts.config.data.augment.where == "loader" and not evaluating
    shapes = {
        "image": ((size, *parts.dataset.image_shape), jnp.float32 if loader else jnp.uint8),
        "label": ((size,), jnp.int32),
    }
    if evaluating:
        shapes["mask"] = (size,), jnp.float32
    if parts.mode == "pmap":
        shapes = {k: ((4, s[0] // 4, *s[1:]), t) for k, (s, t) in shapes.items()}
    return {k: jax.ShapeDtypeStruct(s, t) for k, (s, t) in shapes.items()}


def key_shape() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def steps_of(name: str, config: Any, which: str = "train") -> dict[str, str]:
    """The hashes of the programs of a run; `which` of init, train, evaluate, moments."""
    validate(config)
    parts = build_components(config, begun=True)
    target, optimizer, per_epoch = plan_of(parts)
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), target)
    found = {f"{name}:state": digest(leaves(target))}
    data = config.data
    if "init" in which:
        found |= program(f"{name}/init", jax.jit(parts.init_variables).lower())
    if "evaluate" in which:
        batch = abstract(parts, data.eval_batch_size, True)
        found |= program(f"{name}/evaluate", parts.eval_step.lower(bare.variables, batch, None))
    batch = abstract(parts, data.batch_size, False)
    if "moments" in which:
        step = precise_bn.make_moments_step(
            parts.model.apply, optimizer.batchnorm_modes, **make_augment_and_mix(parts)
        )
        step = parallel.parallelize(step, parts.mesh, mode=parts.mode, donate=False)
        given = (bare.variables, jax.ShapeDtypeStruct((), jnp.int32))
        found |= program(f"{name}/moments", step.lower(given, batch, key_shape()))
    if "train" in which:
        step = make_train_step(parts, optimizer, per_epoch)
        found |= program(f"{name}/train", step.lower(bare, batch, key_shape()))
    return found


def _rows(name: str, *kept: int) -> tuple:
    """Of a network's table."""
    table = create_model(name).table
    return tuple(table[i] for i in kept)


# The smallest network of each family: (name, size of images, fields that make it short).
FAMILY: dict[str, tuple[str, int, dict[str, Any]]] = {
    "alexnet": ("alexnet", 67, dict(hidden=16)),
    "all_cnn": ("all_cnn_c", 32, {}),
    "cifar_preact": ("cifar_preact164", 8, dict(depths=(1, 2, 1), drop_path=0.2)),
    "cifar_resnet": ("cifar_resnet20", 8, dict(depths=(1, 2, 1), drop_path=0.2)),
    "convnext": ("convnext_atto", 32, dict(depths=(1, 1, 2, 1), drop_path=0.1)),
    "deck_cnn": ("deck003_cifar100_example", 18, {}),
    "densenet": ("densenet121", 32, dict(depths=(2, 2, 1, 2), dropout=0.1)),
    "dsn": ("dsn", 8, {}),
    "efficientnet": ("efficientnet_b0", 32, dict(depth_mult=0.5)),
    "fractalnet": (
        "fractalnet_20_droppath",
        16,
        dict(widths=(4, 8, 8), columns=2, dropout=(0.0, 0.1, 0.2)),
    ),
    "googlenet": ("googlenet_tv_aux", 33, dict(table=_rows("googlenet_tv_aux", 0, 2, 3, 7, 8, 10))),
    "highway": ("highway_19", 32, {}),
    "inception_resnet": ("inception_resnet_v2", 75, dict(depths=(1, 2, 1))),
    "inception_v3": ("inception_v3", 75, dict(pool_projs=(32, 64), widths=(128, 160))),
    "inception_v4": ("inception_v4", 75, dict(depths=(1, 1, 1))),
    "lenet": ("lenet5_original", 32, {}),
    "mobilenet_v1": ("mobilenet_v1_025", 32, dict(depths=(1, 1, 2, 1, 1))),
    "mobilenet_v2": ("mobilenet_v2_025", 32, dict(table=_rows("mobilenet_v2_025", *range(4)))),
    "mobilenet_v3": ("mobilenet_v3_small", 32, dict(table=_rows("mobilenet_v3_small", *range(5)))),
    "nas": ("nas_v1", 32, {}),
    "nasnet": ("nasnet_a_mobile", 64, dict(depths=(1, 1), drop_path=0.1)),
    "nin": ("nin_cifar10", 8, {}),
    "pnasnet": ("pnasnet5large", 64, dict(depths=(1,), width=24, stem_width=8)),
    "preact_resnet": ("preact_resnet50", 32, dict(depths=(1, 2, 1, 1), drop_path=0.1)),
    "pyramidnet": ("pyramidnet_110_a48", 8, dict(depth=20, shake_drop=0.2)),
    "resnet": ("resnet50d", 32, dict(depths=(1, 2, 1, 1), drop_path=0.1, dropout=0.1)),
    "resnet_in_resnet": ("rir_18", 8, {}),
    "resnext": ("resnext50_32x4d", 32, dict(depths=(1, 2, 1, 1))),
    "senet": ("senet154", 32, dict(depths=(1, 2, 1, 1))),
    "shake_shake": ("shakeshake_26_2x32d", 8, dict(depths=(2, 1, 1))),
    "simpnet": ("simpnet_slim_300k", 32, {}),
    "sparse_densenet": ("sparse_densenet_abc", 8, dict(depths=(3, 3, 2))),
    "sparsenet": ("sparsenet121", 32, dict(depths=(2, 3, 2, 2))),
    "squeezenet": ("squeezenet1_0_bypass", 33, {}),
    "vgg": ("vgg11_bn", 32, dict(hidden=(16, 16))),
    "vit": ("vit_tiny_patch16_224", 32, dict(depth=2, patch=8, drop_path=0.1, dropout=0.1)),
    "wide_resnet": ("wrn_16_4", 8, dict(dropout=0.3, drop_path=0.1)),
    "xception": ("xception", 71, dict(depth=1)),
    "zfnet": ("zfnet_fig3", 47, dict(hidden=16)),
}


def family_jobs() -> Jobs:
    missing = {family.__name__.rpartition(".")[2] for family in FAMILIES} ^ set(FAMILY)
    if missing:
        raise SystemExit(f"FAMILY and the registry differ by {missing}")
    jobs: Jobs = {}
    for family, (name, size, fields) in FAMILY.items():
        fields = {f"model__{k}": v for k, v in fields.items()}
        given = dict(model__name=name, data__image_size=size, data__channels=3) | fields
        jobs[f"family/{family}"] = lambda f=family, given=given: steps_of(
            f"family/{f}", base(**given), "init train evaluate"
        )
    return jobs


# ---- one field after another

LENET = dict(data__image_size=32)
RESNET = dict(
    model__name="cifar_resnet20",
    model__depths=(1, 1, 1),
    model__widths=(4, 8, 8),
    data__image_size=8,
)
SCAN = RESNET | dict(model__depths=(3,), model__widths=(4,), model__scan=True)
KERNELS = ((r".*/kernel", 5e-4), (r".*", 0.0))
STEM = ((r"params/stem/.*", False), (r".*", True))
MANY = 200  # images: 25 steps an epoch


def variations() -> dict[str, tuple[dict[str, Any], str]]:
    """{name: (fields, which programs)}."""
    found: dict[str, tuple[dict[str, Any], str]] = {}

    def add(
        name: str, fields: Mapping[str, Any], on: Mapping = LENET, which: str = "train"
    ) -> None:
        assert name not in found, name
        found[name] = (dict(on) | dict(fields), which)

    def each(section: str, rows: Mapping[str, Mapping], on: Mapping = LENET) -> None:
        for name, fields in rows.items():
            add(f"{section}/{name}", {f"{section}.{k}": v for k, v in fields.items()}, on)

    add("plain/lenet", {}, which="init train evaluate")
    add("plain/resnet", {}, RESNET, "init train evaluate moments")
    add("plain/scan", {}, SCAN, "init train evaluate moments")
    sgd = {"name": "sgd"}
    each(
        "optimizer",
        {
            "no_momentum": sgd | {"momentum": 0.0},
            "momentum": sgd | {"momentum": 0.7},
            "nesterov": sgd | {"nesterov": True},
            "adam": {"name": "adam"},
            "adam_b": {"name": "adam", "b1": 0.8, "b2": 0.9, "eps": 1e-5},
            "adamw": {"name": "adamw", "weight_decay": (0.05,)},
            "adamw_coupled": {
                "name": "adamw",
                "weight_decay": (0.05,),
                "weight_decay_mode": "coupled",
            },
            "rmsprop": {"name": "rmsprop"},
            "rmsprop_eps": {"name": "rmsprop", "decay_rate": 0.8, "eps": 1e-3, "momentum": 0.0},
            "lamb": {"name": "lamb", "weight_decay": KERNELS},
            "lamb_clipped": {"name": "lamb", "weight_decay": (0.01,), "clip_norm": 1.0},
            "decay": sgd | {"weight_decay": (1e-4,)},
            "decay_rules": sgd | {"weight_decay": KERNELS},
            "decay_decoupled": sgd | {"weight_decay": KERNELS, "weight_decay_mode": "decoupled"},
            "l2": {"l2": (5e-4,)},
            "l2_rules": {"l2": KERNELS},
            "max_norm": {"max_norm": (2.0,)},
            "max_norm_rules": {"max_norm": ((r"params/head/kernel", 1.0), (r".*", 0.0))},
            "grad_noise": {"grad_noise": 0.01},
            "grad_noise_decay": {"grad_noise": 0.01, "grad_noise_decay": 0.9},
            "sam": {"sam": 0.05},
            "clip_norm": {"clip_norm": 1.0},
            "lr_mult": {"lr_mult": ((r"params/head/.*", 10.0), (r".*", 1.0))},
            "layer_decay": {"layer_decay": 0.7},
            "trainable": {"trainable": ((r"params/head/.*", True), (r".*", False))},
        },
    )
    each(
        "optimizer",
        {
            "resnet_trainable": {"trainable": STEM},
            "resnet_bn_frozen": {"bn": ((r"stage1/.*", "frozen"), (r".*", "train"))},
            "resnet_bn_frozen_stats": {"bn": ((r".*", "frozen_stats"),)},
            "resnet_layer_decay": {"layer_decay": 0.7},
            "resnet_max_norm": {"max_norm": (2.0,)},
        },
        RESNET,
    )
    each(
        "optimizer",
        {
            "scan_decay": {"weight_decay": ((r"params/stage1/block2/.*", 0.1), (r".*", 1e-3))},
            "scan_lamb": {"name": "lamb", "weight_decay": KERNELS},
            "scan_lr_mult": {"lr_mult": ((r"params/stage1/block3/.*", 0.5), (r".*", 1.0))},
            "scan_layer_decay": {"layer_decay": 0.7},
            "scan_max_norm": {"max_norm": (2.0,)},
            "scan_l2": {"l2": ((r"params/stage1/block2/.*", 0.1), (r".*", 1e-3))},
            "scan_sam": {"sam": 0.05},
            "scan_grad_noise": {"grad_noise": 0.01},
        },
        SCAN,
    )
    each(
        "schedule",
        {
            "constant": {"name": "constant"},
            "warmup": {"name": "constant", "warmup": "5 steps", "learning_rate": 0.03},
            "steps": {
                "name": "steps",
                "boundaries": ("2 epochs", "90 steps"),
                "factor": 0.3,
                "warmup": "1 epochs",
            },
            "cosine": {"name": "cosine", "warmup": "7 steps", "end": 1e-3},
            "exponential": {"name": "exponential", "every": "2 epochs", "rate": 0.8, "end": 1e-3},
            "one_cycle": {
                "name": "one_cycle",
                "pct_start": 0.4,
                "div_factor": 10.0,
                "final_div_factor": 50.0,
            },
            "plateau": {"name": "plateau", "factor": 0.5, "patience": 2, "min_delta": 1e-2},
            "plateau_warmup": {"name": "plateau", "warmup": "7 steps"},
        },
        LENET | {"data__mock": MANY, "train__duration": "8 epochs"},
    )
    color = LENET | {"data__channels": 3}
    rows = {
        "pad_crop": {"pad_crop": 2},
        "flip": {"flip": True},
        "flip_crop": {"flip": True, "pad_crop": 3},
        "rotate": {"rotate": 10.0},
        "scale": {"scale": 0.1},
        "affine": {"rotate": 5.0, "scale": 0.1, "flip": True, "pad_crop": 2},
        "random_resized_crop": {"random_resized_crop": (0.3, 1.0)},
        "cutout": {"cutout": 7},
        "erase": {"erase": 0.5},
        "randaugment": {"randaugment": (2, 9)},
        "not_normalized": {"normalize": False},
        "not_normalized_erase": {"normalize": False, "erase": 0.5, "cutout": 4},
        "together": {
            "random_resized_crop": (0.3, 1.0),
            "flip": True,
            "pad_crop": 2,
            "randaugment": (1, 5),
            "erase": 0.2,
            "cutout": 3,
        },
        "loader": {"where": "loader", "flip": True, "pad_crop": 2},
    }
    each("data.augment", rows)
    colored = {
        "pca": {"pca": 0.1},
        "color_randaugment": {"randaugment": (2, 9)},
        "color_erase": {"erase": 0.5},
        "color_together": rows["together"] | {"pca": 0.1},
    }
    each("data.augment", colored, color)
    each(
        "data.augment",
        {"streamed_crop": {"random_resized_crop": (0.3, 1.0), "flip": True}},
        LENET | {"data__in_memory": "no"},
    )
    each(
        "data",
        {
            "mean": {"mean": (0.4,), "std": (0.2,)},
            "classes": {"classes": (3, 1, 7)},
            "fraction": {"fraction": 0.5},
            "batch_size": {"batch_size": 16},
        },
    )
    add("data/color", {}, color, "train evaluate")
    each(
        "mix",
        {
            "label_smoothing": {"label_smoothing": 0.1},
            "mixup": {"mixup": 0.2},
            "cutmix": {"cutmix": 1.0},
            "both": {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1},
        },
    )
    each(
        "train",
        {
            "accumulate": {"accumulate": 2},
            "ema": {"ema": 0.99},
            "ema_no_warmup": {"ema": 0.99, "ema_warmup": False},
            "dropout": {"dropout": (0.1,)},
            "dropout_channel": {"dropout": (0.1,), "dropout_mode": "channel"},
        },
    )
    add("train/pmap", {"train.parallel": "pmap"}, which="train evaluate")
    each(
        "train",
        {
            "resnet_sync_batchnorm": {"sync_batchnorm": True},
            "resnet_accumulate": {"accumulate": 2},
            "resnet_accumulate_sync": {"accumulate": 2, "sync_batchnorm": True},
            "resnet_ema": {"ema": 0.99},
            "resnet_dropout": {"dropout": ((r"stage1/.*", 0.2), (r".*", 0.0))},
        },
        RESNET,
    )
    add("train/resnet_pmap", {"train.parallel": "pmap"}, RESNET, "train evaluate moments")
    frozen = {"optimizer.trainable": STEM, "train.ema": 0.9}
    add("train/resnet_frozen_ema", frozen, RESNET, "train moments")
    add("train/resnet_accumulate_sam", {"train.accumulate": 2, "optimizer.sam": 0.05}, RESNET)
    mixed = {"mix.mixup": 0.2, "data.augment.flip": True}
    add("train/resnet_moments_mixed", mixed, RESNET, "moments")
    add("train/scan_dropout", {"train.dropout": (0.1,)}, SCAN)
    dsn = dict(model__name="dsn", data__channels=3, data__image_size=8)
    with_heads = {
        "default": {},
        "off": {"aux_weight": ()},
        "rules": {"aux_weight": ((r"aux1", 0.3), (r".*", 0.1))},
        "corners": {"aux_weight": ((("0 epochs", 1.0), ("10 epochs", 0.0)),)},
        "accumulate": {"accumulate": 2},
    }
    for name, fields in with_heads.items():
        fields = {f"train.{k}": v for k, v in fields.items()}
        add(f"train/aux_{name}", fields, dsn)
    add("model/bfloat16", {"model.dtype": "bfloat16"}, LENET, "init train evaluate")
    add("model/resnet_bfloat16", {"model.dtype": "bfloat16"}, RESNET, "train evaluate moments")
    add("model/wide_head", {"model.num_classes": 12}, LENET, "train evaluate")
    for init in ("paper", "he", "lecun", "xavier", "gaussian", "orthogonal"):
        add(f"model/init_{init}", {"model.init": init}, RESNET, "init")
        add(f"model/lenet_init_{init}", {"model.init": init}, LENET, "init")
    add("model/remat", {"model.remat": True}, RESNET)
    add("model/scan_remat", {"model.remat": True}, SCAN)
    add("model/scan_bfloat16", {"model.dtype": "bfloat16"}, SCAN)
    add("model/scan_pmap", {"train.parallel": "pmap"}, SCAN)
    for norm in ("layer", "channel", "none"):
        add(f"model/norm_{norm}", {"model.norm": norm}, RESNET, "init train evaluate")
    group = {"model.norm": "group", "model.widths": (16, 16, 32)}
    add("model/norm_group", group, RESNET, "init train evaluate")
    for on, what in ((RESNET, "resnet"), (SCAN, "scan")):
        for mode in ("batch", "sample"):
            dropped = {"model.drop_path": 0.3, "model.drop_path_mode": mode}
            add(f"model/{what}_drop_path_{mode}", dropped, on)
        for level in ("batch", "image", "channel", "pixel"):
            shaken = {"model.shake_drop": 0.3, "model.shake_drop_level": level}
            add(f"model/{what}_shake_drop_{level}", shaken, on)
    everything = {
        "optimizer.weight_decay": KERNELS,
        "optimizer.l2": (1e-4,),
        "optimizer.max_norm": (2.0,),
        "optimizer.grad_noise": 0.01,
        "optimizer.sam": 0.05,
        "optimizer.clip_norm": 1.0,
        "mix.mixup": 0.2,
        "mix.cutmix": 1.0,
        "mix.label_smoothing": 0.1,
        "data.augment.flip": True,
        "data.augment.cutout": 3,
        "train.dropout": (0.1,),
        "train.ema": 0.99,
        "train.accumulate": 2,
        "model.drop_path": 0.3,
    }
    add("together/resnet", everything, RESNET, "train moments")
    add("together/scan", everything | {"train.parallel": "pmap"}, SCAN)
    return found


def variation_jobs() -> Jobs:
    return {
        f"step/{name}": lambda name=name, fields=fields, which=which: steps_of(
            f"step/{name}", base(**fields), which
        )
        for name, (fields, which) in variations().items()
    } | {"step/schedule/observe": _observe}


def _observe() -> dict[str, str]:
    """What the plateau schedule makes of a validation."""
    config = base(**LENET, schedule__name="plateau")
    target, _, _ = plan_of(build_components(config, begun=True))
    observe = functools.partial(optimizers.update_plateau, patience=3, factor=0.2, min_delta=1e-3)
    error = jax.ShapeDtypeStruct((), jnp.float32)
    return program("step/schedule/observe", jax.jit(observe).lower(target.opt_state, error))


# ---------------------------------------------------------------------------- convolutions


def convolution_jobs() -> Jobs:
    """A convolution and its gradients, by shape, each as a CPU gets it."""
    rows: list[tuple] = []
    for n, size, cin, cout in (
        (2, 8, 3, 16),
        (64, 32, 16, 16),
        (128, 16, 128, 128),
        (8, 56, 64, 256),
        (4, 35, 192, 48),
        (1, 7, 512, 512),
    ):
        for kernel, strides, padding, dilation, groups in (
            (3, 1, 1, 1, 1),
            (3, 2, "SAME", 1, 1),
            (1, 1, 0, 1, 1),
            (1, 2, 0, 1, 1),
            (5, 1, 2, 1, 1),
            ((1, 7), 1, "SAME", 1, 1),
            (3, 1, 1, 1, 4),
            (3, 1, 1, 1, cin),
            (5, 2, "SAME", 1, cin),
        ):
            if not cin % groups and not cout % groups:
                rows.append((n, size, cin, cout, kernel, strides, padding, dilation, groups))
    rows += [(32, 16, 32, 32, 3, 1, "SAME", 2, 1), (8, 64, 3, 32, 7, 2, 3, 1, 1)]
    rows += [(16, 14, 24, 48, 3, 1, 1, 1, 24), (16, 14, 64, 64, 3, 2, 1, 1, 32)]
    return {
        "conv/" + "_".join(re.sub(r"[^\w]+", "", str(v)) for v in row): functools.partial(
            _convolution, row
        )
        for row in rows
    }


def _convolution(row: tuple) -> dict[str, str]:
    n, size, cin, cout, kernel, strides, padding, dilation, groups = row
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    found = []
    for dtype, flow in ((jnp.float32, False), (jnp.float32, True), (jnp.bfloat16, False)):
        given = dict(
            strides=strides,
            padding=padding,
            kernel_dilation=dilation,
            feature_group_count=groups,
            dtype=dtype,
        )
        x = jax.ShapeDtypeStruct((n, size, size, cin), jnp.float32)
        w = jax.ShapeDtypeStruct((*kernel, cin // groups, cout), jnp.float32)
        conv = functools.partial(_apply_conv, Conv(cout, kernel, use_bias=False, **given), flow)

        def loss(w: Any, x: Any, conv: Callable = conv) -> Any:
            return jnp.sum(conv(w, x) ** 2)

        lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(w, x)
        found.append(Graph(lowered.compiler_ir("stablehlo")).digest())
    name = "conv/" + "_".join(re.sub(r"[^\w]+", "", str(v)) for v in row)
    return {name: digest(found)}


def _apply_conv(module: Conv, flow: bool, w: Any, x: Any) -> Any:
    """In control flow: in a scan's body, told so as the networks do."""
    if not flow:
        return module.apply({"params": {"kernel": w}}, x)

    def body(carry: Any, _: None) -> tuple[Any, Any]:
        with inside_control_flow():
            return carry, module.apply({"params": {"kernel": w}}, x)

    return jax.lax.scan(body, 0.0, None, length=1)[1]


# ---------------------------------------------------------------------------- networks


def network_jobs() -> Jobs:
    """Paths, shapes and types of all variables, and the fields with their values."""
    return {f"variables/{name}": functools.partial(_variables, name) for name in list_models()} | {
        "networks": lambda: {"networks": digest(sorted(list_models()))}
    }


def _variables(name: str) -> dict[str, str]:
    model = create_model(name)
    fields = {
        f.name: getattr(model, f.name)
        for f in dataclasses.fields(model)
        if f.name not in ("name", "parent")
    }
    # Tracing the random numbers of all kernels would take almost half of the time.
    blank = model.clone(kernel_init=nn.initializers.zeros)
    deep = re.search(r"1001|1202|resnet1[015]|resnet200", name) and not name.endswith("v2")
    if deep and hasattr(blank, "scan"):  # the variables are the same
        blank = blank.clone(scan=True)
    shapes = jax.eval_shape(lambda: init_variables(blank, jax.random.key(0)))
    return {
        f"variables/{name}": digest(leaves(shapes)),
        f"network_fields/{name}": digest(fields),
    }


# ---------------------------------------------------------------------------- configs


def config_jobs() -> Jobs:
    jobs: Jobs = {"config/common": lambda: {"config/common": digest(to_plain(common.get_config()))}}
    folder = pathlib.Path(common.__file__).parent
    for path in sorted(folder.rglob("[a-z]*.py")):
        module = ".".join(path.relative_to(folder.parent).with_suffix("").parts)
        for mode in _modes(path):
            name = f"config/{path.relative_to(folder).with_suffix('')}:{mode}"
            jobs[name] = functools.partial(_config, name, module, mode)
    for field in sorted(FIELDS):
        jobs[f"field/{field}"] = functools.partial(_field, field)
    return jobs | {"field/newer": _newer}


def _modes(path: pathlib.Path) -> list[str]:
    """Those that a file names in its call of `check_mode`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "check_mode":
            return ["", *(argument.value for argument in node.args[1:])]
    return []


def _config(name: str, module: str, mode: str) -> dict[str, str]:
    module = importlib.import_module(module)
    config = module.get_config(mode)
    content = [to_plain(config)]
    if hasattr(module, "sweep"):
        content += [
            (row.name, to_plain(row.overrides), to_plain(row.config))
            for row in make_rows(config.lock(), module.sweep())
        ]
    return {name: digest(content)}


VALUES = (None, True, False, -1, 0, 1, 2, 7, 0.0, 0.5, 1.0, 2.5, 1e39, 2**31, "", "x", "2 epochs")
VALUES += ("5 steps", (), (0.5,), (0.2, 0.9), (2, 9), ("3 steps",), (("a.*", 0.5), (".*", 1)))
VALUES += (((".*", True),), ((".*", "frozen"),), (("(", 1),), ((".*", None),), (0, "x"), ("x",))
WORDS = "auto yes no loader device sgd adam lamb adamw rmsprop coupled decoupled constant steps"
WORDS += " cosine exponential one_cycle plateau pmap shard_map unit channel latest best bfloat16"
WORDS += " float16 float32 tfds archive folder 0_steps"
OTHERS: tuple[dict[str, Any], ...] = (
    {},
    {"optimizer.name": "adam", "schedule.name": "plateau"},
    {"train.eval_every": "0 steps", "schedule.name": "one_cycle", "optimizer.momentum": 0.0},
    {"train.ema": 0.9, "train.dropout": (0.1,), "graft.source": "x", "data.in_memory": "yes"},
)


def _field(field: str) -> dict[str, str]:
    """What each value is answered with: the error, doubts, and what a reset makes of it."""
    found: list[Any] = []
    accepted = []
    for value in (*VALUES, *(word.replace("_steps", " steps") for word in WORDS.split())):
        try:
            validate(_with({field: value}))
            accepted.append(value)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    for others, value in itertools.product(OTHERS, accepted):
        config = _with({**others, field: value})
        given, reset = flatten(to_plain(config)), flatten(to_plain(reset_inert_fields(config)))
        found.append([find_problems(config), {k: v for k, v in reset.items() if given[k] != v}])
    return {f"field/{field}": digest(found)}


def _with(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config of common.py as dicts, with some fields changed."""
    config = copy.deepcopy(_common())
    for name, value in fields.items():
        *parents, last = name.split(".")
        functools.reduce(lambda section, part: section[part], parents, config)[last] = value
    return config


@functools.cache
def _common() -> dict[str, Any]:
    return common.get_config().to_dict()


def _newer() -> dict[str, str]:
    """The config of a run that lacks all that came later."""
    sections = {name.split(".")[0]: {} for name in FIELDS if "." in name}
    return {
        "field/newer": digest(
            [add_missing_fields({}), add_missing_fields(sections | {"data": {"augment": {}}})]
        )
    }


# ---------------------------------------------------------------------------- data


def make_folder(folder: pathlib.Path) -> None:
    """Three classes of images of several sizes, to be streamed."""
    rng = np.random.default_rng(7)
    for name in ("ant", "bee", "cat"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(14):
            height, width = rng.integers(12, 40, 2)
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")


@functools.cache
def _scratch() -> pathlib.Path:
    scratch = tempfile.TemporaryDirectory(prefix="freeze_")
    _scratch.keep = scratch
    make_folder(pathlib.Path(scratch.name) / "images")
    return pathlib.Path(scratch.name)


def data_jobs() -> Jobs:
    own = dict(data__name="folder", data__mock=0, data__image_size=16)
    crop = {"data__augment__random_resized_crop": (0.3, 1.0)}
    rows = {
        "mock": {},
        "mock_seed": {"seed": 5},
        "mock_streamed": {"data__in_memory": "no"},
        "mock_fraction": {"data__fraction": 0.5, "data__split_seed": 3},
        "digits": {"data__mock": 0, "data__image_size": 8},
        "digits_classes": {"data__mock": 0, "data__classes": (3, 1), "data__fraction": 0.3},
        "folder": own,
        "folder_streamed": own | {"data__in_memory": "no"},
        "folder_cropped": own | crop | {"data__in_memory": "no"},
        "folder_cropped_auto": own | crop,
        "folder_gray": own | {"data__channels": 1, "data__validation": 5},
        "folder_classes": own | {"data__classes": ("cat", "ant"), "data__fraction": 0.6},
        "folder_pca": own | {"data__augment__pca": 0.1, "data__in_memory": "no"},
    }
    jobs = {f"data/{n}": functools.partial(_data, f"data/{n}", row) for n, row in rows.items()}
    loader = own | {"data__augment__where": "loader", "data__augment__flip": True}
    loader |= {"data__augment__pad_crop": 2, "data__augment__normalize": False}
    for name, row in {"memory": loader, "streamed": loader | {"data__in_memory": "no"}}.items():
        jobs[f"data/loader_{name}"] = functools.partial(_loader, f"data/loader_{name}", row)
    return jobs


def _data_config(row: Mapping[str, Any]) -> Any:
    config = base(**row)
    if not config.data.mock:
        digits = config.data.name == "digits"
        config.data.dir = str(_scratch() / ("tfds" if digits else "images"))
    return config


def _data(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    """Batches to train and to evaluate, of one process and of the second of two; what is known."""
    config = _data_config(row)
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = load_dataset(config.data)
    found: list[Any] = []
    for start, index, count in ((0, 0, 1), (9, 0, 1), (3, 1, 2)):
        given = dict(process_index=index, process_count=count)
        stream = pipeline.train_batches(
            dataset, config.data, seed=config.seed, start_step=start, **given
        )
        with contextlib.closing(stream) as batches:
            found += [dict(batch) for batch in itertools.islice(batches, 3)]
        for split in sorted(dataset.splits):
            stream = pipeline.eval_batches(dataset, split, config.data, **given)
            with contextlib.closing(stream) as batches:
                found += [dict(batch) for batch in itertools.islice(batches, 3)]
    facts = dataset.as_dict()
    labels = {role: np.asarray(split.labels) for role, split in dataset.splits.items()}
    return {
        name: digest([[{k: np.asarray(v) for k, v in batch.items()} for batch in found], labels]),
        f"{name}:facts": digest([facts, dataset.describe()]),
    }


def _loader(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    """What the training step takes where the loader augments."""
    parts = build_components(_data_config(row), begun=True)
    with contextlib.closing(train_batches(parts, 2)) as batches:
        found = [{k: np.asarray(v) for k, v in b.items()} for b in itertools.islice(batches, 3)]
    return {name: digest(found)}


# ---------------------------------------------------------------------------- runs


def run_jobs() -> Jobs:
    small = dict(
        data__image_size=32,
        train__duration="6 steps",
        train__eval_every="3 steps",
        checkpoint__every="2 steps",
        log__every="2 steps",
    )
    full = small | dict(
        optimizer__l2=(1e-4,), train__ema=0.9, train__evaluate_train=True, schedule__name="plateau"
    )
    return {"run/lenet": functools.partial(_run, "run/lenet", full)}


def _run(name: str, fields: Mapping[str, Any]) -> dict[str, str]:
    """The names in what a run, its evaluation and its prediction write; no numbers."""
    workdir = _scratch() / name.replace("/", "_")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        summary = run(base(**fields), workdir)
        trained = _files(workdir)
        evaluation = evaluate_run(workdir)
        predictor = make_predictor_from_run(workdir)
        guesses = predict(predictor, sorted((_scratch() / "images/ant").glob("*.png"))[:2], 10)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    classes = [sorted(one for one, _ in each) for each in guesses]
    return {
        f"{name}/metrics.jsonl": digest([(line["step"], list(line)) for line in lines]),
        f"{name}/summary.json": digest(keys(json.loads((workdir / "summary.json").read_text()))),
        f"{name}/returned": digest(keys(json.loads(json.dumps(summary)))),
        f"{name}/dataset.json": digest(keys(json.loads((workdir / "dataset.json").read_text()))),
        f"{name}/config.json": digest((workdir / "config.json").read_bytes()),
        f"{name}/files": digest(trained),
        f"{name}/evaluation": digest([keys(json.loads(json.dumps(evaluation))), _files(workdir)]),
        f"{name}/prediction": digest([predictor.title, classes]),
    }


def _files(workdir: pathlib.Path) -> list[str]:
    """Of a run; below a checkpoint's step only what is there first, of TensorBoard the folder."""
    paths = [*workdir.glob("*"), *workdir.glob("checkpoints/*"), *workdir.glob("checkpoints/*/*")]
    return sorted(str(path.relative_to(workdir)) for path in paths)


def keys(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: keys(value) for key, value in content.items()}
    return type(content).__name__ if not isinstance(content, list) else "list"


# ---------------------------------------------------------------------------- the command


def all_jobs() -> Jobs:
    made = (config_jobs, family_jobs, variation_jobs, convolution_jobs, network_jobs, data_jobs)
    return {name: job for make in (*made, run_jobs) for name, job in make().items()}


def wanted(name: str, pattern: str) -> bool:
    return not pattern or pattern in name or fnmatch.fnmatchcase(name, pattern)


def compute(pattern: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """(name of a job, its hashes, seconds) of the jobs whose name matches."""
    for name, job in all_jobs().items():
        if wanted(name, pattern):
            began = time.perf_counter()
            try:
                found = dict(job())
            except Exception as error:
                found = {name: f"{type(error).__name__}: {error}"}
            yield name, found, time.perf_counter() - began


def versions() -> dict[str, str]:
    return {m: importlib.metadata.version(m) for m in ("jax", "flax", "optax", "numpy", "pillow")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("write", "check"))
    parser.add_argument("--only", default="", help="a shell pattern, or a part of a name")
    parser.add_argument("--file", type=pathlib.Path, default=FILE)
    parser.add_argument("--strict", action="store_true", help="another text fails too")
    parser.add_argument("--times", action="store_true", help="what took how long")
    args = parser.parse_args()
    known = json.loads(args.file.read_text()) if args.file.is_file() else {}
    frozen = known.get("hashes", {})
    if args.command == "check" and known.get("versions", {}).get("jax") != jax.__version__:
        sys.exit(f"{args.file} is of {known.get('versions')}, and this is jax {jax.__version__}")
    began, new, differs, texts = time.perf_counter(), {}, 0, []
    for name, found, seconds in compute(args.only):
        if args.times:
            print(f"{seconds:7.2f} s  {name}", flush=True)
        new |= found
        if args.command == "write":
            errors = [f"{k}: {v}" for k, v in found.items() if not re.fullmatch("[0-9a-f]{16}", v)]
            if errors:
                print("cannot freeze", *errors, flush=True)
            continue
        for key in sorted(found):
            if found[key] == frozen.get(key):
                continue
            said = "is new" if key not in frozen else "differs"
            said = said if re.fullmatch("[0-9a-f]{16}", found[key]) else found[key]
            if key.endswith(":text"):
                same = found[key.removesuffix(":text")] == frozen.get(key.removesuffix(":text"))
                texts += [key.removesuffix(":text")] if same else []
                differs += args.strict and same
                continue
            differs += 1
            print(f"{key}: {said}", flush=True)
    if args.command == "check":
        if not args.only:
            for key in sorted(frozen.keys() - new.keys()):
                differs += 1
                print(f"{key}: is gone")
        if texts:
            print(f"same graph, another text ({len(texts)}): {', '.join(texts)}")
    else:
        bad = [k for k, v in new.items() if not re.fullmatch("[0-9a-f]{16}", v)]
        hashes = {k: v for k, v in new.items() if k not in bad}
        hashes = (frozen if args.only else {}) | hashes
        content = {"versions": versions(), "hashes": dict(sorted(hashes.items()))}
        args.file.write_text(json.dumps(content, indent=0) + "\n")
        differs = len(bad)
    print(f"{len(new)} hashes, {differs} differ, {time.perf_counter() - began:.0f} s")
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
