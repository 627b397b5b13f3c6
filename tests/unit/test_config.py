"""Proves that every YAML in configs/ builds what it describes, that a wrong setting is refused with its full path and what
would be right, that nothing is converted silently, and that what is written back is the same settings without secrets.

    python -m pytest tests/unit/test_config.py
"""

from pathlib import Path

import pytest
import yaml

from sivae import config, models, objectives
from sivae.config import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))  # not sweeps/, which launch reads

BASE = """
run: {directory: runs/test}
data: {url: "digits:"}
model: {family: conv, num_channels: 1, resolution: 16, channels: [8, 16], latent_dim: 4}
objective: {name: soft_intro_vae}
schedule: {total_images: 1000, batch_size: 32}
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return str(path)


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path):
    settings = config.load(str(path))
    encoder, decoder = models.build(seed=settings.run.seed, **settings.model.model_dump())
    assert sum(p.numel() for p in encoder.parameters()) and sum(p.numel() for p in decoder.parameters())
    objective = objectives.build(num_values=settings.model.num_values, **settings.objective.loss_fields())
    assert isinstance(objective, objectives.OBJECTIVES[settings.objective.name])
    assert all(passes >= 1 for passes in settings.passes(1))


# The published YAML files of the style family, and ALAE's for 1024 pixels: images, epochs a level, beta_kl, beta_rec, base channels,
# learning rates and batches (8 GPUs) of the levels. beta_neg and the scale are the same in all.
GROWN = {
    "ffhq256_style": (60_000, 16, 0.2, 0.1, 64, [0.0015] * 6 + [0.002], [512, 256, 128, 64, 32, 32, 32]),
    "celebahq256_style": (29_000, 30, 0.2, 0.05, 64, [0.0015] * 7, [512, 256, 128, 64, 32, 32, 32]),
    "ffhq1024_style": (
        60_000, 16, 0.2, 0.1, 16, [0.0015] * 6 + [0.002, 0.003, 0.003], [512, 256, 128, 64, 32, 32, 32, 32, 32],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GROWN)
def test_the_published_style_recipes_have_the_published_numbers(name):
    size, epochs, beta_kl, beta_rec, base_channels, rates, batches = GROWN[name]
    settings = config.load(str(ROOT / "configs" / f"{name}.yaml"))
    levels, objective, model = settings.levels(), settings.objective, settings.model
    assert (objective.beta_kl, objective.beta_rec, objective.scale, objective.vae_images) == (
        beta_kl,
        beta_rec,
        5e-6,
        size,
    )
    assert (model.base_channels, model.max_channels, model.latent_dim, model.num_mapping_layers) == (
        base_channels,
        512,
        512,
        8,
    )
    assert settings.schedule.total_images == 300 * size and settings.data.flip
    assert [level.resolution for level in levels] == [4 * 2**i for i in range(len(rates))]
    assert [level.images for level in levels] == [epochs * size] * (len(levels) - 1) + [None]
    assert [level.fade_images for level in levels] == [0] + [epochs // 2 * size] * (len(levels) - 1)
    assert [level.batch_size for level in levels] == batches
    for optimizer in (settings.encoder_optimizer, settings.decoder_optimizer):
        assert [optimizer.lr * level.lr_factor for level in levels] == pytest.approx(rates)
        assert (optimizer.betas, optimizer.eps_hat) == ([0.0, 0.99], True)
    beta_neg = [2048, 2048, 2048, 1024, 512, 512, 512, 512, 512]
    assert [objective.beta_neg * level.beta_neg_factor for level in levels] == beta_neg[: len(levels)]
    assert all(settings.passes(ranks) for ranks in range(1, 9))


# The published image README: beta_kl, beta_rec, beta_neg, z_dim, batch_size; the published code: size, channels; images x epochs.
PUBLISHED = {
    "cifar10": (1.0, 1.0, 256, 128, 32, 32, [64, 128, 256], 50_000 * 250),
    "svhn": (1.0, 1.0, 256, 128, 32, 32, [64, 128, 256], 73_257 * 250),
    "mnist": (1.0, 1.0, 256, 32, 128, 28, [64, 128], 60_000 * 200),
    "fmnist": (1.0, 1.0, 256, 32, 128, 28, [64, 128], 60_000 * 200),
    "celebahq256_conv": (0.5, 1.0, 1024, 256, 8, 256, [64, 128, 256, 512, 512, 512], 29_000 * 250),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipes_have_the_published_numbers(name):
    settings = config.load(str(ROOT / "configs" / f"{name}.yaml"))
    objective, model, schedule = settings.objective, settings.model, settings.schedule
    assert PUBLISHED[name] == (
        objective.beta_kl, objective.beta_rec, objective.beta_neg, model.latent_dim, schedule.batch_size, model.resolution,
        model.channels, schedule.total_images,
    )  # fmt: skip
    for optimizer in (settings.encoder_optimizer, settings.decoder_optimizer):
        assert optimizer.lr == 2e-4 and optimizer.betas == [0.9, 0.999]
    assert settings.data.flip == (name == "celebahq256_conv") and objective.vae_images == 0
    assert settings.run.directory == f"runs/{name}"


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_objective_builds_from_its_settings(base, name):
    settings = config.load(base, ["objective={}", f"objective.name={name}"])
    objective = objectives.build(num_values=settings.model.num_values, **settings.objective.loss_fields())
    assert type(objective) is objectives.OBJECTIVES[name]
    if hasattr(objective, "scale"):
        assert objective.scale == 1 / 256  # the paper's s: one over the 1 x 16 x 16 values


WRONG = [
    # overrides, what the message begins with, what else it says
    (["schedule.batch_sise=3"], "schedule.batch_sise: ", "did you mean `batch_size`?"),
    (["model.chanels=[8]"], "model.chanels: ", "did you mean `channels`?"),
    (["encoder_optimizer.schedule.knd=cosine"], "encoder_optimizer.schedule.knd: ", "did you mean `kind`?"),
    (["objective.margin=3"], "objective.margin: ", "known here: augment, augment_probability, beta_kl, beta_neg"),
    (["trackin.log_images=3"], "trackin: ", "did you mean `tracking`?"),
    (["schedule.batch_size='64'"], "schedule.batch_size: ", "valid integer, not '64'"),
    (["schedule.batch_size=64.0"], "schedule.batch_size: ", "valid integer, not 64.0"),
    (["schedule.total_images=-5"], "schedule.total_images: ", "greater than 0, not -5"),
    (["run.seed=true"], "run.seed: ", "valid integer, not True"),
    (["encoder_optimizer.lr=fast"], "encoder_optimizer.lr: ", "valid number, not 'fast'"),
    (["encoder_optimizer.lr='2e-4'"], "encoder_optimizer.lr: ", "valid number, not '2e-4'"),
    (["decoder_optimizer.lr=.nan"], "decoder_optimizer.lr: ", "finite number, not nan"),
    (["decoder_optimizer.lr=.inf"], "decoder_optimizer.lr: ", "finite number, not inf"),
    (["run.seed=99999999999999999999"], "run.seed: ", "less than 9223372036854775808"),
    (["encoder_optimizer.betas=[0.5]"], "encoder_optimizer.betas: ", "at least 2 items"),
    (["encoder_optimizer.betas=[0.5, 1.0]"], "encoder_optimizer.betas: ", "[0, 1)"),
    (["evaluate.protocol=published", "evaluate.num_fakes=9"], "evaluate.num_fakes: ", "the published protocol fixes it"),
    (["engine.zero_stage=4"], "engine.zero_stage: ", "0, 1, 2 or 3, not 4"),
    (["model.norm=instance"], "model.norm: ", "'batch', 'group', 'layer', 'pixel' or 'none', not 'instance'"),
    (["model.family=vit"], "model.family: ", "'mlp', 'conv'"),
    (["objective.name=gan"], "objective.name: ", "'vae', 'intro_vae', 'soft_intro_vae', 'bootstrap'"),
    (["model.channels=32"], "model.channels: ", "valid list, not 32"),
    (["model.channels=[8, wide]"], "model.channels.1: ", "valid integer, not 'wide'"),
    (["run=3"], "run: ", "dictionary"),
    (["data.url=null"], "data.url: ", "valid string, not None"),
    (["data.split=2024"], "data.split: ", "valid string, not 2024; to have it as text put it in quotes: 'data.split=\"...\"'"),
    # combinations
    (["model.channels=[8,8,8,8]"], "model.channels: ", "4 levels divide the resolution by 16", "2 or fewer levels"),
    (["model.channels=[8,12]"], "model.group_size: ", "8 does not divide every width of channels [8, 12]"),
    (["objective.reconstruction=bce"], "objective.reconstruction: ", "set model.output=sigmoid"),
    (["engine.recompute_from_pixels=8", "model.norm=batch"], "engine.recompute_from_pixels: ", "model.norm=batch"),
    (["objective.style_mixing=0.9"], "objective.style_mixing: ", "only the style family has layers of styles, not conv"),
    (
        ["engine={zero_stage: 1, offload_optimizer: true}", "decoder_optimizer.eps_hat=true"],
        "decoder_optimizer.eps_hat: ", "engine.offload_optimizer",
    ),
    (["engine.offload_optimizer=true"], "engine.offload_optimizer: ", "needs zero_stage 1, 2 or 3"),
    (["engine.overlap_reduction=true"], "engine.overlap_reduction: ", "needs zero_stage 1, 2 or 3"),
    (["engine={zero_stage: 2, overlap_reduction: true, shared_forward: true}"], "engine.shared_forward: ", "with overlap_reduction"),
    (["objective={name: bootstrap, gamma_r: 0.0}"], "objective.gamma_r: ", "greater than 0"),
    (["schedule.batch_size=2000"], "schedule.batch_size: ", "2000 is more than schedule.total_images=1000"),
    (["encoder_optimizer.schedule={kind: milestones, milestones_images: [-5]}"], "encoder_optimizer.schedule.milestones_images.0: ", "greater than 0"),
    (["schedule.total_images=???"], "schedule.total_images=???: ", "??? is no value"),
    (["schedule.total_images=010"], "schedule.total_images=010: ", "to the base of 8; leave the 0 out"),
    (["run.directory=12:30"], "run.directory: ", "'run.directory=\"...\"'"),
    (["encoder_optimizer.schedule.kind=milestones"], "encoder_optimizer.schedule.milestones_images: ", "at least one"),
    (
        ["decoder_optimizer.schedule.milestones_images=[5]"],
        "decoder_optimizer.schedule.milestones_images: ", "set kind `milestones`",
    ),
    (["encoder_optimizer.schedule.final_fraction=0.1"], "encoder_optimizer.schedule.final_fraction: ", "set kind `cosine`"),
    (["encoder_optimizer.schedule={kind: cosine, gamma: 0.5}"], "encoder_optimizer.schedule.gamma: ", "set kind `milestones`"),
    (
        ["encoder_optimizer.schedule={kind: milestones, milestones_images: [5], hold_images: 9}"],
        "encoder_optimizer.schedule.hold_images: ", "kind `milestones` does not use it",
    ),
    (
        ["encoder_optimizer.schedule={kind: milestones, milestones_images: [5, 3]}"],
        "encoder_optimizer.schedule.milestones_images: ", "[5, 3] must rise",
    ),
    (
        ["decoder_optimizer.schedule={kind: cosine, warmup_images: 600, hold_images: 600}"],
        "decoder_optimizer.schedule.hold_images: ", "1200 images, more than schedule.total_images=1000",
    ),
    # overrides that are none
    (["schedule"], "schedule: ", "key.path=value"),
    (["=3"], "=3: ", "key.path=value"),
    (["run.seed=["], "run.seed=[: ", "cannot be applied"),
    (["model.channels.0=8"], "model.channels.0=8: ", "cannot be applied"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case[0][0])
def test_a_wrong_setting_is_named_with_what_would_be_right(base, case):
    overrides, start, *parts = case
    with pytest.raises(ConfigError) as caught:
        config.load(base, overrides)
    message = str(caught.value)
    assert message.startswith(start)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_a_style_model_has_no_values_for_bce():
    tree = yaml.safe_load(BASE) | {"model": {"family": "style", "resolution": 16, "num_channels": 1}}
    assert config.parse(tree).model.resolution == 16
    tree["objective"] = {"name": "vae", "reconstruction": "bce"}
    with pytest.raises(ConfigError, match=r"^objective\.reconstruction: .* in \[-1, 1\]; set mse"):
        config.parse(tree)


def test_channels_last_is_of_the_conv_family(base):
    assert config.load(base, ["engine.channels_last=true"]).engine.channels_last
    tree = yaml.safe_load(BASE) | {"model": {"family": "mlp", "sample_shape": [1, 16, 16]}}
    tree["engine"] = {"channels_last": True}
    with pytest.raises(ConfigError, match="^engine.channels_last: only the conv family can, not mlp"):
        config.parse(tree)
    tree["engine"] = {"channels_last": False}
    config.parse(tree)


@pytest.mark.parametrize("shape, part", [([1, 16, 8], "square"), ([2], "is no image"), ([0], "below 1")])
def test_the_shape_of_an_mlp_is_checked(tmp_path, shape, part):
    tree = yaml.safe_load(BASE) | {"model": {"family": "mlp", "sample_shape": shape}}
    with pytest.raises(ConfigError, match=r"^model\.sample_shape: .*" + part):
        config.parse(tree)


def test_all_that_is_wrong_is_told_at_once(base):
    with pytest.raises(ConfigError) as caught:
        config.load(base, ["run.seed=-1", "model.latent_dim=0"])
    assert "run.seed: " in str(caught.value) and "model.latent_dim: " in str(caught.value)


def test_a_missing_section_is_named(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("run: {directory: x}\n")
    with pytest.raises(ConfigError, match="schedule: is missing; give it in the YAML file or as schedule=value"):
        config.load(str(path))


@pytest.mark.parametrize(
    "content, part",
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "holds no settings"),
        (b"- 1\n- 2\n", "holds no settings"),
        (b"run: [", "is not valid YAML"),
        (b"run: 1\nrun: 2\n", "duplicate key"),
        (b"run: *nowhere\n", "undefined alias"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"run: {directory: '${nowhere}'}\n", "nowhere"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, content, part):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.load(str(path))
    assert str(caught.value).startswith(str(path)) and part in str(caught.value)


def test_a_folder_and_an_unknown_protocol_are_refused(tmp_path):
    for path in (str(tmp_path), "nowhere://x.yaml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            config.load(path)


def test_an_object_store_that_does_not_answer_is_refused(monkeypatch):
    pytest.importorskip("s3fs")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_MAX_ATTEMPTS": "1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",  # discard: nothing listens
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="^s3://bucket/x.yaml: cannot be read"):
        config.load("s3://bucket/x.yaml")


def test_numbers_are_read_as_people_write_them(tmp_path):
    """YAML 1.1 reads 2e-4 as a string; here it is a number, in the file and in an override."""
    path = tmp_path / "numbers.yaml"
    path.write_text(BASE + "encoder_optimizer: {lr: 3e-4}\n")
    settings = config.load(str(path), ["decoder_optimizer.lr=2e-4", "objective.beta_neg=512"])
    assert settings.encoder_optimizer.lr == 3e-4 and settings.decoder_optimizer.lr == 2e-4
    assert settings.objective.beta_neg == 512.0


def test_anchors_and_merge_keys_work(tmp_path):
    path = tmp_path / "anchors.yaml"
    path.write_text(
        BASE + "encoder_optimizer: &adam {lr: 5e-4, betas: [0.5, 0.9]}\ndecoder_optimizer: {<<: *adam, lr: 1e-4}\n"
    )
    settings = config.load(str(path))
    assert settings.encoder_optimizer.lr == 5e-4 and settings.decoder_optimizer.lr == 1e-4
    assert settings.decoder_optimizer.betas == [0.5, 0.9]


def test_overrides_are_applied_in_order_and_leave_the_rest(base):
    settings = config.load(base, ["schedule.batch_size=8", "model.channels=[16,8]", "schedule.batch_size=4"])
    assert settings.schedule.batch_size == 4 and settings.model.channels == [16, 8]
    assert settings.schedule.total_images == 1000 and settings.model.resolution == 16


def test_sets_with_a_colon_need_no_quotes(base):
    assert config.load(base, ["data.url=shapes:"]).data.url == "shapes:"
    assert config.load(base, ["data.url='digits:'"]).data.url == "digits:"


def test_settings_cannot_change_after_validation(base):
    settings = config.load(base)
    with pytest.raises(ValueError, match="frozen"):
        settings.run.seed = 3


def test_passes_per_step(base):
    settings = config.load(base, ["engine.micro_batch_size=4"])
    assert [settings.passes(ranks) for ranks in (1, 2, 3, 4, 8, 32)] == [[8], [4], [3], [2], [1], [1]]
    assert config.load(base).passes(7) == [1]


@pytest.mark.parametrize(
    "overrides, ranks, message",
    [
        ([], 64, "schedule.batch_size: 32 images a step are too few for 64 ranks"),
        (
            ["engine.micro_batch_size=1"],
            3,
            "schedule.batch_size: 32 images a step in passes of 1 leave some of 3 ranks",
        ),
    ],
)
def test_a_batch_that_leaves_a_rank_without_images_is_refused(base, overrides, ranks, message):
    with pytest.raises(ConfigError) as caught:
        config.load(base, overrides).passes(ranks)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_is_written_reads_back_the_same(path, tmp_path):
    settings = config.load(
        str(path), ["decoder_optimizer.schedule={kind: milestones, milestones_images: [10, 20]}", "run.init_from=x"]
    )
    assert config.parse(config.dump(settings)) == settings
    again = tmp_path / "again.yaml"
    again.write_text(config.dump_yaml(settings))
    assert config.load(str(again)) == settings


def test_secrets_are_never_written(base):
    settings = config.load(
        base, ["run.storage_options={key: PUBLIC, secret: HUSH}", "data.storage_options.client_kwargs.token=HUSH"]
    )
    assert settings.run.storage_options == {"key": "PUBLIC", "secret": "HUSH"}
    assert settings.data.storage_options == {"client_kwargs": {"token": "HUSH"}}
    for text in (config.dump_yaml(settings), str(config.dump(settings))):
        assert "HUSH" not in text and "PUBLIC" not in text and "storage_options" not in text


def test_only_urls_have_a_query(base):
    for url, written in (
        ("out-wh?t", "out-wh?t"),
        ("file:///sets/wh?t", "file:///sets/wh?t"),
        ("https://me:HUSH@host/set?sig=HU SH", "https://...@host/set?..."),
    ):
        settings = config.load(base, [f"data.url='{url}'"])
        assert config.dump(settings)["data"]["url"] == written


def test_model_settings_alone():
    settings = config.parse_model({"family": "conv", "channels": [8], "resolution": 28})
    assert config.parse_model(settings.model_dump()) == settings
    with pytest.raises(ConfigError, match=r"model\..*latent"):
        config.parse_model({"family": "conv", "latent": 3})


STYLE = {
    "run": {"directory": "runs/test"}, "data": {"url": "digits:"}, "objective": {"name": "soft_intro_vae", "beta_neg": 64.0},
    "model": {"family": "style", "num_channels": 1, "resolution": 16}, "schedule": {"total_images": 1000, "batch_size": 32},
}  # fmt: skip


def grown(*levels, **changes):
    tree = STYLE | changes
    return config.parse(tree | {"schedule": STYLE["schedule"] | {"levels": list(levels)}})


def test_a_level_takes_what_it_does_not_say_from_the_run():
    first, second, third = grown(
        {"resolution": 4, "images": 300, "batch_size": 64, "micro_batch_size": 8}, {"resolution": 8, "images": 300},
        {"resolution": 16, "fade_images": 100},
    ).levels()  # fmt: skip
    assert (first.batch_size, second.batch_size, third.batch_size) == (64, 32, 32)
    assert (first.micro_batch_size, second.micro_batch_size) == (8, None)
    (only,) = config.parse(STYLE).levels()
    assert (only.resolution, only.batch_size, only.fade_images, only.lr_factor) == (16, 32, 0, 1.0)


EIGHT, SIXTEEN = {"resolution": 8, "images": 300}, {"resolution": 16}


@pytest.mark.parametrize(
    "levels, changes, message",
    [
        ([{"resolution": 4, "images": 300}, SIXTEEN], {}, "schedule.levels.1.resolution: 16 pixels follow 4; each level doubles, so 8 must"),
        ([EIGHT], {}, "schedule.levels.0.images: the last level lasts to the end of the run"),
        ([{"resolution": 8}], {}, "schedule.levels: they reach 8 pixels, not model.resolution=16"),
        ([{"resolution": 8}, SIXTEEN], {}, "schedule.levels.0.images: is missing"),
        ([EIGHT | {"fade_images": 10}, SIXTEEN], {}, "schedule.levels.0.fade_images: the first level has none before it"),
        ([EIGHT | {"resolution": 4}, EIGHT | {"fade_images": 301}, SIXTEEN], {}, "schedule.levels.1.fade_images: 301 is more than the 300"),
        ([{"resolution": 2, "images": 9}, {"resolution": 4, "images": 9}, EIGHT, SIXTEEN], {}, "schedule.levels.0.resolution: levels begin at 4"),
        ([EIGHT | {"batch_size": 2000}, SIXTEEN], {}, "schedule.batch_size: 2000 is more than schedule.total_images=1000"),
        (
            [EIGHT, SIXTEEN], {"engine": {"zero_stage": 1}, "decoder_optimizer": {"weight_decay": 0.1}},
            "decoder_optimizer.weight_decay: under ZeRO levels that have not begun would decay too",
        ),
        ([EIGHT | {"beta_neg_factor": 2.0}, SIXTEEN], {"objective": {"name": "vae"}}, "schedule.levels: objective vae has no beta_neg"),
        (
            [EIGHT, SIXTEEN], {"model": {"family": "conv", "num_channels": 1, "resolution": 16, "channels": [8]}},
            "schedule.levels: only the style family grows by levels, not conv",
        ),
    ],
)  # fmt: skip
def test_a_schedule_of_levels_that_cannot_be_is_refused(levels, changes, message):
    with pytest.raises(ConfigError) as caught:
        grown(*levels, **changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("value", ["runs/my #1", "digits:", "it's #2", "runs/a#b"])
def test_an_override_is_the_text_that_was_written(value):
    assert config.load("configs/digits.yaml", [f"run.directory={value}"]).run.directory == value


def test_quotes_of_yaml_are_taken_off():
    settings = config.load("configs/digits.yaml", ["run.directory='runs/my #1'", 'data.split="2024"'])
    assert settings.run.directory == "runs/my #1" and settings.data.split == "2024"
