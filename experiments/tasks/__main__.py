"""The command line: `python -m experiments.tasks --help`."""

import sys, time
import jax
from experiments.tasks import compare, problems

names = sys.argv[1:]
for task in problems.TASKS:
    if names and task.name not in names:
        continue
    data = task.load()
    network = task.build(data.train[0][: task.batch])
    for optimizer in compare.OPTIMIZERS:
        for arm in compare.ARMS:
            t = time.time()
            outs = compare.run(task, data, network, optimizer, arm, (0,))
            for o in outs:
                print(
                    f"{task.name:22} {optimizer:6} {arm:12} test {o.test:.3f} thin {o.thin:.3f} stored {o.stored:.2f} worst {o.worst:.3f} {time.time() - t:.0f}s {o.ranks}",
                    flush=True,
                )
