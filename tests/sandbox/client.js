// @ts-check
/**
 * A client for the service's two job routes, for browsers and Node 20: one file without dependencies.
 * Copy it, and client.d.ts beside it for TypeScript and for an editor's hints. It is an ES module: a
 * page loads it with <script type="module">, Node wants `"type": "module"` in package.json, or the
 * name client.mjs (and client.d.mts).
 *
 *     const key = crypto.randomUUID();
 *     const video = await makeVideo(job, { service, key, onStage: console.log });
 *
 * client.d.ts describes the job, the options and the errors.
 *
 * @typedef {import("./client.js").PromptJob} PromptJob
 * @typedef {import("./client.js").SpeechJob} SpeechJob
 * @typedef {import("./client.js").Video} Video
 * @typedef {import("./client.js").SpeechVideo} SpeechVideo
 * @typedef {import("./client.js").StageEvent} StageEvent
 * @typedef {import("./client.js").Problem} Problem
 * @typedef {import("./client.js").Options} Options
 */

const DEFAULT_PATIENCE_S = 600;
const DEFAULT_SILENCE_S = 45; // the service sends at least a comment every 15 s
const MAX_RETRY_DELAY_S = 15;
const MAX_DETAIL_CHARS = 300; // of what another server says
const MAX_PAGE_CHARS = 10_000; // of its error page

/** Every way in which a job can fail. */
export class VideoError extends Error {
  /** @param {Problem} problem  @param {ErrorOptions} [options] */
  constructor(problem, options) {
    super(problem.detail, options);
    this.name = "VideoError";
    this.detail = problem.detail;
    this.category = problem.category;
    this.code = problem.code ?? null;
    this.status = problem.status ?? null;
    // Who is not signed in has not used up the key: after the sign-in the same job goes on.
    this.retryable = problem.retryable === true || this.status === 401;
    this.errors = problem.errors ?? []; // the invalid fields: each `loc` ends with a field's name
    this.partial = problem.partial ?? {}; // what is paid for and can still be used
    this.provider = problem.provider ?? null;
    this.requestId = problem.request_id ?? null;
  }
}

/**
 * Make a video: with speech if the job has a `text`, or else a silent one, which only has a
 * `video_url`.
 *
 * @overload  @param {SpeechJob} job  @param {Options} options  @returns {Promise<SpeechVideo>}
 * @overload  @param {PromptJob} job  @param {Options} options  @returns {Promise<Video>}
 * @param {PromptJob | SpeechJob} job
 * @param {Options} options
 * @returns {Promise<Video>}
 */
export async function makeVideo(job, options) {
  const { key, signal, onRetry, patience = DEFAULT_PATIENCE_S } = options;
  let paid = /** @type {import("./client.js").PaidFor} */ ({});
  let waited = 0;
  for (let maxDelay = 1; ; maxDelay = Math.min(2 * maxDelay, MAX_RETRY_DELAY_S)) {
    try {
      return await sendJob(job, options);
    } catch (error) {
      signal?.throwIfAborted();
      if (!(error instanceof VideoError)) throw error;

      paid = { ...paid, ...error.partial }; // a later attempt may know less than an earlier one
      error.partial = paid;
      const jitter = 0.75 + 0.25 * Math.random(); // so that not all pages retry at the same moment
      const delay = Math.max(maxDelay * jitter, retryAfter.get(error) ?? 0);
      if (key == null || !canRetry(error) || waited + delay > patience) throw error;

      onRetry?.(error, delay);
      waited += delay;
      await sleep(delay, signal);
    }
  }
}

/**
 * The seconds that a response's Retry-After asks for, by its error.
 *
 * @type {WeakMap<VideoError, number>}
 */
const retryAfter = new WeakMap();

/**
 * Whether another attempt may help without the user: signing in needs the user.
 *
 * @param {VideoError} error
 */
function canRetry({ retryable, status, code }) {
  return retryable && status !== 401 && code !== "headers_failed";
}

/**
 * Send the job once.
 *
 * @param {PromptJob | SpeechJob} job  @param {Options} options  @returns {Promise<Video>}
 */
async function sendJob(job, options) {
  const request = requestFor(job, options, await furtherHeaders(options));
  try {
    const response = await fetch(request);
    // An early error is plain JSON, and so is everything if a proxy has dropped the Accept header.
    const type = response.headers.get("Content-Type");
    const isStream = response.ok && response.body && type?.startsWith("text/event-stream");
    return await (isStream ? readStream(response, options) : readJson(response));
  } catch (error) {
    if (error instanceof VideoError) throw error;
    const detail = "The connection failed before the video was ready.";
    throw networkError({ code: "connection_failed", retryable: true, detail }, error);
  }
}

/**
 * The caller's own headers, asked for anew at each attempt, since a sign-in may expire meanwhile.
 *
 * @param {Options} options
 */
async function furtherHeaders({ headers }) {
  try {
    return typeof headers === "function" ? await headers() : headers;
  } catch (error) {
    const detail = `The headers of the job are not known: ${error}`;
    throw networkError({ code: "headers_failed", retryable: true, detail }, error);
  }
}

/**
 * The request for a job.
 *
 * @param {PromptJob | SpeechJob} job  @param {Options} options  @param {HeadersInit} [further]
 */
function requestFor(job, { service, key, signal, credentials = "same-origin" }, further) {
  const hasSpeech = "text" in job && job.text != null;
  const route = hasSpeech ? "jobs_prompt_tts" : "jobs_prompt_only";
  const canStream = "body" in Response.prototype; // not in React Native
  try {
    const headers = new Headers(further);
    headers.set("Content-Type", "application/json");
    headers.set("Accept", canStream ? "text/event-stream" : "application/json");
    if (key != null) headers.set("Idempotency-Key", key);
    const url = `${service.replace(/\/+$/, "")}/${route}`;
    const body = JSON.stringify(job);
    return new Request(url, { method: "POST", headers, body, credentials, signal: signal ?? null });
  } catch (error) {
    // The address, the key or a header is invalid: a retry would not help.
    const detail = `The job cannot be sent: ${error}`;
    throw new VideoError({ category: "validation", code: "not_sent", detail }, { cause: error });
  }
}

/**
 * Read a response that is an event stream.
 *
 * @param {Response} response  @param {Options} options  @returns {Promise<Video>}
 */
async function readStream(response, { key, onStage, silence = DEFAULT_SILENCE_S }) {
  const body = /** @type {ReadableStream<Uint8Array>} */ (response.body);
  // A proxy may hold the stream back. Only a job with a key can be asked for again.
  const maxSilence = key == null ? 0 : silence;
  for await (const { event, data } of serverSentEvents(body, maxSilence)) {
    if (event === "stage") notify(onStage, JSON.parse(data));
    if (event === "result") return JSON.parse(data);
    if (event === "error") throw new VideoError(JSON.parse(data)); // it has a status of its own
  }
  const detail = "The response ended before the video was ready.";
  const request_id = response.headers.get("X-Request-ID");
  throw networkError({ code: "response_ended", retryable: true, detail, request_id });
}

/**
 * Read a response that is JSON, or an error page of another server, such as a proxy.
 *
 * @param {Response} response  @returns {Promise<Video>}
 */
async function readJson(response) {
  const { ok, status, headers } = response;
  const text = await response.text();
  const body = parsed(text);
  if (ok && body?.video_url) return body;

  const error = body?.category
    ? new VideoError({ ...body, status })
    : networkError({
        code: typeof body?.code === "string" ? body.code : "other_server",
        retryable: ok || status >= 500 || status === 408 || status === 429,
        detail: detailOf(body, text) || `A response with status ${status}, not from the service.`,
        status,
        request_id: headers.get("X-Request-ID"),
      });
  const seconds = Number(headers.get("Retry-After")); // or a date: then the usual delay has to do
  if (seconds > 0) retryAfter.set(error, seconds);
  throw error;
}

/**
 * The value of a JSON text, or null if it is none.
 *
 * @param {string} text
 */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/**
 * What another server says about its error: a usual field of its JSON, or the words of its page.
 *
 * @param {any} body  @param {string} text
 */
function detailOf(body, text) {
  const fields = [body?.detail, body?.message, body?.msg, body?.error?.message, body?.error];
  const field = fields.find((value) => value && typeof value === "string");
  if (body != null) return field?.slice(0, MAX_DETAIL_CHARS);

  const page = text.slice(0, MAX_PAGE_CHARS).replace(/<(script|style|title)\b.*?<\/\1>|<[^>]*>/gis, " ");
  return page.replace(/\s+/g, " ").trim().slice(0, MAX_DETAIL_CHARS);
}

/**
 * An error that is not the service's.
 *
 * @param {Omit<Problem, "category">} problem  @param {unknown} [cause]
 */
function networkError(problem, cause) {
  return new VideoError({ category: "network", ...problem }, cause ? { cause } : {});
}

/**
 * Call `onStage`. If it throws, the video must not be lost.
 *
 * @param {Options["onStage"]} onStage  @param {StageEvent} stage
 */
function notify(onStage, stage) {
  try {
    onStage?.(stage);
  } catch (error) {
    console.error(error);
  }
}

/**
 * Wait, or throw the signal's reason as soon as it is aborted.
 *
 * @param {number} seconds  @param {AbortSignal} [signal]  @returns {Promise<void>}
 */
function sleep(seconds, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted(); // onRetry may have aborted it
    const timer = setTimeout(wake, 1000 * seconds);
    signal?.addEventListener("abort", stop, { once: true });

    function wake() {
      signal?.removeEventListener("abort", stop);
      resolve();
    }

    function stop() {
      clearTimeout(timer);
      reject(signal?.reason);
    }
  });
}

/**
 * Parse a body of server-sent events as the standard says. (EventSource would, but it cannot POST.)
 * A chunk may end anywhere: in a line, in a CRLF, or in a character of several bytes. After
 * `silence` seconds without a byte (0: never) the body counts as ended.
 *
 * @param {ReadableStream<Uint8Array>} body  @param {number} [silence]
 * @returns {AsyncGenerator<{ event: string, data: string }, void>}
 */
export async function* serverSentEvents(body, silence = 0) {
  const reader = body.getReader(); // not every Safari has `for await (const chunk of body)`
  const close = () => void reader.cancel().catch(() => {});
  const decoder = new TextDecoder(); // with { stream: true } it keeps half a character for later
  let timer = /** @type {ReturnType<typeof setTimeout> | undefined} */ (undefined);
  let unfinishedLine = "";
  let endedWithCR = false;
  let event = "";
  let data = /** @type {string[]} */ ([]);
  try {
    for (;;) {
      if (silence) timer = setTimeout(close, 1000 * silence);
      const { value, done } = await reader.read();
      clearTimeout(timer);
      if (done) return; // the standard drops an event without its blank line

      const chunk = decoder.decode(value, { stream: true });
      const text = endedWithCR ? chunk.replace(/^\n/, "") : chunk; // the second half of a CRLF
      if (chunk) endedWithCR = chunk.endsWith("\r");

      const lines = (unfinishedLine + text).split(/\r\n|\n|\r/);
      unfinishedLine = lines.pop() ?? "";
      for (const line of lines) {
        const [, name, content = ""] = line.match(/^([^:]*)(?:: ?(.*))?$/s) ?? [];
        if (name === "event") event = content;
        else if (name === "data") data.push(content);
        else if (line === "") {
          if (data.length) yield { event: event || "message", data: data.join("\n") };
          event = "";
          data = [];
        }
      }
    }
  } finally {
    clearTimeout(timer);
    close(); // also when the caller stops reading: the connection closes
  }
}
