"""The project's own command line: python main.py fit --config config.yaml."""

from data import Stripes
from lightning.pytorch.cli import LightningCLI
from model import Classifier

if __name__ == "__main__":
    LightningCLI(Classifier, Stripes)
