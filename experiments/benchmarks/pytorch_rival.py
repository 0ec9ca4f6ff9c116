"""Run by `epoch` in an environment of its own: epochs of the same network in PyTorch.

The arguments are the hidden widths, the size of a batch, the number of epochs that are measured,
and the .npy files of images and labels. The last line printed is a JSON object with the seconds.
"""

import itertools
import json
import sys
import time

import numpy as np


def main() -> None:
    """Trains by the same optimizer, with tensors in memory and shuffled indices."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    widths, batch_size, rounds, images, labels = sys.argv[1:]
    images = torch.from_numpy(np.load(images)).reshape(-1, 784).float() / 255
    labels = torch.from_numpy(np.load(labels)).long()
    sizes = [784, *map(int, widths.split(",")), 10]
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    module = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.08, momentum=0.9)
    seconds = []
    for epoch in range(int(rounds) + 1):
        begin = time.perf_counter()
        for index in torch.randperm(len(labels)).split(int(batch_size)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(images[index]), labels[index])
            loss.backward()
            optimizer.step()
        if epoch:
            seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": seconds, "version": torch.__version__}))


if __name__ == "__main__":
    main()
