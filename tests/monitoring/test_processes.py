"""Two processes with unequal shares of the data, against NumPy over all of it."""

import os
import subprocess
import sys

import numpy as np
import torch
from torch import distributed, nn

from bn_lightning.monitoring import ActivationWatch

SIZES = (3, 11)


class OnlySometimes(nn.Module):
    """A network of which each process runs another part."""

    def __init__(self):
        super().__init__()
        self.shared, self.even, self.odd = nn.Flatten(), nn.ReLU(), nn.Tanh()

    def forward(self, x, rank):
        return (self.odd if rank else self.even)(self.shared(x))


def share(rank, flush):
    return 100.0 * rank + torch.randn(SIZES[rank], 3, 2, generator=torch.Generator().manual_seed(10 * rank + flush))


def process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    gathers, all_gather = [], distributed.all_gather
    distributed.all_gather = lambda *arguments, **options: gathers.append(1) or all_gather(*arguments, **options)
    net, watch, found = OnlySometimes(), ActivationWatch(), []
    watch.install(net)
    watch.sampling = True
    for flush in range(3):
        if not (flush == 2 and rank == 0):  # in the last sample one process has no data at all
            net(share(rank, flush), rank)
        gathers.clear()
        found.append((watch.flush(across_processes=True).to_dict(), len(gathers)))
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


def test_processes_with_unequal_shares_of_data_and_layers(tmp_path):
    # This file is the program of both processes: pytest's import mode leaves no module for `spawn` to import.
    both = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [running.wait(timeout=60) for running in both] == [0, 0]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for flush, ((rows, gathers), (others, _)) in enumerate(zip(one, two, strict=True)):
        assert gathers == (2 if flush == 0 else 1)  # the second is the exchange of layouts
        x = [share(rank, flush).double().numpy() for rank in range(2) if not (flush == 2 and rank == 0)]
        everything = np.concatenate([part.reshape(-1) for part in x])
        row = rows["shared"]
        assert row["count"] == everything.size
        np.testing.assert_allclose(
            [row["mean"], row["std"], row["min"], row["max"]],
            [everything.mean(), everything.std(), everything.min(), everything.max()],
            rtol=1e-6,
        )
        assert rows["even"]["count"] == (0 if flush == 2 else SIZES[0] * 6)
        assert rows["odd"]["count"] == SIZES[1] * 6
        keys = ("count", "mean", "std", "zero_fraction", "channels")
        for layer in rows:
            np.testing.assert_equal([others[layer][key] for key in keys], [rows[layer][key] for key in keys])


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2])
