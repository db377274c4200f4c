"""What our step is compared with: the released step's operations, in plain PyTorch, by the book.

The teacher runs on the augmented real batch, autograd goes through an LU solve, everything is float32 and NCHW and
nothing is cut in parts (REFERENCE 4). Knows the networks it is given and nothing of our algorithm.

Letters: m synthetic and b real images [C, H, W], d features, k target dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Random crops of zero-padded images, every other one mirrored: [b, C, H, W] -> the same shape."""
    b, _, h, w = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = (torch.randint(2 * padding + 1, (b, 1), device=images.device) for _ in range(2))
    rows = (top + torch.arange(h, device=images.device))[:, :, None]  # [b, H, 1]
    columns = left + torch.arange(w, device=images.device)  # [b, W]
    columns = torch.where(torch.rand(b, 1, device=images.device) < 0.5, columns.flip(1), columns)[:, None]  # [b, 1, W]
    return padded[torch.arange(b, device=images.device)[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()


class TextbookStep:
    """One meta-update and one training step of the model it used; calling it does both and returns the outer loss.

    model: a pool model with `.network` and a head. teacher: [b, C, H, W] -> [b, k]. x_syn, y_syn: the start.
    images: uint8 [b, C, H, W], the real batch before augmentation; mean, std: [C], of its channels in [0, 1].
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, x_syn: Tensor, y_syn: Tensor, images: Tensor, *, mean: Sequence[float],
                 std: Sequence[float], lr_x: float, lr_y: float, lr: float, momentum: float, weight_decay: float, ridge: float) -> None:
        self.model, self.teacher, self.images, self.ridge = model, teacher.eval(), images, ridge
        self.mean, self.std = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))  # [C, 1, 1]
        self.x_syn, self.y_syn = x_syn.clone().requires_grad_(), y_syn.clone().requires_grad_()
        self.adamw = torch.optim.AdamW([{"params": [self.x_syn], "lr": lr_x}, {"params": [self.y_syn], "lr": lr_y}], weight_decay=0.0)
        self.sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)

    def __call__(self) -> float:
        with torch.no_grad():
            x_real = (crop_and_flip(self.images.float() / 255) - self.mean) / self.std  # [b, C, H, W]
            y_real = self.teacher(x_real)  # [b, k]
        loss = self.outer_loss(x_real, y_real)
        self.x_syn.grad, self.y_syn.grad = torch.autograd.grad(loss, (self.x_syn, self.y_syn))
        self.adamw.step()
        self.train_model()
        return loss.item()

    def outer_loss(self, x_real: Tensor, y_real: Tensor) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            f_real = self._features(x_real)  # [b, d+1]
        f_syn = self._features(self.x_syn)  # [m, d+1]
        kernel, cross = f_syn @ f_syn.T, f_real @ f_syn.T  # [m, m], [b, m]
        regularised = kernel + self.ridge * kernel.trace().detach() * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
        return F.mse_loss(cross @ torch.linalg.solve(regularised, self.y_syn), y_real)

    def train_model(self) -> None:
        self.model.train()
        self.sgd.zero_grad()
        F.mse_loss(self.model(self.x_syn.detach()), self.y_syn.detach()).backward()
        self.sgd.step()

    def _features(self, x: Tensor) -> Tensor:
        features = self.model.network(x)
        return torch.cat([features, features.new_ones(len(features), 1)], 1)
