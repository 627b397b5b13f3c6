#!/bin/bash
# torchrun on one node. It would answer SIGTERM by ending the workers after half a minute; so it does not hear it, and the workers,
# which Slurm signals as well, save in their own time. Their end is its end.
trap '' TERM
# Slurm may repeat its signal while they save.
export SIVAE_SAME_REQUEST_SEC=86400
exec "$SIVAE_PYTHON" -m torch.distributed.run --signals-to-handle=SIGINT "$@"
