// The page's only program: it asks for the state once a second, and shows it. Nothing is ever taken for HTML.
"use strict";

const PERIOD = 1000;
const FRESH = 5; // seconds after its last use for which a segment stands out
const numbers = new Intl.NumberFormat("en");
const byId = (id) => document.getElementById(id);

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function size(bytes) {
  for (const [unit, least] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (bytes >= least) return `${(bytes / least).toFixed(1)} ${unit}`;
  }
  return `${bytes} B`;
}

function duration(seconds) {
  if (seconds === null) return "";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 120) return `${seconds.toFixed(1)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

const count = (number, what) => `${numbers.format(number)} ${what}${number === 1 ? "" : "s"}`;
const percent = (part) => `${Math.floor(1000 * part) / 10} %`; // down: all but one is not all

function bar(start, length, all, fresh) {
  if (length === 0) return element("div", {className: "bar"});
  const mark = element("i", {className: fresh ? "fresh" : ""});
  mark.style.left = `${100 * start / all}%`;
  mark.style.width = `${100 * length / all}%`;
  return element("div", {className: "bar"}, mark);
}

function tiles(stats) {
  const budget = stats.max_bytes === null ? "no budget" : `of ${size(stats.max_bytes)}`;
  const shown = [
    ["Tokens reused", numbers.format(stats.tokens_reused), `${percent(stats.hit_rate)} of all prompts' tokens`],
    ["Tokens computed", numbers.format(stats.tokens_computed), "of prompts"],
    ["Time saved", duration(stats.seconds_saved), "of computation, as measured here"],
    ["Prompts", numbers.format(stats.sessions), `${numbers.format(stats.hits)} reused something`],
    ["On the disk", size(stats.bytes), `${budget}, ${count(stats.segments, "segment")}`],
    ["Evicted", numbers.format(stats.evictions), `${size(stats.bytes_evicted)} in all`],
  ];
  return shown.map(([name, value, more]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value, element("small", {}, more))));
}

const RUNNING = ["waiting", "computing", "answering"];

function row(request) {
  const cell = (text, className = "") => element("td", {className}, text);
  const state = request.stored ? request.state : `${request.state}, not stored`;
  const className = RUNNING.includes(request.state) ? "running" : request.state === "failed" ? "bad" : "";
  const share = element("td", {className: "share"});
  if (request.cached !== null) {
    share.append(`${numbers.format(request.cached)} (${percent(request.cached / request.prompt)})`,
      bar(0, request.cached, request.prompt, false));
  }
  return element("tr", {},
    cell(new Date(1000 * request.began).toLocaleTimeString("en-GB")),
    cell(numbers.format(request.prompt), "number"),
    share,
    cell(duration(request.first), "number"),
    cell(duration(request.total), "number"),
    cell(numbers.format(request.generated), "number"),
    cell(state, className),
    cell(String(request.worker), "number"));
}

function leaf(segment, longest, now) {
  const age = Math.max(0, now - segment.used);
  const facts = [
    `positions ${numbers.format(segment.start)} to ${numbers.format(segment.stop)}`,
    size(segment.bytes),
    count(segment.hits, "hit"),
    `${numbers.format(segment.reused)} tokens reused`,
    `used ${age < 120 ? `${Math.round(age)} s` : duration(age)} ago`,
  ];
  const line = element("p", {title: segment.name}, facts.join(" · "));
  if (segment.pinned) line.append(" · pinned");
  if (segment.writing) line.append(" · ", element("span", {className: "running"}, "being written"));
  if (segment.broken) line.append(" · ", element("span", {className: "bad"}, segment.broken));
  const words = (segment.text ?? "").replace(/\s+/g, " ").trim();
  const text = words ? element("p", {className: "text"}, words) : null;
  return element("li", {}, line, text, bar(segment.start, segment.stop - segment.start, longest, age < FRESH));
}

function tree(segments, now) {
  const longest = Math.max(1, ...segments.map((segment) => segment.stop));
  const below = new Map();
  const known = new Set(segments.map((segment) => segment.name));
  for (const segment of segments) {
    const parent = known.has(segment.parent) ? segment.parent : null;
    below.set(parent, [...(below.get(parent) ?? []), segment]);
  }
  const branch = (some) => element("ul", {}, ...some.sort((a, b) => b.used - a.used).map((segment) => {
    const made = leaf(segment, longest, now);
    if (below.has(segment.name)) made.append(branch(below.get(segment.name)));
    return made;
  }));
  const roots = Map.groupBy(below.get(null) ?? [], (segment) => segment.model);
  return [...roots].flatMap(([model, some]) => [element("h3", {}, model || "a model without a name"), branch(some)]);
}

function show(status) {
  byId("model").textContent = `${status.model}:`;
  byId("tiles").replaceChildren(...tiles(status.stats));
  byId("requests").replaceChildren(...status.requests.map(row));
  byId("none").hidden = status.requests.length > 0;
  byId("tree").replaceChildren(...tree(status.segments, status.now));
  byId("hidden").hidden = status.hidden === 0;
  byId("hidden").textContent = `And ${count(status.hidden, "segment")} more, used longer ago.`;
}

function tell(text, live) {
  const state = byId("state");
  if (state.textContent !== text) state.textContent = text;
  state.classList.toggle("live", live);
}

async function follow() {
  if (!document.hidden) {
    try {
      const answer = await fetch("status", {cache: "no-store"});
      if (!answer.ok) throw new Error(answer.statusText);
      show(await answer.json());
      tell("live", true);
    } catch {
      tell("the server does not answer", false);
    }
  }
  setTimeout(follow, PERIOD);
}

follow();
