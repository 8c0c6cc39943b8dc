// The console: which calls are made how often, and where their answers go. Drawing is in panels.js and charts.js.

import { call, SignInNeeded, token } from "./api.js";
import * as panels from "./panels.js";

const at = (id) => document.getElementById(id);
const groups = new Map(); // name -> { statistics, capacity }
let chosen = null; // name of the group that is shown
let events = { after: 0, incarnation: 0 };

// ------------------------------------------------------------------------------------------- what is asked

async function overview() {
  const { statistics = [] } = await call("getStatistics", { without_instances: true });
  const names = new Set(statistics.map((one) => one.group));
  for (const name of groups.keys()) if (!names.has(name)) groups.delete(name);
  for (const one of statistics) groups.set(one.group, { ...groups.get(one.group), statistics: one });
  panels.summary(groups);
  panels.groupList(groups, chosen, at("filter").value);
  if (chosen && !groups.has(chosen)) location.hash = "";
  if (!chosen && groups.size === 1 && innerWidth > 800) location.hash = `#${encodeURIComponent([...groups.keys()][0])}`;
}

/** Marks change seldom: one group after another, so that a hundred of them are no burst. */
async function marks() {
  for (const [name, known] of groups) {
    if (!document.hidden && !known.statistics.unavailable) await capacityOf(name);
  }
}

async function capacityOf(name) {
  const { capacity } = await call("getCapacity", { instance_group: name });
  if (groups.has(name)) groups.set(name, { ...groups.get(name), capacity });
  return capacity;
}

const ofChosen = (name, work) => async () => {
  const asked = chosen;
  if (!asked) return;
  const answer = await call(name, { instance_group: asked });
  if (asked === chosen) work(answer, groups.get(asked));
};

async function figures() {
  if (!chosen) return;
  const asked = chosen;
  const capacity = await capacityOf(asked);
  const { statistics } = await call("getStatistics", { instance_group: asked });
  if (asked === chosen) panels.figures(statistics[0], capacity);
}

async function follow() {
  const asked = chosen;
  if (!asked) return;
  const { journal } = await call("getEvents", { instance_group: asked, after_id: events.after, limit: 200 });
  if (asked !== chosen) return;
  if (events.incarnation && journal.incarnation !== events.incarnation) events.after = 0;
  events = { after: Number(journal.next), incarnation: journal.incarnation };
  panels.events(journal.events);
}

const JOBS = [
  { work: overview, every_ms: 2000 },
  { work: follow, every_ms: 2000, chosen: true },
  { work: figures, every_ms: 3000, chosen: true },
  { work: ofChosen("getHistory", ({ history }, group) => panels.history(history, group?.capacity)), every_ms: 5000, chosen: true },
  { work: ofChosen("getHotPrefixes", ({ prefixes }, group) => panels.prefixes(prefixes, group)), every_ms: 10000, chosen: true },
  { work: ofChosen("getAdvice", ({ advice }) => panels.advice(advice)), every_ms: 15000, chosen: true },
  { work: marks, every_ms: 60000 },
];

// ------------------------------------------------------------------------------------------- when, and errors

async function run(job) {
  clearTimeout(job.timer);
  const began = performance.now();
  if (!document.hidden && !job.running && at("sign-in").hidden) {
    job.running = true;
    try {
      await job.work();
      if (job.work === overview) panels.state("good", `live · ${new Date().toLocaleTimeString([], { hour12: false })}`);
    } catch (error) {
      failed(error);
    }
    job.running = false;
  }
  const took_ms = performance.now() - began;
  job.timer = setTimeout(run, Math.max(job.every_ms, took_ms * 4), job); // a slow manager is asked less often
}

function failed(error) {
  if (error instanceof SignInNeeded) {
    at("sign-in").hidden = false;
    at("main").hidden = true;
    at("sign-in-error").textContent = error.message;
    panels.state("", "signed out");
    return;
  }
  panels.state("bad", error.name === "TimeoutError" ? "the manager does not answer" : error.message);
}

function choose() {
  const name = decodeURIComponent(location.hash.slice(1)) || null;
  if (name === chosen) return;
  chosen = name;
  events = { after: 0, incarnation: 0 };
  document.body.classList.toggle("chosen", Boolean(name));
  at("group").hidden = !name;
  panels.clear(name);
  panels.groupList(groups, chosen, at("filter").value);
  for (const job of JOBS) if (job.chosen) run(job);
}

at("filter").addEventListener("input", () => panels.groupList(groups, chosen, at("filter").value));
at("sign-in").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  token.set(at("token").value.trim());
  at("token").value = "";
  at("sign-in").hidden = true;
  begin();
});
at("sign-out").addEventListener("click", () => { token.set(""); location.reload(); });
addEventListener("hashchange", choose);
let resized = 0;
addEventListener("resize", () => {  // charts are drawn to their size
  clearTimeout(resized);
  resized = setTimeout(() => { for (const job of JOBS) if (job.chosen) run(job); }, 200);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) for (const job of JOBS) run(job); });

async function begin() {
  at("main").hidden = false;
  at("sign-out").hidden = !token.get();
  await run(JOBS[0]);
  choose();
  for (const job of JOBS.slice(1)) run(job);
}

begin();
