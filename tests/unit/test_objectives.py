"""Proves each objective against closed forms and against the published equations written out in float64; which tensors
pass gradient and which do not; and that nothing overflows, in bfloat16 neither.

    python -m pytest tests/unit/test_objectives.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Normal, kl_divergence

from sivae import models, objectives
from sivae.engines import freeze
from sivae.objectives import Bootstrap, Draws, IntroVae, SoftIntroVae, Vae, kl, reconstruction_error, reparameterize

BATCH, LATENT, VALUES = 6, 3, 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


class Setup:
    """A small MLP pair, a batch and all draws. `exact()` is the same in float64."""

    def __init__(self, output="linear", dtype=torch.float32):
        fields = {"sample_shape": [VALUES], "latent_dim": LATENT, "num_hidden": 8, "num_layers": 1, "output": output}
        self.encoder, self.decoder = (n.to(dtype) for n in models.build("mlp", **fields))
        self.target = copy.deepcopy(models.build("mlp", seed=5, **fields).decoder).to(dtype).requires_grad_(False)
        self.x = torch.rand(BATCH, VALUES, generator=generator(9), dtype=torch.float64).to(dtype)
        self.draws = Draws(*(normals(BATCH, LATENT, seed=i, dtype=dtype) for i in range(6)))

    def exact(self):
        other = copy.copy(self)
        other.encoder, other.decoder, other.target = (
            copy.deepcopy(n).double() for n in (self.encoder, self.decoder, self.target)
        )
        other.x = self.x.double()
        other.draws = Draws(*(getattr(self.draws, name).double() for name in Draws.names()))
        return other

    def run(self, objective, **options):
        """Both phases as a training step has them, without a step in between; gradients of each."""
        options = {"target_decoder": self.target} | options
        freeze(trained=self.encoder, frozen=self.decoder)
        first = objective.encoder_phase(self.encoder, self.decoder, self.x, self.draws, **options)
        grad_encoder = torch.autograd.grad(first.loss, list(self.encoder.parameters()))
        freeze(trained=self.decoder, frozen=self.encoder)
        second = objective.decoder_phase(self.encoder, self.decoder, self.x, first.z, self.draws, **options)
        grad_decoder = torch.autograd.grad(second.loss, list(self.decoder.parameters()))
        for network in (self.encoder, self.decoder):
            network.requires_grad_(True)
        return first, second, grad_encoder, grad_decoder


def close(ours, expected, rtol):
    scale = max(float(expected.abs().max()), 1e-3)
    return float((ours.double() - expected).abs().max()) <= rtol * scale


# The pieces


def test_kl_is_the_closed_form():
    mu, logvar = normals(50, 7, seed=1) * 3, normals(50, 7, seed=2) * 2
    expected = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(torch.zeros(7), torch.ones(7))).sum(1)
    ours = kl(mu, logvar)
    assert ours.shape == (50,) and ours.dtype == torch.float32
    # Computed in float32: sums of 7 terms, each rounded to 6e-8 of the largest (exp of up to about 6).
    assert torch.allclose(ours.double(), expected, rtol=2e-6)
    assert float(kl(torch.zeros(1, 7), torch.zeros(1, 7))) == 0


def test_reparameterize_has_the_distribution_it_names():
    mu, logvar, eps = normals(4, 3, seed=1), normals(4, 3, seed=2), normals(4, 3, seed=3)
    posterior = Normal(mu, (logvar / 2).exp())
    z = reparameterize(mu, logvar, eps)
    # z is the quantile of the posterior at which eps is one of the standard normal; float32 rounding.
    assert torch.allclose(posterior.cdf(z.double()), Normal(torch.zeros(3), torch.ones(3)).cdf(eps).double(), atol=1e-6)
    assert torch.equal(reparameterize(mu, logvar, torch.zeros(4, 3)), mu.float())


def test_reparameterize_rounds_nothing_more_to_bfloat16():
    """What networks give under autocast: as if it had been float32 to begin with."""
    mu, logvar, eps = (normals(4, 3, seed=i, dtype=torch.float32) for i in range(3))
    rounded = mu.bfloat16(), logvar.bfloat16()
    assert torch.equal(reparameterize(*rounded, eps), reparameterize(*(value.float() for value in rounded), eps))


def test_reparameterize_passes_gradient_to_both():
    mu, logvar, eps = (normals(4, 3, seed=i).requires_grad_(i < 2) for i in range(3))
    grad_mu, grad_logvar = torch.autograd.grad(reparameterize(mu, logvar, eps).sum(), (mu, logvar))
    assert torch.equal(grad_mu, torch.ones_like(mu))
    assert torch.allclose(grad_logvar, 0.5 * eps * (logvar / 2).exp(), rtol=1e-6)  # float32 inside


@pytest.mark.parametrize(
    "kind, formula",
    [
        ("mse", lambda target, rec: (target - rec) ** 2),
        ("l1", lambda target, rec: (target - rec).abs()),
        ("bce", lambda target, rec: -(target * rec.log() + (1 - target) * (1 - rec).log())),
    ],
)
def test_reconstruction_is_a_sum_per_image(kind, formula):
    target, rec = (torch.rand(5, 2, 3, 4, generator=generator(i), dtype=torch.float64) for i in (1, 2))
    ours = reconstruction_error(target.float(), rec.float(), kind)
    assert ours.shape == (5,) and ours.dtype == torch.float32
    # Each image alone, all its 24 values summed; float32 rounding of inputs and of the sum.
    for image in range(5):
        assert float(ours[image]) == pytest.approx(float(formula(target[image], rec[image]).sum()), rel=2e-6)


def test_bce_of_hard_targets_is_bernoulli():
    target, rec = (torch.rand(5, 8, generator=generator(i)) for i in (1, 2))
    target = (target > 0.5).float()
    expected = -Bernoulli(probs=rec.double()).log_prob(target.double()).sum(1)
    assert torch.allclose(reconstruction_error(target, rec, "bce").double(), expected, rtol=2e-6)


def test_an_unknown_reconstruction_is_refused():
    with pytest.raises(ValueError, match="huber"):
        reconstruction_error(torch.zeros(1, 2), torch.zeros(1, 2), "huber")


# Soft-IntroVAE, written out from DESIGN.md


def literal_kl(mu, logvar):
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)


def literal_error(a, b, kind="mse"):
    if kind == "bce":
        return -(a * b.log() + (1 - a) * (1 - b).log()).flatten(1).sum(1)
    return ((a - b) ** 2 if kind == "mse" else (a - b).abs()).flatten(1).sum(1)


def literal_soft_intro(s, hp, second=None, detach=True, kind="mse"):
    """The two losses of a Soft-IntroVAE step and their gradients, in float64, term by term as DESIGN.md has them.

    `second` reconstructs generated images (the decoder itself, or the target decoder); `detach` is for the decoder phase.
    """
    E, D, x, d = s.encoder, s.decoder, s.x, s.draws
    again = second or D
    beta_rec, beta_kl, beta_neg, gamma_r, scale = hp
    D.requires_grad_(False)
    fake = D(d.z_prior)
    mu, logvar = E(x)
    z = mu + d.eps_real * (logvar / 2).exp()
    rec = D(z)
    loss_encoder = scale * (beta_rec * literal_error(x, rec, kind).mean() + beta_kl * literal_kl(mu, logvar).mean())
    for image, eps in ((rec, d.eps_rec), (fake, d.eps_fake)):
        mu_r, logvar_r = E(image.detach())
        rec_r = again(mu_r + eps * (logvar_r / 2).exp())
        elbo = beta_rec * literal_error(image, rec_r, kind) + beta_neg * literal_kl(mu_r, logvar_r)
        loss_encoder = loss_encoder + 0.25 * torch.exp(-2 * scale * elbo).mean()
    grad_encoder = torch.autograd.grad(loss_encoder, list(E.parameters()))
    D.requires_grad_(True)
    E.requires_grad_(False)
    z = z.detach()
    fake, rec = D(d.z_prior), D(z)
    loss_decoder = beta_rec * literal_error(x, rec, kind).mean()
    for image, eps in ((rec, d.eps_rec_d), (fake, d.eps_fake_d)):
        mu_r, logvar_r = E(image)
        z_r = mu_r + eps * (logvar_r / 2).exp()
        error = (
            literal_error(image.detach(), again(z_r.detach()), kind)
            if detach
            else literal_error(image, again(z_r), kind)
        )
        loss_decoder = loss_decoder + 0.5 * beta_kl * literal_kl(mu_r, logvar_r).mean()
        loss_decoder = loss_decoder + 0.5 * gamma_r * beta_rec * error.mean()
    loss_decoder = scale * loss_decoder
    return loss_encoder, loss_decoder, grad_encoder, torch.autograd.grad(loss_decoder, list(D.parameters()))


# Float32 against float64 on networks of width 8: sums of a few dozen values of size one, rounded to 6e-8 each.
LOSS, GRADIENT = 1e-6, 2e-5
HP = (0.7, 0.9, 1.3, 0.6, 1 / VALUES)  # all terms of similar size, so that none hides another


def fields(hp=HP):
    return dict(zip(("beta_rec", "beta_kl", "beta_neg", "gamma_r", "scale"), hp))


@pytest.mark.parametrize("kind", ["mse", "l1", "bce"])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_soft_intro_vae_is_its_equations(bootstrap, kind):
    s = Setup(output="sigmoid" if kind == "bce" else "linear")
    exact = s.exact()
    objective = (Bootstrap if bootstrap else SoftIntroVae)(**fields(), reconstruction=kind)
    first, second, grad_encoder, grad_decoder = s.run(objective)
    expected = literal_soft_intro(
        exact, HP, second=exact.target if bootstrap else None, detach=not bootstrap, kind=kind
    )
    assert first.loss.item() == pytest.approx(expected[0].item(), rel=LOSS)
    assert second.loss.item() == pytest.approx(expected[1].item(), rel=LOSS)
    assert all(close(a, b, GRADIENT) for a, b in zip(grad_encoder, expected[2], strict=True))
    assert all(close(a, b, GRADIENT) for a, b in zip(grad_decoder, expected[3], strict=True))


@pytest.mark.parametrize("index", range(5))
def test_every_weight_of_the_loss_matters(index):
    """The comparison above can fail: with one weight off by a hundredth, it does."""
    s = Setup()
    hp = [value * (1.01 if i == index else 1) for i, value in enumerate(HP)]
    first, second, *_ = s.run(SoftIntroVae(**fields(hp)))
    expected = literal_soft_intro(s.exact(), HP)
    assert max(abs(a.loss.item() / b.item() - 1) for a, b in zip((first, second), expected)) > 100 * LOSS


def test_the_terms_are_what_their_names_say():
    s = Setup()
    first, second, *_ = s.run(SoftIntroVae(**fields()))
    E, D, d = s.encoder, s.decoder, s.draws
    mu, logvar = E(s.x)
    rec, fake = D(reparameterize(mu, logvar, d.eps_real)), D(d.z_prior)
    terms = first.terms | second.terms
    expected = {
        "loss_encoder": first.loss, "loss_decoder": second.loss,
        "rec": reconstruction_error(s.x, rec, "mse").mean(), "kl_real": kl(mu, logvar).mean(),
        "kl_rec": kl(*E(rec)).mean(), "kl_fake": kl(*E(fake)).mean(),
        "rec_d": reconstruction_error(s.x, rec, "mse").mean(), "kl_rec_d": kl(*E(rec)).mean(),
        "kl_fake_d": kl(*E(fake)).mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert torch.equal(terms[name], value.detach()), name
    assert set(terms) - set(expected) == {"exp_elbo_rec", "exp_elbo_fake", "rec_rec_d", "rec_fake_d"}
    assert not any(term.requires_grad or term.ndim for term in terms.values())
    assert torch.equal(first.z, reparameterize(mu, logvar, d.eps_real).detach())


def test_the_target_of_the_second_reconstruction_is_not_detached():
    """The encoder's input is detached, the target is not: detaching it changes the encoder's gradient (golden/README.md)."""

    class Detached(SoftIntroVae):
        def _exp_elbo(self, encoder, second, image, eps, labels):
            return super()._exp_elbo(encoder, second, image.detach(), eps, labels)

    s = Setup()
    grads, other = s.run(SoftIntroVae(**fields()))[2], s.run(Detached(**fields()))[2]
    assert max(float((a - b).abs().max()) for a, b in zip(grads, other)) > 1e-4


class Counted(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, *arguments):
        self.calls += 1
        return self.network(*arguments)


def passes(gamma_r):
    s = Setup()
    s.encoder, s.decoder = Counted(s.encoder), Counted(s.decoder)
    objective = SoftIntroVae(**fields() | {"gamma_r": gamma_r})
    z = objective.encoder_phase(s.encoder, s.decoder, s.x, s.draws).z
    s.encoder.calls = s.decoder.calls = 0
    objective.decoder_phase(s.encoder, s.decoder, s.x, z, s.draws)
    return s.encoder.calls, s.decoder.calls


def test_gamma_r_zero_skips_the_reconstructions_of_generated_images():
    assert passes(0.0) == (2, 2) and passes(1e-8) == (2, 4)


def test_gamma_r_zero_is_the_limit_of_a_tiny_one():
    s = Setup()
    _, none, _, grad_none = s.run(SoftIntroVae(**fields() | {"gamma_r": 0.0}))
    _, tiny, _, grad_tiny = s.run(SoftIntroVae(**fields() | {"gamma_r": 1e-8}))
    _, large, _, grad_large = s.run(SoftIntroVae(**fields() | {"gamma_r": 1.0}))
    # 1e-8 of terms of the same size is below float32 rounding.
    assert none.loss.item() == pytest.approx(tiny.loss.item(), rel=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(grad_none, grad_tiny))
    assert (grad_none[2] - grad_large[2]).abs().max() > 0.1 * grad_none[2].abs().max()
    assert set(tiny.terms) - set(none.terms) == {"rec_rec_d", "rec_fake_d"} and large.loss.item() > none.loss.item()


def test_the_exponential_never_overflows():
    """Huge errors and divergences make it vanish; the loss and all gradients stay finite."""
    s = Setup()
    with torch.no_grad():
        for network in (s.encoder, s.decoder):
            for parameter in network.parameters():
                parameter *= 3  # mu, logvar of tens, errors of thousands
    first, second, grad_encoder, grad_decoder = s.run(SoftIntroVae(beta_neg=1e6, gamma_r=1.0, scale=1.0))
    terms = first.terms | second.terms
    for name in ("exp_elbo_rec", "exp_elbo_fake"):
        assert 0 <= float(terms[name]) <= 1
    assert all(value.isfinite().all() for value in (*terms.values(), *grad_encoder, *grad_decoder))
    assert float(terms["exp_elbo_rec"]) == 0.0  # it did vanish


@pytest.mark.parametrize("size", [1e3, 1e10, 1e30])
def test_the_exponential_of_any_finite_image_is_at_most_one(size):
    s = Setup()
    decoder = lambda z, labels=None: s.decoder(z, labels) * size  # noqa: E731
    objective = SoftIntroVae(scale=1e-30)  # so that 1e30 squared, infinite, is met as well
    value, _ = objective._exp_elbo(lambda x, labels: s.encoder(x / size, labels), decoder, s.x, s.draws.eps_rec, None)
    assert 0 <= value.item() <= 1


# VAE, IntroVAE, bootstrap


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_the_two_phases_of_a_vae_have_the_gradients_of_the_joint_loss(kind):
    s = Setup()
    _, _, grad_encoder, grad_decoder = s.run(Vae(beta_rec=0.7, beta_kl=1.9, reconstruction=kind))
    e = s.exact()
    mu, logvar = e.encoder(e.x)
    rec = e.decoder(mu + e.draws.eps_real * (logvar / 2).exp())
    joint = 0.7 * literal_error(e.x, rec, kind).mean() + 1.9 * literal_kl(mu, logvar).mean()
    expected = torch.autograd.grad(joint, [*e.encoder.parameters(), *e.decoder.parameters()])
    assert all(close(a, b, GRADIENT) for a, b in zip((*grad_encoder, *grad_decoder), expected, strict=True))


def test_vae_losses():
    s = Setup()
    first, second, *_ = s.run(Vae(beta_rec=0.7, beta_kl=1.9))
    terms = first.terms | second.terms
    assert first.loss.item() == pytest.approx(0.7 * float(terms["rec"]) + 1.9 * float(terms["kl_real"]), rel=1e-6)
    assert second.loss.item() == pytest.approx(0.7 * float(terms["rec"]), rel=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.2, 1e4])
def test_intro_vae_is_its_equations(margin):
    """Below, between and beyond the divergences of generated images."""
    s = Setup()
    objective = IntroVae(beta_rec=0.7, beta_kl=0.9, beta_neg=1.3, margin=margin)
    first, second, grad_encoder, grad_decoder = s.run(objective)
    e = s.exact()
    E, D, d = e.encoder, e.decoder, e.draws
    mu, logvar = E(e.x)
    z = mu + d.eps_real * (logvar / 2).exp()
    rec, fake = D(z), D(d.z_prior)
    hinge = sum(F.relu(margin - literal_kl(*E(image.detach())).mean()) for image in (rec, fake))
    loss = 0.7 * literal_error(e.x, rec).mean() + 0.9 * (literal_kl(mu, logvar).mean() + 0.5 * 1.3 * hinge)
    assert first.loss.item() == pytest.approx(loss.item(), rel=LOSS)
    assert all(
        close(a, b, GRADIENT)
        for a, b in zip(grad_encoder, torch.autograd.grad(loss, list(E.parameters()), retain_graph=True), strict=True)
    )
    rec = D(z.detach())
    divergence = literal_kl(*E(rec)).mean() + literal_kl(*E(fake)).mean()
    loss = 0.7 * literal_error(e.x, rec).mean() + 0.9 * 0.5 * divergence
    assert second.loss.item() == pytest.approx(loss.item(), rel=LOSS)
    assert all(
        close(a, b, GRADIENT)
        for a, b in zip(grad_decoder, torch.autograd.grad(loss, list(D.parameters())), strict=True)
    )


def test_the_hinge_is_off_beyond_the_margin():
    s = Setup()
    off = s.run(IntroVae(margin=0.0, beta_neg=5.0))
    vae = s.run(Vae())
    terms = off[0].terms
    assert min(float(terms["kl_rec"]), float(terms["kl_fake"])) > 0  # beyond the margin of 0
    assert torch.equal(off[0].loss, vae[0].loss)
    # The same sum with a zero added to it; autograd may add in another order.
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(off[2], vae[2]))
    on = s.run(IntroVae(margin=1e3, beta_neg=5.0))
    assert not torch.allclose(on[2][0], vae[2][0], rtol=1e-2)


def test_bootstrap_needs_a_target_decoder():
    s = Setup()
    objective = Bootstrap(gamma_r=1.0)
    with pytest.raises(ValueError, match="target decoder"):
        objective.encoder_phase(s.encoder, s.decoder, s.x, s.draws)
    with pytest.raises(ValueError, match="target decoder"):
        objective.decoder_phase(s.encoder, s.decoder, s.x, s.draws.z_prior, s.draws)


def test_the_target_decoder_hands_gradient_on_and_gets_none():
    """It is frozen, and only Bootstrap uses it: the gradient of the decoder reaches it through the copy."""
    s = Setup()
    _, _, _, with_target = s.run(Bootstrap(**fields()))
    assert all(parameter.grad is None for parameter in s.target.parameters())
    _, _, _, plain = s.run(SoftIntroVae(**fields()))
    assert not torch.allclose(with_target[0], plain[0], rtol=1e-2)
    other = copy.deepcopy(s.target)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1
    assert not torch.allclose(s.run(Bootstrap(**fields()), target_decoder=other)[3][0], with_target[0], rtol=1e-3)


def test_labels_reach_every_call():
    model = models.build("mlp", sample_shape=[VALUES], latent_dim=LATENT, num_hidden=8, num_layers=1, num_classes=3)
    s = Setup()
    s.encoder, s.decoder = model
    for name, objective in {"vae": Vae(), "intro": IntroVae(), "soft": SoftIntroVae(gamma_r=1.0)}.items():
        # A call that forgets them raises: the models refuse to guess.
        first, second, *_ = s.run(objective, labels=torch.arange(BATCH) % 3)
        other, *_ = s.run(objective, labels=torch.zeros(BATCH, dtype=torch.long))
        assert first.loss.item() != other.loss.item(), name


# Binary cross-entropy and bfloat16


def test_bce_passes_gradient_through_the_target_as_well():
    """In float64 finite differences along random directions, for both arguments."""
    target, rec = (torch.rand(3, 5, generator=generator(i), dtype=torch.float64) * 0.8 + 0.1 for i in (1, 2))
    ours = [value.float().requires_grad_() for value in (target, rec)]
    gradients = torch.autograd.grad(reconstruction_error(*ours, "bce").sum(), ours)

    def exact(a, b):
        return literal_error(a, b, "bce").sum()

    step = 1e-6  # central differences in float64: about 1e-10 of rounding, 1e-12 of truncation
    for index, gradient in enumerate(gradients):
        for seed in range(3):
            direction = normals(3, 5, seed=seed)
            moved = [[value + sign * step * direction * (i == index) for i, value in enumerate((target, rec))]
                     for sign in (1, -1)]  # fmt: skip
            slope = (exact(*moved[0]) - exact(*moved[1])) / (2 * step)
            assert float((gradient.double() * direction).sum()) == pytest.approx(float(slope), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("logit", [-200.0, -90.0, 17.5, 200.0])
@pytest.mark.parametrize("other", [-200.0, 0.5, 17.5])
def test_bce_of_a_saturated_decoder_is_finite(logit, other):
    """A sigmoid is 1 to float32 rounding from 17 on: white pixels of any trained decoder, as target and as reconstruction."""
    a, b = torch.full((1, 4), other, requires_grad=True), torch.full((1, 4), logit, requires_grad=True)
    loss = reconstruction_error(a.sigmoid(), b.sigmoid(), "bce").sum()
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (a, b)))


@pytest.mark.parametrize("objective", [Vae(), IntroVae(), SoftIntroVae(gamma_r=1.0), Bootstrap(gamma_r=1.0)])
@pytest.mark.parametrize("kind", ["mse", "l1", "bce"])
def test_bfloat16_networks_give_float32_losses(objective, kind):
    objective = type(objective)(**{**vars(objective), "reconstruction": kind})
    s = Setup(output="sigmoid" if kind == "bce" else "linear")
    full = s.run(objective)
    with torch.autocast("cpu", torch.bfloat16):
        assert s.encoder(s.x)[0].dtype == torch.bfloat16
        half = s.run(objective)
    for phase, exact in zip(half[:2], full[:2]):
        assert phase.loss.dtype == torch.float32
        assert all(term.dtype == torch.float32 for term in phase.terms.values())
        # bfloat16 keeps 8 bits: half a percent for each of a handful of layers.
        assert phase.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)
    assert half[0].z.dtype == torch.float32


def test_bfloat16_inputs_are_summed_in_float32():
    """256 ones and 256 small errors: in bfloat16 a sum stops growing at 256."""
    target, rec = torch.zeros(1, 1000, dtype=torch.bfloat16), torch.ones(1, 1000, dtype=torch.bfloat16)
    for kind in ("mse", "l1"):
        error = reconstruction_error(target, rec, kind)
        assert error.dtype == torch.float32 and float(error) == 1000
    mu = torch.ones(1, 1000, dtype=torch.bfloat16)
    assert kl(mu, torch.zeros_like(mu)).dtype == torch.float32 and float(kl(mu, torch.zeros_like(mu))) == 500


# Building


def test_scale_is_one_over_the_values_of_a_sample_unless_given():
    assert objectives.build("soft_intro_vae", num_values=50).scale == 1 / 50
    assert objectives.build("bootstrap", num_values=50, scale=0.3).scale == 0.3
    assert not hasattr(objectives.build("vae", num_values=50), "scale")
    assert not hasattr(objectives.build("intro_vae", num_values=50, margin=3.0), "scale")
