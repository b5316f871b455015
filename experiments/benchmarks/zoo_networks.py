"""The networks of `zoo`, one of each family, and what a process of it measures."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from experiments.benchmarks import torch_side, training
from experiments.benchmarks.gpu_table import Measure
from flax_cnns import tree as pytree
from flax_cnns.analysis import device
from flax_cnns.analysis.timing import time_candidates
from flax_cnns.errors import UserError
from flax_cnns.models.registry import create_model


class ZooNetwork(NamedTuple):
    """A network that stands for its family, and its name in torchvision or timm."""

    name: str
    batch: int = 8
    size: int = 0  # height and width of the images; 0: the network's
    torch: str = ""  # "": PyTorch has none
    fields: Mapping[str, Any] = {}

    def describe(self) -> str:
        """Returns the network with its batch and size, such as "resnet50, 8 x 96"."""
        return f"{self.name}, {self.batch}" + (f" x {self.size}" if self.size else "")


NETWORKS = {  # by family
    "lenet": ZooNetwork("lenet5", 64),
    "alexnet": ZooNetwork("alexnet_single_tower", 8, 224),
    "zfnet": ZooNetwork("zfnet_fig3", 8, 96),
    "cifar_resnet": ZooNetwork("cifar_resnet20", 32),
    "resnet": ZooNetwork("resnet50", 8, 96, "resnet50"),
    "resnext": ZooNetwork("resnext50_32x4d", 8, 96, "resnext50_32x4d"),
    "senet": ZooNetwork("seresnet50", 8, 96, "seresnet50"),
    "preact_resnet": ZooNetwork("resnetv2_50", 8, 96, "resnetv2_50"),
    "cifar_preact": ZooNetwork("cifar_preact110", 8),
    "wide_resnet": ZooNetwork("wrn_16_4", 16),
    "shake_shake": ZooNetwork("shakeshake_26_2x32d", 16),
    "pyramidnet": ZooNetwork("pyramidnet_110_a270_shakedrop", 4, fields={"depth": 56}),
    "resnet_in_resnet": ZooNetwork("rir_18", 16),
    "densenet": ZooNetwork("densenet121", 8, 96, "densenet121"),
    "sparsenet": ZooNetwork("sparsenet_40_24", 16),
    "sparse_densenet": ZooNetwork("sparse_densenet_abc", 16),
    "fractalnet": ZooNetwork("fractalnet_20_droppath", 16),
    "googlenet": ZooNetwork("googlenet_tv_aux", 8, 96, "googlenet"),
    "inception_v3": ZooNetwork("inception_v3", 2, 299, "inception_v3"),
    "inception_v4": ZooNetwork("inception_v4", 4, 139, "inception_v4"),
    "inception_resnet": ZooNetwork("inception_resnet_v2", 4, 139, "inception_resnet_v2"),
    "efficientnet": ZooNetwork("efficientnet_b0", 8, 96, "efficientnet_b0"),
    "simpnet": ZooNetwork("simpnet_slim_300k", 16),
    "vgg": ZooNetwork("vgg11_bn", 4, 96, "vgg11_bn"),
    "squeezenet": ZooNetwork("squeezenet1_1", 16, 96, "squeezenet1_1"),
    "xception": ZooNetwork("xception", 4, 139, "legacy_xception"),
    "mobilenet_v1": ZooNetwork("mobilenet_v1_100", 8, 96, "mobilenetv1_100"),
    "mobilenet_v2": ZooNetwork("mobilenet_v2", 8, 96, "mobilenet_v2"),
    "mobilenet_v3": ZooNetwork("mobilenet_v3_small", 8, 96, "mobilenet_v3_small"),
    "nas": ZooNetwork("nas_v1", 8),
    "nas_bench_201": ZooNetwork("nas_bench_201_resnet", 16),
    "nasnet": ZooNetwork("nasnet_a_6_768", 8),
    "pnasnet": ZooNetwork("pnasnet5_large", 2, 96, "pnasnet5large"),
    "deck_cnn": ZooNetwork("deck003_cifar100_example", 32),
    "nin": ZooNetwork("nin_cifar10", 16),
    "all_cnn": ZooNetwork("all_cnn_c", 16),
    "dsn": ZooNetwork("dsn", 16),
    "highway": ZooNetwork("highway_19", 16),
    "airbench": ZooNetwork("airbench94", 64),
    "convnext": ZooNetwork("convnext_tiny", 4, 96, "convnext_tiny"),
    "vit": ZooNetwork("vit_tiny_patch16_224", 8, 224, "vit_tiny_patch16_224"),
}


class ZooSettings(NamedTuple):
    """How often a network is timed."""

    rounds: int
    warmup: int
    at_least: float


def create_network(network: ZooNetwork) -> Any:
    """Makes our network at the size of its row."""
    fields = dict(network.fields)
    if network.size:
        channels = create_model(network.name, **fields).input_size[-1]
        fields["input_size"] = (network.size, network.size, channels)
    return create_model(network.name, **fields)


def measure_network(network: ZooNetwork, settings: ZooSettings) -> list[Measure]:
    """Measures a network in this process: its first step, its memory, and its training and
    inference steps, in turn with PyTorch's if it has the network.

    Without the persistent compilation cache, so that the first step is that of a new program.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    model, cores = create_network(network), jax.devices()[:1]
    trainee = training.Trainee(model, network.batch, devices=cores)
    times = [time.perf_counter()]
    traced = trainee.trace()
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    train, infer = trainee.make_train_call(compiled), trainee.make_inference_call()
    jax.block_until_ready(train())
    times.append(time.perf_counter())
    names = ("tracing", "lowering", "XLA", "first execution")
    measures = [Measure("initialization", round(trainee.init_seconds, 3), "s")]
    measures += [Measure(n, round(b - a, 3), "s") for n, a, b in zip(names, times, times[1:])]
    memory = device.program_memory(compiled)
    measures += [
        Measure("parameters", pytree.count(trainee.state.params)),
        Measure("memory of the training step", "" if memory is None else memory, "bytes"),
    ]
    jax.block_until_ready(infer())
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    measures.append(Measure("peak memory of the process", peak, "bytes"))
    ours = {"training": train, "inference": infer}
    theirs, note = make_torch_calls(network, model, pytree.count(trainee.state.params))
    for kind, call in ours.items():
        candidates = {"ours": call, **({"PyTorch": theirs[kind]} if theirs else {})}
        timed = time_candidates(candidates, **settings._asdict())
        for name in candidates:
            seconds = timed.seconds[name]
            value = round(timed.median(name), 6)
            spread = round(min(seconds), 6), round(max(seconds), 6)
            measures.append(Measure(f"{kind}, {name}", value, "s", *spread, note=note))
        if theirs:
            ratio = [round(value, 3) for value in timed.ratio("ours", "PyTorch")]
            measures.append(Measure(f"{kind}, ours / PyTorch", ratio[0], "", *ratio[1:]))
    return measures


def make_torch_calls(
    network: ZooNetwork, model: Any, count: int
) -> tuple[dict[str, Any] | None, str]:
    """Returns calls of PyTorch's training and inference step, and a note; None and why, if it has
    no such network."""
    if not network.torch:
        return None, "PyTorch has no such network"
    try:
        torch = torch_side.import_torch()
        theirs = torch_side.create_torch_network(network.torch, model.num_classes)
    except UserError as error:
        return None, str(error)
    number = sum(parameter.numel() for parameter in theirs.parameters())
    if number != count:
        return None, f"{network.torch} of PyTorch has {number:,} parameters, not {count:,}"
    examples = training.make_examples(network.batch, model.input_size, model.num_classes)
    where = torch_side.find_torch_device(torch)
    step = torch_side.make_torch_step(torch, theirs, examples, where, "float32")
    # A copy: the training step needs the network in its training mode.
    again = torch_side.create_torch_network(network.torch, model.num_classes)
    infer = torch_side.make_torch_inference(torch, again, examples, where)
    return {"training": step, "inference": infer}, f"{network.torch} of PyTorch"


def end_with_parent() -> None:
    """Ends this process when its standard input closes, as its parent's end does."""

    def watch() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGKILL)  # a compiler ignores other signals for minutes

    threading.Thread(target=watch, daemon=True).start()


def measure_roofline(size: int = 1024, megabytes: int = 256) -> list[Measure]:
    """Measures what this machine does at best in float32: a matrix product, and a sum into one of
    two arrays, which moves three times `megabytes`."""
    a = jax.numpy.ones((size, size), jax.numpy.float32)
    x = jax.numpy.ones(megabytes * 2**18, jax.numpy.float32)
    multiply = jax.jit(lambda a: a @ a)
    add = jax.jit(lambda x, y: x + 0.5 * y, donate_argnums=1)  # no new array in each call
    held = [x + 1]

    def add_in_place() -> Any:
        held.append(add(x, held.pop()))
        return held[0]

    candidates: dict[str, Any] = {"product": lambda: multiply(a), "sum": add_in_place}
    times = time_candidates(candidates, rounds=5, at_least=0.2)
    flops, moved = 2 * size**3, 3 * megabytes * 2**20
    return [
        Measure("matrix product", round(flops / times.median("product") / 1e9, 1), "GFLOP/s"),
        Measure("memory", round(moved / times.median("sum") / 1e9, 1), "GB/s"),
    ]
