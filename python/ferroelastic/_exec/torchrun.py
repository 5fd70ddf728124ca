"""``ferrorun`` under the name ``torchrun``. The scripts of ``bin`` and of ``ferroelastic-torchrun`` run this file."""

from ferroelastic.run import console

if __name__ == "__main__":
    console()
