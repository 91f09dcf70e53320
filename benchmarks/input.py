"""Images/s of the training input, compared with PyTorch's official recipe on the same JPEG files and cores.

The recipe is torchvision's ImageFolder, RandomResizedCrop(224), RandomHorizontalFlip, ToTensor and Normalize in a
DataLoader with as many workers as cores. (This library normalises on the device.) The files are 500x375 JPEGs of
quality 92, cut from photographs that scikit-learn and scikit-image ship, in a temporary folder. The contestants take
turns, and figures are medians over the rounds. Afterwards, this library is measured alone with 1, 2 and 4 worker
processes, unchanged and with decoding replaced by a constant; the rest is Python's part, which limits a process with
many cores.

Run `python -m benchmarks.input`. It needs torch, torchvision and scikit-image in addition to the `train` extra.
(`--alone` omits PyTorch and the augmentations.)
"""

import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from repvgg_jax.cli import run_command
from repvgg_jax.machine import cores
from repvgg_jax.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, decode_image
from train.data.augmentation import Augmentation, make_transform
from train.data.batches import random_numbers
from train.data.pictures import Picture, open_picture, resized_crop
from train.data.pipeline import train_batches
from train.data.resize import resize
from train.data.sources import FolderSource
from train.data.transforms import Transform, random_crop_box

from .arguments import Parser, positive_float, positive_int

SIZE, BATCH = 224, 64
# Batches taken before the clock starts, so that no batch prepared before it is counted.
WARM_UP = 6
# The same for each worker process, of which Grain keeps four batches.
WARM_UP_PER_PROCESS = 5
PROCESSES = 1, 2, 4


def write_photos(folder: Path, count: int) -> float:
    """Write `count` JPEG files in two classes, and return their mean size in bytes."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    photos = [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    photos += [getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    sizes = []
    for number in range(count):
        photo = Image.fromarray(photos[number % len(photos)])
        width = min(photo.width, photo.height * 4 / 3) * rng.uniform(0.6, 1)
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - width * 3 / 4)
        cut = photo.resize((500, 375), Image.Resampling.BICUBIC, (left, top, left + width, top + width * 3 / 4))
        path = folder / "ab"[number % 2] / f"{number:05}.jpg"
        cut.save(path, quality=92)
        sizes.append(path.stat().st_size)
    return statistics.mean(sizes)


class Speed(NamedTuple):
    """Images per second, and milliseconds of processor time per image, which other processes do not affect."""

    rate: float
    cost: float


def processor_seconds() -> float:
    """Return the processor time of this process and its children so far, as Linux counts it."""
    by_thread = [path.read_text(encoding="utf-8") for path in Path("/proc/self/task").glob("*/children")]
    children = [process for text in by_thread for process in text.split()]
    ticks = 0
    for process in ("self", *children):
        ticks += sum(
            map(int, Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13])
        )
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(batches: Iterable[Any], seconds: float, warm_up: int = WARM_UP) -> Speed:
    """Measure the speed for `seconds`, after `warm_up` batches."""
    iterator, images = iter(batches), 0
    for _ in range(warm_up):
        next(iterator)
    start, used = time.perf_counter(), processor_seconds()
    while (passed := time.perf_counter() - start) < seconds:
        next(iterator)
        images += BATCH
    return Speed(images / passed, 1000 * (processor_seconds() - used) / images)


def torchvision_speed(folder: Path, workers: int, seconds: float) -> Speed:
    """Measure PyTorch's official recipe."""
    import torch

    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        # torchvision's operators exist only if its build matches torch's; images do not need them.
        with contextlib.suppress(RuntimeError):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import datasets, transforms

    recipe = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(str(folder), recipe), BATCH, shuffle=True, num_workers=workers, drop_last=True
    )
    # An epoch is longer than a measurement (otherwise, StopIteration is raised), so the workers are started once.
    return measure(loader, seconds)


def our_speed(folder: Path, workers: int, seconds: float, transform: Transform, processes: int = 1) -> Speed:
    """Measure `train_batches`."""
    with train_batches(
        FolderSource(folder),
        batch_size=BATCH,
        local_device_count=1,
        transform=transform,
        preprocessing=Preprocessing(SIZE),
        seed=0,
        num_workers=workers,
        processes=processes,
    ) as batches:
        return measure(batches, seconds, WARM_UP if processes == 1 else WARM_UP_PER_PROCESS * processes)


def our_transform(augmentation: Augmentation) -> Transform:
    """Return the transform of a run with this augmentation."""
    return make_transform("random_resized_crop_flip", augmentation, IMAGENET_MEAN)


_GREY = np.full((SIZE, SIZE, 3), 127, np.uint8)


def constant(image: Picture, rng: np.random.Generator, size: int) -> np.ndarray:
    """Do the work of a training transform except decoding and resizing: draw a crop box, return constant pixels."""
    random_crop_box(image.width, image.height, rng)
    rng.random()
    return _GREY


def print_processes(folder: Path, workers: int, seconds: float, rounds: int) -> None:
    """Measure and print images/s by the number of worker processes, in turn."""
    transforms = {"unchanged": our_transform(Augmentation()), "decoding replaced by a constant": constant}
    speeds: dict[tuple[str, int], list[Speed]] = {(name, count): [] for name in transforms for count in PROCESSES}
    for _ in range(rounds):
        for name, count in speeds:
            # At least one worker per process, as in a run.
            speeds[name, count].append(our_speed(folder, max(workers, count), seconds, transforms[name], count))
    print(f"\nours, {workers} workers in 1 process (the run's own) or more; medians of {rounds} rounds")
    print(f"{'':34}{'processes':>10}{'images/s':>10}{'CPU us/image':>14}")
    for (name, count), values in speeds.items():
        rate, cost = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{name:34}{count:10}{rate:10.0f}{1000 * cost:14.0f}")


CONTESTANTS: dict[str, Augmentation] = {
    "ours": Augmentation(),
    "ours, AutoAugment": Augmentation(auto_augment="autoaugment"),
    "ours, RandAugment": Augmentation(auto_augment="randaugment"),
    "ours, RandAugment of RepVGGplus": Augmentation(auto_augment="randaugment_plus", randaugment_magnitude=15),
    "ours, PIL's exact crops": Augmentation(exact_crop=True),
}


def breakdown(folder: Path, images: int = 128, repeats: int = 12) -> dict[str, float]:
    """Return the microseconds per image of each stage in one thread: minimum over repeats, mean over images."""
    from train.data import jpeg

    source, slots = FolderSource(folder), np.zeros((images, SIZE, SIZE, 3), np.uint8)
    files = [source[index].image for index in range(images)]
    data = [file for file in files if isinstance(file, bytes)]
    boxes = [random_crop_box(500, 375, random_numbers(0, 1, 0, index)) for index in range(images)]
    opened = [jpeg.open_jpeg(file, "", 3) for file in data]
    whole = [np.asarray(decode_image(file, "")) for file in data]
    crops = [
        p[top : top + height, left : left + width] for p, (left, top, width, height) in zip(whole, boxes, strict=True)
    ]
    transform = our_transform(Augmentation())

    def all_of_it(index: int) -> None:
        picture = open_picture(_bytes(source[index].image), "", 3)
        slots[index] = transform(picture, random_numbers(0, 1, 0, index), SIZE)

    def decode(index: int, reduction: int = 1) -> None:
        file = opened[index]
        assert file is not None
        file._decode(boxes[index][1] + boxes[index][3], reduction)

    stages: dict[str, Callable[[int], Any]] = {
        "total": all_of_it,
        "  read the file": lambda index: source[index],
        "  random numbers, crop box": lambda index: random_crop_box(500, 375, random_numbers(0, 1, 0, index)),
        "  read the header": lambda index: jpeg.open_jpeg(data[index], "", 3),
        "  decode down to the crop's last row": decode,
        "    of that, entropy decoding (decoded at 1/8)": functools.partial(decode, reduction=8),
        "  resize the crop": lambda index: resize(crops[index], (0, 0, *crops[index].shape[1::-1]), SIZE),
        "  copy into the batch": lambda index: slots.__setitem__(index, slots[index - 1]),
        "for comparison, PIL decodes": lambda index: decode_image(data[index], ""),
        "for comparison, PIL crops and resizes": lambda index: resized_crop(
            Image.fromarray(whole[index]), boxes[index], SIZE
        ),
    }
    least = {name: np.full(images, np.inf) for name in stages}
    for _ in range(repeats):
        for index in range(images):
            for name, stage in stages.items():
                start = time.perf_counter()
                stage(index)
                least[name][index] = min(least[name][index], time.perf_counter() - start)
    return {name: float(times.mean()) * 1e6 for name, times in least.items()}


def _bytes(image: bytes | np.ndarray) -> bytes:
    assert isinstance(image, bytes)
    return image


def main() -> None:
    """Measure, and print the results."""
    parser = Parser("python -m benchmarks.input", description=__doc__)
    parser.add_argument("--rounds", type=positive_int, default=7, help="measurements of each contestant (default: 7)")
    parser.add_argument(
        "--seconds", type=positive_float, default=3, help="duration of a measurement in seconds (default: 3)"
    )
    parser.add_argument(
        "--images",
        type=positive_int,
        default=3072,
        help="number of files; must be more than a measurement reads (default: 3072)",
    )
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=cores(),
        help="number of decoding workers of each contestant (default: one per core)",
    )
    parser.add_argument(
        "--alone", action="store_true", help="measure only this library, with 1, 2 and 4 worker processes"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_photos(folder, arguments.images)
        print(f"{arguments.images} files of 500x375, {size / 1000:.0f} kB on average; {arguments.workers} workers each")
        if not arguments.alone:
            print_contest(folder, arguments.workers, arguments.seconds, arguments.rounds)
        print_processes(folder, arguments.workers, arguments.seconds, arguments.rounds)
        stages = breakdown(folder)
    print("\nbreakdown, microseconds per image in one thread (minimum of several repeats)")
    for name, microseconds in stages.items():
        print(f"{name:46}{microseconds:6.0f}")


def print_contest(folder: Path, workers: int, seconds: float, rounds: int) -> None:
    """Measure and print the comparison with PyTorch's official recipe."""
    speeds: dict[str, list[Speed]] = {"torchvision, DataLoader": [], **{name: [] for name in CONTESTANTS}}
    theirs = speeds["torchvision, DataLoader"]
    for number in range(rounds):
        theirs.append(torchvision_speed(folder, workers, seconds))
        for name, augmentation in CONTESTANTS.items():
            speeds[name].append(our_speed(folder, workers, seconds, our_transform(augmentation)))
        line = ", ".join(f"{values[-1].rate:.0f}" for values in speeds.values())
        print(f"round {number + 1} of {rounds}: {line}", file=sys.stderr)
    print(f"\nmedians of {rounds} interleaved rounds; in parentheses, the range of the rounds' ratios")
    print(f"{'':34}{'images/s':>8}{'ratio':>23}{'CPU ms/image':>16}{'ratio':>8}")
    for name, values in speeds.items():
        ratios = [a.rate / b.rate for a, b in zip(values, theirs, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rate, cost = (statistics.median(column) for column in zip(*values, strict=True))
        saved = statistics.median(b.cost / a.cost for a, b in zip(values, theirs, strict=True))
        print(f"{name:34}{rate:8.0f}{spread:>23}{cost:16.2f}{saved:8.2f}")


if __name__ == "__main__":
    run_command(main)
