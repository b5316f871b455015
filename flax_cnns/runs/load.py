"""Loads a run as objects: its network, its weights and its preprocessing."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from flax_cnns.checkpoint.finding import REPAIRS, explain_damage
from flax_cnns.data import augment
from flax_cnns.data.load import load_dataset
from flax_cnns.data.types import Dataset
from flax_cnns.runs import own_parts
from flax_cnns.runs import workdir as workdirs
from flax_cnns.runs.build import RunComponents
from flax_cnns.runs.network import check_network, make_model
from flax_cnns.runs.references import check_trust, find_references
from flax_cnns.runs.variables import list_class_names, load_variables
from flax_cnns.train import parallel
from flax_cnns.types import Array, PyTree


class NetworkOfRun(NamedTuple):
    """The network of a run without its weights."""

    config: Any  # a ConfigDict
    dataset: Dataset  # its facts, without examples
    model: nn.Module
    num_logits: int


def make_network_of_run(workdir: pathlib.Path, *, trust: bool = False) -> NetworkOfRun:
    """Builds the network of the run in a folder; reads no weights.

    The data set is not needed. `trust` allows importing the code of a network of the user's own.
    Raises UserError.
    """
    config = workdirs.read_config(workdir)
    references = find_references(config).get("model", [])
    check_trust({"model": {"name": references[0]}} if references else {}, trust, str(workdir))
    facts = workdir / "dataset.json"
    if facts.is_file():
        with explain_damage(facts, REPAIRS[facts.name]):
            dataset = Dataset.from_dict(workdirs.read_json(facts))
    else:  # older versions did not write this file
        dataset = load_dataset(config.data)
    network = own_parts.find_network(config)
    model = make_model(config, dataset, network)
    width = model.num_classes if network is None else check_network(model, dataset)
    return NetworkOfRun(config, dataset, model, width)


class LoadedRun(NamedTuple):
    """A trained network with what it needs to predict.

    `network.apply(variables, preprocessing(images), train=False)` gives the logits of images u8
    [N H W C] (floats if the run was trained on floats).
    """

    network: nn.Module
    variables: PyTree  # {"params", "batch_stats"}; averaged weights if the run evaluates them
    config: Any  # a ConfigDict
    class_names: Sequence[str]  # [K]
    preprocessing: Callable[[Array], Array]  # images -> f32 [N H W C], normalized as in the run
    dataset: Dataset  # its facts, without examples
    step: int
    checkpoint: str  # why this checkpoint: best, latest, named, tested for summary.json ...


def load_run(workdir: str | os.PathLike, checkpoint: str = "", *, trust: bool = False) -> LoadedRun:
    """Loads the network of a run with its weights: `load_run("runs/digits@best")`.

    `workdir`: RUN, RUN@best, RUN@latest or RUN@1200; `checkpoint` may name the checkpoint instead.
    RUN alone means the checkpoint that was tested, or the latest checkpoint of an unfinished run.
    The data set is not needed. `trust` allows importing the code of a network of the user's own.
    Raises UserError.
    """
    workdir, checkpoint = workdirs.split_checkpoint(workdir, checkpoint)
    config, dataset, model, width = make_network_of_run(workdir, trust=trust)
    mesh = parallel.make_mesh(jax.devices()[:1])
    components = RunComponents(config, model, dataset, mesh, None, width)
    variables, (step, why) = load_variables(components, workdir, checkpoint)
    normalize = augment.make_normalize(config.data.augment, mean=dataset.mean, std=dataset.std)
    names = list_class_names(dataset, width)
    variables = components.stack_if_scanned(variables)
    return LoadedRun(model, variables, config, names, normalize, dataset, step, why)
