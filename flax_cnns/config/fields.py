"""Every config field there is: its default, what it may be, what it means, and what older runs had.

`configs/common.py`, the checks, the notes on older runs and docs/config.md are made of this table.
A new field is one row here, with `older_runs`: the value by which all is as it was before.

Durations are texts, `"20 epochs"` or `"500 steps"`; an epoch is one pass over the training
examples. Every `"0 steps"` is never, but the last step always logs, validates and saves. Rules are
tuples of `(regex, value)` over paths such as `"params/stage1/block1/conv1/kernel"`: the first regex
that matches the whole path decides, and every path must be decided. Which fields act under which
choices: `effects.py`. Names that only a registry knows (models, data sets) are checked by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from flax_cnns.config.checks import (
    Check,
    area_range,
    batchnorm_mode,
    best_by,
    boolean,
    channel_count,
    class_list,
    compute_dtype,
    duration,
    durations,
    integer,
    named_references,
    nonempty_string,
    number,
    one_of,
    optimizer_name,
    per_channel,
    randaugment,
    reference,
    references,
    rules,
    schedule_name,
    source_path,
    split_size,
    string,
    weight_over_time,
)

IN_ALL_RUNS = object()  # `older_runs` of a field that the first version had


class Field(NamedTuple):
    default: Any
    check: Check
    meaning: str
    older_runs: Any = IN_ALL_RUNS  # the value by which a run that lacks the field is the same run
    # A strength: off by default, and compared with the others in configs/ablations/regularizers.py.
    regularizer: bool = False


class Section(NamedTuple):
    meaning: str
    fields: dict[str, Field | Section]


def section(meaning: str, **fields: Field | Section) -> Section:
    return Section(meaning, fields)


# A page to read: each field's prose below its default.
# fmt: off
TABLE = section("A config",
    seed=Field(0, integer(), "initialization, data order, augmentation, dropout"),

    model=section(
        "the network: all of it goes to create_model; a config may add its family's fields",
        name=Field("lenet5", nonempty_string,
            "as flax_cnns.list_models names them, or 'package.module:Network' of your own"),
        num_classes=Field(0, integer(), "0: as many as the data set has"),
        dtype=Field("float32", compute_dtype,
            "what computes, or bfloat16; parameters and loss stay float32"),
        init=Field("", string,
            "First values: paper, he, lecun, xavier, gaussian (0.01), orthogonal; '': the"
            " network's default. The head of ResNets, DenseNets, MobileNets and their relatives"
            " starts with lecun, whatever is given here (paper too)."),
        scan=Field(False, boolean,
            "repeats of a block as a loop: deep networks compile in seconds"),
        remat=Field(False, boolean, "compute each block again in the backward pass: less memory"),
    ),

    data=section("images and labels",
        name=Field("digits", nonempty_string,
            "digits, any TFDS name, folder (of images, in dir), a file FILE.npz, or"
            " 'package.module:function' of your own, which returns a flax_cnns.Dataset"),
        dir=Field("", string, "TFDS data_dir, folder of archives or of images; '': TFDS's default"),
        source=Field("auto", one_of("auto", "tfds", "archive", "folder"),
            "tfds, archive, folder; auto: archives if dir has them, else TFDS"),
        labels=Field("", string,
            "where there are several kinds: cifar100 has fine (default) and coarse"),
        classes=Field((), class_list,
            "Only these, labeled 0, 1, ... in this order: by name, or by number, unless another"
            " class has that number as its name."),
        image_size=Field(32, integer(1), "height and width that the network sees"),
        channels=Field(0, channel_count, "0: the data set's own; 1 or 3 converts"),
        validation=Field(0.1, split_size,
            "Taken from train where there is no such split: a fraction, a count, or 0 for none."),
        fraction=Field(1.0, number(0, 1, above=True),
            "of the training examples, each class alike; no other split changes"),
        split_seed=Field(0, integer(),
            "of validation, of fraction, and of an image folder's test split"),
        batch_size=Field(64, integer(1), "over all devices and processes"),
        eval_batch_size=Field(256, integer(1), "likewise, where nothing is learned"),
        in_memory=Field("auto", one_of("auto", "yes", "no"),
            "yes, no, or auto: when they take less than memory_limit and are not photographs that"
            " random_resized_crop cuts out of their full size."),
        memory_limit=Field(4.0, number(), "GiB"),
        threads=Field(8, integer(), "decoding threads of the streaming loader"),
        workers=Field(0, integer(), "worker processes of the streaming loader"),
        skip_damaged=Field(False, boolean,
            "skip and count images that cannot be decoded; else stop"),
        mock=Field(0, integer(),
            "> 0: so many random images in place of the data set's own (smoke runs)"),
        augment=section(
            "Per image. AlexNet's: pad_crop (translations; the paper takes 224 pixels of 256"
            " rather than black ones around), flip and pca=0.1.",
            where=Field("device", one_of("device", "loader"),
                "device: in the training step; loader: in the thread that fetches batches, on the"
                " CPU, where images go to the device as float32, four times the bytes. Both make"
                " the same images.",
                older_runs="device"),
            pad_crop=Field(0, integer(),
                "pixels of padding on each side before a random crop; 0: off", regularizer=True),
            flip=Field(False, boolean, "left-right, half of the time", regularizer=True),
            rotate=Field(0.0, number(0, 180), "degrees, uniform in +-rotate"),
            scale=Field(0.0, number(0, 0.99),
                "relative, uniform in 1 +- scale: 0.1 means 0.9 to 1.1"),
            random_resized_crop=Field((), area_range,
                "(smallest, largest) share of the area; (): off"),
            cutout=Field(0, integer(),
                "side of the square set to the mean; 0: off", regularizer=True),
            erase=Field(0.0, number(0, 1),
                "probability of a box of noise (random erasing)", older_runs=0.0, regularizer=True),
            randaugment=Field((), randaugment,
                "RandAugment: (operations an image, magnitude 0 to 30), such as (2, 9), on"
                " torchvision's scale, where 30 is what the paper calls 10; (): off",
                older_runs=(), regularizer=True),
            pca=Field(0.0, number(0, 1),  # above 1 the sums of pca_color leave 32 bits
                "Standard deviation along the principal components of the data set's own colors,"
                " of which gray images have one; to 1, the paper's is 0.1; 0: off",
                older_runs=0.0, regularizer=True),
            normalize=Field(True, boolean, "by mean and standard deviation"),
        ),
        mean=Field((), per_channel(0.0),
            "Per channel, of images in 0..1; (): the data set's own. A network that starts from"
            " published weights wants those that these were trained with."),
        std=Field((), per_channel(1e-6), "likewise; both, or neither"),
    ),

    mix=section("per batch, inside the step",
        label_smoothing=Field(0.0, number(0, 1),
            "share of a label that all classes get alike", regularizer=True),
        mixup=Field(0.0, number(), "alpha of the Beta distribution; 0: off", regularizer=True),
        cutmix=Field(0.0, number(),
            "likewise; with mixup on too, a coin for each batch says which",
            older_runs=0.0, regularizer=True),
    ),

    optimizer=section("the optimizer",
        name=Field("sgd", optimizer_name,
            "Your own factory 'package.module:function', or sgd, adam, adamw, rmsprop"
            " (TensorFlow's), lamb. lamb adapts the rate of every parameter. timm's adapts only"
            " those with weight decay, and clips the gradient first, as clip_norm=1.0 does here."),
        momentum=Field(0.9, number(0, 1), "sgd, rmsprop"),
        nesterov=Field(False, boolean, "sgd only"),
        b1=Field(0.9, number(0, 1), "adam, adamw, lamb"),
        b2=Field(0.999, number(0, 1), "adam, adamw, lamb"),
        eps=Field(1e-8, number(), "adam, adamw, lamb, rmsprop"),
        decay_rate=Field(0.9, number(0, 1), "rmsprop: of the running mean of squares"),
        weight_decay=Field((), rules(number(), "number", single=True),
            "() none, (1e-4,) every parameter, or rules (regex, number).", regularizer=True),
        weight_decay_mode=Field("auto", one_of("auto", "coupled", "decoupled"),
            "coupled: added to the gradient (after clip_norm); decoupled: the weights shrink by"
            " learning rate x decay beside it; auto: decoupled in adamw and lamb, else coupled.",
            older_runs="auto"),
        l2=Field((), rules(number(), "number", single=True),
            "In the loss, of every optimizer: a in J + a/2 ||w||^2 over what is trainable; as"
            " weight_decay. clip_norm and norm/grads see it; logged as train/l2.",
            older_runs=(), regularizer=True),
        max_norm=Field((), rules(number(), "number", single=True),
            "After each step every unit's incoming weights are scaled back to this norm: (3.0,)"
            " every kernel, or rules (regex, number) over the kernels; 0 is none.",
            older_runs=(), regularizer=True),
        grad_noise=Field(0.0, number(),
            "eta of the variance eta / (1 + step)^decay; 0: off", older_runs=0.0, regularizer=True),
        grad_noise_decay=Field(0.55, number(), "the decay in that variance", older_runs=0.55),
        sam=Field(0.0, number(),
            "rho of sharpness-aware minimization: two gradients a step; 0: off",
            older_runs=0.0, regularizer=True),
        trainable=Field((), rules(boolean, "True or False"), "rules (regex, bool); (): all"),
        bn=Field((), rules(batchnorm_mode, "train, frozen_stats or frozen"),
            "BatchNorm: rules (regex over paths such as 'stage1/block1/norm1', mode). train: by"
            " the batch, and the running statistics move; frozen_stats: by those, which stay;"
            " frozen: scale and bias stay too. (): frozen where `trainable` freezes the layer's"
            " parameters, train elsewhere."),
        lr_mult=Field((), rules(number(), "number", single=True),
            "rules (regex, number): factors on the learning rate; (): all 1"),
        layer_decay=Field(0.0, number(0, 1),
            "A factor on the learning rate from each layer to the one below it; 0: off. A layer is"
            " a block, grouped as in BEiT for transformers and as in timm for the others"
            " (train.optimizers.layer_decay)."),
        clip_norm=Field(0.0, number(), "global norm of the gradient; 0: off"),
    ),

    schedule=section("the learning rate",
        name=Field("cosine", schedule_name,
            "constant, steps, cosine, exponential, one_cycle, plateau"),
        learning_rate=Field(0.1, number(above=True), "the highest"),
        warmup=Field("0 steps", duration, "linear, before the schedule proper"),
        boundaries=Field((), durations, "steps: durations from the start of training"),
        factor=Field(0.1, number(0, 1), "steps, plateau: what the rate is multiplied by"),
        every=Field("1 epochs", duration, "exponential: how often"),
        rate=Field(0.97, number(0, 1), "exponential: by how much"),
        end=Field(0.0, number(), "cosine, exponential: the lowest rate"),
        pct_start=Field(0.3, number(0, 1),
            "one_cycle: share of the run in which the rate rises. Momentum stays as it is."),
        div_factor=Field(25.0, number(above=True), "one_cycle: highest over initial rate"),
        final_div_factor=Field(1e4, number(above=True), "one_cycle: initial over last rate"),
        patience=Field(5, integer(1),
            "plateau: the rate is lowered at the fifth validation without a better error, as with"
            " patience=4 in PyTorch's ReduceLROnPlateau."),
        min_delta=Field(1e-4, number(0, 1), "plateau: what counts as better, relative"),
    ),

    train=section("the run",
        duration=Field("40 epochs", duration, "all of it"),
        parallel=Field("shard_map", one_of("shard_map", "pmap"), "shard_map (under jit) or pmap"),
        sync_batchnorm=Field(False, boolean, "statistics over all devices, or each device alone"),
        accumulate=Field(1, integer(1),
            "batches are cut into this many pieces whose gradients are averaged"),
        ema=Field(0.0, number(0, 1),
            "decay of the averaged weights and statistics, evaluated then; 0: off",
            regularizer=True),
        ema_warmup=Field(True, boolean,
            "The decay of a step is the smaller of ema and (1 + step) / (10 + step), as in"
            " TensorFlow's ExponentialMovingAverage; timm has another formula."),
        aux_weight=Field((0.3,), rules(weight_over_time, "number", single=True),
            "Of the auxiliary heads' losses: (0.3,) every head, or rules (regex of its name,"
            " weight) such as ((r'aux1', 0.3), (r'.*', 0.0)); a weight is a number, or corners"
            " ((duration, number), ...) and the straight lines between them."),
        dropout=Field((), rules(number(0, 0.99), "rate", single=True),
            "Beside the network's own dropout: (rate,) behind every convolution, or rules (regex"
            " over modules such as 'stage1/block1/conv1', rate); (): off",
            older_runs=(), regularizer=True),
        dropout_mode=Field("unit", one_of("unit", "channel"),
            "unit: single responses; channel: whole maps", older_runs="unit"),
        loss=Field("", reference,
            "Your own, 'package.module:function' of (logits [N K], labels [N K]) -> [N]. '':"
            " cross-entropy; for multilabel data the sum of sigmoid cross-entropies.",
            older_runs=""),
        metrics=Field((), named_references,
            "Your own, 'package.module:function' of (logits [N K], labels [N K], mask [N]) ->"
            " (sum, count), logged under the function's name; 'NAME=package.module:function'"
            " gives another.",
            older_runs=()),
        regularizers=Field((), references,
            "Your own, 'package.module:Name' each; own.NAME.FIELD are their fields. One whose"
            " first field is 0, False, None or empty is off.",
            older_runs=()),
        callbacks=Field((), references,
            "Your own, 'package.module:Name' each: on_step, on_validation, on_save.",
            older_runs=()),
        best_by=Field("auto", best_by,
            "What the best checkpoint is chosen by, such as 'validation/loss'. auto:"
            " validation/accuracy, for multilabel data validation/loss.",
            older_runs="auto"),
        best_mode=Field("auto", one_of("auto", "max", "min"),
            "Whether the best is the highest or the lowest. auto: the highest accuracy or top5, the"
            " lowest loss; for your own metric say which.",
            older_runs="auto"),
        max_bad_steps=Field(10, integer(),
            "so many in a row with non-finite gradients stop the run"),
        precise_bn=Field(0, integer(),
            "Before each validation, and at the end, BatchNorm's running statistics are computed"
            " from so many batches of training images, and kept; 0: off."),
        deterministic=Field(False, boolean, "GPU: XLA's deterministic kernels; before JAX starts"),
        eval_every=Field("1 epochs", duration, "on the validation split, where there is one"),
        test_on=Field("latest", one_of("latest", "best"),
            "which checkpoint the test split sees at the end: latest or best"),
        evaluate_train=Field(False, boolean,
            "At the end also the examples that were trained on, neither augmented nor mixed:"
            " logged as fit/loss, fit/accuracy, fit/top5.",
            older_runs=False),
        early_stopping=Field(0, integer(),
            "stop after so many validations without a better one; 0: off", regularizer=True),
    ),

    checkpoint=section("checkpoints",
        every=Field("5 epochs", duration, "how often one is saved"),
        keep_latest=Field(2, integer(1), "so many of the newest"),
        keep_best=Field(1, integer(), "by validation accuracy; without that split best is latest"),
    ),

    graft=section(
        "start from other weights. The last three say how weights may be fitted to the network"
        " (flax_cnns/weights/adapt.py). The report names each leaf that was.",
        source=Field("", string,
            "RUN (the checkpoint tested for its summary.json), RUN@best, RUN@latest, RUN@1200, an"
            " Orbax checkpoint's path, or other libraries' weights: torchvision:resnet50,"
            " timm:resnet50d=/path/file.safetensors; '': none"),
        rules=Field(((r"(.*)", r"\1"),), rules(source_path, "path in the source or None"),
            "(regex over this network's paths, path in the source or None for fresh), ..."),
        adapt_stem=Field(False, boolean,
            "sum the first kernels to 1 channel, or repeat them from 1 or 3", older_runs=False),
        resize_positions=Field(False, boolean,
            "resize a ViT's position embeddings bicubically", older_runs=False),
        averaged=Field(False, boolean,
            "take the averaged weights of a run or a training script's file", older_runs=False),
    ),

    own=section(
        "Fields of your own parts: own.NAME.FIELD goes to the one that is called NAME, as in"
        " 'package.module:NAME'. A network's fields are under model."),

    log=section("what is written down",
        every=Field("20 steps", duration, "the training metrics"),
        tensorboard=Field(True, boolean, "files for TensorBoard too"),
        wandb=Field("", string, "a project's name; '': off"),
    ),
)

STRATEGY = section(
    "what a config of fine-tuning has beside the configs of its runs: the strategies' numbers",
    last=Field(1, integer(1), "stages that last_k trains"),
    rate=Field(0.1, number(above=True),
        "of the learning rate, wherever more than the classifier is fine-tuned"),
    head_share=Field(0.25, number(0.01, 0.99), "of head_then_all's steps"),
    layer_decay=Field(0.5, number(0, 1, above=True),
        "of the rate, from each block to the one below"),
)
# fmt: on


def walk(part: Section, prefix: str = "") -> Iterator[tuple[str, Field | Section]]:
    """(path such as "data.augment", the section or field), in the order of the page."""
    for name, found in part.fields.items():
        yield prefix + name, found
        if isinstance(found, Section):
            yield from walk(found, f"{prefix}{name}.")


def make_defaults(part: Section = TABLE) -> dict[str, Any]:
    """{field: its default}, sections as dicts in it."""
    return {
        name: make_defaults(found) if isinstance(found, Section) else found.default
        for name, found in part.fields.items()
    }


FIELDS = {path: found for path, found in walk(TABLE) if isinstance(found, Field)}
DEFAULTS = {path: field.default for path, field in FIELDS.items()}
