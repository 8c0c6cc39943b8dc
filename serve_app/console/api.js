// Calls of the manager's HTTP API, relative to where this page is served.

export class SignInNeeded extends Error {}

const KEY = "kvcm-token";
export const token = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

const TIMEOUT_MS = 8000;

/** The response of one call. Throws SignInNeeded, or an Error that says what is wrong. */
export async function call(name, body = {}) {
  const headers = { "content-type": "application/json" };
  if (token.get()) headers.authorization = `Bearer ${token.get()}`;
  const response = await fetch(`api/${name}`, {
    credentials: "omit",  // else the browser answers a 401 with a dialog of its own
    method: "POST", headers, body: JSON.stringify({ trace_id: "console", ...body }), signal: AbortSignal.timeout(TIMEOUT_MS),
  });
  if (response.status === 401) throw new SignInNeeded(token.get() ? "That token is not known, or has expired." : "");
  const answer = await response.json().catch(() => ({}));
  const status = answer.header?.status;
  if (!status || status.code !== "OK") throw new Error(status?.message || `${name}: HTTP ${response.status}`);
  return answer;
}
