// Asks the server that this page came from. A refusal is an Error whose message is its sentence.

const GONE = "The server cannot be reached. It may have stopped, or is not started yet.";

class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

class ApiServer {
  key = ""; // in this variable and nowhere else

  async get(path) {
    return (await this.#fetch(path, { method: "GET" })).json();
  }

  async post(path, body, signal) {
    return (await this.#send(path, body, signal)).json();
  }

  // The chunks of an answer as they come. Ends as the stream ends.
  async *stream(path, body, signal) {
    const response = await this.#send(path, body, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await this.#reading(reader);
      if (done) throw new Refusal("The answer broke off. Ask again.");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.slice("data: ".length);
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refusal(sentence(chunk.error.message));
        yield chunk;
      }
    }
  }

  #send(path, body, signal) {
    const headers = { "content-type": "application/json" };
    return this.#fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  }

  async #fetch(path, options) {
    const headers = { ...options.headers };
    if (this.key) headers.authorization = `Bearer ${this.key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
    } catch (error) {
      throw options.signal?.aborted ? error : new Refusal(GONE);
    }
    if (!response.ok) throw await refusalOf(response);
    return response;
  }

  async #reading(reader) {
    try {
      return await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new Refusal("The answer broke off. Ask again.");
    }
  }
}

async function refusalOf(response) {
  try {
    return new Refusal(sentence((await response.json()).error.message), response.status);
  } catch {
    return new Refusal(`The server answered with status ${response.status}.`, response.status);
  }
}

// The server's lines begin small and end without a full stop.
function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}
