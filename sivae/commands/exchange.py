"""Commands that bring models in and out: import and export."""

from __future__ import annotations

import argparse
from pathlib import Path

from sivae import config, inference, outliers
from sivae.errors import shown
from sivae.storage import Folder


def import_(options: argparse.Namespace) -> None:
    from sivae.models import published

    found = published.read(options.source, options.residual)
    model = inference.Model(config.parse_model(found.settings).model_dump())
    model.weights = "average" if found.averaged else "plain"
    model.info = {"imported_from": Path(options.source).name, "kind": found.kind}
    inference.fill(
        model,
        {
            f"{network}.{name}": value
            for network in ("encoder", "decoder")
            for name, value in found.networks[network].items()
        },
        options.source,
    )
    inference.export(model, options.dest, found.networks.get("target_decoder"))
    print(
        f"{shown(options.dest)}: {found.kind} model, {_describe(model)}; use it with sivae.load, or train on with run.init_from={shown(options.dest)}"
    )


def export(options: argparse.Namespace) -> None:
    model = inference.load(options.model, weights=options.weights)
    inference.export(model, options.dest, inference.read_target(options.model))
    outliers.carry_calibration(Folder(inference.run_of(options.model)[0]), Folder(options.dest), model)
    print(
        f"{shown(options.dest)}: {_describe(model)}; {inference.WEIGHTS_FILE}, {inference.SETTINGS_FILE} and a model card"
    )


def _describe(model: inference.Model) -> str:
    parameters = sum(p.numel() for network in (model.encoder, model.decoder) for p in network.parameters())
    shape = "x".join(map(str, model.sample_shape))
    return f"{model.settings['family']} family, {shape}, latent {model.latent_dim}, {parameters:,} parameters"
