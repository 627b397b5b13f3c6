"""sivae: introspective variational autoencoders (Soft-IntroVAE) at scale.

model = sivae.load("runs/digits")        # a run, an exported folder, or any fsspec URL of one
images = model.sample(64)                # [64, C, H, W], in the model's range
"""

__version__ = "0.1.0"


def load(path, **options):
    """Open a trained model, ready for use; see `sivae.inference.load`.

    Imported on first use, so that `import sivae` and `sivae --help` do not wait for torch.
    """
    from sivae.inference import load as load_model

    return load_model(path, **options)
