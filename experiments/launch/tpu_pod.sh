#!/bin/bash
# Trains on a TPU pod slice: runs the same command on every host, and JAX connects the hosts.
#
#   TPU=my-pod ZONE=europe-west4-a experiments/launch/tpu_pod.sh \
#       --workdir=/mnt/shared/runs/resnet50 --config=configs/imagenet_resnet50.py
#
# First, on every host: clone the repository into ~/flax_cnns, run `pip install -e . "jax[tpu]"`, and
# mount one NFS share (such as Filestore) for the run directory. A bucket has no locks and no renames.

set -euo pipefail
: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}"

gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ~/flax_cnns && python3 -m experiments.train $(printf '%q ' "$@")"
