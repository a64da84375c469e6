"""Importance-Aware Adaptive Dataset Distillation (IADD) in one file, to be read with the paper.

    python iadd.py teachers --dataset cifar10  # 200 trajectories of a ConvNet    (Section 3.1)
    python iadd.py distill --ipc 1             # the distilled images             (Algorithm 1)
    python iadd.py eval --arch vgg11           # fresh networks, trained on them  (Section 4.4)

Other options than these (see --help): give the same to all three; each uses those it needs. With
`--dataset shapes` they take three minutes on two CPU cores; `eval --on distilled random full`
prints 57.4 ± 5.5 % for one distilled image per class, 29.5 ± 3.5 for one real, 99.5 ± 0.2 for
all 2,000. CIFAR-10, IPC 1, 50 teachers, T = 5000: 44.8 ± 0.9 (paper, 200 teachers: 46.5 ± 1.1).

The paper: Guang Li, Ren Togo, Takahiro Ogawa, Miki Haseyama, Neural Networks 172, 2024, arXiv
2401.15863; sections, equations, figures, tables and lines (of Algorithm 1) are that paper's.
Train many teachers on the real data and keep their parameters before training and after every
epoch. Then take a few real images per class (IPC) and repeat T times: let a student start where
a random teacher was after a random early epoch i, take J steps of gradient descent on the
augmented distilled images, and see how far it ends from where the teacher was K epochs later.
The difference, each parameter times its importance W, is squared, summed and divided by the
squared distance that the teacher travelled. This loss is back-propagated into W and, through all
J steps, into the images and alpha. With W = 1 this is MTT [51], whose settings fill the gaps.

Glossary
    theta       all parameters of a network as one vector, (P,)       theta, theta~, Eq. (3)-(5)
    theta_start, theta_target   of a teacher at epoch i and i + K     theta_i, theta_{i+K}
    ell         cross-entropy of a network on a mini-batch            l, Eq. (2)
    images      the distilled images, normalised, (N, C, H, W)        D_distill
    alpha       the student's learning rate, a trainable scalar       alpha, Eq. (2), (10)
    W           the importance of each parameter, (P,)                W, Eq. (6), (11)
    T, J        distillation iterations; steps of a student           --iterations, --steps
    K           epochs of a teacher (the paper: its updates)          --expert-epochs
    max_start   a student starts at an epoch i < max_start            I+, --max-start-epoch
    S           segments (theta_start, theta_target) to average over  --segments; the paper: 1

References, numbered as in the paper; its data: [53] CIFAR, [80] Tiny ImageNet, [81] COVID-19
    [6] AlexNet, Krizhevsky 2012; [7] ResNet, He 2016, arXiv 1512.03385; [89] VGG, Simonyan 2015,
    arXiv 1409.1556; [47] DSA, Zhao 2021, arXiv 2102.08259; [51] MTT, Cazenavette 2022, arXiv
    2203.11932; [54] DDPP, Li 2023, arXiv 2209.14609; [83] herding, Chen 2010, arXiv 1203.3472
"""

import argparse
import copy
import ctypes
import datetime
import functools
import gc
import hashlib
import io
import json
import math
import os
import shlex
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torchvision.datasets.folder import make_dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm.auto import tqdm

# ---- 1. The student: J steps of gradient descent, and the way back through them (Section 3.1)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # ell(theta, x, y)


def flat_parameters(net: nn.Module) -> Tensor:
    """A copy of all parameters of a network as one vector theta, (P,): Eq. (3)-(5)."""
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def cross_entropy(net: nn.Module, precision: str = "float32") -> Loss:
    """Returns ell(theta, x, y), the mean cross-entropy of `net` with parameters theta (P,) on
    images x (B, C, H, W) with labels y (B,), a scalar; in bfloat16 ("bf16") or theta's dtype.
    ell raises RuntimeError if `net` has buffers: only parameters are matched."""
    named = dict(net.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def ell(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        dtype = torch.bfloat16 if precision == "bf16" else theta.dtype
        parts = zip(named.items(), theta.split(sizes))
        parameters = {name: part.view_as(p).to(dtype) for (name, p), part in parts}
        logits = torch.func.functional_call(net, parameters, (x.to(dtype),), strict=True)
        return F.cross_entropy(logits.to(theta.dtype), y)

    return ell


class Student:
    """student(theta, alpha, x, y) returns theta (P,) after J steps of gradient descent with
    learning rate alpha (), one on each mini-batch of images x (J, B, C, H, W), labels y (J, B)."""

    def __init__(self, ell: Loss):
        self.gradient = torch.func.grad(ell)  # of ell with respect to theta, (P,)

    def step(self, theta: Tensor, alpha: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return theta - alpha * self.gradient(theta, x, y)  # Eq. (2)

    def step_back(self, v: Tensor, theta: Tensor, alpha: Tensor, x: Tensor, y: Tensor):
        """The backward pass of `step`. v (P,) is the gradient of the loss L with respect to the
        result of `step`; returned are those with respect to theta, alpha and x: (I - alpha H) v,
        -<v, g> and -alpha (dg/dx)^T v, with gradient g and Hessian H of ell at theta."""
        g, pull_back = torch.func.vjp(lambda theta, x: self.gradient(theta, x, y), theta, x)
        Hv, dg_dx_v = pull_back(v)  # one vector-Jacobian product; H is symmetric
        return v - alpha * Hv, -(v @ g), -alpha * dg_dx_v

    def __call__(self, theta: Tensor, alpha: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if not theta.requires_grad:  # as in all later steps, so that `step` is compiled once
            theta = theta.detach().requires_grad_()
        for x_j, y_j in zip(x, y):  # Algorithm 1, lines 6 and 10
            theta = StudentStep.apply(self, theta, alpha, x_j, y_j)  # lines 8, 9
        return theta


class StudentStep(torch.autograd.Function):
    """A step as autograd sees it. create_graph=True would keep the activations of all J steps;
    this keeps the inputs of each and recomputes its activations: memory hardly grows with J."""

    @staticmethod
    def forward(ctx, student, theta, alpha, x, y):
        ctx.student = student
        ctx.save_for_backward(theta, alpha, x, y)
        return student.step(theta, alpha, x, y)

    @staticmethod
    def backward(ctx, v):
        return None, *ctx.student.step_back(v, *ctx.saved_tensors), None  # student, ..., y


# ---- 2. The loss and Algorithm 1 (Sections 3.2, 3.3) -------------------------------------


@dataclass
class Matching:
    """How students are matched with teachers: the settings of Algorithm 1."""

    J: int
    K: int
    max_start: int
    batch: int  # batch size of distilled images
    alpha: float  # alpha_0
    lr_alpha: float  # mu, Eq. (10)
    lr_w: float  # eta, Eq. (11)
    lr_img: float  # zeta, Eq. (12)
    S: int
    method: str  # "iadd", "mtt" or "ddpp"
    epsilon: float  # DDPP's: an input of Algorithm 1 that none of its lines uses
    seed: int


class Distillation(nn.Module):
    """What Algorithm 1 learns, and the optimizer that learns it. images: real ones at first,
    normalised, (N, C, H, W); labels: (N,); P: length of theta."""

    def __init__(self, images: Tensor, labels: Tensor, P: int, m: Matching):
        super().__init__()
        self.t = 0  # iterations done
        self.images = nn.Parameter(images.clone())  # Algorithm 1, line 1
        self.alpha = nn.Parameter(images.new_tensor(m.alpha))  # line 2
        # W_0, the paper's "unit vector": all ones; float32 would round updates of 1e-10 to 0
        self.W = nn.Parameter(images.new_ones(P, dtype=torch.float64))
        self.register_buffer("labels", labels)
        self.register_buffer("mismatch", images.new_zeros(P))  # of the last student, for `plot`
        learned = [  # the paper is silent on momentum: MTT's, and none for W
            {"params": [self.alpha], "lr": m.lr_alpha, "momentum": 0.5},  # Eq. (10)
            {"params": [self.W], "lr": m.lr_w},  # Eq. (11)
            {"params": [self.images], "lr": m.lr_img, "momentum": 0.5},  # Eq. (12)
        ]
        self.optimizer = torch.optim.SGD(learned)


def iadd_loss(theta: Tensor, theta_start: Tensor, theta_target: Tensor, W: Tensor) -> Tensor:
    """Eq. (9) with (7) and (8): ||W theta - W theta_target||^2 / ||theta_start - theta_target||^2.
    All (P,). dL/dw = 2 w (theta - theta_target)^2 / ||...||^2 is not negative for w > 0, so SGD
    can only decrease weights, fastest where the mismatch is largest (Fig. 6, 7)."""
    assert theta.shape == theta_start.shape == theta_target.shape == W.shape
    weighted = W * (theta - theta_target)  # Algorithm 1, lines 11-13
    return weighted.square().sum() / (theta_start - theta_target).square().sum()


def importance_weights(m: Matching, W: Tensor, mismatch: Tensor) -> Tensor:
    """The weights (P,) of a mismatch (P,). IADD learns them; MTT's [51] are 1; DDPP [54] drops
    the parameters hardest to match: here a fraction epsilon, for each student (no rule given)."""
    if m.method == "iadd":
        return W
    if m.method == "mtt":
        return torch.ones_like(W)
    size = mismatch.abs()
    kept = max(1, round((1 - m.epsilon) * len(size)))
    return (size <= size.kthvalue(kept).values).to(W.dtype)


def random_segment(teachers: list[Tensor], K: int, max_start: int) -> Tensor:
    """theta_i, theta_{i+K}, (2, P), of a random teacher (epochs + 1, P) and start i < max_start."""
    trajectory = teachers[torch.randint(len(teachers), ())]
    i = torch.randint(max_start, ()).item()
    return trajectory[[i, i + K]]


def minibatches(n: int, batch: int, J: int) -> Tensor:
    """Indices of J mini-batches, (J, batch), batch <= n, on the CPU. Each pass over the n images is
    a fresh permutation, cut into batches, the last filled up with the first images of the pass."""
    in_a_pass = math.ceil(n / batch)
    permutations = torch.rand(math.ceil(J / in_a_pass), n).argsort(1)  # a row for each pass
    filled = permutations[:, torch.arange(in_a_pass * batch) % n]  # (passes, in_a_pass * batch)
    return filled.view(-1, batch)[:J]


def student_batches(images: Tensor, labels: Tensor, batch: int, J: int) -> tuple[Tensor, Tensor]:
    """J augmented mini-batches, x (J, batch, C, H, W), y (J, batch): Eq. (1), line 7."""
    index = minibatches(len(images), batch, J).to(images.device)  # copied once for all J
    x = images.index_select(0, index.flatten())  # on a CPU its gradient adds in a fixed order
    return augment(x.view(J, batch, *images.shape[1:])), labels[index]


def matching_loss(d: Distillation, student: Student, teachers: list[Tensor], m: Matching) -> Tensor:
    """Algorithm 1, lines 4-13: the loss, (), of one student."""
    segment = random_segment(teachers, m.K, m.max_start)  # line 4
    theta_start, theta_target = segment.to(d.images.device)
    x, y = student_batches(d.images, d.labels, m.batch, m.J)  # line 7
    alpha = d.alpha.clone()  # a leaf's .grad would be memory that a CUDA graph overwrites
    theta = student(theta_start, alpha, x, y)  # lines 5, 6, 8-10
    d.mismatch = theta.detach() - theta_target  # as in Fig. 1
    weights = importance_weights(m, d.W, d.mismatch)
    return iadd_loss(theta, theta_start, theta_target, weights)  # lines 11-13


def iteration(d: Distillation, student, teachers: list[Tensor], m: Matching, segments) -> Tensor:
    """Algorithm 1, lines 4-14 (the loop over t: command_distill): updates d, returns the loss, ().
    segments: range(S) or a part. Eq. (10)-(12) have an index j, but L exists only after step J."""
    d.optimizer.zero_grad()
    loss = d.W.new_zeros(())
    for s in segments:
        seed_all(m.seed, "segment", d.t, s)  # so that it can be resumed, or run elsewhere
        part = matching_loss(d, student, teachers, m) / m.S  # lines 4-13
        part.backward()
        loss += part.detach()
    sum_over_ranks(loss, d.alpha.grad, d.W.grad, d.images.grad)  # of several processes, if any
    d.optimizer.step()  # line 14, Eq. (10)-(13)
    d.t += 1
    return loss


# ---- 3. DSA: differentiable Siamese augmentation [47], the curly A in Eq. (2) ------------


def uniform(x: Tensor, low: float, high: float) -> Tensor:
    """U(low, high) for each image of x (N, C, H, W), drawn on the CPU: (N, 1, 1, 1)."""
    return torch.rand(len(x), 1, 1, 1, dtype=x.dtype).to(x.device) * (high - low) + low


def dsa_color(x: Tensor) -> Tensor:
    """Brightness + U(-.5, .5), then saturation * U(0, 2), then contrast * U(.5, 1.5)."""
    x = x + uniform(x, -0.5, 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * uniform(x, 0, 2)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * uniform(x, 0.5, 1.5)


def dsa_crop(x: Tensor) -> Tensor:
    """Shift by whole pixels, up to an eighth of the side in x and in y."""
    side = x.shape[-1]
    reach = round(side / 8)
    shift = torch.randint(-reach, reach + 1, (2, len(x))).to(x.device)
    dx, dy = 2 * shift / (side - 1)  # `shift` is in pixels; in `warp` the side is 2 long
    return warp(x, tx=dx, ty=dy, mode="nearest")


def dsa_cutout(x: Tensor) -> Tensor:
    """Set a square of half the side to 0; its centre lies anywhere."""
    side = x.shape[-1]
    hole = round(side / 2)
    pixel = torch.arange(side, device=x.device)
    start = torch.randint(0, side + 1 - hole % 2, (2, len(x), 1)).to(x.device) - hole // 2
    rows, columns = (pixel >= start) & (pixel < start + hole)  # (N, side) each
    return x.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)


def dsa_flip(x: Tensor) -> Tensor:
    """Left-right, with probability .5."""
    return torch.where(uniform(x, 0, 1) < 0.5, x.flip(3), x)


def dsa_scale(x: Tensor) -> Tensor:
    """Scale the sampling grid by U(1/1.2, 1.2), in x and in y independently."""
    return warp(x, a=uniform(x, 1 / 1.2, 1.2), d=uniform(x, 1 / 1.2, 1.2))


def dsa_rotate(x: Tensor) -> Tensor:
    """Rotate by U(-15, 15) degrees."""
    angle = uniform(x, -math.pi / 12, math.pi / 12)
    return warp(x, a=angle.cos(), b=-angle.sin(), c=angle.sin(), d=angle.cos())


def warp(x: Tensor, a=1.0, b=0.0, tx=0.0, c=0.0, d=1.0, ty=0.0, mode: str = "bilinear") -> Tensor:
    """The output at (u, v) is x at (a u + b v + tx, c u + d v + ty); both axes run over [-1, 1],
    0 outside. a, ..., ty: a number each, or one for each image."""
    matrix = x.new_empty(len(x), 6)
    for column, entry in enumerate((a, b, tx, c, d, ty)):
        matrix[:, column] = entry.flatten() if isinstance(entry, Tensor) else entry
    grid = F.affine_grid(matrix.view(-1, 2, 3), list(x.shape), align_corners=True)  # (N, H, W, 2)
    return F.grid_sample(x, grid, mode, padding_mode="zeros", align_corners=True)


DSA = [dsa_color, dsa_crop, dsa_cutout, dsa_flip, dsa_scale, dsa_rotate]  # --dsa shortens it


def augment(x: Tensor) -> Tensor:
    """Augments J mini-batches (J, B, C, H, W): each draws one of these kinds for all its images,
    as torch.stack([DSA[k](x_j) for k, x_j in zip(kind, x)]), but all of a kind in one call."""
    kind = torch.randint(len(DSA), (len(x),))
    order = kind.argsort().to(x.device)  # mini-batches of a kind are neighbours
    parts = x[order].split(kind.bincount(minlength=len(DSA)).tolist())
    done = [dsa(part.flatten(0, 1)).view_as(part) for dsa, part in zip(DSA, parts) if len(part)]
    return torch.cat(done)[order.argsort()]  # in the order of x again


# ---- 4. Networks. GroupNorm with one channel per group is instance normalisation ---------


def plain_network(shape, classes: int, layers: list, norm: bool = True) -> nn.Module:
    """Convolutions (width, kernel), each with instance normalisation and ReLU, halvings "avg" or
    "max", a linear layer. shape: (C, H, W) of the images. Raises ValueError if too small."""
    channels, side, _ = shape
    modules = []
    for layer in layers:
        if layer in ("avg", "max"):
            modules.append(nn.AvgPool2d(2) if layer == "avg" else nn.MaxPool2d(2))
            side //= 2
        else:
            width, kernel = layer
            convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2)
            normalisation = nn.GroupNorm(width, width) if norm else nn.Identity()
            modules += [convolution, normalisation, nn.ReLU()]
            channels = width
    if side == 0:
        raise ValueError(f"images of {shape} are too small for this network")
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(channels * side * side, classes))


def convnet(shape, classes: int, width: int = 128) -> nn.Module:
    """The ConvNet of teachers and students (Section 4.1)."""
    depth = max(1, round(math.log2(shape[1])) - 2)  # 3 for 32 pixels a side, 4: 64, 5: 112
    net = plain_network(shape, classes, [(width, 3), "avg"] * depth)
    if (shape, classes, width) == ((3, 32, 32), 10, 128):
        assert len(flat_parameters(net)) == 320_010  # Section 1
    return net


def alexnet(shape, classes: int) -> nn.Module:
    """AlexNet [6] as this field uses it for small images: no stride, no norm, one linear layer."""
    layers = [(128, 5), "max", (192, 5), "max", (256, 3), (192, 3), (192, 3), "max"]
    return plain_network(shape, classes, layers, norm=False)


def vgg11(shape, classes: int) -> nn.Module:
    """VGG11 [89] with a single linear layer."""
    widths = [64, "max", 128, "max", 256, 256, "max", 512, 512, "max", 512, 512, "max"]
    return plain_network(shape, classes, [w if w == "max" else (w, 3) for w in widths])


def resnet18(shape, classes: int) -> nn.Module:
    """ResNet18 [7] for small images: a 3x3 stem without stride or pooling."""
    if shape[1] <= 8:  # its last stage would normalise single pixels, that is, set all to 0
        raise ValueError(f"images of {shape} are too small for this network")
    net = torchvision.models.resnet18(norm_layer=lambda w: nn.GroupNorm(w, w), num_classes=classes)
    net.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    for module in net.modules():  # initialised as the others are, not as by torchvision
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return net


ARCHITECTURES = {"convnet": convnet, "alexnet": alexnet, "vgg11": vgg11, "resnet18": resnet18}

# ---- 5. Training on images: teachers (Section 3.1), evaluation (Section 4.1) -------------


def seed_all(*key) -> None:
    """Seeds PyTorch for one purpose, named by `key`, such as (seed, "segment", 7, 0)."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))


def train(ell: Loss, theta: Tensor, optimizer, images: "ImageSet", epochs: int, batch: int) -> None:
    """Passes over the images in mini-batches with DSA. Updates theta (P,) in place."""
    batch = min(batch, len(images))
    index = minibatches(len(images), batch, epochs * math.ceil(len(images) / batch))
    at_once = max(1, 3 * 2**22 // (batch * images.x[0].numel()))  # mini-batches in 50 MB
    for several in index.to(images.x.device).split(at_once):
        x, y = images[several]
        for x_j, y_j in zip(augment(x), y):
            optimizer.zero_grad()
            ell(theta, x_j, y_j).backward()
            optimizer.step()


def train_teacher(ell: Loss, theta: Tensor, images: "ImageSet", lr: float, batch: int) -> Tensor:
    """theta (P,) after one more epoch, on the CPU. Plain SGD: theta is all the state there is."""
    theta = theta.to(images.x.device, copy=True).requires_grad_()
    train(ell, theta, torch.optim.SGD([theta], lr), images, 1, batch)
    return theta.detach().cpu()


def train_network(ell: Loss, theta: Tensor, images, epochs: int, lr: float, batch: int) -> Tensor:
    """Trains a network of the evaluation from theta (P,) on. The paper is silent; nearly as MTT:
    SGD with momentum .9, weight decay 5e-4, DSA, a tenth of the rate in the second half."""
    theta = theta.to(images.x.device, copy=True).requires_grad_()
    optimizer = torch.optim.SGD([theta], lr, momentum=0.9, weight_decay=5e-4)
    train(ell, theta, optimizer, images, epochs - epochs // 2, batch)
    if epochs > 1:  # `train` does not take 0
        optimizer.param_groups[0]["lr"] = lr / 10
        train(ell, theta, optimizer, images, epochs // 2, batch)
    return theta.detach()


# ---- 6. Normalisation and ZCA (Section 4.2); the real images to begin with ---------------


class Normalisation:
    """Maps uint8 images to network input and back, fitted on training images alone.
    With ZCA whitening z = (x - mean) M, where M = U diag(1 / sqrt(v + eps)) U^T for the covariance
    U diag(v) U^T of the pixels x in [0, 1]; otherwise z = (x - mean) * 1/std for each channel."""

    def __init__(self, mean: Tensor, scale: Tensor):
        self.mean = mean  # (C, H, W); without ZCA (C, 1, 1)
        self.scale = scale  # M (D, D), D = C H W; without ZCA 1/std (C, 1, 1)
        self.zca = scale.dim() == 2

    @classmethod
    def fit(cls, images: Tensor, zca: bool, device="cpu", eps: float = 0.1) -> "Normalisation":
        """images: uint8 (N, C, H, W). eps: as MTT."""
        parts = images.to(device).split(1000)  # floats of all at once would fill the memory
        mean = sum(part.sum(0) for part in parts).double() / len(images) / 255  # (C, H, W)
        if not zca:
            mean = mean.mean((1, 2), keepdim=True)
            squares = sum((part / 255 - mean).square().sum((0, 2, 3)) for part in parts)
            std = (squares / images[:, 0].numel()).sqrt().clamp_min(1e-4)
            return cls(mean.float(), 1 / std[:, None, None].float())
        centred = ((part / 255 - mean).flatten(1).float() for part in parts)
        covariance = sum((x.T @ x).double() for x in centred) / (len(images) - 1)
        v, U = torch.linalg.eigh(covariance)
        M = (U / (v.clamp_min(0) + eps).sqrt()) @ U.T
        return cls(mean.float(), M.float())

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (..., C, H, W) -> network input, float32, on the device."""
        z = torch.empty(images.shape, device=self.mean.device)
        for part, out in zip(images.split(1000), z.split(1000)):
            x = part.to(z.device) / 255 - self.mean
            out.copy_((x.flatten(-3) @ self.scale).view_as(x) if self.zca else x * self.scale)
        return z

    def image_set(self, images: Tensor, labels: Tensor) -> "ImageSet":
        """uint8 (N, C, H, W), (N,), on the device: with ZCA whitened, without it left as bytes."""
        labels = labels.to(self.mean.device)
        if self.zca:
            return ImageSet(self(images), labels)
        return ImageSet(images.to(labels.device), labels, self)

    def inverse(self, z: Tensor) -> Tensor:
        """Network input (N, C, H, W) -> pixels on the scale 0 to 1, not clamped."""
        if self.zca:  # M is symmetric: z = (x - mean) M  <=>  M (x - mean)^T = z^T
            return torch.linalg.solve(self.scale, z.flatten(1).T).T.view_as(z) + self.mean
        return z / self.scale + self.mean


def choose_at_random(images: Tensor, ipc: int) -> Tensor:
    return torch.randperm(len(images))[:ipc]


def real_images(data: "Dataset", normalise: Normalisation, ipc: int, choose=choose_at_random):
    """`ipc` training images of each class, normalised, class after class, and their labels: random
    ones (Algorithm 1, line 1), or those at the indices choose(uint8 images of a class, ipc)."""
    images, labels = data.train
    chosen = []
    for c in range(len(data.classes)):
        members = torch.nonzero(labels == c)[:, 0]
        chosen.append(members[choose(images[members], ipc)])
    index = torch.cat(chosen)
    return normalise(images[index]), labels[index].to(normalise.mean.device)


# ==== The method ends here. What follows serves it: data, files, speed, processes, commands. ======


class UserError(Exception):
    """A mistake that the user can correct: `main` prints it as one line and returns 2."""


# ---- 7. Settings of the commands, where no option is given -------------------------------
# First table: the paper's (Sections 4.1, 4.2, 4.5); lr_teacher, batch_real: MTT's; covid's
# iterations: a guess. Second: MTT's, ZCA too (Section 4.2: always); covid: MTT's for 128 x 128
# pixels. shapes: ours. batch 0: all
PRESETS = """
dataset      teachers epochs lr_teacher batch_real iterations width compile
cifar10           200     50        .01        256       5000   128    True
cifar100          200     50        .01        256       5000   128    True
tinyimagenet      100     50        .01        256       5000   128    True
covid             100     50        .01        256       5000   128    True
shapes              6     10        .02         64        200    32   False

dataset      ipc steps expert_epochs max_start_epoch lr_img lr_alpha alpha batch   zca
cifar10        1    50             2               2    100     1e-7   .01     0  True
cifar10       10    30             2              20    100     1e-5  .001     0  True
cifar10       50    30             2              40   1000     1e-5  .001     0 False
cifar100       1    20             3              20   1000     1e-5   .01     0  True
cifar100      10    20             2              20   1000     1e-5   .01     0 False
cifar100      50    80             2              40   1000     1e-5   .01   125  True
tinyimagenet   1    10             2              10  10000     1e-4   .01     0 False
tinyimagenet  10    20             2              40  10000     1e-4   .01   200 False
covid         20    20             2              10   1000     1e-6   .01     0 False
shapes         1    10             2               4    300     1e-5   .03     0 False
"""


DSA_KINDS = {dsa.__name__.removeprefix("dsa_"): dsa for dsa in DSA}  # choices of --dsa


def preset(name: str, ipc: int, side: int) -> dict:
    """Settings of a dataset (of a folder: CIFAR-10's) at the largest IPC <= ipc, or at its
    smallest; ZCA only up to 32 pixels a side, since its cost grows with the sixth power."""
    settings = {}
    for text in PRESETS.split("\n\n"):
        table = np.genfromtxt(text.splitlines(), dtype=None, names=True, encoding="utf-8")
        if name not in table["dataset"]:
            name = "cifar10"
        rows = [dict(zip(table.dtype.names, row.item())) for row in table[table["dataset"] == name]]
        up_to_ipc = [row for row in rows if row.get("ipc", 0) <= ipc] or rows[:1]
        settings |= up_to_ipc[-1]
    settings["zca"] &= side <= 32
    return settings


# ---- 8. Datasets -------------------------------------------------------------------------


@dataclass
class Dataset:
    """Training and test set: each uint8 images (N, C, H, W), H = W, and int64 labels (N,)."""

    name: str
    classes: list[str]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.train[0].shape[1:])


@dataclass
class ImageSet:
    """Images and labels on a device: x, y = images[index], where x is network input. Stored
    is network input (N, C, H, W) or, with `normalise`, uint8 images, a quarter of the size."""

    x: Tensor
    y: Tensor
    normalise: Normalisation | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index) -> tuple[Tensor, Tensor]:
        x = self.x[index]
        return self.normalise(x) if self.normalise else x, self.y[index]


def load_dataset(name: str, data_dir: Path, size=None, grey=False, only=()) -> Dataset:
    """A dataset of PRESETS or a folder of images, these of the classes `only` (default: all),
    resized to `size` x `size` pixels and, if `grey`, of one channel. Raises UserError."""
    if name in ("cifar10", "cifar100", "shapes"):
        if size or grey or only:
            raise UserError(f"--size, --grey, --classes are for folders of images, not for {name}")
        return make_shapes() if name == "shapes" else load_cifar(name, data_dir)
    folder = user_path(name)
    root = data_dir if name in ("tinyimagenet", "covid") else folder
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; see --dataset and --data-dir in --help")
    if name == "covid":  # COVID-19 Radiography [81]: <class>/images/*
        size = size or 112  # Section 4.1
        grey = True  # ours
    return read_dataset(
        folder.resolve().name, *list_folder(root, only), size, "L" if grey else "RGB"
    )


def load_cifar(name: str, data_dir: Path) -> Dataset:
    """CIFAR-10 or CIFAR-100 [53], downloaded to data_dir on first use (170 MB)."""
    cifar = getattr(torchvision.datasets, name.upper())
    try:
        train = cifar(data_dir)
    except RuntimeError:  # it is not there yet
        try:
            with filelock.FileLock(f"{data_dir}.lock"):  # one process downloads for all
                train = cifar(data_dir, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"there is no complete {data_dir}/{cifar.base_folder}/, and {cifar.url} "
                f"cannot be downloaded: {error}"
            ) from None
    parts = []
    for part in (train, cifar(data_dir, train=False)):
        x = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        parts.append((x, torch.tensor(part.targets)))
    return Dataset(name, train.classes, *parts)


def list_images(folder: Path, only=()) -> tuple[list[str], list]:
    """Classes, all or `only`, and (path, label) of each image in folder/<class>, as torchvision's
    ImageFolder lists them, but without hidden files and the masks of [81]. Prints how many files
    are left out. Raises UserError."""
    inside = sorted(os.listdir(folder))
    found = [c for c in inside if (folder / c).is_dir() and not c.startswith((".", "__MACOSX"))]
    classes = sorted(set(only)) or found
    if len(classes) < 2 or not set(classes) <= set(found):
        raise UserError(
            f"{folder} has no folder of images for "
            f"{sorted(set(classes) - set(found))[:9] or 'two classes or more'}, only {inside[:9]} "
            "(is --dataset or --data-dir one level too high or too deep?)"
        )
    labels = {c: label for label, c in enumerate(classes)}
    files = make_dataset(
        folder,
        labels,
        is_valid_file=lambda path: f"{os.sep}." not in path.removeprefix(str(folder)),
        allow_empty=True,
    )
    suffixes = tuple(Image.registered_extensions())
    images = [
        (path, label)
        for path, label in files
        if path.lower().endswith(suffixes)
        and f"masks{os.sep}" not in path.removeprefix(f"{folder}{os.sep}{classes[label]}").lower()
    ]
    others = set(files) - set(images)
    if others:
        print(f"{len(others)} of {len(files)} files are masks or no images: {min(others)[0]}, ...")
    return classes, images


def list_folder(root: Path, only) -> tuple[list[str], list, list]:
    """Classes, training images, test images of a folder {train,test}/<class>/*, or <class>/*,
    which is split. Tiny ImageNet [80] has val, not test: in classes or, as published, listed in a
    file. Raises UserError."""
    if not (root / "train").is_dir():
        return split(root, *list_images(root, only))
    classes, train = list_images(root / "train", only)
    for name in ("test", "val", "valid", "validation", "val/images"):
        if any((root / name / c).is_dir() for c in classes):
            return classes, train, list_images(root / name, classes)[1]
    annotations = root / "val/val_annotations.txt"
    if not annotations.exists():
        raise UserError(
            f"{root} has {sorted(os.listdir(root))[:9]}, but no test/{classes[0]} (or val/...); "
            f"--dataset {root}/train takes a part of the training images for the test"
        )
    test = []
    for line in annotations.read_text(errors="replace").splitlines():
        row = line.split("\t")  # file, class, bounding box
        if len(row) > 1 and row[1] in classes:
            test.append((str(root / "val/images" / row[0]), classes.index(row[1])))
    return classes, train, test


def split(root: Path, classes: list[str], images: list) -> tuple[list[str], list, list]:
    """Splits each class 8:2 into training and test images, as Section 4.1 does [81], in the order
    of a hash of the file names: the same split everywhere. Raises UserError."""
    folders = {os.path.dirname(path) for path, _ in images}
    if len(folders) > len(classes):  # such as Training/cat, Training/dog
        raise UserError(
            f"{root} must have train/<class>/*, test/<class>/*, or only <class>/*; images are in "
            f"{sorted(folders)[:9]}"
        )
    print(f"{root} has no folder train: a fifth of each class is the test set")
    images.sort(
        key=lambda x: hashlib.sha256(os.fsencode(f"{classes[x[1]]}/{Path(x[0]).name}")).digest()
    )
    train = []
    test = []
    for label in range(len(classes)):
        members = [image for image in images if image[1] == label]
        cut = round(0.8 * len(members))
        train += members[:cut]
        test += members[cut:]
    return classes, train, test


def read_image(path: str, size: int | None, mode: str) -> Tensor:
    """An image file as uint8 (C, H, W), C = 1 for mode "L", 3 for "RGB"."""
    with Image.open(path) as image:
        if image.mode[0] in "IF":  # 16 or 32 bits, which Pillow would clip at 255
            raise ValueError(f"its pixels are of mode {image.mode}; 8-bit images are needed")
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:  # on white, as a page shows it
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(mode)
        if size:
            image = image.resize((size, size), Image.Resampling.BILINEAR)  # antialiased
        return pil_to_tensor(image)


def read_dataset(name: str, classes: list[str], train: list, test: list, size, mode) -> Dataset:
    """Reads lists of (path, label). size, mode: as in `read_image`. Raises UserError."""
    for part, files in (("training", train), ("test", test)):
        empty = sorted(set(classes) - {classes[label] for _, label in files})
        if empty:
            raise UserError(
                f"{name} has no {part} images (.png, .jpg, ...) of {empty[:9]}; where there is no "
                "folder train, a class needs three images or more"
            )
    # a name that is not UTF-8 cannot be drawn, nor be part of a file that torch.load opens
    name, *classes = (x.encode(errors="replace").decode() for x in (name, *classes))
    images = []
    unreadable = []
    for path, _ in tqdm(train + test, f"reading {name}"):  # threads do not help with small files
        try:
            images.append(read_image(path, size, mode))
        except Exception as error:  # OSError, SyntaxError, DecompressionBombError, ...
            unreadable.append(f"{path}: {error}")
            continue
        _, height, width = images[-1].shape
        if images[-1].shape != images[0].shape or height != width:
            raise UserError(
                f"{path} has {width} x {height} pixels, but images must be square and of one size: "
                "--size N makes all N x N"
            )
    if unreadable:
        raise UserError(f"{len(unreadable)} of the images cannot be read: {unreadable[:5]}")
    parts = [len(train), len(test)]
    y = torch.tensor([label for _, label in train + test])
    return Dataset(name, classes, *zip(torch.stack(images).split(parts), y.split(parts)))


SHAPES = {  # positive inside the figure; (u, v) are its own coordinates, its radius is 1
    "disk": lambda u, v: 1 - np.hypot(u, v),
    "ring": lambda u, v: 0.22 - abs(np.hypot(u, v) - 0.78),
    "square": lambda u, v: 0.85 - np.maximum(abs(u), abs(v)),
    "triangle": lambda u, v: 0.5 - np.maximum(-v, 0.866 * abs(u) + 0.5 * v),
    "cross": lambda u, v: np.fmin(0.28 - np.fmin(abs(u), abs(v)), 1 - np.fmax(abs(u), abs(v))),
    "flower": lambda u, v: 0.65 + 0.35 * np.cos(5 * np.arctan2(v, u)) - np.hypot(u, v),
    "stripes": lambda u, v: np.sin(6 * u) / 6,
    "checker": lambda u, v: np.sin(5 * u) * np.sin(5 * v) / 4,
    "dots": lambda u, v: (np.cos(6 * u) + np.cos(6 * v) - 0.8) / 8,
    "waves": lambda u, v: np.sin(8 * np.hypot(u, v)) / 8,
}


def make_shapes(train: int = 200, test: int = 50, seed: int = 0) -> Dataset:
    """Ten classes of drawn figures: no single pixel and no colour gives the class away."""
    rng = np.random.default_rng(seed)
    grid = np.linspace(-1, 1, 32)

    def sample(low, high, channels=1):
        return rng.uniform(low, high, (train + test, channels, 1, 1))

    images = []  # (train + test, 3, 32, 32) of each class
    for figure in SHAPES.values():
        x = grid - sample(-0.3, 0.3)  # (train + test, 1, 1, 32)
        y = grid[:, None] - sample(-0.3, 0.3)  # (train + test, 1, 32, 1)
        tilt = sample(-0.3, 0.3)
        scale = sample(0.4, 0.8)
        u = (np.cos(tilt) * x - np.sin(tilt) * y) / scale
        v = (np.sin(tilt) * x + np.cos(tilt) * y) / scale
        inside = (figure(u, v) * scale * 32 / 2 + 0.5).clip(0, 1)  # with soft edges
        image = sample(0, 0.5, 3) + inside * sample(0.2, 0.5, 3)
        image *= 1 + sample(-0.3, 0.3) * x + sample(-0.3, 0.3) * y
        image += rng.normal(0, 0.15, image.shape)
        images.append(torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)))
    x, test_x = torch.stack(images).split([train, test], 1)  # (10, train, 3, 32, 32), ...
    labels = torch.arange(len(SHAPES))
    train_part = x.flatten(0, 1), labels.repeat_interleave(train)
    test_part = test_x.flatten(0, 1), labels.repeat_interleave(test)
    return Dataset("shapes", list(SHAPES), train_part, test_part)


# ---- 9. Files, speed, processes ----------------------------------------------------------

VERSION = 5  # of the files that are written
CHECKPOINT_SECONDS = 60  # at least, from one checkpoint to the next


def one_line(error: Exception) -> str:
    """The type of an error and the first sentence of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".split(". ")[0][:250]


def save(content: dict, path: Path) -> None:
    """torch.save to a temporary file, then an atomic rename: a kill leaves `path` complete."""
    temporary = path.with_suffix(".tmp")
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        temporary.write_bytes(buffer.getbuffer())  # raises OSError, which torch would replace
        os.replace(temporary, path)
    except OSError as error:  # a full disk: its error names no file
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from None


def load(path: Path, settings: dict, hint="see README", device="cpu", mmap: bool = False) -> dict:
    """The dictionary that `save` wrote; no code in the file is run. Its settings must agree with
    `settings`; any but the version may be missing. hint: what to do if there is no such file.
    Raises UserError."""
    try:
        content = torch.load(path, device, mmap=mmap, weights_only=True)
        found = {**settings, "version": None, **content.get("settings", {})}
    except FileNotFoundError:
        raise UserError(f"there is no {path}; {hint}") from None
    except Exception as error:  # of the system, or one of the many that torch raises
        raise UserError(
            f"cannot read {path}, which must be a whole file by torch.save with a dictionary of "
            f"tensors, see README: {one_line(error)}"
        ) from None
    for name, x in settings.items():
        if found[name] != x:
            raise UserError(
                f"{path} was made with {name} {found[name]!s:.50}, not {x!s:.50}; "
                "give the same options and images, or another --runs (for results, or --name)"
            )
    return content


def lock(folder: Path, args):
    """Locks a folder for a `with` block. Raises UserError if another run has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(folder / f".lock{args.rank}").acquire(timeout=0)
    except (OSError, RuntimeError) as error:  # Timeout, or a file system without locks
        raise UserError(
            f"cannot lock {folder} (does another run write to it? see --runs): {error}"
        ) from None


def torch_compile(function, _):
    """A loss or a `Student`, to be compiled when it is first called."""
    torch.compiler.reset()  # it gives up after eight recompilations of one function
    if not isinstance(function, Student):
        return torch.compile(function, dynamic=False)
    student = copy.copy(function)
    student.step = torch.compile(function.step, dynamic=False)
    student.step_back = torch.compile(function.step_back, dynamic=False)
    return student


def cuda_graph(function, inputs):
    """A function as a CUDA graph: for fixed shapes, each call overwrites the last result."""
    gc.collect()  # an old graph that Python frees only during the capture would spoil it
    return torch.cuda.make_graphed_callables(function, copy.deepcopy(inputs))


def accelerated(function, inputs: tuple, args):
    """A loss or a `Student`, compiled, and on a GPU captured as a CUDA graph. inputs: examples,
    all leaves. What fails is left out with a warning."""
    if not args.compile:
        return function
    ways = []
    if isinstance(function, Student) or args.command != "distill":
        ways.append(torch_compile)  # not within distill: its reset would undo the compiled student
    if inputs[0].is_cuda:
        ways.append(cuda_graph)
    for way in ways:
        print(f"{way.__name__}: up to a minute (--no-compile leaves it out)", file=sys.stderr)
        try:
            faster = way(function, inputs)
            # square(): the gradient of a mere sum() has stride 0, and is compiled for separately
            faster(*inputs).square().sum().backward()
            function = faster
        except Exception as error:  # no C++ compiler, no Triton, an unsupported Python, ...
            print(f"without {way.__name__}: {one_line(error)}", file=sys.stderr)
    return function


def fast_loss(net: nn.Module, images: ImageSet, args) -> Loss:
    """The loss of a network, made faster for mini-batches of these images."""
    inputs = (flat_parameters(net).requires_grad_(), *images[: args.batch_real])
    return accelerated(cross_entropy(net, args.precision), inputs, args)


def fast_student(net: nn.Module, d: Distillation, m: Matching, args) -> Student:
    """The `Student` of a network, made faster for mini-batches of the distilled images."""
    J = m.J if d.images.is_cuda else 2  # a CUDA graph is of all J steps
    x, y = student_batches(d.images, d.labels, m.batch, J)
    learned = [z.detach().clone().requires_grad_() for z in (flat_parameters(net), d.alpha, x)]
    return accelerated(Student(cross_entropy(net, args.precision)), (*learned, y), args)


def tune(device: torch.device) -> None:
    """Lets cuDNN time its convolutions and choose, and glibc's malloc keep large freed blocks;
    else the kernel would clear each page before reuse, up to half of a step's time."""
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current one
    elif sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
            libc.mallopt(-8, 1)  # M_ARENA_MAX: what one thread frees is for all


def distributed() -> bool:
    """Whether torchrun started several processes. (Some builds of torch cannot.)"""
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(*tensors: Tensor | None) -> None:
    """In place, over the processes of torchrun; each waits for all."""
    if distributed():
        for x in tensors:
            if x is not None:  # only IADD has a gradient with respect to W
                dist.all_reduce(x)


def broadcast(*tensors: Tensor) -> None:
    """In place, from rank 0 to the other processes of torchrun."""
    if distributed():
        for x in tensors:
            dist.broadcast(x, 0)


# ---- 10. Commands ------------------------------------------------------------------------


def new_network(arch: str, data: Dataset, args) -> nn.Module:
    """A network on the device. Raises UserError if the images are too small for it."""
    sizes = {"width": args.width} if arch == "convnet" else {}
    try:
        return ARCHITECTURES[arch](data.shape, len(data.classes), **sizes).to(args.device)
    except ValueError as error:
        raise UserError(f"{arch}: {error}") from None


def dataset_and_settings(args) -> tuple:
    """Loads the dataset, fills in the options that were not given, from the preset, and sets
    DSA. Returns the dataset, the settings that teachers and results share, and the folder of both.
    Raises UserError."""
    only_needed_epochs = args.command == "teachers" and args.ipc and not args.epochs
    args.ipc = args.ipc or 1
    data = load_dataset(args.dataset, args.data_dir, args.size, args.grey, args.classes)
    settings = preset(args.dataset, args.ipc, data.shape[1])
    if args.command == "distill":
        del settings["teachers"]  # all there are
    for name, value in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.name = args.name or f"ipc{args.ipc}_{args.method}_seed{args.seed}"
    if only_needed_epochs:  # those that distill reads
        args.epochs = args.max_start_epoch - 1 + args.expert_epochs
    kinds = [kind for kind in DSA_KINDS if kind in args.dsa]
    DSA[:] = [DSA_KINDS[kind] for kind in kinds]  # for `augment`
    print(f"{data.name}: {len(data.train[1])} training and {len(data.test[1])} test images")
    n, c = data.train[1].bincount().min(0)
    if args.ipc > n:
        raise UserError(f"IPC {args.ipc}: {data.classes[c]} has only {n} training images")
    shared = {
        "version": VERSION,
        "dataset": data.name,
        "images_checksum": zlib.crc32(data.train[1].numpy(), zlib.crc32(data.train[0].numpy())),
        "classes": data.classes,
        "shape": data.shape,
        "dsa": " ".join(kinds),
        "zca": args.zca,
        "width": args.width,
    }
    name = "-".join([data.name, *(args.classes and data.classes)])[:60]
    if args.size:
        name += f"-{args.size}px"
    if args.grey:
        name += "-grey"
    return data, shared, args.runs / f"{name}_{'zca' if args.zca else 'std'}_w{args.width}"


def fit_normalisation(data: Dataset, args) -> Normalisation:
    """Fitted on the training images. All processes use rank 0's, since the last bits of an
    eigendecomposition depend on the number of threads."""
    normalise = Normalisation.fit(data.train[0], args.zca, args.device)
    broadcast(normalise.mean, normalise.scale)
    return normalise


def same_options(args, command: str) -> str:
    """The command line of another command with the options of this one."""
    return f"python {shlex.join([sys.argv[0], command, *args.options])}"


def command_teachers(args) -> None:
    """Train teachers on the real data and keep their parameters at each epoch (Section 3.1)."""
    data, settings, folder = dataset_and_settings(args)
    settings |= {
        "lr_teacher": args.lr_teacher,
        "batch_real": args.batch_real,
        "precision": args.precision,
    }
    print(f"settings: {settings}, {args.epochs} epochs; {args.machine}")
    net = new_network("convnet", data, args)
    with lock(folder / "teachers", args):
        todo = []
        for k in range(args.rank, args.teachers, args.ranks):  # teachers of this process
            path = folder / f"teachers/{k:03d}.pt"
            if path.exists() and len(load(path, settings, mmap=True)["thetas"]) > args.epochs:
                continue  # complete: it begins with theta before training
            todo.append(path)
        remaining = torch.tensor(len(todo))
        sum_over_ranks(remaining)
        print(f"{folder}/teachers: {remaining} of {args.teachers} are to be trained")
        if remaining == 0:
            return
        normalise = fit_normalisation(data, args)
        images = normalise.image_set(*data.train)
        test = normalise.image_set(*data.test)
        ell = fast_loss(net, images, args)
        for path in todo:
            seed = (0, "teacher", int(path.stem))  # not --seed: results share teachers
            seed_all(*seed)
            thetas = [flat_parameters(new_network("convnet", data, args)).cpu()]
            if path.exists():
                thetas = list(load(path, settings)["thetas"])
            saved = time.time()
            epochs = range(len(thetas) - 1, args.epochs)
            for epoch in tqdm(epochs, f"teacher {path.stem}", leave=False):
                seed_all(*seed, "epoch", epoch)
                theta = train_teacher(ell, thetas[-1], images, args.lr_teacher, args.batch_real)
                if not theta.isfinite().all():
                    raise UserError(
                        f"teacher {path.stem} diverged: lower --lr-teacher, with another --runs"
                    )
                thetas.append(theta)
                if epoch + 1 == args.epochs or time.time() > saved + CHECKPOINT_SECONDS:
                    save({"thetas": torch.stack(thetas), "settings": settings}, path)
                    saved = time.time()
            hits = confusion_matrix(net, theta.to(args.device), test).trace()
            tqdm.write(f"teacher {path.stem}: {100 * hits / len(test):.1f} % test accuracy")


def load_teachers(args, folder: Path, shared: dict) -> list[Tensor]:
    """The epochs of each teacher that will be read, (epochs + 1, P), memory-mapped."""
    epochs = args.max_start_epoch - 1 + args.expert_epochs
    paths = sorted(folder.glob("[0-9][0-9][0-9].pt"))[: args.teachers]
    teachers = [load(path, shared, mmap=True)["thetas"][: epochs + 1] for path in paths]
    ready = sum(len(thetas) > epochs for thetas in teachers)
    needed = args.teachers or len(paths) or 1
    if ready < needed:
        hint = f"run first: {same_options(args, 'teachers')} --epochs {epochs}"
        if paths:  # otherwise as many as the preset says
            hint += f" --teachers {needed}"
        raise UserError(f"{folder} has {ready} of {needed} teachers of {epochs} epochs; {hint}")
    return teachers


def matching_settings(args, N: int) -> Matching:
    """From the names of the options to the paper's. N: number of distilled images."""
    return Matching(
        J=args.steps,
        K=args.expert_epochs,
        max_start=args.max_start_epoch,
        batch=min(args.batch or N, N),
        alpha=args.alpha,
        lr_alpha=args.lr_alpha,
        lr_w=args.lr_w,
        lr_img=args.lr_img,
        S=args.segments,
        method=args.method,
        epsilon=args.epsilon,
        seed=args.seed,
    )


def command_distill(args) -> None:
    """Distil a dataset into a few images per class (Algorithm 1)."""
    data, settings, folder = dataset_and_settings(args)
    out = folder / args.name
    teachers = load_teachers(args, folder / "teachers", settings)
    m = matching_settings(args, args.ipc * len(data.classes))
    settings |= {
        **vars(m),
        "ipc": args.ipc,
        "precision": args.precision,
        "teachers": len(teachers),
        "teacher_checksum": zlib.crc32(torch.stack([thetas[-1] for thetas in teachers]).numpy()),
    }
    print(f"settings: {settings}, {args.iterations} iterations; {args.machine}")
    with lock(out, args):
        net = new_network("convnet", data, args)
        P = len(flat_parameters(net))
        d, result = start_or_resume(args, data, m, P, settings, out / "distilled.pt")
        if d.t >= args.iterations:
            print(f"{out}/distilled.pt is complete: iteration {d.t}")
            return
        normalise = Normalisation(result["mean"], result["scale"])
        student = fast_student(net, d, m, args)
        segments = range(args.rank, m.S, args.ranks)  # of this process
        losses = []
        saved = time.time()
        bar = tqdm(range(d.t + 1, args.iterations + 1), initial=d.t, total=args.iterations)
        for t in bar:  # Algorithm 1, lines 3 and 15
            losses.append(iteration(d, student, teachers, m, segments))  # lines 4-14
            last = t == args.iterations
            evaluates = args.eval_every and t % args.eval_every == 0
            if t % 10 > 0 and not last and not evaluates:
                continue  # reading a number waits for the GPU
            row = log_row(d, losses)
            result["log"].append(row)
            losses = []
            bar.set_postfix(loss=row[2], alpha=row[3], refresh=False)
            if evaluates:
                images = ImageSet(d.images.detach(), d.labels)
                source = TrainingSet("distilled", normalise, d.alpha.item(), images, t)
                evaluate(args, data, source, "convnet", out)
            if args.rank > 0:
                continue
            if last or t % (10 * math.ceil(args.iterations / 200)) == 0:  # at most 20 times
                draw(d.images.detach(), normalise, args.ipc, out / f"images_{t:05d}.png")
            if last or time.time() > saved + CHECKPOINT_SECONDS:
                save_checkpoint(d, result, out / "distilled.pt")
                saved = time.time()
    print(f"{out}/distilled.pt is at iteration {d.t}, alpha {d.alpha.item():.5f}")


def start_or_resume(args, data: Dataset, m: Matching, P: int, settings: dict, path: Path):
    """A distillation, new or as in the checkpoint at `path`, and what else that holds."""
    exists = torch.tensor(path.exists())
    broadcast(exists)  # rank 0 may be quicker than others, and write it
    if exists:
        result = load(path, settings, device=args.device)
        if len(result["W"]) != P:
            raise UserError(f"{path} has a W not of length {P}; give another --name")
        d = Distillation(result["images"], result["labels"], P, m)
        d.load_state_dict(result, strict=False)  # which holds more than that
        d.optimizer.load_state_dict(result["optimizer"])
        d.t = result["iteration"]
        return d, result
    seed_all(args.seed, "distill")
    normalise = fit_normalisation(data, args)
    images, labels = real_images(data, normalise, args.ipc)  # Algorithm 1, line 1
    broadcast(images)
    result = {
        "settings": settings,
        "machine": args.machine,
        "mean": normalise.mean,
        "scale": normalise.scale,
        "real": images[:: args.ipc][:20].clone(),  # the first of each class, for `plot`
        "log": [],
    }
    d = Distillation(images, labels, P, m)
    if args.rank == 0:
        draw(images, normalise, args.ipc, path.parent / "images_00000.png")
        save_checkpoint(d, result, path)
    return d, result


def save_checkpoint(d: Distillation, result: dict, path: Path) -> None:
    """What `distill` resumes from, and `eval` and `plot` read."""
    state = {"iteration": d.t, "optimizer": d.optimizer.state_dict()}
    save(result | d.state_dict() | state, path)


LOG = ("iteration", "time", "loss", "alpha", "W_min", "W_median", "W_mean")


def log_row(d: Distillation, losses: list[Tensor]) -> list[float]:
    """A row of the log; its loss is the mean since the row before. Raises UserError."""
    loss = float(sum(losses) / len(losses))
    if not (flat_parameters(d).isfinite().all() and d.alpha > 0):
        raise UserError(
            f"diverged by iteration {d.t} (loss {loss:.4g}, alpha {d.alpha.item():.4g}); the last "
            "checkpoint is kept: lower the learning rates and give the new run another --name"
        )
    W = d.W
    return [d.t, time.time(), loss, *(x.item() for x in (d.alpha, W.min(), W.median(), W.mean()))]


def draw(images: Tensor, normalise: Normalisation, ipc: int, path: Path) -> None:
    """The images as a person sees them, a class in each row; at IPC 1 ten (Fig. 4, 5, 8)."""
    shown = math.ceil(1000 * ipc / len(images))  # of each class: a picture of 10,000 takes 6 GB
    images = images.unflatten(0, (-1, ipc))[:, :shown]  # (classes, shown, C, H, W)
    pixels = normalise.inverse(images.flatten(0, 1)).clamp(0, 1)
    pixels = F.interpolate(pixels, scale_factor=math.ceil(96 / pixels.shape[-1]))
    nrow = images.shape[1] if ipc > 1 else 10
    torchvision.utils.save_image(pixels, path, nrow=nrow, padding=4, pad_value=1)


@torch.no_grad()
def herding(net: nn.Sequential, theta: Tensor, normalise, images: Tensor, ipc: int) -> Tensor:
    """Herding [83]: indices (ipc,) into uint8 images (N, C, H, W), by the inputs of the last layer
    of a trained network, here the first teacher after its last epoch."""
    nn.utils.vector_to_parameters(theta.to(normalise.mean.device), net.parameters())
    features = torch.cat([net[:-1](x) for x in normalise(images).split(500)])  # (N, features)
    chosen = []
    for n in range(1, ipc + 1):
        means = (features[chosen].sum(0) + features) / n  # of those chosen and one more
        distance = (features.mean(0) - means).norm(dim=1)
        distance[chosen] = math.inf
        chosen.append(distance.argmin().item())
    return torch.tensor(chosen)


SETS = ["distilled", "random", "herding", "full"]


@dataclass
class TrainingSet:
    """What networks are trained on. on: one of SETS; lr: the learning rate, unless --lr is given;
    iteration: of the distilled images."""

    on: str
    normalise: Normalisation
    lr: float
    images: ImageSet
    iteration: int | None = None


def command_eval(args) -> None:
    """Train fresh networks on the distilled images, test them on real ones (Section 4.1)."""
    if args.distilled:
        args.name = args.name or args.distilled.stem
    data, shared, folder = dataset_and_settings(args)
    for arch in args.arch:
        new_network(arch, data, args)  # raises if the images are too small for it
    if "herding" in args.on:
        hint = f"run first: {same_options(args, 'teachers')} --teachers 1"
        theta = load(folder / "teachers/000.pt", shared, hint)["thetas"][-1]
        net = new_network("convnet", data, args)
    out = folder / args.name
    if "distilled" in args.on:
        distilled = load_distilled(args, data, shared, out)
        normalise = distilled.normalise
    else:
        normalise = fit_normalisation(data, args)
    out.mkdir(parents=True, exist_ok=True)
    converged = True
    for on in args.on:
        if on == "distilled":
            source = distilled
        else:
            choose = choose_at_random
            if on == "herding":
                choose = functools.partial(herding, net, theta, normalise)
            if on == "full":
                images = normalise.image_set(*data.train)
            else:
                images = ImageSet(*real_images(data, normalise, args.ipc, choose))
            source = TrainingSet(on, normalise, args.lr_teacher, images)
        for arch in args.arch:
            converged &= evaluate(args, data, source, arch, out)
    if not converged:
        raise UserError("networks diverged, see above: lower --lr")


def load_distilled(args, data: Dataset, shared: dict, out: Path) -> TrainingSet:
    """The result of `distill` with these options, or the file of --distilled. It needs `images`,
    normalised, (N, C, H, W), `labels`, class numbers (N,) or probabilities (N, classes), and
    `alpha` or --lr; it may have `mean` and `scale`, `iteration`, `settings`. Raises UserError."""
    path = args.distilled or out / "distilled.pt"
    wanted = {**shared, "ipc": args.ipc}
    hint = f"run first: {same_options(args, 'distill')}"
    if args.distilled:  # perhaps of another width, version or program
        wanted = {key: wanted[key] for key in ("classes", "dsa", "zca", "ipc")}
        hint = "see --distilled"
    result = load(path, wanted, hint, args.device)
    n = len(data.classes)
    N = args.ipc * n
    normalise = None
    try:
        images = torch.as_tensor(result["images"], device=args.device).detach()
        labels = torch.as_tensor(result["labels"], device=args.device).detach()
        alpha = args.lr or float(result["alpha"])
        soft = labels.dim() == 2
        if not (
            images.shape == (N, *data.shape)
            and labels.shape in ((N,), (N, n))
            and images.is_floating_point()
            and (soft or not labels.is_floating_point())
            and 0 <= labels.min() <= labels.max() < n
            and alpha > 0
        ):
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}, labels {labels.dtype} "
                f"{tuple(labels.shape)} from {labels.min()} to {labels.max()}, alpha {alpha:.4g}"
            )
        if "mean" in result or "scale" in result:
            normalise = Normalisation(result["mean"], result["scale"])
            normalise(data.test[0][:1])  # raises if their shapes are wrong
    except Exception as error:  # of many types, since the file may be anybody's
        raise UserError(
            f"{path}: {one_line(error)}; needed are images {(N, *data.shape)}, normalised "
            f"floats, N = IPC x classes; labels {(N,)}, ints below {n}, or {(N, n)}, "
            "probabilities; alpha above 0, or --lr; mean and scale (C, 1, 1) or neither; see README"
        ) from None
    print(f"{path}: iteration {result.get('iteration', 'unknown')}")
    images = ImageSet(images.float(), labels.float() if soft else labels.long())
    normalise = normalise or fit_normalisation(data, args)
    return TrainingSet("distilled", normalise, alpha, images, result.get("iteration"))


@torch.no_grad()
def confusion_matrix(net: nn.Module, theta: Tensor, images: ImageSet) -> Tensor:
    """Entry (r, c): number of images of class r that the network classifies as c."""
    nn.utils.vector_to_parameters(theta, net.parameters())
    scores = torch.cat([net(images[k : k + 250][0]) for k in range(0, len(images), 250)])
    n = scores.shape[1]  # of classes
    return torch.bincount(n * images.y + scores.argmax(1), minlength=n * n).view(n, n)


def evaluate(args, data: Dataset, source: TrainingSet, arch: str, out: Path) -> bool:
    """Trains new networks on the images ("random": others each time), tests them, prints the
    accuracy and appends it to results.jsonl. Returns False if a network diverged."""
    began = time.time()
    images = source.images
    lr = args.lr or source.lr
    test = source.normalise.image_set(*data.test)
    epochs = args.eval_epochs or (args.epochs if source.on == "full" else 1000)
    net = new_network(arch, data, args)
    ell = fast_loss(net, images, args)
    classes = len(data.classes)
    matrices = torch.zeros(args.nets, classes, classes, dtype=torch.int64)
    for k in tqdm(range(args.rank, args.nets, args.ranks), f"{arch} on {source.on}", leave=False):
        seed_all(args.seed, "eval", source.on, arch, k)
        theta = flat_parameters(new_network(arch, data, args))
        if source.on == "random":
            images = ImageSet(*real_images(data, source.normalise, args.ipc))
        theta = train_network(ell, theta, images, epochs, lr, args.batch_real)
        if not theta.isfinite().all():
            break  # its matrix stays 0
        matrices[k] = confusion_matrix(net, theta, test)
    sum_over_ranks(matrices)
    if not matrices.sum((1, 2)).all():
        tqdm.write(f"{source.on:<10}{arch:<9}diverged at the learning rate {lr:.4g}")
        return False
    scores = [100 * matrix.trace().item() / len(test) for matrix in matrices]
    row = {
        "on": source.on,
        "file": str(args.distilled or ""),
        "arch": arch,
        "ipc": len(images) // classes,
        "iteration": source.iteration,
        "lr": lr,
        "lr_given": args.lr is not None,
        "epochs": epochs,
        "seed": args.seed,
        "precision": args.precision,
        "mean": np.mean(scores),
        "std": np.std(scores, ddof=1) if len(scores) > 1 else 0.0,
        "accuracies": scores,
        "seconds": time.time() - began,
        "confusion": matrices.sum(0).tolist(),
    }
    tqdm.write(
        f"{source.on:<10}{arch:<9}{row['mean']:5.1f} ± {row['std']:.1f} % ({args.nets} networks, "
        f"{epochs} epochs, learning rate {lr:.5f}, {row['seconds']:.0f} s)"
    )
    if args.rank == 0:
        append_line(json.dumps(row), out / "results.jsonl")
    return True


def append_line(line: str, path: Path) -> None:
    """Appends a line to a file, also after an incomplete one, which a full disk may leave."""
    with open(path, "a+") as file:
        file.seek(0)
        if file.read()[-1:].strip():
            file.write("\n")
        file.write(line + "\n")


def command_plot(args) -> None:
    """Draw curves of a distillation, its images before and after, and an animated GIF."""
    folder = args.folder
    result = load(folder / "distilled.pt", {"version": VERSION}, "distill makes it")
    log = np.array(result["log"]).reshape(-1, len(LOG))
    np.savetxt(folder / "log.csv", log, "%.17g", ",", header=",".join(LOG), comments="")
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # without incomplete ones
    draw_curves(result, log, rows, folder / "plot.png")
    draw_pairs(result, folder / "pairs.png")
    draw_gif(sorted(folder.glob("images_*.png")), folder / "evolution.gif")
    print(f"{folder}: log.csv, plot.png, pairs.png, evolution.gif")


def draw_curves(result: dict, log: np.ndarray, rows: list[dict], path: Path) -> None:
    """The log (rows, columns), evaluations, mismatch and 1 - W by parameter (Fig. 1, 6, 7)."""
    parameter = "parameter, from the first layer on"
    panels = [
        ("iteration", "loss, Eq. (9)", log[:, 0], log[:, 2]),
        ("iteration", "alpha, learning rate of the student", log[:, 0], log[:, 3]),
        ("iteration", "1 - W_min, 1 - W_median, 1 - W_mean", log[:, 0], 1 - log[:, 4:]),
        (parameter, "|student - teacher|, last iteration", result["mismatch"].abs()),
        (parameter, "1 - W", 1 - result["W"]),
    ]
    figure = Figure((18, 8), layout="constrained")
    *axes, accuracy = figure.subplots(2, 3).ravel()
    for ax, (xlabel, ylabel, *curve) in zip(axes, panels):
        ax.plot(*curve, linewidth=0.5)
        ax.set(xlabel=xlabel, ylabel=ylabel)
    axes[2].legend(LOG[4:])
    for row in rows:
        if row["on"] == "distilled" and row["arch"] == "convnet" and not row["file"]:
            color = "C1" if row["lr_given"] else "C0"
            accuracy.errorbar(row["iteration"], row["mean"], row["std"], fmt="o", color=color)
    accuracy.set(xlabel="iteration", ylabel="test accuracy of ConvNets, % (orange: --lr)")
    figure.savefig(path)


def draw_pairs(result: dict, path: Path) -> None:
    """The first image of each class (at most 20), real above distilled."""
    real = result["real"]
    n = len(real)
    distilled = result["images"][:: result["settings"]["ipc"]][:n]
    pixels = Normalisation(result["mean"], result["scale"]).inverse(torch.cat([real, distilled]))
    grid = torchvision.utils.make_grid(pixels.clamp(0, 1), nrow=n, padding=1, pad_value=1)
    figure = Figure((n + 1, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid.permute(1, 2, 0), extent=(0, n, 0, 2))
    axes.set_xticks(
        np.arange(n) + 0.5, result["settings"]["classes"][:n], rotation=30, parse_math=False
    )
    axes.set_yticks([0.5, 1.5], ["distilled", "real"])
    figure.savefig(path)


def draw_gif(pictures: list[Path], path: Path) -> None:
    """An animated GIF of images_<iteration>.png."""
    frames = []
    for picture in pictures:
        frame = Image.open(picture)
        frame.thumbnail((1100, 1100))
        frame = ImageOps.expand(frame, (0, 14, 0, 0), "white")
        ImageDraw.Draw(frame).text((4, 2), picture.stem.replace("images_", "iteration "), "black")
        frames.append(frame)
    if frames:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=250, loop=0)


# ---- 11. Command line --------------------------------------------------------------------


def between(low: float, high: float, kind: type = float):
    """An argparse type: a number from `low` to `high`."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)

    return number


def user_path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # a shell leaves the ~ of --runs=~/x


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of teachers, distill, eval. Each takes all and ignores the others'."""
    switch = argparse.BooleanOptionalAction
    whole = between(1, 99999, int)
    rate = between(0, 1e30)
    above_zero = between(1e-12, 1e30)
    add = parser.add_argument_group("data and network (all three commands)").add_argument
    add("--dataset", default="cifar10", help="preset below or folder of images (cifar10)")
    add("--data-dir", type=user_path, default="data", help="folder for CIFAR, of covid, ... (data)")
    add("--classes", nargs="+", default=[], help="for folders of images: classes to use (all)")
    add("--size", type=between(1, 512, int), help="pixels a side to resize to (covid: 112)")
    add("--grey", action="store_true", help="read folders of images as grey (covid: always)")
    add("--zca", action=switch, help="ZCA whitening (preset), else per-channel normalisation")
    add("--dsa", nargs="+", choices=DSA_KINDS, default=DSA_KINDS, help="augmentations (all)")
    add("--ipc", type=whole, help="distilled images per class (1)")
    add("--width", type=whole, help="channels of the ConvNet (preset; paper: 128)")
    add = parser.add_argument_group("files and machine (all three commands)").add_argument
    add("--runs", type=user_path, default="runs", help="folder of everything written (runs)")
    add("--name", help="name of the result's folder (ipc<IPC>_<method>_seed<seed>)")
    add("--seed", type=int, default=0, help="random seed of everything but the teachers (0)")
    add("--device", help="device: cpu, cuda, cuda:1, ... (cuda if there is one)")
    text = "in float32, CUDA convolves in TF32 (default: bf16 if the hardware has it)"
    add("--precision", choices=["float32", "bf16"], help=text)
    add("--compile", action=switch, help="torch.compile and CUDA graphs (all but shapes)")
    add = parser.add_argument_group("teachers").add_argument
    add("--teachers", type=between(1, 999, int), help="number (preset; distill: all there are)")
    add("--epochs", type=whole, help="epochs of each (preset; with --ipc those distill needs)")
    add("--lr-teacher", type=above_zero, help="learning rate of SGD without momentum (preset)")
    add("--batch-real", type=whole, help="batch size, in evaluations too (preset)")
    add = parser.add_argument_group("distill").add_argument
    add("--method", choices=["iadd", "mtt", "ddpp"], default="iadd", help="method (iadd)")
    add("--iterations", type=whole, help="number of iterations T (preset; paper: 5000)")
    add("--steps", type=whole, help="steps J of a student (preset)")
    add("--expert-epochs", type=whole, help="teacher epochs K from start to target (preset)")
    add("--max-start-epoch", type=whole, help="bound I+ of start epochs, i < I+ (preset)")
    add("--segments", type=whole, default=1, help="segments S to average over (1)")
    add("--batch", type=between(0, 99999, int), help="batch size (preset; 0: all images)")
    add("--alpha", type=above_zero, help="initial learning rate of the student (preset)")
    add("--lr-alpha", type=rate, help="learning rate of alpha, mu in Eq. (10) (preset)")
    add("--lr-w", type=rate, default=1e-4, help="learning rate of W, eta in Eq. (11) (1e-4)")
    add("--lr-img", type=rate, help="learning rate of the images, zeta in Eq. (12) (preset)")
    add("--epsilon", type=between(0, 1), default=0.1, help="fraction that ddpp drops (0.1)")
    add("--eval-every", type=whole, help="iterations from one evaluation to the next (none)")
    add = parser.add_argument_group("eval (distill --eval-every: a ConvNet)").add_argument
    add("--on", nargs="+", choices=SETS, default=SETS[:1], help="training images (distilled)")
    add("--arch", nargs="+", choices=ARCHITECTURES, default=["convnet"], help="networks (convnet)")
    add("--nets", type=whole, default=5, help="number of networks of each kind (5)")
    add("--eval-epochs", type=whole, help="epochs of each (1000; on full --epochs)")
    add("--lr", type=above_zero, help="learning rate (alpha; on real images --lr-teacher)")
    add("--distilled", type=user_path, metavar="FILE", help="file to evaluate instead of a result")


COMMANDS = {
    "teachers": command_teachers,
    "distill": command_distill,
    "eval": command_eval,
    "plot": command_plot,
}


def make_parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.set_defaults(rank=0, ranks=1)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        text = function.__doc__
        command = commands.add_parser(name, help=text, description=text, formatter_class=form)
        if name == "plot":
            command.add_argument("folder", type=user_path, help="folder of a result of distill")
        else:
            command.epilog = PRESETS
            add_options(command)
    return parser


def set_up_device(args) -> None:
    """Chooses device and precision, and joins the processes of torchrun. Raises UserError."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun
    if launched:
        args.rank = int(os.environ["RANK"])
        args.ranks = int(os.environ["WORLD_SIZE"])
    if args.command == "distill" and args.ranks > args.segments:
        raise UserError(f"{args.ranks} processes need --segments {args.ranks} or more")
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64).item()  # W is float64
    except Exception as error:  # whatever a missing backend raises
        raise UserError(
            f"--device {name} (try cpu, or fewer GPUS): {' '.join(str(error).split())}"
        ) from None
    tune(device)
    if launched:
        dist.init_process_group(timeout=datetime.timedelta(days=1))  # Gloo, and NCCL on CUDA
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        processor = torch.cuda.get_device_name(device)
    else:
        # private, so it may be missing
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        processor = f"{torch.get_num_threads()} CPU threads"
    args.device = device
    args.machine = f"torch {torch.__version__}, {args.ranks} x {processor}"
    args.precision = args.precision or ("bf16" if has_bf16 else "float32")


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, or 2 for what the user can correct, or 130 for Ctrl-C."""
    args = make_parser().parse_args(argv)
    args.options = (argv or sys.argv[1:])[1:]
    stderr = sys.stderr
    try:
        if args.command != "plot":
            set_up_device(args)
            if args.rank > 0:
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (till the end)
        COMMANDS[args.command](args)
        if distributed():
            time.sleep(1)  # lets Gloo's threads free their tensors, for which they need the GIL
            dist.destroy_process_group()  # keeps the GIL while it waits for them
        return 0
    except KeyboardInterrupt:
        print("iadd.py: interrupted; the same command resumes teachers or distill", file=stderr)
        return 130
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error} (--runs chooses where files are written)"
    except (MemoryError, RuntimeError) as error:
        on_cpu = "DefaultCPUAllocator" in str(error)  # torch has no type for it
        if not on_cpu and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        message = (
            "out of memory; --no-zca, and smaller --size, --width, --batch, --batch-real, "
            "--steps need less"
        )
    finally:
        sys.stderr = stderr  # for a traceback
    print(f"iadd.py: error: {message}", file=stderr)
    return 2


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in Jupyter
        sys.stdout.reconfigure(errors="replace")  # a terminal without ±
    sys.exit(main())
