// What the page asks, as a line for a shell and as a program. Keys are named and never written out.

const KEY_NAME = "NVLM_API_KEY";
const base = () => new URL("v1", document.baseURI).href;

// The body comes by a here-document: a picture is longer than an argument may be.
function asCurl(body, needsKey) {
  const key = needsKey ? ` -H "Authorization: Bearer $${KEY_NAME}"` : "";
  return [
    `curl ${quoted(`${base()}/chat/completions`)} -H 'Content-Type: application/json'${key} \\`,
    "    --data-binary @- <<'END_OF_BODY'",
    JSON.stringify(body),
    "END_OF_BODY",
    "",
  ].join("\n");
}

// JSON of strings, lists, objects and numbers is Python too.
function asPython(body, needsKey) {
  const { model, messages, temperature, mm_processor_kwargs: tiles } = body;
  return [
    ...(needsKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(base())}, api_key=${needsKey ? `os.environ["${KEY_NAME}"]` : '"none"'})`,
    "answer = client.chat.completions.create(",
    `    model=${JSON.stringify(model)},`,
    `    messages=${JSON.stringify(messages, null, 4).replaceAll("\n", "\n    ")},`,
    `    temperature=${temperature},`,
    `    extra_body={"mm_processor_kwargs": ${JSON.stringify(tiles)}},`,
    ")",
    "print(answer.choices[0].message.content)",
    "",
  ].join("\n");
}

const quoted = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;

// Resolves to whether it was copied; else it lies open to be copied by hand.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // no clipboard without TLS, but on this machine
    byId("by_hand_text").value = text;
    byId("by_hand").showModal();
    byId("by_hand_text").select();
    return false;
  }
}
