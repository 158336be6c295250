#!/usr/bin/env bash
# Asks a Triton server about a picture with curl: the whole answer, then as it comes (SSE).
#   examples/triton_curl.sh [URL] [IMAGE] [PROMPT]
set -euo pipefail
url=${1:-http://localhost:8000}
image=${2:-"$(dirname "$0")/coffee.jpg"}
prompt=${3:-What is in the cup?}

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

question whole | curl --silent --show-error --fail-with-body --data @- "$url/v2/models/nvlm/generate"
echo
question stream | curl --silent --show-error --fail-with-body --no-buffer --data @- \
    "$url/v2/models/nvlm/generate_stream"
