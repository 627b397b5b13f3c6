"""Commands that train, and those to ask before: toy2d, plan, doctor."""

from __future__ import annotations

import argparse
import json
import os
import sys

from sivae import config
from sivae.cli import EXIT_INTERRUPTED
from sivae.errors import UserError


def train(options: argparse.Namespace) -> int:
    from sivae import trainer

    settings = config.load(options.config, options.overrides)
    if options.profile_steps < 1:
        raise UserError(f"--profile-steps: {options.profile_steps} is not a number of steps")
    result = trainer.train(settings, profile_steps=options.profile_steps if options.profile else None)
    if int(os.environ.get("RANK", 0)) == 0 and options.profile:
        print(result.profile or "", end="")
    elif int(os.environ.get("RANK", 0)) == 0:
        print(
            f"{result.images_seen:,} images seen; checkpoint {settings.run.directory}/checkpoints/{result.checkpoint}"
        )
        if result.picture:
            print(f"picture: {result.picture}")
        if settings.tracking.tensorboard:
            print(f"log: tensorboard --logdir {settings.run.directory}/tensorboard")
    return EXIT_INTERRUPTED if result.interrupted else 0


def toy2d(options: argparse.Namespace) -> int:
    from sivae import toy2d as trainer

    settings = config.load(options.config, options.overrides, trainer.Toy2dConfig)
    try:
        found = trainer.train(settings)
    except trainer.Stopped as stopped:
        print(f"sivae: {stopped}", file=sys.stderr)
        return EXIT_INTERRUPTED
    for line in trainer.table(found):
        print(line)
    directory = settings.run.directory
    print(f"picture: {directory}/{trainer.PICTURE_FILE}; models: sivae.load('{directory}/models/{found[0]['seed']}')")
    return 0


def plan(options: argparse.Namespace) -> None:
    from sivae import plan

    settings = config.load(options.config, options.overrides)
    made = plan.make(settings, num_gpus=options.gpus, gpu_name=options.gpu, utilization=options.utilization)
    print(json.dumps(made, indent=1) if options.json else plan.render(made))


def doctor(options: argparse.Namespace) -> int:
    from sivae import doctor

    return doctor.run(options.config, options.overrides)
