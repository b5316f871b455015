"""Every field there is, with its default. A config starts from `get_config()`, sets what differs.

Durations are texts, `"20 epochs"` or `"500 steps"`; an epoch is one pass over the training
examples. Every `"0 steps"` is never, but the last step always logs, validates and saves. Rules are
tuples of `(regex, value)` over paths such as `"params/stage1/block1/conv1/kernel"`: the first regex
that matches the whole path decides, and every path must be decided. A new run refuses a field that
is not at its default and cannot act under the other choices, such as momentum with adam.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,  # initialisation, data order, augmentation, dropout
            # ---- the network: all of it goes to create_model; a config may add its family's fields
            model=dict(
                name="lenet5",
                num_classes=0,  # 0: as many as the data set has
                dtype="float32",  # what computes, or bfloat16; parameters and loss stay float32
                # First values: paper, he, lecun, xavier, gaussian (0.01), orthogonal; "": the
                # network's default. The head of ResNets, DenseNets, MobileNets and their relatives
                # starts with lecun, whatever is given here (paper too).
                init="",
                scan=False,  # repeats of a block as a loop: deep networks compile in seconds
                remat=False,  # compute each block again in the backward pass: less memory
            ),
            # ---- images and labels
            data=dict(
                name="digits",  # digits, any TFDS name, or folder (of images, in dir)
                dir="",  # TFDS data_dir, folder of archives or of images; "": TFDS's default
                source="auto",  # tfds, archive, folder; auto: archives if dir has them, else TFDS
                labels="",  # where there are several kinds: cifar100 has fine (default) and coarse
                # Only these, labeled 0, 1, ... in this order: by name, or by number, unless another
                # class has that number as its name.
                classes=(),
                image_size=32,  # height and width that the network sees
                channels=0,  # 0: the data set's own; 1 or 3 converts
                # Taken from train where there is no such split: a fraction, a count, or 0 for none.
                validation=0.1,
                fraction=1.0,  # of the training examples, each class alike; no other split changes
                split_seed=0,  # of these, and of an image folder's test split
                batch_size=64,  # over all devices and processes
                eval_batch_size=256,
                # yes, no, or auto: when they take less than memory_limit and are not photographs
                # that random_resized_crop cuts out of their full size.
                in_memory="auto",
                memory_limit=4.0,  # GiB
                threads=8,  # decoding threads of the streaming loader
                workers=0,  # its worker processes
                skip_damaged=False,  # skip and count images that cannot be decoded; else stop
                mock=0,  # > 0: so many random images in place of the data set's own (smoke runs)
                # Per image. AlexNet's: pad_crop (translations; the paper takes 224 pixels of 256
                # rather than black ones around), flip and pca=0.1.
                augment=dict(
                    # device: in the training step; loader: in the thread that fetches batches, on
                    # the CPU, where images go to the device as float32, four times the bytes. Both
                    # make the same images.
                    where="device",
                    pad_crop=0,  # pixels of padding on each side before a random crop; 0: off
                    flip=False,  # left-right, half of the time
                    rotate=0.0,  # degrees, uniform in +-rotate
                    scale=0.0,  # relative, uniform in 1 +- scale
                    random_resized_crop=(),  # (smallest, largest) share of the area; (): off
                    cutout=0,  # side of the square set to the mean; 0: off
                    erase=0.0,  # probability of a box of noise (random erasing)
                    # RandAugment: (operations an image, magnitude 0 to 30), such as (2, 9), on
                    # torchvision's scale, where 30 is what the paper calls 10; (): off
                    randaugment=(),
                    # Standard deviation along the principal components of the data set's own
                    # colours, of which grey images have one; to 1, the paper's is 0.1; 0: off
                    pca=0.0,
                    normalize=True,  # by mean and standard deviation
                ),
                # Per channel, of images in 0..1; (): the data set's own. A network that starts from
                # published weights wants those that these were trained with.
                mean=(),
                std=(),
            ),
            # ---- per batch, inside the step
            mix=dict(
                label_smoothing=0.0,
                mixup=0.0,  # alpha of the Beta distribution; 0: off
                cutmix=0.0,  # likewise; with mixup on too, a coin for each batch says which
            ),
            # ---- the optimizer
            optimizer=dict(
                # sgd, adam, adamw, rmsprop (TensorFlow's), lamb. lamb adapts the rate of every
                # parameter. timm's adapts only those with weight decay, and clips the gradient
                # first, as clip_norm=1.0 does here.
                name="sgd",
                momentum=0.9,  # sgd, rmsprop
                nesterov=False,  # sgd only
                b1=0.9,  # adam, adamw, lamb
                b2=0.999,
                eps=1e-8,  # adam, adamw, lamb, rmsprop
                decay_rate=0.9,  # rmsprop: of the running mean of squares
                # () none, (1e-4,) every parameter, or rules (regex, number).
                weight_decay=(),
                # coupled: added to the gradient (after clip_norm); decoupled: the weights shrink by
                # learning rate x decay beside it; auto: decoupled in adamw and lamb, else coupled.
                weight_decay_mode="auto",
                # In the loss, of every optimizer: a in J + a/2 ||w||^2 over what is trainable; as
                # weight_decay. clip_norm and norm/grads see it; logged as train/l2.
                l2=(),
                # After each step every unit's incoming weights are scaled back to this norm: (3.0,)
                # every kernel, or rules (regex, number) over the kernels; 0 is none.
                max_norm=(),
                grad_noise=0.0,  # eta of the variance eta / (1 + step)^decay; 0: off
                grad_noise_decay=0.55,
                sam=0.0,  # rho of sharpness-aware minimization: two gradients a step; 0: off
                trainable=(),  # rules (regex, bool); (): all
                # BatchNorm: rules (regex over paths such as "stage1/block1/norm1", mode). train: by
                # the batch, and the running statistics move; frozen_stats: by those, which stay;
                # frozen: scale and bias stay too. (): frozen where `trainable` freezes the layer's
                # parameters, train elsewhere.
                bn=(),
                lr_mult=(),  # rules (regex, number): factors on the learning rate; (): all 1
                # A factor on the learning rate from each layer to the one below it; 0: off. A layer
                # is a block, grouped as in BEiT for transformers and as in timm for the others
                # (train.optimizers.layer_decay).
                layer_decay=0.0,
                clip_norm=0.0,  # global norm of the gradient; 0: off
            ),
            # ---- the learning rate
            schedule=dict(
                name="cosine",  # constant, steps, cosine, exponential, one_cycle, plateau
                learning_rate=0.1,  # the highest
                warmup="0 steps",  # linear, before the schedule proper
                boundaries=(),  # steps: durations from the start of training
                factor=0.1,  # steps, plateau: what the rate is multiplied by
                every="1 epochs",  # exponential: how often
                rate=0.97,  # exponential: by how much
                end=0.0,  # cosine, exponential: the lowest rate
                # one_cycle: share of the run in which the rate rises. Momentum stays as it is.
                pct_start=0.3,
                div_factor=25.0,  # one_cycle: highest over initial rate
                final_div_factor=1e4,  # one_cycle: initial over last rate
                # plateau: the rate is lowered at the fifth validation without a better error, as
                # with patience=4 in PyTorch's ReduceLROnPlateau.
                patience=5,
                min_delta=1e-4,  # plateau: what counts as better, relative
            ),
            # ---- the run
            train=dict(
                duration="40 epochs",
                parallel="shard_map",  # shard_map (under jit) or pmap
                sync_batchnorm=False,  # statistics over all devices, or each device alone
                accumulate=1,  # batches are cut into this many pieces whose gradients are averaged
                ema=0.0,  # decay of the averaged weights and statistics, evaluated then; 0: off
                # The decay of a step is the smaller of ema and (1 + step) / (10 + step), as in
                # TensorFlow's ExponentialMovingAverage; timm has another formula.
                ema_warmup=True,
                # Of the auxiliary heads' losses: (0.3,) every head, or rules (regex of its name,
                # weight) such as ((r"aux1", 0.3), (r".*", 0.0)); a weight is a number, or corners
                # ((duration, number), ...) and the straight lines between them.
                aux_weight=(0.3,),
                # Beside the network's own dropout: (rate,) behind every convolution, or rules
                # (regex over modules such as "stage1/block1/conv1", rate); (): off
                dropout=(),
                dropout_mode="unit",  # unit: single responses; channel: whole maps
                max_bad_steps=10,  # so many in a row with non-finite gradients stop the run
                # Before each validation, and at the end, BatchNorm's running statistics are
                # computed from so many batches of training images, and kept; 0: off.
                precise_bn=0,
                deterministic=False,  # GPU: XLA's deterministic kernels; before JAX starts
                eval_every="1 epochs",  # on the validation split, where there is one
                test_on="latest",  # which checkpoint the test split sees at the end: latest or best
                # At the end also the examples that were trained on, neither augmented nor mixed:
                # logged as fit/loss, fit/accuracy, fit/top5.
                evaluate_train=False,
                early_stopping=0,  # stop after so many validations without a better one; 0: off
            ),
            # ---- checkpoints
            checkpoint=dict(
                every="5 epochs",
                keep_latest=2,
                keep_best=1,  # by validation accuracy; without that split best is latest
            ),
            # ---- start from other weights
            graft=dict(
                # RUN (the checkpoint tested for its summary.json), RUN@best, RUN@latest, RUN@1200,
                # an Orbax checkpoint's path, or other libraries' weights:
                # torchvision:resnet50, timm:resnet50d=/path/file.safetensors; "": none
                source="",
                # (regex over this network's paths, path in the source or None for fresh), ...
                rules=((r"(.*)", r"\1"),),
                # How weights may be fitted to the network (flax_cnns/weights/adapt.py). The report
                # names each leaf that was.
                adapt_stem=False,  # sum the first kernels to 1 channel, or repeat them from 1 or 3
                resize_positions=False,  # resize a ViT's position embeddings bicubically
                averaged=False,  # take the averaged weights of a run or a training script's file
            ),
            # ---- what is written down
            log=dict(
                every="20 steps",
                tensorboard=True,
                wandb="",  # a project's name; "": off
            ),
        )
    )


def check_mode(mode: str, *modes: str) -> None:
    """Raises ValueError for `--config=file.py:mode` with a mode that the file does not have."""
    if mode and mode not in modes:
        raise ValueError(f"unknown mode {mode!r} of this config; it has {', '.join(modes)}")
