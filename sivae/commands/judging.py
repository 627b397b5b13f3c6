"""Commands that measure: evaluate and ood."""

from __future__ import annotations

import argparse
import dataclasses

from sivae import inference
from sivae.commands.files import (
    given,
    load_model,
    load_on_all,
    open_set,
    read_image,
    require,
    require_unused,
    write_bytes,
)
from sivae.errors import require_matplotlib, shown
from sivae.storage import Folder


def evaluate(options: argparse.Namespace) -> None:
    from sivae import distributed, real_statistics
    from sivae.evaluate import Evaluation, Protocol, departures, write

    names = ("num_fakes", "num_reals", "seed", "truncation", "truncation_layers", "mode", "batch_size")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    fixed = [f"--{name.replace('_', '-')}" for name in given if name != "seed"]
    if options.protocol:
        require(not fixed, f"{fixed and fixed[0]}: the published protocol fixes it; leave one of the two out")
        require(options.weights != "plain", "--weights: the published protocol takes the averaged weights")
        require(options.split == "train", "--split: the published protocol takes the training images")
    require(given.get("seed", 0) >= 0, f"--seed: {given.get('seed')} is negative")
    detectors = dict(pair.partition("=")[::2] for pair in options.detector)
    require(all(detectors.values()), "--detector: is written NAME=FILE, for example dinov2=dinov2-vitl14.pt")
    with distributed.join(options.device) as group:
        model = load_on_all(options, group)
        group.on_main(lambda: _kept_in(options).try_writing())
        stream = group.together(lambda: open_set(options.data, options.split, model, progress=group.is_main))
        metrics = tuple(options.metrics.split(","))
        if options.protocol:
            protocol = Protocol.published(metrics, model.settings, len(stream))
            protocol = dataclasses.replace(protocol, **given)
        else:
            protocol = Protocol(metrics, **given)
        kept = Folder(options.statistics) if options.statistics else real_statistics.default_folder()
        evaluation = Evaluation(stream, protocol, group, detectors=detectors, lpips=options.lpips, statistics=kept)
        for sentence in departures(protocol, model.weights) if options.protocol and group.is_main else ():
            print(f"--protocol {options.protocol}: {sentence}")
        figures = evaluation.run(model)

        def tell() -> None:
            for name, value in figures.items():
                print(f"{name} {value:.6g}")
            kept = write(_kept_in(options), evaluation, figures, model, shown(options.data))
            print(f"{kept}: the figures with their protocol")

        group.on_main(tell)


def ood(options: argparse.Namespace) -> None:
    from sivae import outliers

    if options.judge:
        measuring = ("inlier", "inlier_split", "outlier", "outlier_split", "count", "samples", "seed", "output")
        require_unused(options, measuring, "goes without --judge, which takes the thresholds as they were found")
    else:
        require_unused(options, ("score",), "goes with --judge; sets are told apart by all scores")
        options.output = given(options.output, "ood.png")
    samples, seed = given(options.samples, 16), given(options.seed, 0)
    require(samples > 0, f"--samples: {samples} is not a number of draws")
    require(seed >= 0, f"--seed: {seed} is negative")
    model = load_model(options)
    require(len(model.sample_shape) == 3, "this model is not one of images")
    folder = _kept_in(options)
    if options.judge:
        image, _ = read_image(options.judge, model)
        verdict = outliers.judge(
            model, image, outliers.read_calibration(folder, model), given(options.score, "negative_elbo")
        )
        print(f"{options.judge}: {verdict.sentence}")
        return
    require(options.inlier and options.outlier, "give both --inlier and --outlier, or --judge IMAGE")
    require(options.count is None or options.count > 0, f"--count: {options.count} is not a number of images")
    require_matplotlib("the histograms")
    settings = {"num_samples": samples, "seed": seed, "count": options.count}
    sets = [
        (options.inlier, given(options.inlier_split, "test")),
        (options.outlier, given(options.outlier_split, "test")),
    ]
    streams = [open_set(url, split, model) for url, split in sets]
    outliers.check_sets(*streams, options.count)
    folder.try_writing()
    if not model.info.get("objective"):
        kind, weight = outliers.weighting(model)
        print(f"{shown(options.model)}: does not say how it was trained; the scores take a {kind} of weight {weight:g}")
    inlier, outlier = (outliers.score_set(model, stream, **settings) for stream in streams)
    results = outliers.compare(inlier, outlier, seed)
    for line in outliers.table(results):
        print(line)
    known = {name: (stream, shown(url)) for name, stream, (url, _) in zip(("inlier", "outlier"), streams, sets)}
    kept = outliers.write_figures(folder, model, results, known, options.count, samples, seed)
    print(f"{kept}: the figures with their protocol")
    names = [f"{shown(url)} {split}" for url, split in sets]
    calibration = outliers.calibrate(model, inlier, streams[0], names[0], samples, seed)
    before = outliers.inliers_of_calibration(folder, model)
    kept = outliers.write_calibration(folder, model, calibration)
    replaced = f", in place of those of {before}" if before not in (None, names[0]) else ""
    there = f" --keep {options.keep}" if options.keep else ""
    print(
        f"{kept}: thresholds of {names[0]}{replaced}; judge an image with sivae ood {options.model} --judge IMAGE{there}"
    )
    write_bytes(options.output, outliers.histograms(inlier, outlier, results, *names))


def _kept_in(options: argparse.Namespace) -> Folder:
    """Where figures and thresholds are: beside the model, or --keep."""
    return Folder(options.keep or inference.run_of(options.model)[0])
