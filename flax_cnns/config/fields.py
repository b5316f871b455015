"""The table of all config fields: default, check, meaning, and the value in older runs.

The default config, the checks, the notes on older runs and docs/config.md all come from this table.
To add a field, add one row with `older_runs`: the value that leaves an older run unchanged.

A duration is a string, `"20 epochs"` or `"500 steps"`; an epoch is one pass over the training
examples. `"0 steps"` means never, but the last step always logs, validates and saves. Rules are
tuples of `(regex, value)` over paths such as `"params/stage1/block1/conv1/kernel"`. The first regex
that matches the whole path decides, and every path must be decided. `effects.py` says when a field
has an effect. The registries check names of models and data sets, which this table does not list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax_cnns.config.checks import (
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
from flax_cnns.config.entries import Field, Section, section

# Formatted for reading: the meaning of a field is below its default.
# fmt: off
TABLE = section("A config.",
    seed=Field(0, integer(), "Seed of initialization, data order, augmentation and dropout."),

    model=section(
        "The network. All of these fields go to create_model; a config may add fields of the"
        " network's family.",
        name=Field("lenet5", nonempty_string,
            "A name from flax_cnns.list_models(), or your own as 'package.module:Network'."),
        num_classes=Field(0, integer(), "Number of classes; 0: as many as the data set has."),
        dtype=Field("float32", compute_dtype,
            "Dtype of the computation. Parameters and loss stay float32."),
        init=Field("", string,
            "Initializer of the weights: paper, he, lecun, xavier, gaussian (0.01), orthogonal, or"
            " lsuv (all layers but grafted ones); '': the network's default. Heads of ResNets,"
            " DenseNets, MobileNets and relatives start with lecun, except by lsuv."),
        whiten=Field(False, boolean,
            "Fill the kernel of the layer whiten, which airbench94 has, with whitening filters of"
            " the training images. optimizer.trainable freezes it.",
            older_runs=False),
        scan=Field(False, boolean,
            "Run repeated blocks as a loop, so that deep networks compile faster."),
        remat=Field(False, boolean, "Recompute each block in the backward pass: less memory."),
    ),

    data=section("Images and labels.",
        name=Field("digits", nonempty_string,
            "digits, any TFDS name, folder (images in the folder dir), a file of arrays FILE.npz,"
            " or your own function 'package.module:function', which returns a flax_cnns.Dataset."),
        dir=Field("", string,
            "TFDS's data_dir, or the folder of archives or of images; '': TFDS's default."),
        source=Field("auto", one_of("auto", "tfds", "archive", "folder"),
            "Where the data are read from. auto: archives if dir has them, else TFDS."),
        labels=Field("", string,
            "Which kind of label to use if the data set has several: cifar100 has fine (the"
            " default) and coarse."),
        classes=Field((), class_list,
            "Use only these classes, labeled 0, 1, ... in this order. A class is given by name or"
            " by number, but not by a number that is the name of another class."),
        image_size=Field(32, integer(1), "Height and width of the images that the network sees."),
        channels=Field(0, channel_count,
            "Channels of the images; 1 or 3 converts. 0: the data set's own."),
        validation=Field(0.1, split_size,
            "Size of the validation split that is taken from train if the data set has none: a"
            " fraction, a count, or 0 for none."),
        fraction=Field(1.0, number(0, 1, above=True),
            "Fraction of the training examples to use, the same for each class. Other splits stay"
            " whole."),
        split_seed=Field(0, integer(),
            "Seed of the random draws of validation, fraction, and an image folder's test split."),
        batch_size=Field(64, integer(1), "Training batch size, over all devices and processes."),
        eval_batch_size=Field(256, integer(1),
            "Batch size outside training, over all devices and processes."),
        in_memory=Field("auto", one_of("auto", "yes", "no"),
            "Whether all images are decoded once and kept in memory. auto: if they take less than"
            " memory_limit, and are not photographs that random_resized_crop crops at full size."),
        memory_limit=Field(4.0, number(), "Limit for in_memory=auto, in GiB."),
        decoder=Field("pillow", one_of("pillow", "opencv"),
            "What decodes JPEGs. opencv takes less time, rounds crops to whole pixels, and does not"
            " blur what shrinks by less than 1.4. Pillow reads all other files, and CMYK.",
            older_runs="pillow"),
        threads=Field(8, integer(), "Decoding threads of the streaming loader."),
        workers=Field(0, integer(), "Worker processes of the streaming loader."),
        skip_damaged=Field(False, boolean,
            "Skip and count images that cannot be decoded. False: the first one ends the run."),
        mock=Field(0, integer(),
            "Use this many random images in place of the data set's own, for smoke runs; 0: off."),
        augment=section(
            "Augmentation of single images. AlexNet's scheme is pad_crop (translations; the paper"
            " crops 224 of 256 pixels instead of padding with black), flip, and pca=0.1.",
            where=Field("device", one_of("device", "loader"),
                "device: inside the training step. loader: on the CPU, in the thread that fetches"
                " batches; images then go to the device as float32, four times the bytes. Both"
                " produce the same images.",
                older_runs="device"),
            pad_crop=Field(0, integer(),
                "Pixels of padding on each side before a random crop; 0: off.", regularizer=True),
            flip=Field(False, boolean, "Mirror with probability 0.5.", regularizer=True),
            alternate_flip=Field(False, boolean,
                "With flip: mirror each image in every second epoch; the seed draws the images that"
                " are mirrored in the first.",
                older_runs=False),
            rotate=Field(0.0, number(0, 180),
                "Rotate by an angle drawn uniformly from -rotate to +rotate degrees."),
            scale=Field(0.0, number(0, 0.99),
                "Zoom by a factor drawn uniformly from 1 - scale to 1 + scale."),
            random_resized_crop=Field((), area_range,
                "(smallest, largest) share of the area to crop; (): off."),
            cutout=Field(0, integer(),
                "Side of a square that is set to the mean; 0: off.", regularizer=True),
            erase=Field(0.0, number(0, 1),
                "Probability of filling a random box with noise (random erasing).",
                older_runs=0.0, regularizer=True),
            randaugment=Field((), randaugment,
                "RandAugment: (operations per image, magnitude from 0 to 30), such as (2, 9). The"
                " scale is torchvision's, where 30 is what the paper calls 10. (): off.",
                older_runs=(), regularizer=True),
            pca=Field(0.0, number(0, 1),  # above 1, pca_color overflows 32 bits
                "Standard deviation of the color noise along the principal components of the data"
                " set's colors (gray images have one component); the paper's is 0.1; 0: off.",
                older_runs=0.0, regularizer=True),
            normalize=Field(True, boolean,
                "Subtract each channel's mean and divide by the channel's standard deviation."),
        ),
        mean=Field((), per_channel(0.0),
            "Mean of each channel, for images in 0..1; (): the data set's own. A network that"
            " starts from published weights needs the values that the weights were trained with."),
        std=Field((), per_channel(1e-6),
            "Standard deviation of each channel, given like mean. Set both or neither."),
    ),

    mix=section("Mixing of images and labels within a batch, inside the step.",
        label_smoothing=Field(0.0, number(0, 1),
            "Share of each label that is spread evenly over all classes.", regularizer=True),
        mixup=Field(0.0, number(),
            "Mixup: alpha of the Beta distribution; 0: off.", regularizer=True),
        cutmix=Field(0.0, number(),
            "CutMix: alpha of the Beta distribution; 0: off. If mixup is on too, a coin flip"
            " chooses one of the two for each batch.",
            older_runs=0.0, regularizer=True),
    ),

    optimizer=section("The optimizer.",
        name=Field("sgd", optimizer_name,
            "sgd, adam, adamw, rmsprop (TensorFlow's), lamb, muon (Optax's, for"
            " convolution kernels; sgd for the rest), or your own factory"
            " 'package.module:function'. lamb adapts the learning rate of every parameter. timm's"
            " lamb adapts only the parameters with weight decay, and clips the gradient first, as"
            " clip_norm=1.0 does here."),
        momentum=Field(0.9, number(0, 1), "Momentum of sgd, muon and rmsprop."),
        nesterov=Field(False, boolean, "Nesterov momentum, for sgd and muon."),
        b1=Field(0.9, number(0, 1), "beta_1 of adam, adamw and lamb."),
        b2=Field(0.999, number(0, 1), "beta_2 of adam, adamw and lamb."),
        eps=Field(1e-8, number(), "epsilon of adam, adamw, lamb and rmsprop."),
        decay_rate=Field(0.9, number(0, 1), "rmsprop: decay of the running mean of squares."),
        weight_decay=Field((), rules(number(), "number", single=True),
            "Weight decay. (): none; (1e-4,): every parameter; or rules (regex, number).",
            regularizer=True),
        weight_decay_mode=Field("auto", one_of("auto", "coupled", "decoupled"),
            "coupled: decay x weight is added to the gradient (after clip_norm). decoupled: apart"
            " from the update, the weights shrink by learning rate x decay. auto: decoupled in"
            " adamw and lamb, else coupled.",
            older_runs="auto"),
        l2=Field((), rules(number(), "number", single=True),
            "L2 penalty in the loss, for every optimizer: the a in J + a/2 ||w||^2 over the"
            " trainable parameters, given like weight_decay. clip_norm and norm/grads include the"
            " penalty's gradient. The penalty is logged as train/l2.",
            older_runs=(), regularizer=True),
        max_norm=Field((), rules(number(), "number", single=True),
            "Limit on the norm of every unit's incoming weights. After each step, weights with a"
            " larger norm are scaled back to the limit. (3.0,): every kernel; or rules (regex,"
            " number) over the kernels; 0: no limit.",
            older_runs=(), regularizer=True),
        grad_noise=Field(0.0, number(),
            "Gradient noise: eta of the variance eta / (1 + step)^decay; 0: off.",
            older_runs=0.0, regularizer=True),
        grad_noise_decay=Field(0.55, number(),
            "The decay in the variance of the gradient noise.", older_runs=0.55),
        sam=Field(0.0, number(),
            "rho of sharpness-aware minimization. Each step computes two gradients. 0: off.",
            older_runs=0.0, regularizer=True),
        trainable=Field((), rules(boolean, "True or False"),
            "Which parameters are trained: rules (regex, bool); (): all."),
        bn=Field((), rules(batchnorm_mode, "train, frozen_stats or frozen"),
            "Modes of BatchNorm: rules (regex over paths such as 'stage1/block1/norm1', mode)."
            " train: normalize by the batch and update the running statistics. frozen_stats:"
            " normalize by the running statistics, which stay fixed. frozen: scale and bias stay"
            " fixed too. (): frozen where `trainable` freezes the layer's parameters, train"
            " elsewhere."),
        lr_mult=Field((), rules(number(), "number", single=True),
            "Factors on the learning rate: rules (regex, number); (): all 1."),
        layer_decay=Field(0.0, number(0, 1),
            "Factor on the learning rate from each layer to the layer below it; 0: off. A layer is"
            " a block, grouped as in BEiT for transformers and as in timm for other networks"
            " (train.optimizers.layer_decay)."),
        clip_norm=Field(0.0, number(), "Limit on the global norm of the gradient; 0: off."),
    ),

    schedule=section("The learning rate.",
        name=Field("cosine", schedule_name, "Shape of the schedule after the warm-up."),
        learning_rate=Field(0.1, number(above=True), "The highest rate."),
        warmup=Field("0 steps", duration, "Length of a linear warm-up before the schedule."),
        boundaries=Field((), durations,
            "steps: when the rate changes, as durations from the start of training."),
        factor=Field(0.1, number(0, 1), "steps, plateau: what the rate is multiplied by."),
        every=Field("1 epochs", duration, "exponential: how often the rate changes."),
        rate=Field(0.97, number(0, 1), "exponential: what the rate is multiplied by."),
        end=Field(0.0, number(), "cosine, exponential: the lowest rate."),
        pct_start=Field(0.3, number(0, 1),
            "one_cycle: share of the run in which the rate rises. Momentum does not change."),
        div_factor=Field(25.0, number(above=True), "one_cycle: highest rate / initial rate."),
        final_div_factor=Field(1e4, number(above=True), "one_cycle: initial rate / last rate."),
        patience=Field(5, integer(1),
            "plateau: the rate falls after this many validations in a row without a lower error."
            " PyTorch's ReduceLROnPlateau counts one less: patience=4 is 5 here."),
        min_delta=Field(1e-4, number(0, 1),
            "plateau: the relative improvement that counts as better."),
    ),

    train=section("The run.",
        duration=Field("40 epochs", duration, "Length of the run."),
        parallel=Field("shard_map", one_of("shard_map", "pmap"),
            "How a step uses several devices: shard_map (under jit) or pmap."),
        sync_batchnorm=Field(False, boolean,
            "Compute BatchNorm's statistics over all devices, not on each device separately."),
        accumulate=Field(1, integer(1),
            "Cut each batch into this many pieces and average their gradients."),
        steps_per_call=Field(1, integer(1),
            "Steps that one call of the compiled program takes, in a loop over images that stay on"
            " the devices (docs/accelerators.md).",
            older_runs=1),
        ema=Field(0.0, number(0, 1),
            "Decay of an exponential moving average of weights and statistics; evaluations use the"
            " average. 0: off.",
            regularizer=True),
        ema_warmup=Field(True, boolean,
            "Use min(ema, (1 + step) / (10 + step)) as the decay of each step, as TensorFlow's"
            " ExponentialMovingAverage does. timm has another formula."),
        aux_weight=Field((0.3,), rules(weight_over_time, "weight", single=True),
            "Weights of the auxiliary heads' losses: (0.3,) for every head, or rules (regex over"
            " names of heads, weight) such as ((r'aux1', 0.3), (r'.*', 0.0)). A weight is a number,"
            " or points ((duration, number), ...) joined by straight lines."),
        dropout=Field((), rules(number(0, 0.99), "rate", single=True),
            "Dropout in addition to the network's own: (rate,) after every convolution, or rules"
            " (regex over modules such as 'stage1/block1/conv1', rate); (): off.",
            older_runs=(), regularizer=True),
        dropout_mode=Field("unit", one_of("unit", "channel"),
            "What train.dropout drops. unit: single activations; channel: whole feature maps.",
            older_runs="unit"),
        loss=Field("", reference,
            "Your own loss, 'package.module:function' of (logits [N K], labels [N K]) -> [N]. '':"
            " cross-entropy, or the sum of sigmoid cross-entropies for multilabel data.",
            older_runs=""),
        metrics=Field((), named_references,
            "Your own metrics, each 'package.module:function' of (logits [N K], labels [N K],"
            " mask [N]) -> (sum, count). Each is logged under the function's name, or under NAME"
            " if given as 'NAME=package.module:function'.",
            older_runs=()),
        regularizers=Field((), references,
            "Your own regularizers, each 'package.module:Name'. Their fields are own.NAME.FIELD. A"
            " regularizer whose first field is 0, False, None or empty is off.",
            older_runs=()),
        callbacks=Field((), references,
            "Your own callbacks, each 'package.module:Name', with methods on_step, on_validation"
            " or on_save.", older_runs=()),
        best_by=Field("auto", best_by,
            "The metric that chooses the best checkpoint, such as 'validation/loss'. auto:"
            " validation/accuracy, or validation/loss for multilabel data.", older_runs="auto"),
        best_mode=Field("auto", one_of("auto", "max", "min"),
            "Whether the highest or the lowest value of best_by is the best. auto: the highest"
            " accuracy or top5, the lowest loss. Set it for your own metric.", older_runs="auto"),
        max_bad_steps=Field(10, integer(),
            "Stop after this many steps in a row with values that are not finite; 0: never."),
        eval_flip=Field(False, boolean,
            "Average the logits of each image and its mirror image in every validation and test.",
            older_runs=False),
        precise_bn=Field(0, integer(),
            "Before each validation and at the end, compute BatchNorm's running statistics from"
            " this many batches of training images, and keep them; 0: off."),
        deterministic=Field(False, boolean,
            "Use XLA's deterministic kernels on GPUs. Has no effect if JAX has already started."),
        eval_every=Field("1 epochs", duration,
            "How often to evaluate on the validation split, if there is one."),
        test_on=Field("latest", one_of("latest", "best", "never"),
            "Which checkpoint the run tests at the end. never: it does not read the test split."),
        evaluate_train=Field(False, boolean,
            "At the end, also evaluate the training examples, neither augmented nor mixed. Logged"
            " as fit/loss, fit/accuracy, fit/top5.", older_runs=False),
        early_stopping=Field(0, integer(),
            "Stop after this many validations without a new best one; 0: off.", regularizer=True),
    ),

    checkpoint=section("Checkpoints.",
        every=Field("5 epochs", duration, "How often to save a checkpoint."),
        keep_latest=Field(2, integer(1), "Keep this many of the newest checkpoints."),
        keep_best=Field(1, integer(),
            "Keep this many of the best checkpoints by train.best_by. Without a validation split,"
            " the best is the latest."),
    ),

    graft=section(
        "Start from other weights. adapt_stem, resize_positions and averaged allow weights to be"
        " adapted to the network (flax_cnns/weights/adapt.py); the graft report names each leaf"
        " that was adapted.",
        source=Field("", string,
            "A run as RUN (the checkpoint tested for its summary.json), RUN@best, RUN@latest or"
            " RUN@1200; the path of an Orbax checkpoint; or weights of another library, as"
            " torchvision:resnet50 or timm:resnet50d=/path/file.safetensors. '': none."),
        rules=Field(((r"(.*)", r"\1"),), rules(source_path, "path in the source or None"),
            "Rules (regex over this network's paths, path in the source). With None for the path,"
            " the leaf is initialized afresh."),
        adapt_stem=Field(False, boolean,
            "Adapt the first kernels to the images' channels: sum them to 1 channel, or repeat"
            " them from 1 or 3.", older_runs=False),
        resize_positions=Field(False, boolean,
            "Resize a ViT's position embeddings bicubically.", older_runs=False),
        averaged=Field(False, boolean,
            "Take the averaged weights of a run or a training script's file.", older_runs=False),
    ),

    own=section(
        "Fields of your own parts. own.NAME.FIELD goes to the part that is called NAME, as in"
        " 'package.module:NAME'. Fields of your own network are under model instead."),

    log=section("Logging.",
        every=Field("20 steps", duration, "How often to log the training metrics."),
        tensorboard=Field(True, boolean, "Also write files for TensorBoard."),
        wandb=Field("", string, "Name of a Weights & Biases project; '': off."),
    ),
)

STRATEGY = section(
    "Numbers of the fine-tuning strategies. Only a fine-tuning config has this section, next to the"
    " configs of its runs.",
    last=Field(1, integer(1), "last_k: how many stages are trained."),
    rate=Field(0.1, number(above=True),
        "Factor on the learning rate wherever more than the classifier is fine-tuned."),
    head_share=Field(0.25, number(0.01, 0.99),
        "head_then_all: share of the steps that train only the head."),
    layer_decay=Field(0.5, number(0, 1, above=True),
        "Factor on the learning rate from each block to the block below it."),
)
# fmt: on


def walk(part: Section, prefix: str = "") -> Iterator[tuple[str, Field | Section]]:
    """Yields (path such as "data.augment", section or field) in the order of the table."""
    for name, entry in part.fields.items():
        yield prefix + name, entry
        if isinstance(entry, Section):
            yield from walk(entry, f"{prefix}{name}.")


def make_defaults(part: Section = TABLE) -> dict[str, Any]:
    """Returns `{field: default}`, with sections as nested dicts."""
    return {
        name: make_defaults(entry) if isinstance(entry, Section) else entry.default
        for name, entry in part.fields.items()
    }


FIELDS = {path: entry for path, entry in walk(TABLE) if isinstance(entry, Field)}
DEFAULTS = {path: field.default for path, field in FIELDS.items()}
