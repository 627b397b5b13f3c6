"""Proves what a loaded model gives: shapes, ranges, samples that depend on their number and seed alone; that export and load
are bitwise, BatchNorm's buffers included; and that what is no model, or a damaged one, is refused in a sentence.

    python -m pytest tests/unit/test_inference.py
"""

import json
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

import sivae
from sivae import checkpoint, inference, models
from sivae.commands import files
from sivae.config import parse_model
from sivae.distributed import Group
from sivae.errors import UserError
from sivae.images import to_float
from sivae.objectives import reparameterize
from sivae.storage import Folder

SHAPE = (1, 16, 16)


def model_of(family="conv", seed=0, **fields):
    common = {"latent_dim": 4} | fields
    if family == "conv":
        tree = {"family": "conv", "num_channels": 1, "resolution": 16, "channels": [4, 8], "group_size": 4} | common
    elif family == "style":
        tree = {
            "family": "style", "num_channels": 1, "resolution": 16, "base_channels": 4, "max_channels": 8,
            "num_mapping_layers": 2,
        } | common  # fmt: skip
    else:
        tree = {"family": "mlp", "sample_shape": list(SHAPE), "num_hidden": 16, "num_layers": 1} | common
    made = inference.Model(parse_model(tree).model_dump())
    torch.manual_seed(seed)
    with torch.no_grad():  # not what `build` gives, so that a forgotten load is seen
        for network in (made.encoder, made.decoder):
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return made


def images(count, seed=0):
    return torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["conv", "mlp", "style"])
def model(request):
    return model_of(request.param)


def test_shapes_and_types(model):
    x = images(5)
    mu, logvar = model.encode(x)
    assert mu.shape == logvar.shape == (5, 4)
    assert model.decode(mu).shape == model.reconstruct(x).shape == model.sample(5).shape == (5, *SHAPE)
    assert model.interpolate(x, images(5, seed=1), steps=7).shape == (5, 7, *SHAPE)
    assert model.sample_shape == SHAPE and model.latent_dim == 4
    for made in (mu, model.sample(2), model.to_uint8(model.sample(2))):
        assert not made.requires_grad
    assert model.to_uint8(model.sample(2)).dtype == torch.uint8
    assert not model.encoder.training and not model.decoder.training


def test_uint8_and_floats_in_the_models_range_are_the_same_image(model):
    x = images(3)
    floats = to_float(x, *model.value_range)
    assert all(torch.equal(a, b) for a, b in zip(model.encode(x), model.encode(floats)))
    assert model.value_range == models.VALUE_RANGES[model.settings["family"]]


def test_sigmoid_samples_lie_in_the_range():
    samples = model_of(output="sigmoid").sample(8)
    assert 0 <= samples.min() and samples.max() <= 1


def test_an_image_of_a_seed_is_the_same_whatever_is_asked_with_it(model):
    whole = model.sample(9, seed=3)
    # Other batch sizes choose other kernels: float32 rounding of values of size one.
    for other in (
        model.sample(9, seed=3, batch_size=2),
        model.sample(5, seed=3),
        model.sample(9, seed=3, batch_size=1),
    ):
        assert torch.allclose(other, whole[: len(other)], atol=1e-5)
    assert torch.equal(model.sample(9, seed=3), whole)
    assert (model.sample(9, seed=4) - whole).abs().max() > 1e-3
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 9


def test_sampling_leaves_the_global_generator_alone(model):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    model.sample(3)
    assert torch.equal(torch.rand(1), expected)


def test_reconstruct_decodes_the_mean_or_a_draw(model):
    x, eps = images(3), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    mu, logvar = model.encode(x)
    assert torch.equal(model.reconstruct(x), model.decode(mu))
    assert torch.equal(model.reconstruct(x, eps=eps), model.decode(reparameterize(mu, logvar, eps)))
    assert not torch.equal(model.reconstruct(x, eps=eps), model.reconstruct(x))


def test_interpolation_goes_straight_from_one_to_the_other(model):
    a, b = images(2), images(2, seed=1)
    path = model.interpolate(a, b, steps=5)
    # Batches of 10 and of 2: float32 rounding.
    assert torch.allclose(path[:, 0], model.reconstruct(a), atol=1e-5)
    assert torch.allclose(path[:, -1], model.reconstruct(b), atol=1e-5)
    middle = model.decode((model.encode(a)[0] + model.encode(b)[0]) / 2)
    assert torch.allclose(path[:, 2], middle, atol=1e-5)


# Labels


def test_samples_without_labels_draw_classes_evenly():
    conditional = model_of(num_classes=3)
    assert torch.equal(conditional.sample(7), conditional.sample(7, labels=torch.arange(7) % 3))
    one = conditional.sample(7, labels=torch.ones(7, dtype=torch.long))
    assert not torch.equal(one[0], conditional.sample(7)[0]) and torch.allclose(
        one[1], conditional.sample(7)[1], atol=1e-5
    )
    # In batches as well, each image keeps its class.
    assert torch.allclose(conditional.sample(7, batch_size=2), conditional.sample(7), atol=1e-5)
    # And asked for from some number on, as by the ranks that judge a model.
    assert torch.allclose(conditional.sample(3, first=4), conditional.sample(7)[4:], atol=1e-5)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_labels_out_of_range_are_refused(labels):
    conditional, labels = model_of(num_classes=3), torch.tensor(labels)
    for work in (
        lambda: conditional.sample(2, labels=labels),
        lambda: conditional.encode(images(2), labels),
        lambda: conditional.decode(torch.zeros(2, 4), labels),
        lambda: conditional.reconstruct(images(2), labels),
    ):
        with pytest.raises(UserError, match=r"labels must lie in 0 \.\. 2; got"):
            work()


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0]), torch.zeros(2, 1, dtype=torch.long)]
)
def test_labels_of_another_shape_or_type_are_refused(labels):
    conditional = model_of(num_classes=3)
    for work in (lambda: conditional.sample(2, labels=labels), lambda: conditional.encode(images(2), labels)):
        with pytest.raises(UserError, match="labels"):
            work()


def test_a_conditional_model_does_not_guess_the_class_of_a_given_image():
    conditional = model_of(num_classes=3)
    for work in (
        lambda: conditional.encode(images(2)),
        lambda: conditional.reconstruct(images(2)),
        lambda: conditional.interpolate(images(2), images(2)),
        lambda: conditional.decode(torch.zeros(2, 4)),
    ):
        with pytest.raises(UserError, match="labels"):
            work()


def test_interpolation_keeps_the_class_along_the_way():
    conditional, labels = model_of(num_classes=3), torch.tensor([2, 0])
    a, b = images(2), images(2, seed=1)
    path = conditional.interpolate(a, b, steps=4, labels=labels)
    assert torch.allclose(path[:, 0], conditional.reconstruct(a, labels), atol=1e-5)
    assert torch.allclose(path[:, -1], conditional.reconstruct(b, labels), atol=1e-5)
    others = torch.tensor([1, 2])
    path = conditional.interpolate(a, b, 5, labels, others)
    ends = conditional.encode(a, labels)[0], conditional.encode(b, others)[0]
    for step, shown in ((2, labels), (3, others)):
        assert torch.allclose(path[:, step], conditional.decode(torch.lerp(*ends, step / 4), shown), atol=1e-5)
    assert torch.allclose(path[:, 0], conditional.reconstruct(a, labels), atol=1e-5)
    assert torch.allclose(path[:, -1], conditional.reconstruct(b, others), atol=1e-5)


def test_a_long_path_is_decoded_in_parts(model):
    a, b, counts = images(2), images(2, seed=1), []
    whole = model.interpolate(a, b, 40)
    model.decoder.register_forward_hook(lambda decoder, latents, made: counts.append(len(made)))
    parts = model.interpolate(a, b, 40, batch_size=32)
    assert counts == [32, 32, 16] and torch.allclose(parts, whole, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 8, 8), (2, 1, 16, 8), (2, 16, 16), (2, 256)])
def test_an_image_of_the_wrong_shape_is_refused(model, shape):
    with pytest.raises(UserError, match=r"do not fit this model, which takes \(1, 16, 16\)"):
        model.encode(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(UserError, match="do not fit"):
        model.reconstruct(torch.zeros(shape))


def test_images_of_another_type_are_refused(model):
    with pytest.raises(UserError, match=r"images are torch.int64; give uint8, or floats from -?\d to 1"):
        model.encode(images(2).long())


@pytest.mark.parametrize("shape", [(2, 3), (4,), (2, 3, 4), (2, 4, 1)])
def test_latents_of_the_wrong_shape_are_refused(model, shape):
    with pytest.raises(UserError, match="latents of shape .* do not fit this model, which takes"):
        model.decode(torch.zeros(shape))


@pytest.mark.parametrize(
    "arguments", [{"count": 0}, {"count": -1}, {"count": 2, "seed": -1}, {"count": 2, "batch_size": 0}]
)
def test_samples_that_there_are_not(model, arguments):
    name = next(reversed(arguments))
    with pytest.raises(UserError, match=f"{name}: {arguments[name]} is too few, give {int(name != 'seed')} or more"):
        model.sample(**arguments)


# Export and load


def everything(model):
    return {f"{part}.{k}": v for part in ("encoder", "decoder") for k, v in getattr(model, part).state_dict().items()}


@pytest.mark.parametrize("fields", [{}, {"num_classes": 3}, {"norm": "batch"}, {"family": "mlp"}, {"output": "sigmoid"}], ids=str)  # fmt: skip
def test_export_and_load_is_bitwise(tmp_path, fields):
    model = model_of(**fields)
    model.info = {"images_seen": 7}
    inference.export(model, str(tmp_path / "model"))
    again = sivae.load(str(tmp_path / "model"))
    assert again.settings == model.settings and again.info == {"images_seen": 7}
    assert everything(again).keys() == everything(model).keys()
    assert all(torch.equal(everything(again)[name], value) for name, value in everything(model).items())
    assert torch.equal(again.sample(4), model.sample(4))
    labels = torch.tensor([0, 2]) if fields.get("num_classes") else None
    assert torch.equal(again.reconstruct(images(2), labels), model.reconstruct(images(2), labels))


def test_an_exported_folder_says_what_it_is(tmp_path):
    inference.export(model_of(), str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "model.safetensors", "sivae.json"]
    assert json.loads((tmp_path / "sivae.json").read_text())["model"]["family"] == "conv"
    assert "1 x 16 x 16" in (tmp_path / "README.md").read_text()
    assert all(value.is_contiguous() for value in load_file(tmp_path / "model.safetensors").values())


@pytest.mark.parametrize("fields", [{}, {"num_classes": 3}, {"family": "style"}], ids=str)
def test_the_code_of_a_model_card_runs(tmp_path, fields):
    model = model_of(**fields)
    inference.export(model, str(tmp_path))
    code = (tmp_path / "README.md").read_text().split("```")[1].removeprefix("python")
    made = {}
    exec(code.replace("PATH_OR_URL_OF_THIS_FOLDER", str(tmp_path)), made)
    assert torch.equal(made["images"], model.sample(16))
    labels = torch.arange(16) % 3 if model.num_classes else None  # those of `sample`
    assert torch.equal(made["again"], model.reconstruct(made["images"], labels))


def test_a_url_works_as_a_path_does():
    model = model_of()
    inference.export(model, "memory://models/one")
    assert torch.equal(sivae.load("memory://models/one").sample(2), model.sample(2))


def test_batch_norm_is_exported_with_its_buffers(tmp_path):
    """A trained BatchNorm model samples, loaded, as it did in eval mode before: the most reported fault of published code."""
    model = model_of(norm="batch")
    model.encoder.train(), model.decoder.train()
    with torch.no_grad():
        for seed in range(5):
            mu, _ = model.encoder(to_float(images(16, seed)) * 3)
            model.decoder(mu * 2 + 1)
    model.encoder.eval(), model.decoder.eval()
    means = [value for name, value in everything(model).items() if name.endswith("running_mean")]
    assert means and min(float(value.abs().max()) for value in means) > 0
    inference.export(model, str(tmp_path))
    again = sivae.load(str(tmp_path))
    assert torch.equal(again.sample(8, seed=1), model.sample(8, seed=1))
    assert torch.equal(again.encode(images(3))[0], model.encode(images(3))[0])
    fresh = inference.Model(model.settings)
    inference.fill(fresh, everything(model), "here")
    for module in (*fresh.encoder.modules(), *fresh.decoder.modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    assert (fresh.sample(8, seed=1) - model.sample(8, seed=1)).abs().max() > 1e-3  # the buffers matter


@pytest.fixture
def run(tmp_path):
    """A run directory with two checkpoints, whose average and plain weights differ."""
    folder, models_of = Folder(str(tmp_path / "run")), {}
    for number, images_seen in enumerate((100, 200)):
        average, plain = model_of(seed=2 * number), model_of(seed=2 * number + 1)
        state = {"images_seen": images_seen, "model": average.settings, "seed": 0}
        checkpoint.save(folder, state, {"weights": everything(plain), "average": everything(average)})
        models_of[images_seen] = average, plain
    return folder, models_of


def test_a_run_gives_the_average_of_its_newest_checkpoint(run):
    folder, models_of = run
    assert torch.equal(sivae.load(folder.url).sample(2), models_of[200][0].sample(2))
    assert torch.equal(sivae.load(folder.url, weights="plain").sample(2), models_of[200][1].sample(2))
    assert sivae.load(folder.url).info["images_seen"] == 200
    one = f"{folder.url}/checkpoints/000000000100"
    assert torch.equal(sivae.load(one).sample(2), models_of[100][0].sample(2))
    assert torch.equal(sivae.load(f"{one}/", weights="plain").sample(2), models_of[100][1].sample(2))
    assert sivae.load(one).weights == "average" and sivae.load(one, weights="plain").weights == "plain"


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_a_checkpoint_may_be_named_from_inside_its_run(run, monkeypatch, inside):
    folder, models_of = run
    monkeypatch.chdir(f"{folder.url}/{inside}")
    path = "000000000100" if inside else "checkpoints/000000000100"
    assert torch.equal(sivae.load(path).sample(2), models_of[100][0].sample(2))
    assert inference.run_of(path) == (folder.url, "000000000100")


def test_only_what_is_named_like_a_checkpoint_is_one(tmp_path):
    for path in (
        "runs/checkpoints/mine",
        "s3://checkpoints/000000000100",
        "a/checkpoints",
        "memory://checkpoints/best",
    ):
        expected = path if "://" in path else f"{tmp_path}/{path}"
        assert inference.run_of(path if "://" in path else expected) == (expected, None)
    for name in ("000000000100", "000000000100.1", "best"):
        assert inference.run_of(f"s3://bucket/run/checkpoints/{name}/") == ("s3://bucket/run", name)
        assert inference.run_of(tmp_path / "checkpoints" / name) == (str(tmp_path), name)


def test_an_exported_model_knows_its_weights_and_gives_no_others(run, tmp_path):
    folder, models_of = run
    for weights, other in (("average", "plain"), ("plain", "average")):
        path = str(tmp_path / weights)
        inference.export(sivae.load(folder.url, weights=weights), path)
        assert sivae.load(path).weights == sivae.load(path, weights=weights).weights == weights
        with pytest.raises(UserError, match=f"holds {weights} weights alone, and {other} ones are asked for"):
            sivae.load(path, weights=other)


def test_a_run_without_an_average_has_plain_weights(tmp_path):
    model = model_of()
    state = {"images_seen": 100, "model": model.settings, "seed": 0, "averaged": False}
    tensors = everything(model)
    checkpoint.save(Folder(str(tmp_path)), state, {"weights": tensors, "average": tensors})
    assert sivae.load(tmp_path).weights == "plain"
    with pytest.raises(UserError, match="keeps no average of its weights"):
        sivae.load(tmp_path, weights="average")


def test_a_damaged_newest_checkpoint_gives_the_one_before_it_and_is_told(run, capfd):
    folder, models_of = run
    folder.write(b"garbage", "checkpoints", "000000000200", "average.safetensors")
    assert torch.equal(sivae.load(folder.url).sample(2), models_of[100][0].sample(2))
    (told,) = capfd.readouterr().err.splitlines()
    assert "000000000200" in told and "is damaged" in told and told.endswith("trying the checkpoint before it")
    with pytest.raises(UserError, match="damaged"):
        sivae.load(f"{folder.url}/checkpoints/000000000200")


def test_every_rank_has_the_model_that_rank_0_found(run):
    """A newer checkpoint may come between two ranks' looks: the others do not look."""
    folder, models_of = run
    sent = {}

    class Main(Group):
        def broadcast(self, tensors):
            sent["tensors"] = tensors
            return tensors

        def on_main(self, work):
            sent["found"] = work()
            return sent["found"]

    class Other(Main):
        def broadcast(self, tensors):
            assert tensors is None
            return sent["tensors"]

        def on_main(self, work):
            return sent["found"]

    cpu = torch.device("cpu")
    first = files.load_on_all(
        Namespace(model=f"{folder.url}/checkpoints/000000000100", weights=None), Main(0, 2, cpu, None)
    )
    other = files.load_on_all(Namespace(model=folder.url, weights=None), Other(1, 2, cpu, None))
    for model in (first, other):
        assert torch.equal(model.sample(2), models_of[100][0].sample(2))
        assert (model.info["images_seen"], model.weights) == (100, "average")


def test_what_is_no_model_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no model; give a run directory"):
            sivae.load(str(path))


def test_what_is_said_of_a_url_has_no_password():
    place = "memory://me:secret@models/one"
    with pytest.raises(UserError, match=r"^memory://\.\.\.@models/one: holds no model"):
        sivae.load(place)
    inference.export(model_of(), place)
    Folder(place).write(b"", "model.safetensors")
    with pytest.raises(UserError, match=r"^memory://\.\.\.@models/one: is not a model"):
        sivae.load(place)


def test_unknown_weights_are_refused(run):
    with pytest.raises((UserError, ValueError), match="avrage"):
        sivae.load(run[0].url, weights="avrage")


SPOILED = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "truncated weights": lambda folder: cut(folder / "model.safetensors", -1),
    "a truncated header": lambda folder: cut(folder / "model.safetensors", 20),
    "empty weights": lambda folder: cut(folder / "model.safetensors", 0),
    "truncated settings": lambda folder: cut(folder / "sivae.json", 30),
    "settings of another kind": lambda folder: (folder / "sivae.json").write_text("[1]"),
    "settings without a model": lambda folder: (folder / "sivae.json").write_text("{}"),
    "settings that are no text": lambda folder: (folder / "sivae.json").write_bytes(b"\xff\x00"),
    "a later format": lambda folder: (folder / "sivae.json").write_text(
        (folder / "sivae.json").read_text().replace('"format": 1', '"format": 2')
    ),
    "an unknown family": lambda folder: edit(folder, family="vit"),
    "an unknown setting": lambda folder: edit(folder, depth=3),
    "other widths": lambda folder: edit(folder, channels=[8, 8]),
    "another latent size": lambda folder: edit(folder, latent_dim=5),
    "more levels": lambda folder: edit(folder, channels=[4, 8, 8]),
}


def cut(path, end):
    path.write_bytes(path.read_bytes()[:end])


def edit(folder, **fields):
    tree = json.loads((folder / "sivae.json").read_text())
    tree["model"] |= fields
    (folder / "sivae.json").write_text(json.dumps(tree))


@pytest.mark.parametrize("kind", SPOILED)
def test_a_damaged_export_is_refused(tmp_path, kind):
    inference.export(model_of(), str(tmp_path))
    SPOILED[kind](tmp_path)
    with pytest.raises(UserError) as caught:
        sivae.load(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_loading_is_strict(change):
    model = model_of()
    tensors = everything(model)
    name = "decoder.head.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["decoder.more"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(2, 2)
    with pytest.raises(UserError, match="the decoder's weights do not fit"):
        inference.fill(model_of(), tensors, "here")


def test_a_killed_export_is_no_model(tmp_path):
    """The settings are written last: what lacks them does not load. Exported again it is whole."""
    inference.export(model_of(), str(tmp_path))
    (tmp_path / "sivae.json").unlink()
    with pytest.raises(UserError, match="holds no model"):
        sivae.load(str(tmp_path))
    inference.export(model_of(), str(tmp_path))
    sivae.load(str(tmp_path))


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "target_decoder.safetensors"])
def test_the_files_of_others_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds a {name} that is of no exported model"):
        inference.export(model_of(), str(tmp_path))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_an_export_leaves_no_target_of_the_one_before_it(tmp_path):
    model = model_of()
    inference.export(model, str(tmp_path), model.decoder.state_dict())
    assert inference.read_target(str(tmp_path)).keys() == model.decoder.state_dict().keys()
    inference.export(model, str(tmp_path))
    assert inference.read_target(str(tmp_path)) == {}


def test_a_model_that_still_grows_has_seen_whole_images():
    settings, cut = model_of("style").settings, {"data": {"random_crop": True}}
    assert inference.Model(settings, info=cut).random_crop is None
    assert inference.Model(settings, info=cut | {"stage": {"level": 1, "blend": 1.0}}).random_crop is False
    assert inference.Model(settings).random_crop is False


def test_a_run_is_not_hidden_behind_an_export(run, tmp_path):
    """`load` takes the exported model of a folder that holds both."""
    folder, models_of = run
    with pytest.raises(UserError, match="holds a run, whose checkpoints this model would hide"):
        inference.export(model_of(), folder.url)
    assert folder.names() == ["checkpoints"]
    assert torch.equal(sivae.load(folder.url).sample(2), models_of[200][0].sample(2))
