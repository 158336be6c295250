// The page's life: it meets the server, shows pictures, asks, stops and copies.

const RETRY_MS = 1000;
const server = new ApiServer();
const conversation = new Conversation(byId("turns"));
const attached = new Attached(byId("attached"), server);
let model = "";
let stopping = null; // of the answer that is being written
let needsKey = false;

const mostTiles = () => Number(byId("most_tiles").value);

async function meet() {
  let reply;
  try {
    reply = await server.get("v1/models");
  } catch (error) {
    refuse(error);
    if (error.status === 503) setTimeout(meet, RETRY_MS); // the engine is being loaded
    return;
  }
  const [first] = reply.data;
  model = first.id;
  byId("model").textContent = `${model}, ${first.max_model_len} tokens`;
  Object.assign(byId("most_tiles"), { max: first.max_num_tiles, value: first.max_num_tiles });
  byId("most_tiles_shown").textContent = first.max_num_tiles;
  byId("trouble").textContent = "";
  byId("key_row").hidden = true;
  tileAgain();
}

// Says what went wrong, and asks for the key where it is that.
function refuse(error) {
  byId("trouble").textContent = error.message;
  conversation.scroll(); // the sentence takes room from it
  if (error.status !== 401) return;
  needsKey = true;
  byId("key_row").hidden = false;
  byId("key").focus();
}

function attach(files) {
  byId("trouble").textContent = "";
  byId("empty").hidden = true;
  return attached.add(files, mostTiles, refuse);
}

// All pictures: the next question sends those of the turns before again, with the new number.
function tileAgain() {
  const pictures = [...conversation.pictures, ...attached.pictures];
  return Promise.all(pictures.map((each) => each.tile(server, mostTiles()).catch(refuse)));
}

function body(messages) {
  return {
    model,
    messages,
    temperature: Number(byId("temperature").value),
    mm_processor_kwargs: { max_num_tiles: mostTiles() },
  };
}

async function ask() {
  const question = byId("question").value.trim();
  if (stopping || (question === "" && attached.pictures.length === 0)) return;
  const messages = conversation.messages(attached.pictures, question);
  const turn = begin(question);
  try {
    await hear(turn, body(messages));
    conversation.turns.push(turn);
    byId("status").textContent = "";
    byId("announced").textContent = `Answer: ${turn.answer}`; // to those who cannot see it come
  } catch (error) {
    if (turn.asked.isConnected) broken(turn, error); // else a new conversation has begun
  } finally {
    stopping = null;
    byId("ask").textContent = "Ask";
  }
}

function begin(question) {
  stopping = new AbortController();
  const turn = conversation.begin(attached.take(), question);
  byId("empty").hidden = true;
  byId("question").value = "";
  byId("trouble").textContent = "";
  byId("status").textContent = "The answer is being written.";
  byId("ask").textContent = "Stop";
  conversation.scroll();
  return turn;
}

async function hear(turn, asked) {
  const more = { stream: true, stream_options: { include_usage: true }, return_timings: true };
  const chunks = server.stream("v1/chat/completions", { ...asked, ...more }, stopping.signal);
  for await (const chunk of chunks) {
    for (const { delta } of chunk.choices) conversation.say(turn, delta.content ?? "");
    if (chunk.timings) turn.timings.textContent = timingsLine(chunk);
    conversation.scroll();
  }
}

// What was said before a stop stays. A question that has no answer can be asked again.
function broken(turn, error) {
  const isStopped = error.name === "AbortError";
  byId("status").textContent = isStopped ? "Stopped." : "";
  if (isStopped && turn.answer !== "") {
    conversation.turns.push(turn);
    return;
  }
  conversation.takeBack(turn);
  attached.putBack(turn.pictures);
  if (byId("question").value === "") byId("question").value = turn.question;
  if (!isStopped) refuse(error);
}

function beginAnew() {
  stopping?.abort();
  conversation.clear();
  attached.clear();
  byId("trouble").textContent = "";
  byId("status").textContent = "";
  byId("empty").hidden = false;
  byId("question").focus();
}

// The question in the box; where there is none, the last one that was answered.
async function copyAs(written) {
  const question = byId("question").value.trim();
  const isNew = question !== "" || attached.pictures.length > 0 || conversation.turns.length === 0;
  const messages = conversation.messages(attached.pictures, question);
  const asked = body(isNew ? messages : messages.slice(0, -2));
  byId("status").textContent = (await copy(written(asked, needsKey))) ? "Copied." : "";
}
