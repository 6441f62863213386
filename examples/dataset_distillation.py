"""Learn ten images from which a classifier learns almost as well as from a thousand.

    python examples/dataset_distillation.py                 # digits, under two minutes
    python examples/dataset_distillation.py --data mnist    # 50,000 images; see --help

The two losses, the call of ``bilevel.solve`` and the references are in
``tasks/data_distillation.py``; every option of that task is accepted here. No learning rate is
among them.
"""

import os
import sys

from tasks.__main__ import main

arguments = sys.argv[1:]
if os.environ.get("BILEVEL_TINY"):
    arguments = ["--preset", "quick", *arguments]

sys.exit(main(["data-distillation", *arguments]))
