#!/usr/bin/env bash
# Asks a Triton server about a picture with curl: the whole answer, then as it comes (SSE).
#   examples/triton_curl.sh [URL] [IMAGE] [PROMPT]
set -euo pipefail
url=${1:-http://localhost:8000}
image=${2:-"$(dirname "$0")/scan_1642.png"}
prompt=${3:-Read the number.}

# A question in JSON; the picture travels as base64. (python3 quotes the text.)
question() {
    python3 - "$image" "$prompt" "$1" <<'PYTHON'
import base64, json, sys
image, prompt, stream = sys.argv[1:]
picture = base64.b64encode(open(image, "rb").read()).decode()
fields = {"text_input": prompt, "max_tokens": 16, "image_base64": [picture]}
print(json.dumps({**fields, "stream": stream == "stream"}))
PYTHON
}

# Without the header curl says that it sends a form. --data-binary keeps the JSON as it is.
ask=(curl --silent --show-error --fail-with-body --header "Content-Type: application/json" --data-binary @-)
question whole | "${ask[@]}" "$url/v2/models/nvlm/generate"
echo
question stream | "${ask[@]}" --no-buffer "$url/v2/models/nvlm/generate_stream"
