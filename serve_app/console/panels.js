// What each part of the page shows. Everything from the manager is put in as text.

import { curve, icicle, lines } from "./charts.js";
import { bytes, clock, count, duration, rate, ratio, share, tier } from "./words.js";

const INSTANCES_MAX = 100, EVENTS_MAX = 200;
const FREQUENT = new Set(["lookup", "write_started", "write_finished"]);
const KINDS = ["lookup", "write_started", "write_finished", "write_aborted", "session_expired", "evicted", "demoted", "promoted",
  "removed", "trimmed", "refused", "fault", "incarnation"];
const at = (id) => document.getElementById(id);

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

export function state(kind, text) {
  document.querySelector(".dot").className = `dot ${kind}`;
  at("state-text").textContent = text;
}

export function summary(groups) {
  let used = 0, quota = 0, down = 0;
  for (const { statistics } of groups.values()) {
    if (statistics.unavailable) { down += 1; continue; }
    used += statistics.gauges.used_bytes;
    quota += statistics.gauges.quota_bytes;
  }
  const away = down ? `, ${down} not answering` : "";
  at("summary").textContent = `${groups.size} group${groups.size === 1 ? "" : "s"}${away} · ${bytes(used)} of ${bytes(quota)} used`;
}

// ------------------------------------------------------------------------------------------- the list of groups

const rows = new Map(); // name -> elements that are updated in place

export function groupList(groups, chosen, filter) {
  const list = at("group-list"), wanted = [...groups.keys()].filter((name) => name.includes(filter)).sort();
  for (const name of [...rows.keys()]) if (!groups.has(name)) rows.delete(name);
  const items = wanted.map((name) => {
    if (!rows.has(name)) rows.set(name, row(name));
    update(rows.get(name), groups.get(name), name === chosen);
    return rows.get(name).item;
  });
  if (items.length !== list.children.length || items.some((item, i) => item !== list.children[i])) list.replaceChildren(...items);
}

function row(name) {
  const item = element("li"), link = element("a"), first = element("div", "", "row"), second = element("div", "", "row");
  link.href = `#${encodeURIComponent(name)}`;
  const parts = { item, link, size: element("span"), hits: element("span"), work: element("span"), bar: bar() };
  first.append(element("b", name), parts.size);
  second.append(parts.hits, parts.work);
  link.append(first, parts.bar.box, second);
  item.append(link);
  return parts;
}

function update(parts, { statistics, capacity }, current) {
  parts.link.setAttribute("aria-current", current);
  if (statistics.unavailable) {
    parts.size.textContent = "not answering";
    parts.hits.textContent = statistics.unavailable;
    parts.work.textContent = "";
    return;
  }
  const { gauges, counters } = statistics;
  parts.size.textContent = `${bytes(gauges.used_bytes)} of ${bytes(gauges.quota_bytes)}`;
  parts.hits.textContent = `hits ${ratio(share(counters.hit_tokens, counters.lookup_tokens))} of tokens`;
  parts.work.textContent = `${count(gauges.writing_sessions)} writing`;
  fill(parts.bar, gauges, gauges.quota_bytes, capacity ? [capacity.low_bytes, capacity.high_bytes] : []);
}

function bar() {
  const box = element("div", "", "bar"), used = element("i"), reserved = element("i", "", "reserved");
  box.append(reserved, used);
  return { box, used, reserved };
}

function fill({ box, used, reserved }, row, quota, marks) {
  const part = (value) => `${quota ? Math.min(value / quota, 1) * 100 : 0}%`;
  used.style.width = part(row.used_bytes);
  reserved.style.width = part(row.used_bytes + row.reserved_bytes);
  for (const old of box.querySelectorAll("u")) old.remove();
  for (const mark of marks) {
    const tick = element("u");
    tick.style.left = part(mark);
    box.append(tick);
  }
  box.title = `used ${bytes(row.used_bytes)}, reserved ${bytes(row.reserved_bytes)}` +
    (marks.length ? `; reclaims above ${bytes(marks[1])}, down to ${bytes(marks[0])}` : "");
}

// ------------------------------------------------------------------------------------------- one group

export function clear(name) {
  at("group-name").textContent = name || "";
  for (const id of ["numbers", "events", "prefixes"]) at(id).replaceChildren();
  for (const id of ["tiers", "instances"]) at(id).tBodies[0].replaceChildren();
  for (const chart of document.querySelectorAll(".chart")) chart.replaceChildren();
  for (const id of ["group-sentence", "advice-sentence", "prefix-told", "instances-more"]) at(id).textContent = "";
}

export function figures(statistics, capacity) {
  const { gauges, counters } = statistics;
  const full = capacity.seconds_to_full === null ? "" : ` At the present rate it is full in ${duration(capacity.seconds_to_full)}.`;
  at("group-sentence").textContent = `${bytes(gauges.used_bytes)} of ${bytes(gauges.quota_bytes)} used, policy ${capacity.policy}, ` +
    `actor up for ${duration(statistics.now_s - statistics.started_s)}.${full}`;
  at("numbers").replaceChildren(...[
    ["hit tokens", ratio(share(counters.hit_tokens, counters.lookup_tokens))],
    ["hit blocks", ratio(share(counters.hit_blocks, counters.lookup_blocks))],
    ["look-ups", count(counters.lookups)],
    ["blocks", count(gauges.blocks)],
    ["sessions writing", count(gauges.writing_sessions)],
    ["evicted blocks", count(counters.evicted_blocks)],
    ["demoted", count(counters.demoted_blocks)],
    ["promoted", count(counters.promoted_blocks)],
    ["refused writes", count(counters.refused_writes)],
    ["pins", count(gauges.pins)],
    ["waiting to be erased", bytes(gauges.pending_delete_bytes)],
  ].map(number));
  tiers(statistics.tiers, capacity);
  instances(statistics.instances);
}

function number([label, value]) {
  const made = element("div");
  made.append(element("b", value), element("span", label));
  return made;
}

function tiers(counted, { tiers: reported, quota_bytes }) {
  at("tiers").tBodies[0].replaceChildren(...reported.map((one) => {
    const line = element("tr"), cell = element("td", "", "bar-column"), drawn = bar();
    fill(drawn, one, one.quota_bytes || quota_bytes, [one.low_bytes, one.high_bytes].filter((mark) => mark !== null));
    cell.append(drawn.box);
    const name = `${tier(one.storage_type)} (${one.storages.join(", ")})`;
    const quota = one.quota_bytes === null ? "" : ` of ${bytes(one.quota_bytes)}`;
    line.append(element("td", name), element("td", bytes(one.used_bytes) + quota), cell,
      element("td", `${count(counted[one.storage_type]?.hit_blocks ?? 0)} blocks`), element("td", duration(one.seconds_to_full)));
    return line;
  }));
}

function instances(known) {
  const all = Object.entries(known).sort(([, a], [, b]) => b.used_bytes - a.used_bytes);
  at("instances").tBodies[0].replaceChildren(...all.slice(0, INSTANCES_MAX).map(([name, one]) => {
    const line = element("tr");
    line.append(element("td", name), element("td", bytes(one.used_bytes)), element("td", count(one.blocks)),
      element("td", ratio(share(one.hit_blocks, one.lookup_blocks))), element("td", count(one.sessions ?? 0)));
    return line;
  }));
  at("instances-more").textContent = all.length > INSTANCES_MAX ? `and ${count(all.length - INSTANCES_MAX)} that hold less` : "";
}

export function history({ rows: columns, now_s, step_s }, capacity) {
  const times = columns.time_s, draw = (id, series, options) => lines(at(id), times, series, { now: now_s, ...options });
  const line = (name, className, divisor = 1) => ({
    values: columns[name].map((value) => (value === null ? null : value / divisor)), className,
  });
  draw("chart-hits", [line("hit_ratio_tokens", "l1"), line("hit_ratio_blocks", "l2")], { top: 1, format: (value) => `${Math.round(value * 100)} %` });
  const marks = capacity ? [capacity.low_bytes, capacity.high_bytes] : [];
  const top = Math.max(...columns.quota_bytes, 1);
  draw("chart-used", [line("used_bytes", "l1")], { top, marks, format: bytes });
  draw("chart-latency", [line("latency_p50_s", "l1"), line("latency_p99_s", "l2")], { format: duration });
  draw("chart-rates", [line("written_blocks", "l1", step_s), line("evicted_blocks", "l2", step_s)], { format: rate });
}

export function advice(told) {
  const { observed } = told;
  at("advice-sentence").textContent = observed.requests
    ? `Expected from ${count(observed.accessed_blocks)} blocks looked up in the last ${duration(observed.seconds)}; for a leaf-first LRU over the whole group.`
    : "";
  const points = told.rows.map((row) => ({ x: row.quota_bytes, y: row.hit_ratio }));
  curve(at("chart-advice"), points, { formatX: bytes, formatY: ratio, now: told.quota_bytes, ceiling: told.infinite_hit_ratio });
}

export function prefixes({ nodes, lookups }, group) {
  const order = (group?.capacity?.tiers ?? []).flatMap((one) => one.storages);
  const ofTier = (storage) => (group?.capacity?.tiers ?? []).findIndex((one) => one.storages.includes(storage));
  const kinds = (group?.capacity?.tiers ?? []).map((one) => one.storages[0]);
  const box = at("prefixes");
  const shown = (prefix) => ({ ...prefix, storage: kinds[ofTier(prefix.storage)] ?? order[0], children: prefix.children.map(shown), place: prefix.storage });
  icicle(box, nodes.map(shown), kinds, (prefix) => `${prefix.instance_id}: ${count(prefix.hits)} look-ups share these ${count(prefix.blocks)} blocks, ` +
    `${count(prefix.resident_blocks)} of them here (${bytes(prefix.bytes)}${prefix.place ? ` on ${prefix.place}` : ""}); last hit ${clock(prefix.last_hit_s)}`);
  if (!nodes.length) box.replaceChildren(element("span", lookups ? "nothing was found yet" : "no look-ups yet", "quiet"));
}
at("prefixes").addEventListener("told", (event) => { at("prefix-told").textContent = event.detail; });

// ------------------------------------------------------------------------------------------- events

for (const kind of KINDS) at("kind").append(Object.assign(element("option", kind.replace("_", " ")), { value: kind }));
let seen = [];
at("kind").addEventListener("change", () => showEvents());

export function events(fresh) {
  seen = fresh.length && fresh[0].id <= (seen.at(-1)?.id ?? 0) ? fresh : [...seen, ...fresh].slice(-5000);
  showEvents();
}

function showEvents() {
  const kind = at("kind").value;
  const wanted = seen.filter((one) => (kind ? one.kind === kind : !FREQUENT.has(one.kind))).slice(-EVENTS_MAX).reverse();
  at("events").replaceChildren(...(wanted.length ? wanted.map(eventLine) : [element("li", "nothing yet", "quiet")]));
}

function eventLine(one) {
  const line = element("li"), when = element("time", clock(one.time_s));
  const size = one.blocks ? `${count(one.blocks)} blocks, ${bytes(one.bytes)}` : "";
  const bad = one.kind === "fault" || one.kind === "refused" ? "bad-text" : "";
  line.append(when, element("b", one.kind.replace("_", " "), bad),
    element("span", [one.instance_id, size, one.storage && `on ${one.storage}`, one.reason].filter(Boolean).join(" · ")));
  return line;
}
