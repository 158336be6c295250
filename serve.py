"""Step 3 as a server: answers OpenAI's API over HTTP with an engine directory."""

from __future__ import annotations

import os

from frontends.openai.main import main
from nvlm.program.command_line import run
from nvlm.program.launcher import end, rank_from

if __name__ == "__main__":
    run(main, rank=rank_from(os.environ), end=end)
