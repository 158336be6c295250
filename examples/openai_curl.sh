#!/bin/bash
# Asks serve.py about a picture with curl: bash examples/openai_curl.sh PICTURE QUESTION
set -euo pipefail
picture=${1:-examples/scan_1642.png} question=${2:-Read the number.}
server=${SERVER:-http://127.0.0.1:8000}
[ -r "$picture" ] || { echo "error: $picture cannot be read; give a picture" >&2; exit 2; }
# The picture goes through stdin: an argument may hold 128 KiB at most.
{
    printf '{"messages": [{"role": "user", "content": ['
    printf '{"type": "image_url", "image_url": {"url": "data:image/png;base64,'
    base64 -w 0 "$picture"
    printf '"}}, {"type": "text", "text": '
    python3 -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$question"  # quotes the text
    printf '}]}], "max_tokens": 100}'
} | curl --silent --show-error "$server/v1/chat/completions" \
    --header 'Content-Type: application/json' --data-binary @-
echo
