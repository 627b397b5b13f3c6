"""The `sivae` command. Subcommands are imported when they run, so that help answers at once.

Exit codes: 0 done, 1 something is wrong (one sentence on stderr), 2 wrong arguments,
75 stopped by a signal with a checkpoint saved (run the same command again).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
from contextlib import AbstractContextManager, nullcontext

from sivae import __version__, startup
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
            "--weights", choices=["average", "plain"],
            help="of a run: the running average (default, as in training's pictures) or the plain weights",
        )  # fmt: skip

    def add_keep(command: argparse.ArgumentParser, what: str) -> None:
        command.add_argument(
            "--keep", metavar="FOLDER", help=f"where {what} are kept, path or URL; by default beside the model"
        )

    train = add("train", "Train, or go on where the run directory's newest checkpoint stands.")
    train.add_argument("config", help="YAML file; path or URL")
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="settings that replace the file's, e.g. schedule.batch_size=64",
    )
    train.add_argument(
        "--profile", action="store_true",
        help="take some steps from where the run stands, tell where their time and memory went (RUN/profile/), and stop; no checkpoint"
        " is written",
    )  # fmt: skip
    train.add_argument(
        "--profile-steps", type=int, default=10, metavar="N", help="steps that --profile times (default 10)"
    )

    toy2d = add("toy2d", "Train models of a density in the plane, all seeds at once, and judge them.")
    toy2d.add_argument("config", help="YAML file, e.g. configs/toy2d/8gaussians.yaml; path or URL")
    toy2d.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. method=vae run.seeds=[0]")

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
        help="png (default), qoi (lossless, a quarter larger, takes less than half the time), webp (lossless without --quality) or jpeg",
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
    index.add_argument(
        "--split", default="train", metavar="NAME", help="what to call this part of the data (default train)"
    )
    index.add_argument("--licence", default="", help="licence and attribution, recorded in the index")

    sample = add("sample", "Draw images from the prior.")
    add_model(sample)
    sample.add_argument("--count", type=int, help="64 when not given, or 8 rows of --truncation-sweep")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--label", type=int, help="class of all images, for a conditional model")
    sample.add_argument(
        "--truncation", type=float, metavar="PSI",
        help="of a style model: pull styles to the average, 1 (default) not at all, 0.7 as published",
    )  # fmt: skip
    sample.add_argument(
        "--truncation-layers", type=int, metavar="N", help="in the first N layers only (8 as published); all by default"
    )
    sample.add_argument(
        "--truncation-sweep",
        type=int,
        metavar="N",
        help="of a style model: every image in N columns, with PSI from -1 to 1",
    )
    sample.add_argument("--output", default="samples.png", help="picture of all images, with --folder of the first 64")
    sample.add_argument(
        "--folder",
        help="also write every image as a PNG of its own into this folder, which may hold none of another call",
    )

    of_images = "class of the images, for a conditional model; the source's own when not given"
    reconstruct = add("reconstruct", "Reconstruct images: a picture with each image above its reconstruction.")
    add_model(reconstruct)
    reconstruct.add_argument(
        "source",
        help="image file, folder, packed set (or pyramid of them), .npy/.npz, digits: or shapes:; #N picks image N of all splits",
    )
    reconstruct.add_argument("--label", type=int, help=of_images)
    reconstruct.add_argument("--count", type=int, default=16)
    reconstruct.add_argument(
        "--levels", action="store_true", help="of a style model that grew: reconstruct at every level of detail"
    )
    reconstruct.add_argument("--output", default="reconstructions.png")

    interpolate = add("interpolate", "Walk between the latents of two images, in a straight line or on a sphere.")
    add_model(interpolate)
    interpolate.add_argument("first", help="image file, or a set with #N for image N, e.g. digits:#3")
    interpolate.add_argument("second")
    interpolate.add_argument(
        "--label", type=int,
        help="class of both images, for a conditional model; the sources' own when not given, where it changes half way",
    )  # fmt: skip
    interpolate.add_argument("--steps", type=int, default=10)
    interpolate.add_argument(
        "--spherical", action="store_true", help="keep the distance from the origin, as draws of the prior have it"
    )
    interpolate.add_argument("--output", default="interpolation.png")
    interpolate.add_argument("--gif", metavar="FILE", help="also write the path as a GIF, there and back")
    interpolate.add_argument("--frames", type=int, help="images of the GIF from one end to the other (default 30)")

    traverse = add("traverse", "Move an image's latent dimensions one by one: a row for each of those that tell most.")
    add_model(traverse)
    traverse.add_argument("source", help="image file, or a set; #N picks image N, otherwise the first image moves")
    traverse.add_argument("--label", type=int, help=of_images)
    traverse.add_argument("--count", type=int, default=64, help="images of the source that dimensions are ranked over")
    traverse.add_argument("--dims", type=int, default=8, help="latent dimensions, by their mean KL divergence")
    traverse.add_argument("--steps", type=int, default=9)
    traverse.add_argument("--reach", type=float, default=3.0, help="of the moved value; the prior's deviation is 1")
    traverse.add_argument("--output", default="traversals.png")

    stylemix = add("stylemix", "Mix styles: rows give the coarse layers of a style model, columns the fine ones.")
    add_model(stylemix)
    stylemix.add_argument(
        "--rows", metavar="SOURCE", help="images of the coarse styles, as for reconstruct; samples when not given"
    )
    stylemix.add_argument("--columns", metavar="SOURCE", help="images of the fine styles; samples when not given")
    stylemix.add_argument("--count", type=int, default=5, help="rows and columns")
    stylemix.add_argument(
        "--coarse-layers", type=int, metavar="N", help="layers that follow the row; 4 of them when not given"
    )
    stylemix.add_argument("--seed", type=int, default=0)
    stylemix.add_argument(
        "--label", type=int,
        help="class of all mixed images, for a conditional model; 0 when not given, and needed with --rows and --columns",
    )  # fmt: skip
    stylemix.add_argument("--output", default="stylemix.png")

    evaluate = add("evaluate", "Judge a model by figures, beside real images; alone or under torchrun.")
    add_model(evaluate)
    evaluate.add_argument("--data", required=True, metavar="URL", help="packed set of real images, or digits:")
    evaluate.add_argument("--split", default="train", help="which part of the set (default train)")
    evaluate.add_argument(
        "--metrics", required=True, metavar="NAMES",
        help="with commas between: fid, kid; frechet_D, kernel_D, precision_D, recall_D, density_D, coverage_D for a detector D "
        "(pixels, inception, dinov2 or one of --detector); mse, psnr, ssim, ms_ssim, lpips of reconstructions",
    )  # fmt: skip
    evaluate.add_argument(
        "--detector", action="append", default=[], metavar="NAME=FILE",
        help="TorchScript file of a detector: a path or URL, with #sha256=HEX to insist on",
    )  # fmt: skip
    evaluate.add_argument("--lpips", metavar="FILE", help="TorchScript file of LPIPS, likewise")
    evaluate.add_argument(
        "--protocol", choices=["published"],
        help="as the paper's figures were made: 50,000 samples, the first 50,000 training images, uint8 rounded down, no "
        "truncation, averaged weights, BatchNorm in train mode",
    )  # fmt: skip
    add_keep(evaluate, "the figures")
    evaluate.add_argument("--num-fakes", type=int, metavar="N", help="samples (default 50000)")
    evaluate.add_argument("--num-reals", type=int, metavar="N", help="only the first N of the split; all by default")
    evaluate.add_argument("--seed", type=int, help="of the samples and of KID's subsets (default 0)")
    evaluate.add_argument("--truncation", type=float, metavar="PSI", help="of a style model; 1 (default) is none")
    evaluate.add_argument("--truncation-layers", type=int, metavar="N", help="in the first N layers only")
    evaluate.add_argument("--mode", choices=["eval", "train"], help="of BatchNorm (default eval)")
    evaluate.add_argument("--batch-size", type=int, metavar="N", help="images at a time (default 64)")
    evaluate.add_argument(
        "--statistics", metavar="FOLDER",
        help="where features of real images are kept, path or URL; statistics/ of $SIVAE_CACHE or ~/.cache/sivae by default",
    )  # fmt: skip

    ood = add(
        "ood",
        "Tell outliers from inliers by a model's scores, keep the figures and thresholds beside it, or judge one image.",
    )
    add_model(ood)
    ood.add_argument("--inlier", metavar="URL", help="packed set of images such as the model was trained on, held out")
    ood.add_argument("--inlier-split", metavar="NAME", help="of the set (default test)")
    ood.add_argument("--outlier", metavar="URL", help="packed set of other images")
    ood.add_argument("--outlier-split", metavar="NAME", help="of the set (default test)")
    ood.add_argument("--count", type=int, metavar="N", help="only the first N images of each; all by default")
    ood.add_argument("--samples", type=int, metavar="K", help="latent draws for each image (default 16)")
    ood.add_argument("--seed", type=int, help="of the draws and of the bootstrap (default 0)")
    ood.add_argument("--output", help="picture of the scores' histograms (default ood.png)")
    add_keep(ood, "figures and thresholds")
    ood.add_argument("--judge", metavar="IMAGE", help="an image file, or a set with #N: is it an outlier?")
    ood.add_argument(
        "--score", choices=["negative_elbo", "kl", "reconstruction", "importance_weighted"],
        help="which score judges (default negative_elbo)",
    )  # fmt: skip

    encode = add(
        "encode",
        "Encode a packed set: mu, logvar, label and name of every image. Interrupted and run again, it goes on.",
    )
    add_model(encode)
    encode.add_argument("data", help="folder or URL of the packed set, or digits:")
    encode.add_argument("dest", help="folder or URL to write")
    encode.add_argument("--split", default="all", metavar="NAME", help="of the set; all by default")
    encode.add_argument("--format", default="safetensors", choices=["safetensors", "parquet"])
    encode.add_argument("--batch-size", type=int, default=64, metavar="N", help="images encoded at once (default 64)")

    def add_set(command: argparse.ArgumentParser, required: bool) -> None:
        command.add_argument("--data", required=required, metavar="URL", help="packed set, or digits:")
        command.add_argument("--split", metavar="NAME", help="of the set; all by default, or what --encoded holds")
        command.add_argument(
            "--encoded", metavar="FOLDER", help="the set's latents, from sivae encode, to encode nothing"
        )

    neighbours = add(
        "neighbours", "Find the images of a set that are nearest to one in latent space, and the N of SET#N for each."
    )
    add_model(neighbours)
    neighbours.add_argument("image", help="image file, or a set with #N for image N")
    add_set(neighbours, required=True)
    neighbours.add_argument(
        "--label", type=int, help="class of the image, for a conditional model; its source's own when not given"
    )
    neighbours.add_argument("--count", type=int, default=8, metavar="K")
    neighbours.add_argument("--output", default="neighbours.png")

    attribute = add(
        "attribute", "Find the latent direction of an attribute from labelled examples, and move images along it."
    )
    add_model(attribute)
    add_set(attribute, required=False)
    attribute.add_argument(
        "--label", type=int, metavar="L", help="the attribute: images of this label, against all others"
    )
    attribute.add_argument(
        "--positives", metavar="SOURCE", help="instead of --data and --label: images with the attribute"
    )
    attribute.add_argument("--negatives", metavar="SOURCE", help="images without it")
    attribute.add_argument("--direction", metavar="FILE", help="apply a direction that was found before")
    attribute.add_argument(
        "--save", metavar="FILE", help="where to put the one found now (default attribute.safetensors)"
    )
    attribute.add_argument(
        "--images",
        metavar="SOURCE",
        help="what to change: image file, folder, set; #N picks one; of --data when not given",
    )
    attribute.add_argument(
        "--image-label", type=int, metavar="L",
        help="class of --images, for a conditional model; their source's own when not given",
    )  # fmt: skip
    attribute.add_argument("--count", type=int, default=6, help="images to change")
    attribute.add_argument("--steps", type=int, default=7, help="strengths")
    attribute.add_argument(
        "--reach", type=float, default=3.0, help="the highest strength, in standard deviations within a class"
    )
    attribute.add_argument("--output", default="attribute.png")

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
    export.add_argument(
        "--weights", choices=["average", "plain"], help="of a run: the running average (default) or plain"
    )

    plan = add(
        "plan", "Say what a run needs before it starts: memory by ZeRO stage, FLOPs, storage, GPU hours, checkpoint."
    )
    plan.add_argument("config", help="YAML file; path or URL")
    plan.add_argument("overrides", nargs="*", metavar="key.path=value")
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of the whole run (default 1)")
    plan.add_argument(
        "--gpu", default="h100", metavar="NAME", help="h100 (default), h200, a100-80gb, l40s, rtx4090, ..."
    )
    plan.add_argument(
        "--utilization", type=float, metavar="SHARE",
        help="of what the GPU's peak FLOP/s and memory bandwidth allow, 0 to 1 (assumed 0.5)",
    )  # fmt: skip
    plan.add_argument("--json", action="store_true", help="print the numbers as JSON: bytes, seconds, FLOPs")

    doctor = add(
        "doctor",
        "Say what is installed, which accelerator there is, and whether a run of a config could start.",
    )
    doctor.add_argument("config", nargs="?", help="YAML file to check")
    doctor.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if arguments is not None:
        return _run(options, nullcontext())
    # Without arguments the process is ours, from its imports to its end.
    try:
        code = _run(options, startup.importing())
    except Exception:  # noqa: BLE001 - said as Python says it
        sys.excepthook(*sys.exc_info())
        code = EXIT_ERROR
    distributed = sys.modules.get("sivae.distributed")
    if distributed is not None and distributed.joined:
        distributed.end_process(code)
    return code


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Settings may also stand behind options, where argparse does not look for them."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(options, "overrides") and all(re.match(r"[^-=][^=]*=", word) for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _run(options: argparse.Namespace, around_imports: AbstractContextManager) -> int:
    if options.debug:
        os.environ["SIVAE_DEBUG"] = "1"
    else:
        # The libraries' threads (TensorBoard's writer) hand their errors to the caller, who says it in one sentence.
        threading.excepthook = lambda failure: None
    from sivae.config import ConfigError

    try:
        with around_imports:
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
    except (MemoryError, RuntimeError) as error:
        # A GPU's is a RuntimeError of torch, which is imported by the commands that can meet it.
        of_device = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
        of_host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        if options.debug or not (of_host or isinstance(error, of_device)):
            raise
        said = str(error).rpartition("DefaultCPUAllocator: ")[2].split(". ")[0]
        advice = (
            "lower engine.micro_batch_size, or raise engine.zero_stage"
            if options.command == "train"
            else "take fewer images at a time"
            + (", or --device cpu" if isinstance(error, of_device) and not of_host else "")
        )
        print(f"sivae: error: out of memory ({said}); {advice}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("sivae: stopped", file=sys.stderr)
        return 130
