"""What the server of `tests.support.command.background` imports once, so that a command
starts in milliseconds."""

from __future__ import annotations

import torch

from tests.support.command import BUILD, CONVERT, RUN, script

torch.set_num_threads(1)
for name in (CONVERT, BUILD, RUN):
    script(name)
