"""A convolutional variational autoencoder of 8×8 digits with one of three normalizations, and its lower bound."""

import torch
from torch import Tensor, nn
from torch.distributions import Binomial

import syncbn

NORMS = ("syncbn", "batch", "none")
LATENT, LEVELS = 16, 16
"""Numbers that stand for an image; a pixel is an integer from 0 to 16."""


class VAE(nn.Module):
    """Two convolutions of stride 2 down to 2×2 and two back up, each normalized, around LATENT numbers an image.

    (N, 1, 8, 8) in [0, 1], noise (N, LATENT) -> logits (N, 1, 8, 8), and mean and log variance (N, LATENT) of the code.
    """

    def __init__(self, norm: str, width: int = 32) -> None:
        super().__init__()
        make = nn.Identity if norm == "none" else nn.BatchNorm2d
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, width, 3, 2, 1), make(width), nn.ReLU()),
            *(nn.Conv2d(width, 2 * width, 3, 2, 1), make(2 * width), nn.ReLU()),
            nn.Flatten(),
        )
        self.code = nn.Linear(8 * width, 2 * LATENT)
        self.decoder = nn.Sequential(
            *(nn.Linear(LATENT, 8 * width), nn.Unflatten(1, (2 * width, 2, 2)), make(2 * width), nn.ReLU()),
            *(nn.ConvTranspose2d(2 * width, width, 4, 2, 1), make(width), nn.ReLU()),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
        )

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.code(self.encoder(x)).chunk(2, 1)
        return self.decoder(mean + torch.exp(log_var / 2) * noise), mean, log_var


def build(norm: str) -> nn.Module:
    """The VAE with norm; 'syncbn' is the 'batch' model converted."""
    model = VAE(norm)
    return syncbn.convert_sync_batchnorm(model) if norm == "syncbn" else model


def bound(counts: Tensor, logits: Tensor, mean: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x|z) and KL(q(z|x) ‖ p(z)) of each image, (N,), in nats; their difference is the evidence lower bound.

    x is (N, 1, 8, 8) of integers from 0 to 16. p(x|z) is binomial, 16 trials a pixel, so that this is a probability of
    the image itself and the bound is one of its log evidence; q is a normal distribution, p(z) the standard one.
    Source: Kingma, Welling, Auto-encoding variational Bayes, 2013 (arXiv:1312.6114), equation 10.
    """
    likelihood = Binomial(LEVELS, logits=logits, validate_args=False).log_prob(counts).flatten(1).sum(1)
    divergence = (mean.square() + log_var.exp() - 1 - log_var).sum(1) / 2
    return likelihood, divergence
