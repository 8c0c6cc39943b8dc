// Numbers as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
const TIERS = { ST_TAIRMEMPOOL: "shared memory", ST_NFS: "files", ST_3FS: "3FS", ST_VCNS_3FS: "VCNS 3FS", ST_MOONCAKE: "Mooncake" };

export function bytes(value) {
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) { value /= 1024; unit += 1; }
  return `${value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${UNITS[unit]}`;
}

export const count = (value) => Math.round(value).toLocaleString("en");
export const rate = (value) => (value >= 100 || value === 0 ? count(value) : value.toFixed(1));
export const ratio = (value) => (value === null || value === undefined ? "–" : `${(value * 100).toFixed(1)} %`);
export const share = (hits, asked) => (asked ? hits / asked : null);
export const tier = (name) => TIERS[name] || name;
export const clock = (time_s) => new Date(time_s * 1000).toLocaleTimeString([], { hour12: false });

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${(seconds * 1000).toPrecision(3)} ms`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}
