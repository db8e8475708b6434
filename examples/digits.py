"""A small convolutional network, trained on scikit-learn's handwritten digits and pruned to 30 % of its parameters.

    pip install scikit-learn
    python examples/digits.py

LLM Surgeon works on any network of linear layers and convolutions: channels go, and the layers that read them are updated.
Everything is repeatable; training takes some seconds on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import resect
from resect.statistics import Classes, Data


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 1, 8, 8] and labels [n] to train on, and others to measure with."""
    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(images, labels, test_size=0.25, random_state=seed, stratify=labels)
    as_images = [torch.tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 for part in (train, test)]
    return as_images[0], torch.tensor(train_labels), as_images[1], torch.tensor(test_labels)


def network() -> nn.Sequential:
    """Three convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int = 15) -> None:
    """Adam on shuffled batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that are told right."""
    return float((model(images).argmax(1) == labels).float().mean())


def size(model: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Trains, prunes in three ways, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    images, labels, test_images, test_labels = digits(asked.seed)
    dense = network()
    start = time.perf_counter()
    train(dense, images, labels)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    print(f"{'':34}{'parameters':>12}{'accuracy':>10}")
    print(f"{'dense':34}{size(dense):>12,}{accuracy(dense, test_images, test_labels):>10.1%}")
    data = Data(list(zip(images.split(128), labels.split(128), strict=True)), Classes())
    ways = {
        "one shot, nothing made up for": {"shots": 1, "compensation": None},
        "one shot": {"shots": 1},
        "five shots": {"shots": 5},
    }
    for name, settings in ways.items():
        model = copy.deepcopy(dense)
        resect.prune(
            model,
            method="llm-surgeon",
            keep=asked.keep,
            of="model",
            layout="per-layer",
            data=data,
            inputs=(test_images[:2],),
            settings={"kinds": ["channels"], **settings},
        )
        print(f"{name:34}{size(model):>12,}{accuracy(model, test_images, test_labels):>10.1%}")


if __name__ == "__main__":
    main()
