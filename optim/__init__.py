"""Optimizers whose step size sets itself: Polyak, line search, schedule-free, averaging, clipping.

All are ``torch.optim.Optimizer``s with ``step(closure=None, *, loss=None, target=None)``:

>>> import torch, optim
>>> x = torch.tensor([1.0, -2.0], requires_grad=True)
>>> optimizer = optim.SPS([x])
>>> for _ in range(20):
...     optimizer.zero_grad()
...     loss = (x**2).sum()
...     loss.backward()
...     _ = optimizer.step(loss=loss)
>>> bool(loss < 1e-10)
True

How far to go is in :mod:`optim.rules`, in the letters of the papers; which method to take, and what
each needs, in ``docs/optim.md``.
"""

from optim.base import Last as Last
from optim.clipped import ClippedSGD as ClippedSGD
from optim.decreasing import AdaSPS as AdaSPS
from optim.decreasing import DecSPS as DecSPS
from optim.decreasing import InexactPolyak as InexactPolyak
from optim.iam import IAM as IAM
from optim.iam import IAMAdam as IAMAdam
from optim.polyak import SPS as SPS
from optim.polyak import SPSB as SPSB
from optim.polyak import SafeguardedSPS as SafeguardedSPS
from optim.polyak import SPSPlus as SPSPlus
from optim.schedule_free import ScheduleFreeAdamSPS as ScheduleFreeAdamSPS
from optim.schedule_free import ScheduleFreeSPS as ScheduleFreeSPS
from optim.search import SLS as SLS
from optim.search import SLSB as SLSB
from optim.search import AdaSLS as AdaSLS
