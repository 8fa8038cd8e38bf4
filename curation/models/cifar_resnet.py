"""ResNet-20 for 32 px images: the CIFAR-10 network of He et al. 2015 (arXiv:1512.03385), Sec. 4.2, without its head.

The layout of weights is that of akamaster/pytorch_resnet_cifar10, whose shortcuts (option A) have none: a block that
halves the image takes every other pixel and fills the new channels with zeros.

n images, C channels, F = 64 features.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, NUM_FEATURES = 32, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""With which the published weights were trained; they are ImageNet's."""


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self._grows = channels - channels_in
        stride = 2 if self._grows else 1
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x_nCHW: Tensor) -> Tensor:
        """(n, C_in, H, W) -> (n, C, H / stride, W / stride)."""
        straight = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x_nCHW)))))
        if self._grows:
            half = self._grows // 2
            x_nCHW = F.pad(x_nCHW[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        return F.relu(straight + x_nCHW)


class CifarResNet20(nn.Module):
    """Normalised images (n, 3, 32, 32) -> features (n, 64), what the linear head sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[Block(16, 16) for _ in range(3)])
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))

    def forward(self, x_nCHW: Tensor) -> Tensor:
        """The mean over the last block's pixels."""
        x_nCHW = F.relu(cast(Tensor, self.bn1(self.conv1(x_nCHW))))
        return self.layer3(self.layer2(self.layer1(x_nCHW))).mean(dim=(2, 3))


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (n, 32, 32, 3) -> float32 (n, 3, 32, 32) as the weights were trained."""
    images = pixels.permute(0, 3, 1, 2).float().div(255)
    mean, std = (torch.tensor(value, device=images.device).reshape(3, 1, 1) for value in (MEAN, STD))
    return (images - mean) / std
