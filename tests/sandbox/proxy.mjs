// @ts-check
/**
 * A proxy that lets only signed-in users make videos, each of them a few an hour. Node 20, without dependencies:
 * copy it, and run it where only it knows the SERVICE_TOKEN. With it, client.js needs
 * `service: "https://the-proxy"` and `headers: () => ({ Authorization: "Bearer " + accessToken })`.
 *
 * SERVICE_URL           the service, such as https://talking-pet.onrender.com
 * SERVICE_TOKEN         one of the tokens in the service's own SERVICE_TOKEN
 * SUPABASE_URL          the project in which the users sign in
 * SUPABASE_ANON_KEY     its publishable key (not the service role)
 * ALLOWED_ORIGIN        the page's origin, such as https://app.example.com
 * JOBS_PER_HOUR, PORT   5 and 8080, if unset
 */
import http from "node:http";
import https from "node:https";

const { SERVICE_URL = "", SERVICE_TOKEN = "", SUPABASE_URL = "", SUPABASE_ANON_KEY = "" } = process.env;
const { ALLOWED_ORIGIN = "", JOBS_PER_HOUR = "5", PORT = "8080" } = process.env;
const ROUTES = ["/jobs_prompt_only", "/jobs_prompt_tts"];
const REQUEST_HEADERS = ["accept", "content-type", "content-length", "x-request-id"];
const RESPONSE_HEADERS = [
  "content-type",
  "retry-after",
  "x-request-id",
  "server-timing",
  "idempotency-replayed",
];
const HOUR_MS = 3_600_000;
const SIGN_IN_TIMEOUT_MS = 10_000;
const MAX_BODY_BYTES = 65_536; // the service's limit

/**
 * The jobs of the last hour: user id -> key -> when it came first. It is lost with the process, and each
 * process counts for itself.
 *
 * @type {Map<string, Map<string, number>>}
 */
const jobs = new Map();

/** A refusal in the service's own form, so that client.js tells it like one of the service. */
class Refusal extends Error {
  /**
   * @param {number} status  @param {string} code  @param {string} detail
   * @param {Record<string, string>} [headers]
   */
  constructor(status, code, detail, headers = {}) {
    super(detail);
    this.status = status;
    this.headers = headers;
    const category = status < 500 ? "validation" : "internal";
    this.body = { detail, category, code, retryable: status === 429 || status >= 500 };
  }
}

/**
 * The id of the user whose session it is. Supabase is asked each time: a session may have ended.
 *
 * @param {http.IncomingMessage} request  @returns {Promise<string>}
 */
async function userId(request) {
  const authorization = request.headers.authorization ?? "";
  const refusal = new Refusal(401, "unauthorized", "Sign in first.", { "WWW-Authenticate": "Bearer" });
  if (!/^Bearer \S+$/.test(authorization)) throw refusal;

  const headers = { apikey: SUPABASE_ANON_KEY, Authorization: authorization };
  const signal = AbortSignal.timeout(SIGN_IN_TIMEOUT_MS);
  const response = await fetch(`${SUPABASE_URL}/auth/v1/user`, { headers, signal });
  if (response.status === 401 || response.status === 403) throw refusal;
  if (!response.ok) throw new Error(`Supabase answered ${response.status}`);
  const { id } = await response.json();
  return id;
}

/**
 * Count a job of a user. The same key again is the same job, and free.
 *
 * @param {string} user  @param {string} key
 */
function countJob(user, key) {
  const now = Date.now();
  for (const [name, keys] of jobs) {
    for (const [one, since] of keys) if (now - since > HOUR_MS) keys.delete(one);
    if (keys.size === 0) jobs.delete(name);
  }
  const mine = jobs.get(user) ?? new Map();
  if (mine.has(key)) return;

  if (mine.size >= Number(JOBS_PER_HOUR)) {
    const [oldest = now] = mine.values();
    const seconds = Math.ceil((oldest + HOUR_MS - now) / 1000);
    const detail = `You can make ${JOBS_PER_HOUR} videos an hour; try again later.`;
    throw new Refusal(429, "spending_limit", detail, { "Retry-After": String(seconds) });
  }
  jobs.set(user, mine.set(key, now));
}

/**
 * Pass a job to the service, and its response to the page as it comes.
 *
 * @param {http.IncomingMessage} request  @param {http.ServerResponse} response  @param {string} key
 */
function forward(request, response, key) {
  const headers = pick(request.headers, REQUEST_HEADERS);
  headers["authorization"] = `Bearer ${SERVICE_TOKEN}`;
  headers["idempotency-key"] = key;
  const url = new URL(request.url ?? "", SERVICE_URL);
  const { request: send } = url.protocol === "https:" ? https : http;
  // Not fetch: it gives up after five minutes without a byte.
  const upstream = send(url, { method: "POST", headers }, (answer) => {
    response.writeHead(answer.statusCode ?? 502, pick(answer.headers, RESPONSE_HEADERS));
    response.flushHeaders();
    answer.pipe(response);
    answer.on("error", () => response.destroy()); // cut like the service's: client.js sends it again
  });
  upstream.on("error", (error) => refuse(response, error));
  response.on("close", () => upstream.destroy()); // the page has gone
  request.pipe(upstream);
}

/**
 * The headers with these names.
 *
 * @param {http.IncomingHttpHeaders} headers  @param {string[]} names
 */
function pick(headers, names) {
  const picked = /** @type {http.OutgoingHttpHeaders} */ ({});
  for (const name of names) if (headers[name] !== undefined) picked[name] = headers[name];
  return picked;
}

/**
 * Answer with an error; one that is no Refusal goes to the log, and not to the page.
 *
 * @param {http.ServerResponse} response  @param {unknown} error
 */
function refuse(response, error) {
  if (response.headersSent) {
    response.destroy();
    return;
  }
  if (!(error instanceof Refusal)) console.error(error);
  const unknown = new Refusal(502, "proxy_failed", "The service cannot be reached; try again.");
  const { status, headers, body } = error instanceof Refusal ? error : unknown;
  response.writeHead(status, { "Content-Type": "application/json", ...headers });
  response.end(JSON.stringify(body));
}

/**
 * Answer one request.
 *
 * @param {http.IncomingMessage} request  @param {http.ServerResponse} response
 */
async function handle(request, response) {
  response.setHeader("Access-Control-Allow-Origin", ALLOWED_ORIGIN);
  response.setHeader("Access-Control-Expose-Headers", RESPONSE_HEADERS.join(", "));
  response.setHeader("Cache-Control", "no-store");
  if (request.method === "OPTIONS") {
    const names = [...REQUEST_HEADERS, "authorization", "idempotency-key"];
    response.setHeader("Access-Control-Allow-Headers", names.join(", "));
    response.writeHead(204).end();
    return;
  }
  try {
    if (request.method !== "POST" || !ROUTES.includes(request.url ?? "")) {
      throw new Refusal(404, "route_not_found", "There is no such route.");
    }
    if (Number(request.headers["content-length"] ?? 0) > MAX_BODY_BYTES) {
      throw new Refusal(400, "body_too_large", "The body must have at most 64 KiB.");
    }
    const user = await userId(request);
    const key = request.headers["idempotency-key"];
    if (typeof key !== "string" || key === "") {
      throw new Refusal(400, "missing_key", "The header Idempotency-Key is required.");
    }
    countJob(user, key);
    forward(request, response, `${user}:${key}`); // so that nobody can ask for the job of another user
  } catch (error) {
    refuse(response, error);
  }
}

const server = http.createServer(handle);
server.requestTimeout = 30_000; // for the request; a response may take as long as its job
server.listen(Number(PORT), () => {
  const { port } = /** @type {import("node:net").AddressInfo} */ (server.address());
  console.log(`listening on port ${port}`);
});
