"""Asks serve.py about a picture by the openai package, streamed: pip install openai

python examples/openai_chat.py examples/scan_1642.png "Read the number."
"""

from __future__ import annotations

import base64
import mimetypes
import sys
from pathlib import Path

from openai import OpenAI


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/openai_chat.py PICTURE QUESTION")
    path, question = Path(sys.argv[1]), sys.argv[2]
    kind = mimetypes.guess_type(path)[0] or "image/png"
    url = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    stream = client.chat.completions.create(
        model="nvlm-d",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": question},
                ],
            }
        ],
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
