// The list of outputs: rows are drawn a hundred at a time, and what is in them when they are opened.
"use strict";
const { models, rows } = JSON.parse(document.getElementById("data").textContent);
const search = document.getElementById("search"), show = document.getElementById("show");
const list = document.getElementById("rows"), more = document.getElementById("more"), count = document.getElementById("count");
const CHUNK = 100, FOLD = 4000; // rows drawn at a time; characters of an answer that are shown at once
const right = (row, i) => row.outputs[i]?.verdict === "correct";
const noted = (note) => (row) => row.outputs.some((o) => o?.notes.includes(note));

const filters = [["all", () => true]];
for (let i = 1; i < models.length; i++) {
  filters.push([`only ${models[i]} right, not ${models[0]}`, (row) => right(row, i) && !right(row, 0)]);
  filters.push([`only ${models[0]} right, not ${models[i]}`, (row) => right(row, 0) && !right(row, i)]);
}
filters.push(
  ["all right", (row) => models.every((_, i) => right(row, i))],
  ["none right", (row) => !models.some((_, i) => right(row, i))],
  ["a truncated output", noted("truncated")],
  ["an output that ends in a loop", noted("ends in a loop")],
  ["an output without an answer", (row) => row.outputs.some((o) => o && o.extracted === null)],
);
filters.forEach(([name, test], i) => show.add(new Option(`${name} (${rows.filter(test).length})`, i)));

// One lower-case text a row, made in the background, since making all of them takes longer than searching them
const lower = new Array(rows.length);
function text(i) {
  if (lower[i] === undefined) {
    const { id, question, gold, outputs } = rows[i];
    const parts = outputs.flatMap((o) => (o ? [o.reasoning ?? "", o.answer] : []));
    lower[i] = [id, question, gold, ...parts].join("\n").toLowerCase();
  }
  return lower[i];
}
let prepared = 0;
function prepare() {
  const until = performance.now() + 20;
  while (prepared < rows.length && performance.now() < until) text(prepared++);
  if (prepared < rows.length) setTimeout(prepare);
}
setTimeout(prepare);

let found = [], drawn = 0, term = "";
function find() {
  term = search.value.trim().toLowerCase();
  const test = filters[show.value][1];
  found = [];
  for (let i = 0; i < rows.length; i++) if (test(rows[i]) && (!term || text(i).includes(term))) found.push(i);
  count.textContent = `${found.length} of ${rows.length}`;
  list.replaceChildren();
  drawn = 0;
  draw();
}
function draw() {
  const end = Math.min(drawn + CHUNK, found.length);
  for (; drawn < end; drawn++) list.append(rowElement(found[drawn]));
  more.hidden = drawn === found.length;
}

function element(tag, name, content) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (content !== undefined) made.textContent = content;
  return made;
}
function mark(output) {
  if (!output) return element("span", "mark", "–");
  if (output.verdict === "rated") return element("span", "mark", output.extracted);
  const ok = output.verdict === "correct";
  return element("span", ok ? "mark right" : "mark wrong", ok ? "✓" : "✗");
}
// Text with the search term marked, at most 200 times
function fill(target, content) {
  const low = content.toLowerCase();
  let from = 0, marks = 0;
  if (term && low.length === content.length) { // a letter may change its length with its case: then nothing is marked
    for (let at = low.indexOf(term); at >= 0 && marks < 200; at = low.indexOf(term, from), marks++) {
      target.append(content.slice(from, at), element("mark", "", content.slice(at, at + term.length)));
      from = at + term.length;
    }
  }
  target.append(content.slice(from));
}
function firstLine(i) {
  const line = element("span", "first"), at = term ? text(i).indexOf(term) : -1;
  const { question } = rows[i];
  if (at < 0 || question.toLowerCase().includes(term)) fill(line, question.slice(0, 300));
  else fill(line, "… " + text(i).slice(Math.max(0, at - 60), at + term.length + 200));
  return line;
}
function rowElement(i) {
  const row = rows[i], made = element("article", "row"), head = element("button");
  head.type = "button";
  head.setAttribute("aria-expanded", "false");
  head.append(element("span", "name", row.sample ? `${row.id} · ${row.sample}` : row.id), ...row.outputs.map(mark), firstLine(i));
  head.addEventListener("click", () => {
    const open = head.getAttribute("aria-expanded") === "true";
    head.setAttribute("aria-expanded", String(!open));
    if (open) made.lastChild.remove();
    else made.append(bodyElement(row));
  });
  made.append(head);
  return made;
}
function bodyElement(row) {
  const body = element("div", "body"), question = element("div", "text"), columns = element("div", "columns");
  fill(question, row.question);
  body.append(question, element("p", "muted", `gold answer ${row.gold}`), columns);
  row.outputs.forEach((output, i) => columns.append(outputElement(output, models[i])));
  return body;
}
function outputElement(output, name) {
  const made = element("section"), header = element("header");
  header.append(element("strong", "", name), mark(output));
  made.append(header);
  if (!output) {
    made.append(element("p", "muted", "not sampled"));
    return made;
  }
  const answer = output.extracted === null ? "no answer" : `answer ${output.extracted}`;
  const tokens = `${output.thinking.toLocaleString("en")} + ${output.tokens.toLocaleString("en")} tokens`;
  made.append(element("p", "label", [`${output.verdict} (${output.rule})`, answer, tokens, ...output.notes].join(" · ")));
  if (output.reasoning !== null) made.append(folded(`reasoning, ${output.reasoning.length.toLocaleString("en")} characters`, output.reasoning));
  const text = element("div", "text");
  fill(text, output.answer.slice(0, FOLD));
  made.append(text);
  if (output.said) made.append(folded("the judge's words", output.said));
  if (output.answer.length > FOLD) made.append(folded("the rest of the answer", output.answer.slice(FOLD)));
  return made;
}
function folded(title, content) {
  const made = element("details"), text = element("div", "text");
  made.append(element("summary", "", title), text);
  made.addEventListener("toggle", () => made.open && !text.firstChild && fill(text, content));
  made.open = Boolean(term) && content.toLowerCase().includes(term);
  return made;
}

search.addEventListener("input", find);
show.addEventListener("change", find);
more.addEventListener("click", draw);
find();
