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

    pack = add(
        "pack",
        "Pack images into shards with an index, once, so that training only streams them. Killed and run again, it goes on.",
    )
    pack.add_argument(
        "source",
        help="folder of images, .npy or .npz, .zip, .tfrecords, CIFAR-10, MNIST, SVHN, Cars3D, KTH or FFHQ as published, a packed set, "
        ".tar shards (path or URL), or digits: or shapes:",
    )
    pack.add_argument("dest", help="folder or URL of the packed set")
    pack.add_argument("--resolution", type=int, required=True, help="height and width in pixels")
    pack.add_argument(
        "--format", default="png", choices=["png", "qoi", "webp", "jpeg"],
        help="png (default), qoi (lossless, a third larger, decodes three times as fast), webp (lossless without --quality) or jpeg",
    )  # fmt: skip
    pack.add_argument(
        "--quality", type=int, metavar="Q", help="0 to 100, of lossy webp, and of jpeg (95 when not given)"
    )
    pack.add_argument(
        "--crop", default="center", metavar="CROP",
        help="center (the central square, default), none, SIZE (the central square of SIZE pixels) or LEFT,TOP,SIZE",
    )  # fmt: skip
    pack.add_argument("--filter", default="lanczos", choices=["lanczos", "bicubic", "bilinear", "box", "nearest"])
    pack.add_argument(
        "--num-channels", type=int, choices=[1, 3], help="grey or colour; as the first image when not given"
    )
    pack.add_argument(
        "--labels",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="ask for labels (of a folder of images: the names of its subfolders), or leave them out; a source's own by default",
    )
    pack.add_argument(
        "--splits", metavar="SPLITS",
        help="none, ranges (train=0:60000,validation=60000:) or shares (validation=10%%, the rest is train); the source's own by default",
    )  # fmt: skip
    pack.add_argument(
        "--pyramid", action="store_true", help="one set for each power of two from the resolution down to 4"
    )
    pack.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read, and list them")
    pack.add_argument("--verify", choices=["file", "pixels"], help="compare published checksums (FFHQ)")
    pack.add_argument("--samples-per-shard", type=int, metavar="N", help="instead of --shard-size")
    pack.add_argument(
        "--shard-size", default="256MiB", metavar="BYTES", help="about, e.g. 500MB or 1GiB (default 256MiB)"
    )
    pack.add_argument("--licence", help="licence and attribution, recorded in the index; the source's own by default")
    pack.add_argument("--workers", type=int, metavar="N", help="processes (default: the number of cores)")

    check = add("check", "Compare every byte of a packed set, or of all levels of a pyramid, with its index.")
    check.add_argument("url", help="folder or URL of the packed set")
    check.add_argument("--split", default="all", help="only this split")
    check.add_argument("--workers", type=int, metavar="N", help="processes (default: the number of cores)")

    index = add("index", "Make the index of WebDataset shards that others made, to train on them as they are.")
    index.add_argument(
        "urls",
        nargs="+",
        metavar="URLS",
        help="shards in one folder, e.g. https://host/shards-{000000..000069}.tar or 'set/*.tar'",
    )
    index.add_argument("--output", metavar="FOLDER", help="where to put the index, when not beside the shards")
    index.add_argument("--crc", action="store_true", help="read every byte and record checksums, not the headers alone")
    index.add_argument("--split", default="train", metavar="NAME", help="what to call this part of the data")
    index.add_argument("--licence", default="", help="licence and attribution, recorded in the index")

    sample = add("sample", "Draw images from the prior.")
    add_model(sample)
    sample.add_argument("--count", type=int, default=64)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--label", type=int, help="class of all images, for a conditional model")
    sample.add_argument(
        "--truncation", type=float, default=1.0, metavar="PSI",
        help="of a style model: pull styles to the average, 1 (default) not at all, 0.7 as published",
    )  # fmt: skip
    sample.add_argument(
        "--truncation-layers", type=int, metavar="N", help="in the first N layers only (8 as published); all by default"
    )
    sample.add_argument("--output", default="samples.png", help="picture of all images")
    sample.add_argument("--folder", help="also write every image as a PNG of its own into this folder")

    reconstruct = add("reconstruct", "Reconstruct images: a picture with each image above its reconstruction.")
    add_model(reconstruct)
    reconstruct.add_argument(
        "source", help="image file, folder, packed set, .npy/.npz, digits: or shapes:; #N picks image N"
    )
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

    translate = add(
        "translate",
        "Give images the class of others: a picture with the images that set the content at the left, those that set the"
        " class at the top, and each content with each class between them. Needs a model of the translation family.",
    )
    add_model(translate)
    translate.add_argument(
        "content", metavar="A", help="images whose content is kept: file, folder or set; #N picks image N"
    )
    translate.add_argument("class_", metavar="B", help="images whose class they take on: the same")
    translate.add_argument(
        "--count", type=int, default=8, metavar="N", help="at most so many rows and columns, from all over A and B"
    )
    translate.add_argument("--output", default="translation.png")

    imported = add("import", "Read a published checkpoint (image, bootstrap, style, 2D, IntroVAE) into sivae's format.")
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
