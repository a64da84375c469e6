"""Importance-Aware Adaptive Dataset Distillation (IADD) in one file.

Guang Li, Ren Togo, Takahiro Ogawa, Miki Haseyama: "Importance-Aware Adaptive Dataset Distillation",
Neural Networks 172, 2024, arXiv:2401.15863. Sections, equations and algorithm lines below are that paper's.

The method. Train many teachers on the real data and keep their parameters after every epoch. Then take a few images
per class (IPC), real ones to begin with, and repeat T times: start a student at a random early epoch i of a random
teacher, let it take J steps of gradient descent on the augmented distilled images, and compare where it arrives with
where the teacher stood K epochs later. The squared distance, each parameter weighted by its own importance W, is
back-propagated through all J steps into the images, into the student's learning rate alpha and into W. In the end a
fresh network trained on the distilled images alone does far better than one trained on as many real images.

    python iadd.py teachers --dataset cifar10     # 200 trajectories of a ConvNet (Section 3.1)
    python iadd.py distill --ipc 1                # Algorithm 1: the distilled images
    python iadd.py eval --arch vgg11              # train fresh networks on them, test on real images

The method is the middle of the file, from DSA to IADD, a quarter of it; before it stand settings and datasets, after it
files, several processes, the commands, figures, timing and the command line.

Without a GPU and without a download, `--dataset shapes` runs all three in about three minutes. What was interrupted
goes on when it is started again; `torchrun --nproc-per-node 4 iadd.py ...` uses four GPUs. The paper is silent on J, K,
I+, alpha_0, the learning rates and the momentum, so these are MTT's (Cazenavette et al., "Dataset Distillation by
Matching Training Trajectories", CVPR 2022); the README lists every such choice. One departure: ZCA is used where MTT
used it, not on every benchmark. With W = 1, IADD is MTT.

Glossary
    theta        all parameters of a network as one vector, (P,)        theta, Eq. (3)-(5)
    theta_start, theta_target   of a teacher at epoch i and i + K       theta_i, theta_{i+K}
    ell          cross-entropy of a network on a mini-batch             l, Eq. (2)
    images       the distilled images, normalised, (N, C, H, W)         D_distill
    alpha        the student's learning rate, a trainable scalar        alpha, Eq. (2), (10)
    W            the importance of each parameter, (P,)                 W, Eq. (6), (11)
    T            distillation iterations                                --iterations
    J, K         student steps; teacher epochs, of many steps each      --steps, --expert-epochs (MTT's "experts")
    max_start    a student starts at a teacher epoch i < max_start      I+, --max-start-epoch
    DSA, IPC     differentiable Siamese augmentation; images per class  script A, [47]; --ipc
"""
import argparse, contextlib, ctypes, datetime, functools, gc, hashlib, io, itertools, json, math, multiprocessing, os
import platform, random, re, shutil, signal, statistics, sys, time, warnings, zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# -------- Settings: default < preset < what the user typed ------------------------------------------------------------
# Sections 4.1, 4.2 and 4.5; 5000 iterations on COVID-CXR are assumed. Paper silent on the teachers' learning rate and
# batch: MTT's. `shapes` is ours.
TRAINING = """
dataset       teachers  epochs  lr_teacher  batch_real  iterations  width
cifar10            200      50         .01         256        5000    128
cifar100           200      50         .01         256        5000    128
tinyimagenet       100      50         .01         256        5000    128
covid              100      50         .01         256        5000    128
shapes               6      10         .02          64         200     32
"""
# Paper silent: MTT's values (COVID-CXR: nobody's; MTT's for images of 128 x 128). zca too is MTT's.
MATCHING = """
dataset       ipc  steps  expert_epochs  max_start_epoch  lr_img  lr_alpha  alpha  batch  zca
cifar10         1     50              2                2     100      1e-7    .01    all  yes
cifar10        10     30              2               20     100      1e-5   .001    all  yes
cifar10        50     30              2               40    1000      1e-5   .001    all   no
cifar100        1     20              3               20    1000      1e-5    .01    all  yes
cifar100       10     20              2               20    1000      1e-5    .01    all   no
cifar100       50     80              2               40    1000      1e-5    .01    125  yes
tinyimagenet    1     10              2               10   10000      1e-4    .01    all   no
tinyimagenet   10     20              2               40   10000      1e-4    .01    200   no
covid          20     20              2               10    1000      1e-6    .01    all   no
shapes          1     10              2                4     300      1e-5    .03    all   no
"""

class UserError(Exception):
    """Something the user can mend. The command line prints it as one line and exits with code 2."""

def parse_table(text: str, keys: int) -> dict[tuple, dict]:
    """One of the tables above as {(first `keys` columns): {column: value}}; a batch of "all" becomes None."""
    def value(word):
        words = {"all": None, "yes": True, "no": False}
        return words.get(word, word) if word.isidentifier() else int(word) if word.isdigit() else float(word)
    header, *rows = [[value(word) for word in line.split()] for line in text.strip().splitlines()]
    return {tuple(row[:keys]): dict(zip(header[keys:], row[keys:])) for row in rows}

def preset(name: str, ipc: int) -> dict:
    """The settings of dataset `name` for the largest listed IPC that does not exceed `ipc` (else the smallest)."""
    rows = {row_ipc: row for (row_name, row_ipc), row in parse_table(MATCHING, 2).items() if row_name == name}
    nearest = max((n for n in rows if n <= ipc), default=min(rows))
    return {**parse_table(TRAINING, 1)[name,], **rows[nearest]}

def seed_all(*key) -> None:
    """Starts the random stream named `key`, such as (seed, "teacher", 3): each purpose has its own, so none repeats."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))

def must_agree(path: Path, found: dict, wanted: dict, remedy: str) -> None:
    """Raises UserError if the settings `found` in a file depart from those `wanted`, such as "width 32, not 128"."""
    if wrong := ", ".join(f"{k} {found.get(k)}, not {v}" for k, v in wanted.items() if found.get(k) != v):
        raise UserError(f"{path} has {wrong}: {remedy}")

# -------- Datasets ----------------------------------------------------------------------------------------------------
@dataclass
class Dataset:
    """Images and labels: train and test are pairs of uint8 (N, C, H, W), H = W, and int64 (N,), index into classes."""
    name: str
    classes: list[str]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return tuple(self.train[0].shape[1:])

def load_dataset(name: str, data_dir: Path, cache: Path, size: int | None = None, only: list[str] = ()) -> Dataset:
    """cifar10, cifar100, tinyimagenet, covid or shapes, or a folder with train/<class>/* and test/<class>/*.
    data_dir: the folder or archive of the data. cache: where they are unpacked and kept once read. For image files,
    size: the side in pixels that they are resized to (covid: 112), only: the classes to use. Raises UserError."""
    only = list(dict.fromkeys(only))
    if name in ("cifar10", "cifar100", "shapes"):
        if size or only:
            raise UserError(f"--size and --classes are for datasets of image files, not for {name}")
        return make_shapes() if name == "shapes" else load_cifar(name, unpacked(data_dir, cache))
    full_name = Path(name).resolve().name + (f"-{len(only)}classes" if only else "") + (f"-{size}px" if size else "")
    if name == "tinyimagenet":
        return read_dataset(full_name, list_tiny_imagenet(unpacked(data_dir, cache)), only, cache, size, "RGB")
    if name == "covid":
        return read_dataset(full_name, list_covid(unpacked(data_dir, cache), only), only, cache, size or 112, "L")
    if Path(name).is_dir():
        return read_dataset(full_name, list_folder(Path(name)), only, cache, size)
    raise UserError(f"unknown dataset {name!r}: not cifar10, cifar100, tinyimagenet, covid or shapes, nor a folder")

def load_cifar(name: str, data_dir: Path) -> Dataset:
    """CIFAR-10 or CIFAR-100 [53], downloaded to data_dir on first use (170 MB)."""
    cifar = getattr(torchvision.datasets, name.upper())
    try:
        parts = [cifar(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot download {name} ({error}); put its archive into {data_dir} yourself") from None
    pairs = [(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts]
    return Dataset(name, list(parts[0].classes), *pairs)

def unpacked(path: Path, cache: Path) -> Path:
    """The folder `path`; of an archive (.zip, .tar.gz, ...) the folder in `cache` into which it is unpacked, once."""
    if not path.is_file():
        return path
    target = cache / f"{path.name}-{checksum({'path': path.resolve(), 'date': path.stat().st_mtime_ns})}"
    if not target.exists():
        print(f"unpacking {path} into {target}", file=sys.stderr)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:  # what would land outside of the folder is an error in a tar, and left out of a zip
            shutil.unpack_archive(path, temporary, **({} if path.suffix == ".zip" else {"filter": "data"}))
            temporary.rename(target)
        except Exception as error:  # each format raises its own
            if not target.is_dir():  # nor has another process been faster
                raise UserError(f"cannot unpack {path}: {error}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target

def image_files(folder: Path) -> list[Path]:
    """The image files there, in the order of their names; hidden and other files are ignored."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in torchvision.datasets.folder.IMG_EXTENSIONS
                  and file.name[0] != "." and file.is_file())

def find_root(data_dir: Path, inside: list[str], name: str, layout: str, page: str) -> Path:
    """data_dir, or a folder at most two levels below it, that contains all of `inside`, or else any of them."""
    folders = [data_dir, *sorted(data_dir.glob("*/")), *sorted(data_dir.glob("*/*/"))]
    for enough, folder in itertools.product((all, any), folders):
        if enough(os.path.exists(folder / entry) for entry in inside):
            return folder
    raise UserError(f"{data_dir} does not hold {layout}: download it from {page}, then run: python iadd.py teachers "
                    f"--dataset {name} --data-dir FOLDER_OR_ARCHIVE")

def list_folder(root: Path) -> tuple[list, list, list]:
    """Classes, and (file, class) of training and test images, in train/<class>/*, test/<class>/*. Raises UserError."""
    if not ((root / "train").is_dir() and (root / "test").is_dir()):
        raise UserError(f"{root} needs images in {root}/train/<class>/ and in {root}/test/<class>/")
    train, test = ([(file, c.name) for c in sorted((root / part).iterdir()) if c.is_dir() and c.name[0] != "."
                    for file in image_files(c)] for part in ("train", "test"))
    return sorted({c for _, c in train + test}), train, test

def list_tiny_imagenet(data_dir: Path) -> tuple[list, list, list]:
    """Tiny ImageNet [80] as published; the validation images, whose labels are known, are the test set."""
    root = find_root(data_dir, ["wnids.txt"], "tinyimagenet", "tiny-imagenet-200/{wnids.txt,words.txt,train/,val/}",
                     "http://cs231n.stanford.edu/tiny-imagenet-200.zip")
    def columns(file):
        lines = (root / file).read_text("utf-8", errors="replace").splitlines()
        return dict(line.split("\t")[:2] for line in lines if "\t" in line)
    words, labels, names = columns("words.txt"), columns("val/val_annotations.txt"), {}
    for wnid in (root / "wnids.txt").read_text().split():
        name = words.get(wnid, wnid).split(",")[0]
        names[wnid] = f"{name} {wnid}" if name in names.values() else name
    train = [(file, name) for wnid, name in names.items() for file in image_files(root / "train" / wnid / "images")]
    test = [(root / "val/images" / file, names[wnid]) for file, wnid in labels.items() if wnid in names]
    return list(names.values()), train, test

def list_covid(data_dir: Path, only: list[str] = ()) -> tuple[list, list, list]:
    """The COVID-19 Radiography Database [81] without its masks, split 8:2 in each class (Section 4.1): 16,933 and 4,232
    images. Which file goes where depends on its name alone."""
    classes, train, test = list(only or ["COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"]), [], []
    root = find_root(data_dir, classes, "covid", f"COVID-19_Radiography_Dataset/{{{','.join(classes)}}}/images/*.png",
                     "https://www.kaggle.com/datasets/tawsifurrahman/covid19-radiography-database")
    if missing := [name for name in classes if not (root / name).is_dir()]:
        raise UserError(f"{root} has no folder {', '.join(missing)}; --classes COVID Normal, say, runs on a part")
    for name in classes:
        images = root / name / "images"
        files = image_files(images if images.is_dir() else root / name)  # in old copies there is no such folder
        files.sort(key=lambda file: hashlib.sha256(f"{name}/{file.name}".encode()).digest())
        cut = round(0.8 * len(files))
        train, test = train + [(f, name) for f in files[:cut]], test + [(f, name) for f in files[cut:]]
    return classes, train, test

def read_image(path: str, size: int | None, mode: str | None = None) -> np.ndarray:
    """One image file as uint8 (H, W, C), C = 1 for mode L, else 3 (default: L if it is greyscale). Raises UserError."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # 16 or 32 bits, which Pillow would clip at 255
                raise ValueError(f"its pixels are of mode {image.mode}; 8-bit images are needed")
            mode = mode or ("L" if image.mode in ("1", "L", "LA") else "RGB")
            image = ImageOps.exif_transpose(image).convert(mode)
            if size:
                image = image.resize((size, size), Image.Resampling.BILINEAR)  # antialiased
            pixels = np.asarray(image)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, DecompressionBombError, ...
        raise UserError(f"cannot read the image {path}: {str(error) or repr(error)}") from None
    return pixels.reshape(*pixels.shape[:2], -1)

def read_dataset(name: str, listing: tuple[list, list, list], only: list[str], cache: Path, size: int | None,
                 mode: str | None = None) -> Dataset:
    """The images of a listing, if given `only` of these classes. Read once, then kept in `cache` under a name made from
    every file's path, size and date. Raises UserError."""
    classes, *parts = listing
    classes = only or classes
    train, test = ([(file, c) for file, c in part if c in classes] for part in parts)
    lacking = set(classes) - ({c for _, c in train} & {c for _, c in test})
    if lacking or len(classes) < 2:
        raise UserError(f"{name} needs two or more classes, each with training and with test images; look at "
                        f"{', '.join(sorted(lacking or classes)) or 'the folder'}")
    files = [file for file, _ in train + test]
    stamps = [(str(f.resolve()), s.st_size, s.st_mtime_ns) for f in files for s in [f.stat()]]
    path = cache / f"{name}-{checksum({'size': size, 'mode': mode, 'files': stamps})}.pt"
    if not path.exists():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # images of more than 89 million pixels
        with ThreadPoolExecutor() as pool:
            reading = pool.map(lambda file: read_image(file, size, mode), files)  # an error cancels the rest
            arrays = list(progress_bar(reading, desc=f"reading {name}", total=len(files), unit="image"))
        side, channels = arrays[0].shape[0], max(array.shape[2] for array in arrays)
        for file, array in zip(files, arrays):
            if array.shape[:2] != (side, side):
                raise UserError(f"{file} has {array.shape[1]}x{array.shape[0]} pixels, not {side}x{side}; see --size")
        images = np.stack([np.broadcast_to(array, (side, side, channels)) for array in arrays])
        save({"images": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()}, path)
    images = load(path, "images")["images"].clone().split([len(train), len(test)])
    labels = (torch.tensor([classes.index(c) for _, c in part]) for part in (train, test))
    return Dataset(name, classes, *zip(images, labels))

def make_shapes(train: int = 200, test: int = 50, size: int = 32, seed: int = 0) -> Dataset:
    """Ten classes of drawn shapes and textures, `train` and `test` images of each. Place, size, tilt, colours and light
    are random and there is much noise: no pixel and no colour tells the class, and one example teaches little."""
    patterns = {  # positive inside the figure; (u, v) are its own coordinates, its radius is 1
        "disk": lambda u, v: 1 - np.hypot(u, v), "ring": lambda u, v: 0.22 - abs(np.hypot(u, v) - 0.78),
        "square": lambda u, v: 0.85 - np.maximum(abs(u), abs(v)),
        "triangle": lambda u, v: 0.5 - np.maximum(-v, 0.866 * abs(u) + 0.5 * v),
        "cross": lambda u, v: np.minimum(0.28 - np.minimum(abs(u), abs(v)), 1 - np.maximum(abs(u), abs(v))),
        "flower": lambda u, v: 0.65 + 0.35 * np.cos(5 * np.arctan2(v, u)) - np.hypot(u, v),
        "stripes": lambda u, v: np.sin(6 * u) / 6, "checker": lambda u, v: np.sin(5 * u) * np.sin(5 * v) / 4,
        "dots": lambda u, v: (np.cos(6 * u) + np.cos(6 * v) - 0.8) / 8,
        "waves": lambda u, v: np.sin(8 * np.hypot(u, v)) / 8}
    rng, n, grid = np.random.default_rng(seed), train + test, np.linspace(-1, 1, size)
    def draw(low, high, channels=1):
        return rng.uniform(low, high, (n, channels, 1, 1))
    def render(pattern):
        x, y = grid[None, :] - draw(-.3, .3), grid[:, None] - draw(-.3, .3)  # (n, 1, size, size) when combined
        tilt, scale = draw(-.3, .3), draw(.4, .8)
        u, v = (np.cos(tilt) * x - np.sin(tilt) * y) / scale, (np.sin(tilt) * x + np.cos(tilt) * y) / scale
        inside = (pattern(u, v) * scale * size / 2 + 0.5).clip(0, 1)  # with soft edges
        image = (draw(0, .5, 3) + inside * draw(.2, .5, 3)) * (1 + draw(-.3, .3) * x + draw(-.3, .3) * y)
        image += rng.normal(0, .15, image.shape)
        return torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8))
    images, labels = torch.stack([render(pattern) for pattern in patterns.values()]), torch.arange(len(patterns))
    pairs = [(part.flatten(0, 1), labels.repeat_interleave(part.shape[1])) for part in images.split([train, test], 1)]
    return Dataset("shapes", list(patterns), *pairs)

class Normalisation:
    """Maps uint8 images to network input and back, fitted on training images alone. Works on its own device.

    With ZCA whitening z = (x - mean) M, M = U diag(1 / sqrt(S + eps)) U^T for the covariance U diag(S) U^T of
    the pixels x in [0, 1] (Section 4.2; eps = .1 as MTT); otherwise z = (x - mean) * 1/std for each channel."""

    def __init__(self, mean: Tensor, scale: Tensor):
        self.mean, self.scale = mean, scale  # (D,) and M (D, D), D = C H W; or mean and 1/std, (C, 1, 1) both
        self.zca = scale.dim() == 2

    @classmethod
    def fit(cls, images: Tensor, zca: bool, device="cpu", eps: float = 0.1) -> "Normalisation":
        """images: uint8 (N, C, H, W), N > 1. Raises UserError if they are too large for ZCA."""
        if zca and (D := images[0].numel()) > 20000:
            raise UserError(f"ZCA of {D} numbers an image needs a matrix of {4e-9 * D * D:.0f} GB: use --no-zca")
        x = images.to(device).float().div_(255)
        if not zca:
            std, mean = torch.std_mean(x, (0, 2, 3))
            return cls(mean[:, None, None], 1 / std.clamp_min(1e-4)[:, None, None])
        x = x.flatten(1)
        S, U = torch.linalg.eigh(torch.cov(x.T).double())
        return cls(x.mean(0), (U / (S.clamp_min(0) + eps).sqrt() @ U.T).float())

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 of that shape."""
        def transform(x):
            return ((x.flatten(1) - self.mean) @ self.scale).view_as(x) if self.zca else (x - self.mean) * self.scale
        return torch.cat([transform(part.to(self.mean.device).float() / 255) for part in images.split(5000)])

    def inverse(self, z: Tensor) -> Tensor:
        """Network input (N, C, H, W) -> pixels, in [0, 1] for an image, not clamped."""
        if self.zca:  # M is symmetric: z = (x - mean) M  <=>  M (x - mean)^T = z^T
            return (self.mean + torch.linalg.solve(self.scale, z.flatten(1).T).T).view_as(z)
        return z / self.scale + self.mean

# -------- Differentiable Siamese augmentation (DSA), script A in Eq. (2); Zhao, Bilen, ICML 2021 [47] -----------------
# Each function takes (N, C, H, W); every image draws its own parameters. "Siamese", the same draws for real
# and distilled images, matters where their gradients are matched; here they are never augmented together.
def uniform(x: Tensor, low: float, high: float) -> Tensor:
    """One number from U(low, high) for each image of x, (N,)."""
    return torch.rand(len(x), dtype=x.dtype, device=x.device) * (high - low) + low

def warp(x: Tensor, a=1.0, b=0.0, tx=0.0, c=0.0, d=1.0, ty=0.0, mode: str = "bilinear") -> Tensor:
    """Samples x at (a u + b v + tx, c u + d v + ty), u, v in [-1, 1]; 0 outside. Arguments (N,) or numbers."""
    rows = [m.to(x.dtype) if isinstance(m, Tensor) else x.new_full((len(x),), m) for m in (a, b, tx, c, d, ty)]
    matrix = torch.stack(rows, 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=True)  # (N, H, W, 2)
    return F.grid_sample(x, grid, mode, padding_mode="zeros", align_corners=True)

def dsa_color(x: Tensor) -> Tensor:
    """Brightness + U(-.5, .5), then saturation * U(0, 2), then contrast * U(.5, 1.5)."""
    x = x + uniform(x, -.5, .5).view(-1, 1, 1, 1)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * uniform(x, 0, 2).view(-1, 1, 1, 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * uniform(x, .5, 1.5).view(-1, 1, 1, 1)

def dsa_crop(x: Tensor) -> Tensor:
    """Shift by whole pixels, up to an eighth of the side in x and in y."""
    side, reach = x.shape[-1], round(x.shape[-1] / 8)
    dx, dy = 2 * torch.randint(-reach, reach + 1, (2, len(x)), device=x.device) / (side - 1)
    return warp(x, tx=dx, ty=dy, mode="nearest")

def dsa_cutout(x: Tensor) -> Tensor:
    """Set a square of half the side to 0; its centre lies anywhere."""
    side, hole = x.shape[-1], round(x.shape[-1] / 2)
    pixel = torch.arange(side, device=x.device)
    start = torch.randint(0, side + 1 - hole % 2, (2, len(x), 1), device=x.device) - hole // 2
    rows, columns = (pixel >= start) & (pixel < start + hole)  # (N, side) each
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)

def dsa_flip(x: Tensor) -> Tensor:
    """Left-right, with probability .5."""
    return torch.where(uniform(x, 0, 1).view(-1, 1, 1, 1) < .5, x.flip(3), x)

def dsa_scale(x: Tensor) -> Tensor:
    """Scale the sampling grid by U(1/1.2, 1.2), in x and in y independently."""
    return warp(x, a=uniform(x, 1 / 1.2, 1.2), d=uniform(x, 1 / 1.2, 1.2))

def dsa_rotate(x: Tensor) -> Tensor:
    """Rotate by U(-15, 15) degrees."""
    angle = uniform(x, -math.pi / 12, math.pi / 12)
    return warp(x, a=angle.cos(), b=-angle.sin(), c=angle.sin(), d=angle.cos())

DSA = [dsa_color, dsa_crop, dsa_cutout, dsa_flip, dsa_scale, dsa_rotate]

def augment(x: Tensor) -> Tensor:
    """Augments J mini-batches at once, (J, B, C, H, W): each draws one of the six groups for all its images.
    Differentiable in x. Random numbers come from torch's global generators."""
    group = torch.randint(len(DSA), (len(x),))  # drawn on the CPU, so that nothing waits for a GPU
    order = on_device(group.argsort(), x.device)
    parts = x[order].split(group.bincount(minlength=len(DSA)).tolist())
    done = [dsa(part.flatten(0, 1)).view_as(part) for dsa, part in zip(DSA, parts) if len(part)]
    return torch.cat(done)[order.argsort()]

# -------- Networks. GroupNorm with one channel a group is instance normalisation: no running statistics ---------------
def plain_network(shape: tuple[int, int, int], classes: int, layers: list, norm: bool = True) -> nn.Module:
    """Convolutions (width, kernel), each with instance normalisation and ReLU, and halvings "avg" or "max"."""
    channels, side, _ = shape
    modules = []
    for layer in layers:
        if isinstance(layer, str):
            modules.append({"avg": nn.AvgPool2d, "max": nn.MaxPool2d}[layer](2))
            side //= 2
        else:
            width, kernel = layer
            modules.append(nn.Conv2d(channels, width, kernel, padding=kernel // 2))
            modules += [nn.GroupNorm(width, width), nn.ReLU()] if norm else [nn.ReLU()]
            channels = width
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(channels * side * side, classes))

def convnet(shape, classes, width=128, depth=3) -> nn.Module:
    """ConvNetD<depth>, the network of teachers and students (Section 4.1); 320,010 parameters for CIFAR-10."""
    return plain_network(shape, classes, [(width, 3), "avg"] * depth)

def alexnet(shape, classes) -> nn.Module:
    """AlexNet [6] as this field uses it for small images: no stride, no normalisation, a single linear layer."""
    layers = [(128, 5), "max", (192, 5), "max", (256, 3), (192, 3), (192, 3), "max"]
    return plain_network(shape, classes, layers, norm=False)

def vgg11(shape, classes) -> nn.Module:
    """VGG11 [89] with a single linear layer."""
    widths = [64, "max", 128, "max", 256, 256, "max", 512, 512, "max", 512, 512, "max"]
    return plain_network(shape, classes, [w if w == "max" else (w, 3) for w in widths])

def resnet18(shape, classes) -> nn.Module:
    """ResNet18 [7] for small images: a 3x3 stem without stride or pooling, and PyTorch's usual initialisation."""
    net = torchvision.models.resnet18(num_classes=classes, norm_layer=lambda width: nn.GroupNorm(width, width))
    net.conv1, net.maxpool = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False), nn.Identity()
    return net.apply(lambda module: getattr(module, "reset_parameters", lambda: None)())

ARCHITECTURES = {"convnet": convnet, "alexnet": alexnet, "vgg11": vgg11, "resnet18": resnet18}

def default_depth(size: int) -> int:
    """ConvNetD3 for 32 pixels a side, D4 for 64, D5 for 112 (Sections 4.2 and 4.5)."""
    return max(1, round(math.log2(size)) - 2)

def build(arch: str, data: Dataset, width: int = 128, depth: int = 3) -> nn.Module:
    """A freshly initialised network for a dataset; width and depth are the ConvNet's. Raises UserError."""
    smallest = 2 ** {"convnet": depth, "alexnet": 3, "vgg11": 5, "resnet18": 4}[arch]
    if data.shape[1] < smallest:
        raise UserError(f"{arch} needs images of {smallest} pixels a side or more, these have {data.shape[1]}")
    options = {"width": width, "depth": depth} if arch == "convnet" else {}
    return ARCHITECTURES[arch](data.shape, len(data.classes), **options)

# -------- Networks as pure functions of their parameters, and what makes such functions fast --------------------------
def flat_parameters(net: nn.Module) -> Tensor:
    """A copy of all parameters of `net` as one vector theta, (P,)."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])

def functional(net: nn.Module):
    """`net` as predict(theta, x): (P,), (B, C, H, W) -> (B, classes). Of `net` itself only the structure is used."""
    if isinstance(next(net.buffers(), None), Tensor):
        raise UserError("the network has state beside its parameters, such as the running statistics of BatchNorm, "
                        "which trajectory matching would leave out: use GroupNorm")
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()))
    sizes = [shape.numel() for shape in shapes]
    def predict(theta: Tensor, x: Tensor) -> Tensor:
        parameters = {n: part.view(s) for n, part, s in zip(names, theta.split(sizes), shapes)}
        return torch.func.functional_call(net, parameters, (x,), strict=True)
    return predict

def flat_loss(net: nn.Module):
    """The cross-entropy of `net` as ell(theta, x, y): (P,), (B, C, H, W), (B,) -> ()."""
    predict = functional(net)
    return lambda theta, x, y: F.cross_entropy(predict(theta, x), y)

plain = lambda function: function  # no acceleration

def recorded(function):
    """`function`, of tensors on a GPU, but its kernels are recorded at the first call and replayed at every later one,
    because Python launches them slower than they run. Shapes must not change; the next call overwrites a result."""
    replay = None
    def call(*inputs):
        nonlocal replay
        if replay is None:
            examples = tuple(i.detach().clone().requires_grad_(i.requires_grad) for i in inputs)
            gc.collect()  # an old graph that Python frees only while this one is recorded would spoil it
            try:
                replay = torch.cuda.make_graphed_callables(function, examples)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise UserError(f"cannot record a CUDA graph, --no-compile does without: {error}") from None
        return replay(*inputs)
    return call

def forward_flops(net: nn.Module, x: Tensor) -> int:
    """Floating-point operations of one forward pass. Forward and backward take about three times as many."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return counter.get_total_flops()

def accelerators(net: nn.Module, x: Tensor, passes: float, wanted: bool | None = None) -> tuple:
    """Two transformations of functions, (compile, record), for speed. Results are the same but for rounding.
    wanted: --compile, --no-compile, or None to compile if as many forward `passes` of x would take minutes."""
    if wanted is False:
        return plain, plain
    record = recorded if x.is_cuda else plain
    if wanted or passes * forward_flops(net, x) > (1e15 if x.is_cuda else 5e12):
        try:
            torch.compiler.reset()  # a process may compile one function eight times only, for eight networks
            torch.compile(lambda x: x + 1)(x)
            print("compiling first, for up to a minute (--no-compile does without)", file=sys.stderr)
            return functools.partial(torch.compile, dynamic=False), record
        except Exception as error:  # no C++ compiler, no Triton, an unsupported Python: each has a type of its own
            print(f"torch.compile does not work here ({type(error).__name__}): going on without", file=sys.stderr)
    return plain, record

def tune(device: torch.device) -> None:
    """For speed: cuDNN times its convolutions and chooses; glibc's malloc keeps large blocks that are freed, since the
    system would clear every page before it gives it out again, on a CPU up to half of the time of a training step."""
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # CUDA graphs are recorded on the current one
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0), mallopt(-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    except (AttributeError, OSError, TypeError):
        pass  # another system, another malloc

# -------- Training on a set of images: teachers, and the networks of the evaluation -----------------------------------
def minibatches(n: int, batch: int, J: int, device) -> Tensor:
    """Indices of J mini-batches, (J, batch), batch <= n: every pass over the n images is a fresh permutation, cut into
    batches; an incomplete last one is filled up with the first images of the pass."""
    a_pass = math.ceil(n / batch)
    index = torch.rand(math.ceil(J / a_pass), n, device=device).argsort(1)
    return index[:, torch.arange(a_pass * batch, device=device) % n].view(-1, batch)[:J]

def train(ell, theta: Tensor, optimizer, x: Tensor, y: Tensor, epochs: int, batch: int, progress=lambda n: 0) -> None:
    """Passes over x (N, C, H, W), y (N,) in random mini-batches with DSA. Updates theta (P,) in place."""
    batch = min(batch, len(x))
    indices = minibatches(len(x), batch, epochs * math.ceil(len(x) / batch), x.device)
    for index in indices.split(max(1, 4096 // batch)) if epochs else ():
        for x_j, y_j in zip(augment(x[index]), y[index]):  # thousands of images are augmented at once
            optimizer.zero_grad()
            ell(theta, x_j, y_j).backward()
            optimizer.step()
        progress(len(index))

def train_teacher(ell, theta: Tensor, x: Tensor, y: Tensor, epochs: range, seed: tuple, lr: float = 0.01,
                  batch: int = 256, progress=lambda steps: None):
    """Yields a teacher's parameters, (P,) on the CPU, after each of the epochs, from theta (P,) on (Section 3.1). These
    are all of its state, and each epoch has its own random stream: it goes on as if it had never stopped."""
    theta = theta.to(x.device, copy=True).requires_grad_()
    optimizer = torch.optim.SGD([theta], lr)
    for epoch in epochs:
        seed_all(*seed, "epoch", epoch)
        train(ell, theta, optimizer, x, y, 1, batch, progress)
        yield theta.detach().to("cpu", copy=True)  # a copy, not a view of the live weights

def train_network(ell, theta: Tensor, x: Tensor, y: Tensor, epochs: int, lr: float, batch: int = 256,
                  progress=lambda steps: None) -> Tensor:
    """Trains a network of the evaluation from theta (P,) on (Section 4.1 is silent on how: MTT's protocol): SGD with
    momentum .9, weight decay 5e-4 and DSA; the learning rate drops tenfold half-way. Returns its parameters."""
    theta = theta.to(x.device, copy=True).requires_grad_()
    optimizer = torch.optim.SGD([theta], lr, momentum=0.9, weight_decay=5e-4)
    train(ell, theta, optimizer, x, y, max(1, epochs // 2), batch, progress)
    optimizer.param_groups[0]["lr"] = lr / 10
    train(ell, theta, optimizer, x, y, epochs - max(1, epochs // 2), batch, progress)
    return theta.detach()

@torch.no_grad()
def confusion_matrix(net: nn.Module, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Entry (r, c): how many of the images x of class r `net` with the parameters theta takes for class c."""
    predict = functional(net)
    scores = torch.cat([predict(theta, part) for part in x.split(500)])
    n = scores.shape[1]
    return torch.bincount(n * y + scores.argmax(1), minlength=n * n).view(n, n)

def accuracy(confusion: Tensor) -> float:
    """Share of the images that are classified rightly, in per cent."""
    return 100 * (confusion.trace() / confusion.sum()).item()

# -------- IADD: Section 3, Algorithm 1 --------------------------------------------------------------------------------
def student_step(net: nn.Module, compile=plain, batch: int | None = None):
    """One step of Eq. (2), step(theta, alpha, x, y) = theta - alpha grad ell, differentiable in theta, alpha and x.

    Unrolling J such steps with create_graph=True would keep every activation of all of them. This keeps the
    step's inputs only, and its backward pass runs the step again, as one vector-Jacobian product: the same gradients,
    and the activations of a single step at a time.

    With several ranks, each has a share of the mini-batch of `batch` images and computes theta / RANKS minus its part
    of alpha grad ell. The sum over the ranks is the step, and likewise backwards for theta; the gradients in alpha and
    x stay parts, which `iadd` adds up once."""
    ell = flat_loss(net)
    def part_of_step(theta, alpha, x, y):
        return theta / RANKS - alpha * (len(x) / (batch or len(x))) * torch.func.grad(ell)(theta, x, y)
    def back(v, theta, alpha, x, y):
        _, vjp = torch.func.vjp(lambda *inputs: part_of_step(*inputs, y), theta, alpha, x)
        return vjp(v)
    fast_part, fast_back = compile(part_of_step), compile(back)
    class StudentStep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return sum_over_ranks(fast_part(*inputs))

        @staticmethod
        def backward(ctx, v):
            d_theta, d_alpha, d_x = fast_back(v, *ctx.saved_tensors)
            d_theta = sum_over_ranks(d_theta) if ctx.needs_input_grad[0] else None  # not for the first step
            return d_theta, d_alpha, d_x, None  # nothing for y
    return StudentStep.apply

def student_batches(images: Tensor, labels: Tensor, batch: int, J: int) -> tuple[Tensor, Tensor]:
    """J augmented mini-batches (line 7, Eq. (1)) of the images (N, C, H, W), which an iteration does not change: x
    (J, batch, C, H, W), differentiable, and y (J, batch). Every rank makes the same and takes its share of each."""
    index = minibatches(len(images), batch, J, images.device)
    x = images.index_select(0, index.flatten())  # on a CPU images[index] would add its gradients in any order
    return augment(x.view(J, batch, *images.shape[1:]))[:, RANK::RANKS], labels[index][:, RANK::RANKS]

def unroll(step, theta: Tensor, alpha: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The student's parameters (P,) after a step on each of the mini-batches x (J, batch, C, H, W), y (J, batch)."""
    for x_j, y_j in zip(x, y):                                                            # lines 6, 10
        theta = step(theta, alpha, x_j, y_j)                                              # lines 8-9, Eq. (2)
    return theta

def iadd_loss(theta: Tensor, theta_start: Tensor, theta_target: Tensor, W: Tensor) -> Tensor:
    """Eq. (9) with (7) and (8): ||W theta - W theta_target||^2 / ||theta_start - theta_target||^2, all (P,)."""
    return (W * (theta - theta_target)).square().sum() / (theta_start - theta_target).square().sum()

def weigh(method: str, W: Tensor, d: Tensor, epsilon: float = 0.1) -> Tensor:
    """The weights (P,) of the mismatch d = theta - theta_target (P,): what distinguishes the methods. IADD learns them,
    MTT's [51] are 1, DDPP [54] drops what is hardest to match: the share epsilon of parameters with the largest |d|."""
    if method == "ddpp":
        with torch.no_grad():  # the mask is new in every iteration
            W.copy_(d.abs() <= d.abs().kthvalue(max(1, round((1 - epsilon) * len(d)))).values)
    return W if method == "iadd" else W.detach()

def random_segments(teachers: list[Tensor], K: int, max_start: int, T: int, done: int = 0, seed: int = 0):
    """Yields theta_i and theta_{i+K} of a random teacher, i uniform in [0, max_start) (line 4), for the iterations from
    `done` to T. Each pair is read from its file while the one before is in use."""
    def read(t):
        stream = random.Random(f"{seed} segment {t}")
        n, i = stream.randrange(len(teachers)), stream.randrange(max_start)
        return teachers[n][i].clone(), teachers[n][i + K].clone()
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, done)
        for t in range(done, T):
            segment, ahead = ahead.result(), reader.submit(read, t + 1)
            yield segment

def iadd(step, images: Tensor, labels: Tensor, alpha: Tensor, W: Tensor, teachers: list[Tensor], *, T: int, J: int,
         K: int, max_start: int, batch: int, lr_img: float, lr_alpha: float, lr_w: float, method="iadd", epsilon=0.1,
         normalize_w=False, max_loss=None, seed=0, done=0, momentum=(None, None), record=plain):
    """Algorithm 1 from iteration `done` to T. Updates images (N, C, H, W), alpha (), W (P,) in place, yields each loss.
    step: of `student_step`. teachers: (epochs + 1, P) each. method, epsilon: of `weigh`. Eq. (10)-(12) carry the index
    j, but Algorithm 1 updates once an iteration. Not in the paper: normalize_w, W keeps a root mean square of 1; and
    max_loss, above which nothing is updated. Each iteration has its own random stream; with the momentum of alpha and
    images, buffers that are updated in place, a later call goes on as if there had been no break."""
    student = record(functools.partial(unroll, step))
    optimizer = torch.optim.SGD([  # paper silent on momentum: MTT's .5; W follows plain SGD (Section 4.1)
        {"params": [alpha], "lr": lr_alpha, "momentum": 0.5},                             # Eq. (10)
        {"params": [W], "lr": lr_w, "momentum": 0},                                       # Eq. (11)
        {"params": [images], "lr": lr_img, "momentum": 0.5}])                             # Eq. (12)
    for x, buffer in zip((alpha, images), momentum):
        optimizer.state[x]["momentum_buffer"] = buffer
    for t, segment in enumerate(random_segments(teachers, K, max_start, T, done, seed), done):  # lines 3-4
        seed_all(seed, "iteration", t)
        theta_start, theta_target = (on_device(theta, images.device) for theta in segment)  # line 5
        theta = student(theta_start, alpha, *student_batches(images, labels, batch, J))   # lines 6-10
        weights = weigh(method, W, theta - theta_target, epsilon)
        loss = iadd_loss(theta, theta_start, theta_target, weights)                       # lines 11-13, Eq. (9)
        if max_loss is None or not loss > max_loss:
            optimizer.zero_grad()
            loss.backward()
            for x in (images, alpha):  # each rank has a part of their gradients, but the whole of that of W
                sum_over_ranks(x.grad)
            optimizer.step()                                                              # line 14, Eq. (10)-(13)
            if normalize_w and method == "iadd":
                W.data /= W.data.square().mean().sqrt()
        yield loss.detach()

def real_images(data: Dataset, normalise: Normalisation, ipc: int, choose=None) -> tuple[Tensor, Tensor]:
    """`ipc` training images of each class, normalised, and their labels; class after class.
    choose: of a class's images, normalised, the indices of the ipc to take (default: random ones, line 1)."""
    members = [torch.nonzero(data.train[1] == c)[:, 0] for c in range(len(data.classes))]
    fewest, name = min((len(member), name) for member, name in zip(members, data.classes))
    if ipc > fewest:
        raise UserError(f"IPC {ipc} is too large: class {name} has {fewest} images")
    index = torch.cat([member[choose(normalise(data.train[0][member])) if choose else torch.randperm(len(member))[:ipc]]
                       for member in members])
    return normalise(data.train[0][index]), data.train[1][index].to(normalise.mean.device)

@torch.no_grad()
def herding(net: nn.Sequential, theta: Tensor, x: Tensor, ipc: int) -> Tensor:
    """The baseline Herding [83] of Table 1, greedy: indices (ipc,) into x (N, C, H, W), each of them added because it
    brings the mean feature of those chosen nearest to that of all x. Features: the input of a ConvNet's last layer."""
    nn.utils.vector_to_parameters(theta, net.parameters())
    features = torch.cat([net[:-1](part) for part in x.split(500)])  # (N, features)
    mean, chosen = features.mean(0), []
    for n in range(1, ipc + 1):
        distance = (mean - (features[chosen].sum(0) + features) / n).norm(dim=1)
        distance[chosen] = math.inf
        chosen.append(distance.argmin().item())
    return torch.tensor(chosen)

# -------- Files: written whole or not at all, read as data and never as code, one writer a folder ---------------------
def checksum(content: dict) -> str:
    """Of a dict of CPU tensors and plain values."""
    parts = (v.contiguous().numpy() if isinstance(v, Tensor) else repr(v).encode() for _, v in sorted(content.items()))
    return f"{functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0):08x}"

def write(path: Path, content) -> None:
    """Bytes to a temporary file, which is then renamed: whatever happens, `path` is the old file or the new, whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; what was there before is kept") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()

def save(content: dict, path: Path) -> None:
    """What torch.save makes of `content` and its checksum."""
    buffer = io.BytesIO()
    torch.save({**content, "checksum": checksum(content)}, buffer)
    write(path, buffer.getbuffer())

def load(path: Path, *keys: str) -> dict:
    """What `save` wrote, its tensors memory-mapped. Raises UserError if the file is missing, damaged or another's."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if content.pop("checksum") != checksum(content) or not content.keys() >= set(keys):
            raise ValueError("not what was saved")
        return content
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise UserError(f"{path} is damaged or not such a file of iadd.py ({type(error).__name__} {error}); if it is "
                        "iadd.py's, delete it and run the command again that made it") from None

def append_line(path: Path, line: str) -> None:
    """By one write, so that lines of several runs do not mix; taken back if the disk does not hold all of it."""
    try:
        with open(path, "ab", buffering=0) as file:
            size, content = file.tell(), f"{line}\n".encode()
            if file.write(content) < len(content):
                file.truncate(size)
                raise OSError("the disk is full")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None

@contextlib.contextmanager
def exclusive(folder: Path):
    """A lock: while the block runs, another run that would write into `folder` gets a UserError. It ends with the
    process, however that ends. On Windows and on file systems without locks there is none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "a") as lock:
        try:
            import fcntl
            if RANK == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {folder}: wait, or choose another --name or --runs") from None
        except (ImportError, OSError):
            pass
        for left_by_a_killed_run in folder.glob("*.tmp") if RANK == 0 else ():
            left_by_a_killed_run.unlink()
        yield

def set_aside(folder: Path) -> None:
    """Moves all files of the folder, if there are any, into folder/old, or old2, old3, ..."""
    if files := [file for file in folder.glob("*") if file.is_file() and file.suffix != ".tmp"]:
        old = next(old for n in itertools.count(1) if not (old := folder / f"old{n if n > 1 else ''}").exists())
        old.mkdir()
        for file in files:
            file.replace(old / file.name)

# -------- Several processes, interruptions, progress, memory ----------------------------------------------------------
# torchrun starts the processes, the "ranks". Teachers, students' mini-batches and evaluated networks are shared out and
# the results added up. Rank 0 prints and writes; the others write their teachers.
RANK, RANKS = 0, 1
if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
    RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def sum_over_ranks(x: Tensor) -> Tensor:
    """In place; everybody waits for it. Raises UserError if a rank has ended."""
    try:
        if RANKS > 1:
            torch.distributed.all_reduce(x)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"lost contact with the other processes of this job ({str(error).splitlines()[0]})") from None
    return x

@contextlib.contextmanager
def rank_0_first():
    """Rank 0 runs the block first, then the others, who find the files that it wrote."""
    if RANK > 0:
        sum_over_ranks(torch.zeros(1))
    try:
        yield
    finally:
        if RANK == 0:
            sum_over_ranks(torch.zeros(1))

def on_signals(answer=None) -> None:
    """From now on SIGINT (Ctrl-C) and SIGTERM raise KeyboardInterrupt(their number), or get another answer."""
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt if answer is None else answer)

def progress_bar(iterable=None, **options) -> tqdm:
    """tqdm, but with one line in half a minute where the output is not a terminal."""
    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 30, **options)

def on_device(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`; a copy to a GPU does not wait for the work that is queued on it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

def peak_memory(device: torch.device) -> float:
    """GB of memory that this process has held at most: on the GPU, or in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:  # not getrusage, whose maximum begins with that of the process that started this one
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6
    except OSError:  # not Linux
        return math.nan

# -------- The three commands ------------------------------------------------------------------------------------------
def prepare(args: argparse.Namespace) -> tuple[Dataset, dict, Path, Path]:
    """Fills in what the user did not type, from every column of the preset, and loads the data.
    Returns it, the settings that teachers and students must share, and the folders of teachers and of the result."""
    args.dataset, args.ipc = args.dataset or "cifar10", args.ipc or 1
    name = args.preset or (args.dataset if (args.dataset,) in parse_table(TRAINING, 1) else "cifar10")
    for key, value in preset(name, args.ipc).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    with rank_0_first():  # downloads, unpacks
        data = load_dataset(args.dataset, args.data_dir, args.runs / "cache", args.size, args.classes)
    args.depth = args.depth or default_depth(data.shape[1])
    build("convnet", data, args.width, args.depth)  # says at once if the images are too small
    print(f"{data.name}: {len(data.train[0])} training and {len(data.test[0])} test images, {data.shape[1]}x"
          f"{data.shape[2]}x{data.shape[0]}, {len(data.classes)} classes; settings of {name} where none are given")
    shared = {"dataset": data.name, "fingerprint": checksum(dict(enumerate(data.train))), "shape": list(data.shape),
              "zca": args.zca, "width": args.width, "depth": args.depth}
    folder = args.runs / f"{data.name}_{'zca' if args.zca else 'std'}_convnet-d{args.depth}-w{args.width}"
    own = "teachers" if args.command == "teachers" else args.name or f"ipc{args.ipc}_{args.method}_seed{args.seed}"
    if Path(own).name != own or own[0] == "." or own == "teachers" != args.command:
        raise UserError(f"{own!r} cannot be the name of a result's folder")
    return data, shared, folder / "teachers", folder / own

def describe(args: argparse.Namespace, folder: Path, settings: dict) -> None:
    """Prints the settings and writes them, with versions, device and threads, to folder/settings.json."""
    print("settings:", settings)
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"CPU {platform.machine()}"
    environment = {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (torch, torchvision, np)},
                   "device": device, "threads": torch.get_num_threads(), "processes": RANKS, "compile": args.compile}
    if RANK == 0:
        write(folder / "settings.json", json.dumps({"settings": settings, **environment}, indent=1).encode())

def command_teachers(args: argparse.Namespace) -> None:
    """Train teachers on the real data and keep their parameters after every epoch (Section 3.1)."""
    shorten = args.epochs is None and args.ipc is not None
    data, shared, folder, _ = prepare(args)
    if shorten:  # the only epochs that distill with the preset of this IPC reads
        args.epochs = args.max_start_epoch - 1 + args.expert_epochs
    settings = {**shared, "lr_teacher": args.lr_teacher, "batch_real": args.batch_real, "seed": args.seed}
    paths = [folder / f"{k:03d}.pt" for k in range(args.teachers)]
    with exclusive(folder):
        with rank_0_first():
            if args.restart and RANK == 0:
                set_aside(folder)
        trained = {}  # the trajectories so far
        for path in filter(Path.exists, paths):
            old = load(path, "thetas", "settings")
            must_agree(path, old["settings"], settings, "--restart trains all anew, --runs DIR chooses another folder")
            trained[path] = list(old["thetas"])
        todo = [path for path in paths if len(trained.get(path, [0])) <= args.epochs]
        print(f"{len(paths) - len(todo)} of {len(paths)} teachers are complete in {folder}")
        sum_over_ranks(torch.zeros(1))  # before anyone writes, all have looked
        if todo:
            describe(args, folder, {"teachers": args.teachers, "epochs": args.epochs, **settings})
            start, score = time.time(), train_teachers(args, data, settings, todo[RANK::RANKS], trained)
            sum_over_ranks(torch.zeros(1))  # nobody leaves the folder to other runs before all have done with it
            size = sum(path.stat().st_size for path in paths) / 1e6
            print(f"{len(todo)} teachers trained in {time.time() - start:.0f} s, peak memory "
                  f"{peak_memory(args.device):.2f} GB; one of them has {score:.1f} % test accuracy; {len(paths)} take "
                  f"{size:.0f} MB of disk")

def train_teachers(args: argparse.Namespace, data: Dataset, settings: dict, paths: list[Path], trained: dict) -> float:
    """Trains the teachers at `paths` to the end, from where they stand in `trained`. A kill costs a minute and an epoch
    at most, a signal the epoch. Returns the test accuracy of the last."""
    normalise = Normalisation.fit(data.train[0], args.zca, args.device)
    (x, y), test = ((normalise(i), l.to(args.device)) for i, l in (data.train, data.test))
    net, an_epoch = build("convnet", data, args.width, args.depth).to(args.device), math.ceil(len(x) / args.batch_real)
    compile, record = accelerators(net, x[:args.batch_real], 3 * args.teachers * args.epochs * an_epoch, args.compile)
    ell, score = record(compile(flat_loss(net))), math.nan
    left = sum(args.epochs + 1 - len(trained.get(path, [0])) for path in paths)  # epochs
    with progress_bar(total=an_epoch * left, unit="step") as bar:
        for path in paths:
            seed, saved = (args.seed, "teacher", int(path.stem)), time.time()
            seed_all(*seed)
            thetas = trained.get(path) or [flat_parameters(build("convnet", data, args.width, args.depth))]
            epochs = range(len(thetas) - 1, args.epochs)
            def keep():
                save({"thetas": torch.stack(thetas), "settings": settings}, path)
            try:
                for theta in train_teacher(ell, thetas[-1], x, y, epochs, seed, args.lr_teacher, args.batch_real,
                                           bar.update):
                    if not theta.isfinite().all():
                        raise UserError(f"teacher {path.stem} diverged: lower --lr-teacher (now {args.lr_teacher:g})")
                    thetas.append(theta)
                    if time.time() - saved > 60:
                        keep()
                        saved = time.time()
            except BaseException:  # KeyboardInterrupt, too
                if len(thetas) - 1 > epochs.start:
                    on_signals(signal.SIG_IGN)
                    keep()
                raise
            keep()
            score = accuracy(confusion_matrix(net, theta.to(args.device), *test))
            bar.set_postfix_str(f"teacher {path.stem} has {score:.1f} % test accuracy", refresh=False)
    return score

def open_teachers(shared: dict, folder: Path, needed: int = 1, most: int | None = None) -> list[Tensor]:
    """The trajectories in `folder`, memory-mapped, (epochs + 1, P) each, at `most` so many. Raises UserError if they do
    not fit or have fewer than the `needed` epochs, or if there are none."""
    remedy = f"run first: python iadd.py teachers --epochs {needed}, with the same options on data and network"
    teachers = []
    for path in sorted(folder.glob("*.pt"))[:most]:
        content = load(path, "thetas", "settings")
        must_agree(path, content["settings"], shared, remedy)
        if (epochs := len(content["thetas"]) - 1) < needed:
            raise UserError(f"{path} holds {epochs} epochs, not {needed}; {remedy}")
        teachers.append(content["thetas"])
    if not teachers:
        raise UserError(f"no teachers in {folder}; {remedy}")
    return teachers

def spread(W: Tensor) -> dict[str, float]:
    """How far the importance weights have come from 1: minimum, 1 % quantile, median, mean."""
    return {"W_min": W.min().item(), "W_1pct": W.kthvalue(math.ceil(len(W) / 100)).values.item(),
            "W_median": W.median().item(), "W_mean": W.mean().item()}

def command_distill(args: argparse.Namespace) -> None:
    """Distil a dataset into a few images per class (Algorithm 1)."""
    most = args.teachers  # not the preset's
    data, shared, folder, out = prepare(args)
    args.batch = min(args.batch or math.inf, args.ipc * len(data.classes))
    if args.batch < RANKS:
        raise UserError(f"{RANKS} processes cannot share out the {args.batch} images of a student step")
    names = ("ipc", "method", "steps", "expert_epochs", "max_start_epoch", "batch", "lr_img", "lr_alpha", "alpha",
             "lr_w", "normalize_w", "epsilon", "max_loss", "seed")
    needed = args.max_start_epoch - 1 + args.expert_epochs
    teachers = open_teachers(shared, folder, needed, most)
    if most and len(teachers) < most:
        raise UserError(f"{folder} holds {len(teachers)} teachers, not {most}: run teachers --teachers {most} first")
    settings = {**shared, **{name: getattr(args, name) for name in names}, "teachers": len(teachers),
                "teachers_fingerprint": checksum({n: thetas[:needed + 1] for n, thetas in enumerate(teachers)})}
    with exclusive(out):
        state = open_state(args, data, settings, teachers[0].shape[1], out / "distilled.pt")
        if state["iteration"] == args.iterations:
            return print(f"{out}/distilled.pt is there already; --restart makes it anew")
        describe(args, out, {"iterations": args.iterations, **settings})
        training, alpha = load(min(folder.glob("*.pt")), "settings")["settings"], float(state["alpha"])
        steps = args.expert_epochs * math.ceil(len(data.train[0]) / training["batch_real"])
        print(f"{len(teachers)} teachers: {args.steps} steps of alpha = {alpha:.4g} are to take a student where "
              f"{steps} steps of {training['lr_teacher']:g}, {args.expert_epochs} epochs, took its teacher")
        print(f"the rows of {out}/images_*.png are {', '.join(data.classes)}")
        distil(args, data, teachers, state, out)

def open_state(args: argparse.Namespace, data: Dataset, settings: dict, P: int, result: Path) -> dict:
    """The state to go on from, read from `result`. Without that file, or with --restart, rank 0 first writes the
    initial one. Raises UserError if it is of other settings, or further than wanted."""
    with rank_0_first():
        if RANK == 0 and (args.restart or not result.exists()):
            seed_all(args.seed, "distill")
            normalise = Normalisation.fit(data.train[0], args.zca, args.device)
            images, labels = real_images(data, normalise, args.ipc)            # Algorithm 1, line 1
            first = result.with_name("first.tmp")
            save({"images": images.cpu(), "labels": labels.cpu(), "mean": normalise.mean.cpu(),
                  "scale": normalise.scale.cpu(), "alpha": args.alpha,         # line 2
                  "W": torch.ones(P, dtype=torch.float64),  # float32 would round away steps below 3e-8
                  "momentum": torch.zeros(images.shape), "momentum_alpha": torch.zeros(()), "classes": data.classes,
                  "settings": settings, "iteration": 0, "seconds": 0.0, "skipped": 0, "log": []}, first)
            if args.restart:
                set_aside(result.parent)
            first.rename(result)
    state = load(result, "images", "W")
    must_agree(result, state["settings"], settings, "--restart begins anew, --name NAME keeps both")
    if state["iteration"] > args.iterations:
        raise UserError(f"{result} is at iteration {state['iteration']} already, beyond --iterations {args.iterations}")
    return state

def distil(args: argparse.Namespace, data: Dataset, teachers: list[Tensor], state: dict, out: Path) -> None:
    """Algorithm 1 from where `state` stands, with checkpoints, log and evaluations."""
    moving = {key: torch.as_tensor(state[key]).to(args.device, copy=True) for key in (
        "images", "alpha", "W", "momentum_alpha", "momentum")}
    images, alpha, W = (moving[key].requires_grad_() for key in ("images", "alpha", "W"))
    labels, mean, scale = (state[key].to(args.device) for key in ("labels", "mean", "scale"))
    normalise, settings = Normalisation(mean, scale), state["settings"]
    net = build("convnet", data, args.width, args.depth).to(args.device)
    passes = args.iterations * args.steps * 12  # a step costs as much as 3 forward passes, its way back as 9
    compile, record = accelerators(net, images.detach()[:args.batch], passes, args.compile)
    options = {key: settings[key] for key in (
        "batch", "lr_img", "lr_alpha", "lr_w", "method", "epsilon", "normalize_w", "max_loss", "seed")}
    losses = iadd(student_step(net, compile, args.batch), images, labels, alpha, W, teachers, T=args.iterations,
                  J=args.steps, K=args.expert_epochs, max_start=args.max_start_epoch, done=state["iteration"],
                  momentum=(moving["momentum_alpha"], moving["momentum"]), record=record if RANKS == 1 else plain,
                  **options)
    test = (normalise(data.test[0]), data.test[1].to(args.device)) if args.eval_every else None

    def good(values):
        return values["alpha"] > 0 and all(torch.as_tensor(values[key]).isfinite().all() for key in moving)
    def checkpoint():
        if RANK == 0 and good(state):
            save({**state, "alpha": float(state["alpha"])}, out / "distilled.pt")
    def picture():
        pixels, png = normalise.inverse(images.detach()).clamp(0, 1), io.BytesIO()
        pixels = F.interpolate(pixels, scale_factor=math.ceil(96 / data.shape[1]))  # to 96 a side or more
        torchvision.utils.save_image(pixels, png, "png", nrow=args.ipc, padding=4, pad_value=1)
        write(out / f"images_{state['iteration']:05d}.png", png.getbuffer())

    if state["iteration"] > 0:
        print(f"going on from iteration {state['iteration']}")
    elif RANK == 0:
        picture()
    start, spikes, skipped, log = time.time() - state["seconds"], 0, state["skipped"], state["log"]
    recent = torch.tensor(state.get("recent", []), dtype=W.dtype, device=args.device).unbind()  # of no row yet
    with progress_bar(losses, total=args.iterations, initial=state["iteration"], unit="it") as bar:
        try:
            for t, loss in enumerate(bar, state["iteration"] + 1):
                spikes = spikes + 1 if args.max_loss and loss > args.max_loss else 0
                skipped, seconds, recent = skipped + (spikes > 0), time.time() - start, [*recent, loss]
                saves = t % args.checkpoint_every == 0 or t == args.iterations
                tests = args.eval_every and t % args.eval_every == 0
                due = t % 10 == 0 or saves or tests or spikes == 10  # not always: reading waits for the GPU
                if due:
                    if not (loss.isfinite() and good(moving)) or spikes == 10:
                        remedy = "a lower " + ("" if alpha <= 0 else "--alpha, ") + "--lr-alpha, --lr-img or --lr-w"
                        raise UserError(f"diverged by iteration {t}: loss {loss:.4g}, alpha {alpha:.4g}; the last good "
                                        f"state is kept; --restart with {remedy}{' or no --max-loss' * (spikes > 0)}")
                    row = {"loss": torch.stack(recent).mean().item(), "alpha": alpha.item(), **spread(W.detach()),
                           "skipped": skipped}
                    bar.set_postfix_str(" ".join(f"{key} {value:.4g}" for key, value in row.items()), refresh=False)
                    log, recent = [*log, {"iteration": t, "seconds": round(seconds, 2), **row}], []
                if tests:
                    evaluate(args, data, test, out, "distilled", lambda: (images.detach(), labels), "convnet",
                             {"alpha": alpha.item(), "iteration": t, "settings": settings}, compile=False)
                if due or args.device.type == "cpu":  # all at once, so that an interruption finds whole iterations
                    state = {**state, **{key: x.detach().to("cpu", copy=True) for key, x in moving.items()},
                             "iteration": t, "seconds": seconds, "skipped": skipped, "log": log,
                             "recent": [loss.item() for loss in recent]}
                if due and RANK == 0:
                    lines = [log[0].keys(), *(row.values() for row in log)]
                    write(out / "log.csv", "".join(",".join(map(str, line)) + "\n" for line in lines).encode())
                if saves and RANK == 0:
                    picture(), checkpoint()
        except BaseException:  # KeyboardInterrupt, too
            on_signals(signal.SIG_IGN)
            checkpoint()
            raise
    print(f"{args.iterations} iterations in {time.time() - start:.0f} s, peak memory {peak_memory(args.device):.2f} GB;"
          f" loss {loss:.4f}, alpha {args.alpha:g} -> {alpha.item():.5f}; {out}/distilled.pt")

def evaluate(args: argparse.Namespace, data: Dataset, test: tuple[Tensor, Tensor], out: Path, on: str, source,
             arch: str, result: dict, compile: bool | None = None) -> None:
    """Train args.nets fresh networks, each on what `source()` returns, images and labels, and test them on `test`, the
    same. Prints a row and appends it to out/results.jsonl. result: alpha, settings and iteration if distilled."""
    epochs = args.eval_epochs or (args.epochs if on == "full" else 1000)
    lr = args.lr or result.get("alpha", args.lr_teacher)
    net, x = build(arch, data, args.width, args.depth).to(args.device), source()[0]
    batch = min(args.batch_real, len(x))
    steps = args.nets * epochs * math.ceil(len(x) / batch)
    compile, record = accelerators(net, x[:batch], 3 * steps, compile)
    ell, start, n = record(compile(flat_loss(net))), time.time(), len(data.classes)
    matrices = torch.zeros(args.nets, n, n, dtype=torch.int64)  # the networks are shared out over the ranks
    with progress_bar(total=math.ceil(steps / RANKS), desc=f"{arch} on {on}", unit="step", leave=False) as bar:
        for k in range(RANK, args.nets, RANKS):
            seed_all(args.seed, "eval", on, arch, k)
            theta = flat_parameters(build(arch, data, args.width, args.depth))
            theta = train_network(ell, theta, *source(), epochs, lr, batch, bar.update)
            matrices[k] = confusion_matrix(net, theta, *test)
    scores, seconds = [accuracy(m) for m in sum_over_ranks(matrices)], round(time.time() - start, 1)
    mean, std = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
    tqdm.write(f"{on:<12}{arch:<10}{f'{mean:.1f} ± {std:.1f} %':>14}{args.nets:>10}{epochs:>8}{lr:>10.5f}"
               f"{seconds:>9.0f}" + (f"  at iteration {result['iteration']}" if result else ""))
    row = {"on": on, "arch": arch, "mean": mean, "std": std, "accuracies": scores, "epochs": epochs, "lr": lr,
           "dataset": data.name, "ipc": args.ipc, "seed": args.seed, "seconds": seconds, **result}
    if args.confusion or args.confusion is None and args.dataset == "covid":
        row["confusion"] = matrices.sum(0).tolist()
        share = 100 * matrices.sum(0) / matrices.sum((0, 2))[:, None]
        print(f"  confusion matrix in per cent, rows: true classes; mean accuracy of these {share.diag().mean():.1f} %")
        for name, shares in zip(data.classes, share.tolist()):
            print(f"  {name:<16}" + "".join(f"{value:7.1f}" for value in shares))
    if RANK == 0:
        append_line(out / "results.jsonl", json.dumps(row))

def open_result(args: argparse.Namespace) -> tuple[Dataset, Normalisation, dict | None, dict, Path, Path]:
    """What eval and plot read: data, normalisation, content of the distilled file (None where there is none and none is
    needed), the settings that teachers share with it, their folder, and its path."""
    given = args.command == "eval" and args.distilled
    content = load(given, "images", "W") if given else None
    for key in ("dataset", "ipc", "width", "depth", "zca"):  # a file from elsewhere brings its own settings
        if content and getattr(args, key) is None:
            setattr(args, key, content["settings"].get(key))
    data, shared, folder, out = prepare(args)
    path = given or out / "distilled.pt"
    if not path.exists():
        if args.command == "plot" or "distilled" in args.on:
            raise UserError(f"{path} does not exist; run first: python iadd.py distill, with the same options")
        return data, Normalisation.fit(data.train[0], args.zca, args.device), None, shared, folder, path
    content = content or load(path, "images", "W")
    args.ipc = content["settings"]["ipc"]  # under a --name of its own it can be any
    if content["classes"] != data.classes or tuple(content["images"].shape[1:]) != data.shape:
        raise UserError(f"{path} was distilled from other classes or image sizes than {data.name} has")
    must_agree(path, content["settings"], {} if given else shared, "it belongs to another dataset or network")
    normalise = Normalisation(content["mean"].to(args.device), content["scale"].to(args.device))
    return data, normalise, content, shared, folder, path

def command_eval(args: argparse.Namespace) -> None:
    """Train fresh networks on the distilled images and test them on real ones."""
    data, normalise, content, shared, folder, path = open_result(args)
    def herded():
        teacher, = open_teachers(shared, folder, most=1)
        print(f"herding by the features of the first teacher after {len(teacher) - 1} epochs")
        net = build("convnet", data, args.width, args.depth).to(args.device)
        return real_images(data, normalise, args.ipc, lambda x: herding(net, teacher[-1].to(x.device), x, args.ipc))
    sources = {"distilled": lambda: (content["images"].to(args.device), content["labels"].to(args.device)),
               "random": lambda: real_images(data, normalise, args.ipc),  # drawn anew for each network
               "herding": functools.cache(herded),
               "full": functools.cache(lambda: (normalise(data.train[0]), data.train[1].to(args.device)))}
    for arch, on in itertools.product(args.arch, args.on):  # whatever is wrong shows before hours of training
        build(arch, data, args.width, args.depth), sources[on]()
    test = normalise(data.test[0]), data.test[1].to(args.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    open(path.parent / "results.jsonl", "a").close()  # says now if it cannot be written
    print(f"\n{data.name}, IPC {args.ipc}: test accuracy after the last epoch, mean ± standard deviation\n"
          f"{'trained on':<12}{'network':<10}{'accuracy':>14}{'networks':>10}{'epochs':>8}{'lr':>10}{'seconds':>9}")
    for on, arch in itertools.product(args.on, args.arch):
        result = {key: content[key] for key in ("alpha", "iteration", "settings")} if on == "distilled" else {}
        evaluate(args, data, test, path.parent, on, sources[on], arch, result, args.compile)

# -------- Figures -----------------------------------------------------------------------------------------------------
def command_plot(args: argparse.Namespace) -> None:
    """Draw the distilled images, the course of the distillation, and the weights W beside what they weigh."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"figures need matplotlib: pip install matplotlib ({error})") from None
    matplotlib.use("Agg")  # draws files, no windows
    import matplotlib.pyplot as plt
    data, normalise, content, shared, folder, path = open_result(args)
    settings, ipc, W = content["settings"], content["settings"]["ipc"], content["W"]
    images, labels, alpha = (torch.as_tensor(content[key], device=args.device) for key in ("images", "labels", "alpha"))
    def finish(figure, name):
        png = io.BytesIO()
        figure.savefig(png, dpi=130, bbox_inches="tight")
        write(path.with_name(f"plot_{name}.png"), png.getbuffer())
        print(path.with_name(f"plot_{name}.png"))

    seed_all(args.seed, "plot")  # Fig. 4, 5 and 8
    real = real_images(data, normalise, ipc)[0]
    order = [k for k in range(len(images)) if k % ipc < 10][:100]  # a part of them, if there are many
    columns = min(ipc, 10) if ipc > 1 else min(len(order), 5 if len(order) <= 20 else 10)
    rows = math.ceil(len(order) / columns)
    figure, axes = plt.subplots(rows, 2 * columns + 1, figsize=(1.2 * (2 * columns + 1), 1.5 * rows), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for left, x in ((0, real), (columns + 1, images)):
        for k, pixels in enumerate(normalise.inverse(x[order]).clamp(0, 1).expand(-1, 3, -1, -1).cpu()):
            axes[k // columns, left + k % columns].imshow(pixels.permute(1, 2, 0).numpy())
            axes[k // columns, left + k % columns].set_title(data.classes[labels[order[k]]][:16], fontsize=7, pad=2)
    figure.suptitle(f"{data.name}: on the left real images, on the right {len(order)} of {len(images)} distilled ones")
    finish(figure, "images")

    log, results = content["log"], path.with_name("results.jsonl")
    try:
        tests = [row for row in map(json.loads, results.read_text().splitlines() if results.exists() else ())
                 if row["on"] == "distilled" and row["settings"] == settings]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{results} is damaged: {error!r}") from None
    figure, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")
    for ax, keys in zip(axes, (["loss"], ["alpha"], list(spread(W)))):
        for key in keys:
            ax.plot([row["iteration"] for row in log], [row.get(key, math.nan) for row in log], label=key)
    for arch in ARCHITECTURES:
        if last := {row["iteration"]: row for row in tests if row["arch"] == arch}:
            points = [[last[t][key] for t in sorted(last)] for key in ("iteration", "mean", "std")]
            axes[3].errorbar(*points, marker="o", capsize=3, label=f"test accuracy of {arch}, %")
    for ax in axes:
        ax.set_xlabel("iteration")
        ax.legend(*ax.get_legend_handles_labels())
    finish(figure, "curves")

    K, J, max_start, batch = (settings[key] for key in ("expert_epochs", "steps", "max_start_epoch", "batch"))
    teachers = open_teachers(shared, folder, max_start - 1 + K, most=10)
    net = build("convnet", data, args.width, args.depth).to(args.device)
    step, misses = student_step(net), []
    for segment in random_segments(teachers, K, max_start, T=10):
        start, target = (on_device(theta, args.device) for theta in segment)
        misses.append((unroll(step, start, alpha, *student_batches(images, labels, batch, J)) - target).abs().cpu())
    figure, axes = plt.subplots(1, 2, figsize=(18, 4), layout="constrained")  # Fig. 1, 6 and 7
    for ax, title, values in ((axes[0], "|student - teacher|, mean of 10 students", torch.stack(misses).mean(0)),
                              (axes[1], "importance weight W", W)):
        ax.plot(values.numpy(), linewidth=0.3)
        ax.set(title=title, xlabel="parameter; dotted: where the layers begin")
        for layer, end in zip(net.parameters(), itertools.accumulate(p.numel() for p in net.parameters())):
            if layer.dim() > 1:  # the weights of a layer; its biases and its normalisation are slivers
                ax.axvline(end - layer.numel(), color="black", linestyle=":")
    finish(figure, "weights")

# -------- Bench: the runtime analysis of Section 4.2, and the rest of the method, on random data ----------------------
def unrolled_step(net: nn.Module):
    """The step of Eq. (2) the obvious way, which is MTT's: the graph of all J steps is kept."""
    ell = flat_loss(net)
    def step(theta, alpha, x, y):
        theta = theta if theta.requires_grad else theta.clone().requires_grad_()
        gradient, = torch.autograd.grad(ell(theta, x, y), theta, create_graph=True)
        return theta - alpha * gradient
    return step

def median_seconds(runs, device: torch.device) -> float:
    """Median time of the items of an iterator but the first, which may compile; if it is the only one, its time."""
    times = [time.perf_counter()]
    for _ in runs:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
    return statistics.median([after - before for before, after in itertools.pairwise(times)][len(times) > 2:])

def measure(ours: bool, task: str, batch: int, steps: int, width: int, device: torch.device, compiling: bool,
            repeats: int) -> tuple[float, float, float]:
    """Seconds a step (median), its floating-point operations, and peak memory in GB, of one task done in one way.
    task: "distil", an iteration of Algorithm 1 with `steps` steps of `batch` images, or "train", as many steps."""
    if ours:
        tune(device)
    n = batch if task == "distil" else batch * steps
    net, x = convnet((3, 32, 32), 10, width).to(device), torch.randn(n, 3, 32, 32, device=device)
    theta, y = flat_parameters(net), torch.arange(n, device=device) % 10
    compile, record = accelerators(net, x[:batch], math.inf, compiling and ours)
    if task == "distil":
        step = student_step(net, compile) if ours else unrolled_step(net)
        teacher = torch.stack([theta, theta + 0.01 * torch.randn_like(theta)]).cpu()
        alpha, W = theta.new_tensor(0.01).requires_grad_(), torch.ones_like(theta).double().requires_grad_()
        runs = iadd(step, x.requires_grad_(), y, alpha, W, [teacher], T=repeats + 1, J=steps, K=1, max_start=1,
                    batch=batch, lr_img=1, lr_alpha=1e-7, lr_w=1e-4, record=record)
    else:
        ell, optimizer = record(compile(flat_loss(net))), torch.optim.SGD([theta.requires_grad_()], 0.01, momentum=0.9)
        runs = (train(ell, theta, optimizer, x, y, 1, batch) for _ in range(repeats + 1))
    flops = forward_flops(net, x[:batch].detach()) * (12 if task == "distil" else 3)
    return median_seconds(runs, device) / steps, flops, peak_memory(device)

def measure_alone(*arguments) -> tuple[float, float, float]:
    """`measure` in a process of its own, as peak memory and malloc are a process's; NaN if memory did not suffice."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except (BrokenExecutor, torch.OutOfMemoryError):
            return math.nan, math.nan, math.nan

def command_bench(args: argparse.Namespace) -> None:
    """Time each part of the method against the obvious way to write it (Section 4.2), on random data."""
    gpu, width, repeats = args.device.type == "cuda", args.width or (32 if args.quick else 128), 2 if args.quick else 5
    torch.backends.cuda.matmul.allow_tf32 = True  # as cuDNN's convolutions do
    a = torch.randn(2 * [8192 if gpu else 2048], device=args.device)
    rate = 2 * len(a) ** 3 / median_seconds((a @ a for _ in range(10)), args.device)
    print(f"{torch.cuda.get_device_name(args.device) if gpu else f'{torch.get_num_threads()} CPU threads'}, torch "
          f"{torch.__version__}, ConvNetD3 of width {width}; torch.mm of side {len(a)}: {rate / 1e12:.2f} TFLOP/s\n\n"
          f"{'milliseconds a step':<22}{'obvious way':>12}{'here':>10}{'faster':>8}{'of mm':>7}  peak memory -> here")
    J, settings = 5 if args.quick else 50 if gpu else 8, (width, args.device, args.compile is not False)
    for name, task, batch, steps, count, what in [
            ("distil", "distil", 10, J, 500, "10 iterations of 50 steps"),
            ("distil", "distil", 100, J, 500, "10 iterations of 50 steps"),
            ("teachers", "train", 256, J, 196, "an epoch of CIFAR-10"),
            ("evaluation", "train", 10, 20 * J, 5000, "five networks, 1000 epochs")]:
        (slow, _, before), (fast, flops, after) = (
            measure_alone(ours, task, batch, steps, *settings, repeats) for ours in (False, True))
        print(f"{f'{name}, batch {batch}':<22}{1000 * slow:>12.2f}{1000 * fast:>10.2f}{slow / fast:>7.2f}x"
              f"{flops / fast / rate:>7.0%}{before:>7.2f} -> {after:.2f} GB  {what}: {count * fast:.2f} s", flush=True)
    for batch in (10,) if args.quick else (10, 100):
        few, many = (measure_alone(True, "distil", batch, J, *settings, 0)[2] for J in (5, 50))
        print(f"peak memory at batch {batch}: J = 5 {few:.2f} GB, J = 50 {many:.2f} GB ({many / few - 1:+.0%})")

# -------- Command line ------------------------------------------------------------------------------------------------
def at_least(low: float, kind: type = int, strict: bool = False, high: float = 1e9):
    """An argparse type: a number from `low` (above it, if strict) to `high`."""
    def number(text):  # the name shows in argparse's message
        value = kind(text)
        if not low <= value <= high or strict and value == low:
            bound = "above" if strict else "at least"
            raise argparse.ArgumentTypeError(f"{text} is not {bound} {low} and at most {high:g}")
        return value
    return number

def make_parser() -> argparse.ArgumentParser:
    whole, above_zero, zero_up = at_least(1), at_least(0, float, strict=True), at_least(0, float)
    form, switch = argparse.RawDescriptionHelpFormatter, argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{teachers,distill,eval,plot,bench}")
    machine, data, result, evaluation = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    add = machine.add_argument_group("machine and network").add_argument
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    add("--compile", action=switch, help="torch.compile; --no-compile: plain PyTorch (default: if the run is long)")
    add("--width", type=whole, help="channels of each convolution of the ConvNet (default: preset, 128 in the paper)")
    add = data.add_argument_group("data and files").add_argument
    add("--dataset", help="cifar10, cifar100, tinyimagenet, covid, shapes, or a folder of {train,test}/<class>/* "
        "(default: cifar10)")
    add("--classes", nargs="+", default=(), help="the classes to use, of image files (default: all)")
    add("--preset", choices=[name for name, in parse_table(TRAINING, 1)],
        help="whose settings hold where none are given (default: the dataset's own, for a folder cifar10's)")
    add("--data-dir", type=Path, default=Path("data"), help="folder or archive of the data, downloads (default: data)")
    add("--runs", type=Path, default=Path("runs"), help="where everything else is written (default: runs)")
    add("--size", type=whole, help="side in pixels to which image files are resized (default: covid 112, others not)")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--depth", type=whole, help="convolution blocks (default: by image size: 3 for 32 pixels, 4 for 64, 5 for 112)")
    add("--zca", action=switch, help="whiten by ZCA, or normalise each channel (default: preset)")
    add = result.add_argument_group("which result").add_argument
    add("--ipc", type=whole, help="distilled images per class (default: 1)")
    add("--method", choices=["iadd", "mtt", "ddpp"], default="iadd",
        help="mtt keeps the weights W at 1, ddpp drops what is hardest to match (default: iadd)")
    add("--name", help="its folder's name (default: ipc<IPC>_<method>_seed<seed>)")
    add = evaluation.add_argument_group("evaluation").add_argument
    add("--nets", type=whole, default=5, help="networks of each kind, differently initialised (default: 5)")
    add("--eval-epochs", type=whole, help="epochs of training (default: 1000; on the full set the preset's 50)")
    add("--lr", type=above_zero, help="learning rate (default: the learned alpha; on real images the teachers')")
    add("--confusion", action=switch, help="show and save the confusion matrix (default: for covid)")

    def command(name, function, *parents):
        presets = f"presets (default < preset < what is typed):\n{TRAINING}{MATCHING}" if data in parents else ""
        sub = commands.add_parser(name, parents=parents, help=function.__doc__, description=function.__doc__,
                                  formatter_class=form, epilog=presets)
        sub.set_defaults(function=function)
        return sub.add_argument_group(name).add_argument
    add = command("teachers", command_teachers, data, machine)
    add("--teachers", type=whole, help="how many trajectories (default: preset, 200 in the paper for CIFAR)")
    add("--epochs", type=whole, help="epochs of each (default: preset, 50; with --ipc only those that distill reads)")
    add("--ipc", type=whole, help="train only the epochs that distill with this IPC reads (default: all)")
    add("--lr-teacher", type=above_zero, help="learning rate, plain SGD (default: preset, .01)")
    add("--batch-real", type=whole, help="images a step (default: preset, 256)")
    add("--restart", action="store_true", help="train all anew, the teachers that are there move to a folder `old`")
    add = command("distill", command_distill, data, machine, result, evaluation)
    add("--iterations", type=whole, help="T, distillation iterations (default: preset, 5000 in the paper)")
    add("--teachers", type=whole, help="use the first so many of the teachers in the folder (default: all)")
    add("--steps", type=whole, help="J, student steps an iteration (default: preset)")
    add("--expert-epochs", type=whole, help="K, teacher epochs from start to target (default: preset)")
    add("--max-start-epoch", type=whole, help="I+, students start at a teacher epoch below it (default: preset)")
    add("--batch", type=whole, help="distilled images a student step (default: preset, mostly all; at most all)")
    add("--lr-img", type=zero_up, help="learning rate of the images (default: preset)")
    add("--lr-alpha", type=zero_up, help="learning rate of alpha (default: preset)")
    add("--alpha", type=above_zero, help="alpha_0, the student's first learning rate (default: preset)")
    add("--lr-w", type=zero_up, default=1e-4, help="learning rate of the weights W (default: 1e-4, Section 4.1)")
    add("--normalize-w", action="store_true", help="iadd: keep W at a root mean square of 1 (beyond the paper)")
    add("--epsilon", type=at_least(0, float, high=0.99), default=0.1, help="ddpp: share that is dropped (default: 0.1)")
    add("--max-loss", type=above_zero, help="skip the update of an iteration whose loss is above it (default: none)")
    add("--checkpoint-every", type=whole, default=500, help="iterations between checkpoints (default: 500)")
    add("--eval-every", type=whole, help="iterations between evaluations, each like `eval` (default: none)")
    add("--restart", action="store_true", help="begin anew, the result that is there moves to a folder `old`")
    add = command("eval", command_eval, data, machine, result, evaluation)
    add("--distilled", type=Path, metavar="FILE", help="a distilled file from elsewhere (default: the one in --runs)")
    add("--on", nargs="+", choices=["distilled", "random", "herding", "full"], default=["distilled"],
        help="distilled images, as many real ones, random or by herding, or all (default: distilled)")
    add("--arch", nargs="+", choices=ARCHITECTURES, default=["convnet"], help="networks to train (default: convnet)")
    command("plot", command_plot, data, machine, result)
    add = command("bench", command_bench, machine)
    add("--quick", action="store_true", help="width 32 and few repetitions: two to three minutes")
    return parser

def start_process(args: argparse.Namespace) -> None:
    """Chooses and tunes the device, and meets the other ranks. Raises UserError."""
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()
    except Exception as error:  # whatever a missing backend raises
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {args.device or 'cuda'} cannot be used here ({reason})") from None
    args.device = device
    tune(device)
    if RANKS > 1 and args.command in ("plot", "bench"):
        raise UserError(f"{args.command} is for one process: run it without torchrun")
    if RANKS > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        on_signals(signal.SIG_DFL)  # to wait for a rank that does not come is not Python's to interrupt
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=1))
        on_signals()

def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 2 for what the user can mend, 128 and the signal's number."""
    stderr, args = sys.stderr, argparse.Namespace(command=None)
    if RANK > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    on_signals()
    try:
        args = make_parser().parse_args(argv)
        start_process(args)
        args.function(args)
        if RANKS > 1:
            time.sleep(0.1)  # torch 2.6 (its issue 56297): Python waits for gloo, and gloo for Python to drop a sum
            torch.distributed.destroy_process_group()
        return 0
    except KeyboardInterrupt as stop:
        again = "the same command" + (" without --restart" if getattr(args, "restart", False) else "")
        again = f": what is done is saved, and {again} goes on from there"
        print("iadd.py: interrupted" + (again if args.command in ("teachers", "distill") else ""), file=sys.stderr)
        return 128 + (stop.args or [signal.SIGINT])[0]
    except (UserError, OSError, MemoryError, RuntimeError, SystemExit) as error:  # SystemExit is argparse's
        on_signals()  # who saved has ignored them
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(10 * (RANK > 0))  # if it is not of this rank alone, rank 0 says it, and torchrun ends the others
            if isinstance(error, SystemExit):
                raise
            line = (str(error) or repr(error)).splitlines()[0]
            if not isinstance(error, (UserError, OSError)):
                if not isinstance(error, MemoryError) and not re.search("alloc|out of memory", line, re.I):
                    raise  # not the user's: show where
                less = {"teachers": "--batch-real or --width", "distill": "--batch, --steps or --width"}
                line = (f"out of memory, at a peak of {peak_memory(args.device):.2f} GB: a smaller "
                        f"{less.get(args.command, '--width')} needs less ({line})")
            print(f"iadd.py: {f'rank {RANK}: ' * (RANKS > 1)}error: {line}", file=stderr)
        return 2
    finally:
        sys.stderr = stderr  # for a traceback

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without ±
    sys.exit(main())
