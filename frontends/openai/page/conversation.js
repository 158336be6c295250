// The turns so far, and how they look.

class Conversation {
  turns = []; // {pictures, question, answer}; of answered questions alone

  constructor(element) {
    this.element = element;
  }

  get pictures() {
    return this.turns.flatMap((turn) => turn.pictures);
  }

  // With a further question, as the server takes it.
  messages(pictures, question) {
    const before = this.turns.flatMap((turn) => [
      userMessage(turn.pictures, turn.question),
      { role: "assistant", content: turn.answer },
    ]);
    return [...before, userMessage(pictures, question)];
  }

  // A turn that is being answered.
  begin(pictures, question) {
    const asked = make("section", "turn question");
    asked.setAttribute("aria-label", "Question");
    asked.append(...pictures.map((each) => each.element), make("p", "said", question));
    const answered = make("section", "turn answer");
    answered.setAttribute("aria-label", "Answer");
    const said = make("p", "said");
    const timings = make("p", "timings");
    answered.append(said, timings);
    this.element.append(asked, answered);
    return { pictures, question, answer: "", asked, answered, said, timings };
  }

  // Text that came. Boxes are drawn as soon as they are whole, on the last picture shown so far.
  say(turn, text) {
    turn.answer += text;
    turn.said.textContent = turn.answer;
    const boxes = boxesOf(turn.answer);
    const picture = [...this.pictures, ...turn.pictures].at(-1);
    if (picture && boxes.length > 0) drawBoxes(picture.frame, boxes);
  }

  scroll() {
    this.element.scrollTop = this.element.scrollHeight;
  }

  // The pictures stay, since the next question may be the same one again.
  takeBack(turn) {
    turn.asked.remove();
    turn.answered.remove();
  }

  clear() {
    this.turns = [];
    this.element.querySelectorAll(".turn").forEach((each) => each.remove());
  }
}

function userMessage(pictures, question) {
  const content = [...pictures.map((each) => each.part), { type: "text", text: question }];
  return { role: "user", content: pictures.length > 0 ? content : question };
}

// Of the server's last chunk. The first token comes when all but decoding is done.
function timingsLine({ timings, usage }) {
  const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);
  const cached = usage.prompt_tokens_details?.cached_tokens;
  const parts = [
    `tiling ${seconds(timings.tiling_ms)}`,
    `vision ${seconds(timings.vision_ms)}`,
    `first token ${seconds(timings.total_ms - timings.decode_ms)}`,
    ...(timings.decode_tokens_per_s > 0 ? [`${timings.decode_tokens_per_s.toFixed(1)} tokens/s`] : []),
    `${usage.prompt_tokens} tokens in${cached ? `, ${cached} of them known` : ""}`,
    `${usage.completion_tokens} out`,
  ];
  return parts.join(" · ");
}
