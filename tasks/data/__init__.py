"""Data sets of the tasks, and the re-iterables that feed them to ``bilevel.solve``.

==================  =====================================================================
load(name)          digits, mnist, fashion-mnist, omniglot: a :class:`Dataset` of images
load_text(name)     tiny-shakespeare, or any text file: a :class:`Text` of character tokens
batches(...)        shuffled minibatches of images and labels
episodes(...)       few-shot problems: a support and a query batch of a few classes each
blocks(...)         shuffled blocks of tokens, with the next token of each as target
==================  =====================================================================

The last three are :class:`Epochs`: re-iterables with a position that can be saved and restored.
"""

from .batches import Batches as batches
from .batches import Blocks as blocks
from .batches import Episodes as episodes
from .batches import Epochs
from .dataset import Dataset, stratified
from .images import NAMES, load
from .text import Text, load_text

__all__ = [
    "NAMES",
    "Dataset",
    "Epochs",
    "Text",
    "batches",
    "blocks",
    "episodes",
    "load",
    "load_text",
    "stratified",
]
