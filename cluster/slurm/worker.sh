#!/bin/bash
# What torchrun starts for every rank: the training, and a mark when it was stopped with a checkpoint saved (code 75).
code=0
"$SIVAE_PYTHON" -m sivae train "$@" || code=$?
if ((code == 75)); then touch "$SIVAE_STOPPED"; fi
exit "$code"
