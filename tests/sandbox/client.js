// @ts-check
/**
 * A client for the service's two job routes, for browsers and Node 20. It is one file without
 * dependencies: copy it.
 *
 *     const key = crypto.randomUUID();
 *     const video = await makeVideo(job, { service, key, onStage: console.log });
 *
 * @typedef {{ image_url: string, prompt: string, seconds?: number, resolution?: string,
 *   model?: string | null }} PromptJob
 * @typedef {PromptJob & { text: string, voice_id: string,
 *   fit?: "shortest" | "video" | "speech" }} SpeechJob
 * @typedef {{ video_url: string, audio_url?: string, final_url?: string }} Video
 * @typedef {"speech" | "audio_upload" | "video" | "download" | "convert" | "mux" | "final_upload"} Stage
 * @typedef {{ stage: Stage, state: "started" | "progress" | "done", seconds: number,
 *   status?: string | null, percent?: number | null }} StageEvent
 * @typedef {{ audio_url?: string | null, video_url?: string | null,
 *   prediction_id?: string | null }} PaidFor
 * @typedef {{ loc: (string | number)[], msg: string }} FieldError
 * @typedef {"configuration" | "validation" | "provider" | "resource" | "internal" |
 *   "network"} Category
 * @typedef {{ detail: string, category: Category, provider?: string | null,
 *   request_id?: string | null, retryable?: boolean, status?: number, partial?: PaidFor | null,
 *   errors?: FieldError[] | null }} Problem
 *
 * @typedef {object} Options
 * @property {string} service
 *   The service's address, such as https://pets.example.com.
 * @property {string} [key]
 *   The idempotency key, one per job. With a key, the job survives a lost connection and is retried
 *   until it has a result, and only one video is paid for. Without a key, nothing is retried, since
 *   each attempt is paid for, and a lost connection cancels the job.
 * @property {AbortSignal} [signal]
 *   Stops waiting and throws the signal's reason; without a key, it also cancels the job.
 * @property {(stage: StageEvent) => void} [onStage]
 *   Called with the progress. Each attempt of a job with a key starts again with the stages so far.
 * @property {(error: VideoError, seconds: number) => void} [onRetry]
 *   Called before each retry, with its cause and the seconds until then.
 * @property {number} [patience]
 *   Seconds to wait between attempts, in total, before the last error is thrown.
 * @property {number} [silence]
 *   Seconds without a byte, after which the event stream of a job with a key counts as broken.
 */

const DEFAULT_PATIENCE_S = 600;
const DEFAULT_SILENCE_S = 45; // the service sends at least a comment every 15 s
const MAX_RETRY_DELAY_S = 15;

/**
 * Every way in which a job can fail. `category` comes from the service; it is "network" if the
 * response did not come from the service, or did not arrive.
 */
export class VideoError extends Error {
  /** @param {Problem} problem  @param {ErrorOptions} [options] */
  constructor(problem, options) {
    super(problem.detail, options);
    this.name = "VideoError";
    this.category = problem.category;
    this.retryable = problem.retryable === true; // the same job and key may succeed later
    this.errors = problem.errors ?? []; // the invalid fields: each `loc` ends with a field's name
    this.partial = problem.partial ?? {}; // what is paid for and can still be used
    this.provider = problem.provider ?? null;
    this.requestId = problem.request_id ?? null;
    this.status = problem.status ?? null;
  }
}

/**
 * Make a video: with speech if the job has a `text`, or else a silent one, which only has a
 * `video_url`.
 *
 * @overload  @param {SpeechJob} job  @param {Options} options  @returns {Promise<Required<Video>>}
 * @overload  @param {PromptJob} job  @param {Options} options  @returns {Promise<Video>}
 * @param {PromptJob | SpeechJob} job
 * @param {Options} options
 * @returns {Promise<Video>}
 */
export async function makeVideo(job, options) {
  const { key, signal, onRetry, patience = DEFAULT_PATIENCE_S } = options;
  let paid = /** @type {PaidFor} */ ({});
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
      const delay = maxDelay * jitter;
      if (key == null || !error.retryable || waited + delay > patience) throw error;

      onRetry?.(error, delay);
      waited += delay;
      await sleep(delay, signal);
    }
  }
}

/**
 * Send the job once.
 *
 * @param {PromptJob | SpeechJob} job  @param {Options} options  @returns {Promise<Video>}
 */
async function sendJob(job, options) {
  const request = requestFor(job, options);
  try {
    const response = await fetch(request);
    // An early error is plain JSON, and so is everything if a proxy has dropped the Accept header.
    const type = response.headers.get("Content-Type");
    const isStream = response.body && type?.startsWith("text/event-stream");
    return await (isStream ? readStream(response, options) : readJson(response));
  } catch (error) {
    if (error instanceof VideoError) throw error;
    const detail = "The connection failed before the video was ready.";
    throw new VideoError({ category: "network", retryable: true, detail }, { cause: error });
  }
}

/**
 * The request for a job.
 *
 * @param {PromptJob | SpeechJob} job  @param {Options} options
 */
function requestFor(job, { service, key, signal }) {
  const hasSpeech = "text" in job && job.text != null;
  const route = hasSpeech ? "jobs_prompt_tts" : "jobs_prompt_only";
  const canStream = "body" in Response.prototype; // not in React Native
  const headers = new Headers({ "Content-Type": "application/json" });
  headers.set("Accept", canStream ? "text/event-stream" : "application/json");
  try {
    if (key != null) headers.set("Idempotency-Key", key);
    const url = `${service.replace(/\/+$/, "")}/${route}`;
    const body = JSON.stringify(job);
    return new Request(url, { method: "POST", headers, body, signal: signal ?? null });
  } catch (error) {
    // The address or the key is invalid: a retry would not help.
    const detail = `The job cannot be sent: ${error}`;
    throw new VideoError({ category: "validation", detail }, { cause: error });
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
  throw new VideoError({ category: "network", retryable: true, detail, request_id });
}

/**
 * Read a response that is JSON, or an error page.
 *
 * @param {Response} response  @returns {Promise<Video>}
 */
async function readJson(response) {
  const { ok, status, headers } = response;
  const body = await response.json().catch(() => null); // a proxy's error page is not JSON
  if (ok && body?.video_url) return body;
  if (body?.category) throw new VideoError({ ...body, status });

  const detail = `A response with status ${status} came, but not from the service.`;
  const retryable = ok || status >= 500 || status === 408 || status === 429;
  const request_id = headers.get("X-Request-ID");
  throw new VideoError({ category: "network", retryable, detail, status, request_id });
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
