"""A training whose data loader reads samples that were pickled by another program."""

import pickle
from typing import Any

from torch.utils.data import DataLoader, Dataset

# The program that wrote the samples has a class `Example` in its main module.
SAMPLE = b"\x80\x04\x8c\x08__main__\x8c\x07Example\x93)\x81."


class Samples(Dataset[Any]):
    """Pickled samples."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return 4

    def __getitem__(self, index: int) -> Any:
        """Return a sample."""
        return pickle.loads(SAMPLE)


for batch in DataLoader(Samples(), num_workers=1):
    print(batch)
