"""The `sivae` command. Subcommands are imported when they run, so that help answers at once.

Exit codes: 0 done, 1 something is wrong (one sentence on stderr), 2 wrong arguments,
75 stopped by a signal with a checkpoint saved (run the same command again).
"""

from __future__ import annotations

import argparse
import os
import sys
import threading

from sivae import __version__
from sivae.errors import UserError

EXIT_ERROR, EXIT_INTERRUPTED = 1, 75


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sivae", description="Train and use introspective variational autoencoders (Soft-IntroVAE)."
    )
    parser.add_argument("--version", action="version", version=f"sivae {__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error, and DeepSpeed's log")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[shared])

    def add_model(command: argparse.ArgumentParser) -> None:
        command.add_argument("model", help="run directory, checkpoint, or exported model; path or URL")
        command.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
        command.add_argument(
            "--weights",
            default="average",
            choices=["average", "plain"],
            help="running average (as in training's pictures) or plain weights",
        )

    train = add("train", "Train, or go on where the run directory's newest checkpoint stands.")
    train.add_argument("config", help="YAML file; path or URL")
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="settings that replace the file's, e.g. schedule.batch_size=64",
    )

    pack = add("pack", "Pack a folder of images, a .npy/.npz array or digits: into shards with an index.")
    pack.add_argument("source", help="folder, .npy or .npz file (path or URL), or digits:")
    pack.add_argument("dest", help="folder or URL of the packed set")
    pack.add_argument("--resolution", type=int, required=True, help="height and width in pixels")
    pack.add_argument(
        "--num-channels", type=int, choices=[1, 3], help="grey or colour; as the first image when not given"
    )
    pack.add_argument("--labels", action="store_true", default=None, help="take the names of subfolders as classes")

    sample = add("sample", "Draw images from the prior.")
    add_model(sample)
    sample.add_argument("--count", type=int, default=64)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--label", type=int, help="class of all images, for a conditional model")
    sample.add_argument("--output", default="samples.png", help="picture of all images")
    sample.add_argument("--folder", help="also write every image as a PNG of its own into this folder")

    reconstruct = add("reconstruct", "Reconstruct images: a picture with each image above its reconstruction.")
    add_model(reconstruct)
    reconstruct.add_argument("source", help="image file, folder, packed set, .npy/.npz or digits:; #N picks image N")
    reconstruct.add_argument(
        "--label", type=int, help="class of the images, for a conditional model, where the source has none"
    )
    reconstruct.add_argument("--count", type=int, default=16)
    reconstruct.add_argument("--output", default="reconstructions.png")

    interpolate = add("interpolate", "Walk in a straight line between the latents of two images.")
    add_model(interpolate)
    interpolate.add_argument("first", help="image file, or a set with #N for image N, e.g. digits:#3")
    interpolate.add_argument("second")
    interpolate.add_argument(
        "--label", type=int, help="class along the path, for a conditional model; the first image's by default"
    )
    interpolate.add_argument("--steps", type=int, default=10)
    interpolate.add_argument("--output", default="interpolation.png")

    imported = add("import", "Read a published checkpoint (image, bootstrap, 2D, IntroVAE) into sivae's format.")
    imported.add_argument("source", help=".pth file")
    imported.add_argument("dest", help="folder or URL to write")
    imported.add_argument(
        "--residual",
        choices=["soft_intro_vae", "intro_vae"],
        help="say which code an image model is from, where its names do not tell",
    )

    export = add("export", "Write a run's model as safetensors, settings and a model card.")
    export.add_argument("model", help="run directory or checkpoint")
    export.add_argument("dest", help="folder or URL to write")
    export.add_argument("--weights", default="average", choices=["average", "plain"])

    doctor = add(
        "doctor",
        "Say what is installed, which accelerator there is, and whether a config's data and run directory open.",
    )
    doctor.add_argument("config", nargs="?", help="YAML file to check")
    doctor.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    if options.debug:
        os.environ["SIVAE_DEBUG"] = "1"
    else:
        # The libraries' threads (TensorBoard's writer) hand their errors to the caller, who says it in one sentence.
        threading.excepthook = lambda failure: None
    from sivae.config import ConfigError

    try:
        from sivae import commands

        return commands.COMMANDS[options.command](options) or 0
    except (UserError, ConfigError) as error:
        if options.debug:
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank == 0 or not getattr(error, "shared", False):
            where = f" (rank {rank})" if rank else ""
            print(f"sivae: error{where}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except MemoryError as error:
        if options.debug:
            raise
        print(
            f"sivae: error: out of memory ({error}); lower engine.micro_batch_size, or raise engine.zero_stage",
            file=sys.stderr,
        )
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("sivae: stopped", file=sys.stderr)
        return 130
