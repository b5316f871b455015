#!/bin/bash
# Trains on a TPU pod slice: the same command on every host, which JAX joins by itself.
#
#   TPU=my-pod ZONE=europe-west4-a experiments/launch/tpu_pod.sh \
#       --workdir=/mnt/shared/runs/resnet50 --config=configs/imagenet_resnet50.py
#
# Before: clone the repository into ~/flax_cnns on every host, `pip install -e . "jax[tpu]"` there, and
# mount one NFS share (such as Filestore) for the run directory: a bucket has neither locks nor renames.

set -euo pipefail
: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}"

gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ~/flax_cnns && python3 -m experiments.train $(printf '%q ' "$@")"
