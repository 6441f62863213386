"""Data sets of the tasks, and the re-iterables that feed them to ``bilevel.solve``.

==================  =====================================================================
load(name)          digits, mnist, fashion-mnist, omniglot: a :class:`Dataset` of images
load_text(name)     tiny-shakespeare, or any text file: a :class:`Text` of character tokens
batches(...)        shuffled minibatches of images and labels
episodes(...)       few-shot problems: a support and a query batch of a few classes each
==================  =====================================================================

The last two are :class:`Epochs`: re-iterables with a position that can be saved and restored.
"""

from .batches import Batches as batches
from .batches import Episodes as episodes
from .batches import Epochs
from .dataset import Dataset
from .images import load
from .text import Text, load_text

__all__ = ["Dataset", "Epochs", "Text", "batches", "episodes", "load", "load_text"]
